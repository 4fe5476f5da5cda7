# shellcheck shell=bash
# Sourced by ssh.sh and slurm.sh: what both say and do.

say() { printf 'tokenweave: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 2
}

whole() { # NAME VALUE
    [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1 must be a whole number such as 8, not '$2'; see --help"
}

quoted() { # WORDS...: as one line that any POSIX shell reads back
    local word words=()
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        words+=("$word")
    done
    printf '%s' "${words[*]}"
}

DEFAULT_PROGRAM=(-m -- tokenweave.cli generate --overlap weave '12+34=')

# Into `program`, with a -- before it, after which torchrun takes no option of it (--n) for an abbreviation of its own.
set_apart() { # PROGRAM...
    local module=()
    if [[ $1 == -m ]]; then module=(-m) && shift; fi
    program=(${module[@]+"${module[@]}"})
    if [[ ${1--} != -* ]]; then program+=(--); fi # else torchrun's own options come first, or the -- is there
    program+=("$@")
}
