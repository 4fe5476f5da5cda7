# shellcheck shell=bash
# Sourced by generate.sh and test.sh. `setup` makes a virtual environment with tokenweave in it, or keeps a current one.
#
# TOKENWEAVE_VENV    where; default: .venv in the repository. One that you made yourself is used, and never emptied.
# TOKENWEAVE_PYTHON  the Python (>= 3.11) to make it with; default: the first one found.
#
# pip's own settings apply (pip.conf, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...). On a CPU-only Linux machine let one of
# them point to CPU builds of torch: pip's default build brings gigabytes of CUDA libraries.

TOKENWEAVE_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TOKENWEAVE_VENV=${TOKENWEAVE_VENV:-$TOKENWEAVE_ROOT/.venv}
[[ $TOKENWEAVE_VENV == /* ]] || TOKENWEAVE_VENV=$PWD/$TOKENWEAVE_VENV
VENV_PYTHON=$TOKENWEAVE_VENV/bin/python
# In it: `ours` (we made the environment), `lock`, `setup.log`, and `stamp` (what a finished set-up was made from).
STATE=$TOKENWEAVE_VENV/.tokenweave

say() { printf 'tokenweave: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

gpu_count() {
    { nvidia-smi -L 2>/dev/null </dev/null || true; } | grep -c '^GPU ' || true # grep counts 0 without nvidia-smi too
}

find_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
    if [[ ${TOKENWEAVE_PYTHON-} ]]; then candidates=("$TOKENWEAVE_PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' &>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python${TOKENWEAVE_PYTHON:+ ($TOKENWEAVE_PYTHON)}: 3.11 or newer with venv and ensurepip is needed;" \
        "install one (Debian and Ubuntu: also python3-venv) or name it in TOKENWEAVE_PYTHON"
}

fingerprint() { # of all that the environment depends on; fails when its interpreter does not run
    "$VENV_PYTHON" -I -S -c '
import hashlib, sys
*facts, setup, project = sys.argv[1:]
facts += [sys.version, *(open(path, encoding="utf-8").read() for path in (setup, project))]
print(hashlib.sha256("\0".join(facts).encode()).hexdigest())' \
        "$TOKENWEAVE_ROOT" "$TOKENWEAVE_VENV" "cuda=$((GPUS > 0))" \
        "$TOKENWEAVE_ROOT/launch/setup.sh" "$TOKENWEAVE_ROOT/pyproject.toml"
}

is_current() { # in milliseconds: this runs every time
    [[ -f $STATE/stamp && -x $VENV_PYTHON && $(fingerprint 2>/dev/null) == "$(<"$STATE/stamp")" ]]
}

contents() { find "$TOKENWEAVE_VENV" -mindepth 1 -maxdepth 1 ! -name .tokenweave "$@"; }

claim() { # the folder, or refuse to touch it; any number of set-ups may come here at once
    mkdir -p "$TOKENWEAVE_VENV"
    if [[ -f $STATE/ours || -f $TOKENWEAVE_VENV/pyvenv.cfg ]]; then
        mkdir -p "$STATE"
    elif [[ -z $(contents -print -quit) ]]; then
        mkdir -p "$STATE" && touch "$STATE/ours"
    else
        die "TOKENWEAVE_VENV=$TOKENWEAVE_VENV is neither empty nor a virtual environment; name another folder"
    fi
}

lock() { # $1: a Python. Held until descriptor 9 is closed; in Python, since not every system has flock(1)
    exec 9>"$STATE/lock"
    "$1" -I -c '
import fcntl, sys, time
for second in range(3600):
    try: sys.exit(fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError: second or print("tokenweave: waiting for another set-up to finish", file=sys.stderr)
    time.sleep(1)
sys.exit(1)' </dev/null || die "another set-up has held $STATE/lock for an hour; end it, then try again"
}

logged() { # runs a command of the set-up; it gets no input, since that may hold prompts
    if ! "$@" >>"$STATE/setup.log" 2>&1 </dev/null; then
        # It was complete before, and pip undoes what fails: the next set-up need not start over.
        if [[ $UPDATING ]]; then echo 'update failed' >"$STATE/stamp"; fi
        tail -n 30 "$STATE/setup.log" >&2
        die "set-up failed at: $*; the whole log is in $STATE/setup.log"
    fi
}

pip_install() { logged "$VENV_PYTHON" -m pip install --no-input --no-user --disable-pip-version-check "$@"; }

is_complete() { # a set-up ended well here, and Python has not been replaced by a newer one since, which finds no pip
    [[ -f $STATE/stamp ]] && "$VENV_PYTHON" -I -c 'import pip' &>/dev/null
}

torch_suits() {
    "$VENV_PYTHON" -I -c '
import sys, torch
version = tuple(map(int, torch.__version__.split(".")[:2]))
sys.exit(not ((2, 11) <= version < (2, 14) and (torch.version.cuda or sys.argv[1] == "0")))' "$GPUS" &>/dev/null
}

install_torch() {
    if torch_suits; then return; fi
    if ((GPUS)); then
        pip_install --force-reinstall 'torch>=2.11,<2.14' # also in place of a CPU build
        torch_suits || say "warning: here is an NVIDIA GPU, but pip chose a torch without CUDA; see pip config list"
    elif [[ $(uname) == Linux ]]; then
        pip_install 'torch==2.13.0' # exactly: pip would prefer a newer default build to a CPU build
    fi
}

build() { # $1: a Python
    local extras=test,nvrtc
    if ((GPUS)); then extras=test,cuda; fi
    say "setting up $TOKENWEAVE_VENV: takes a minute or more; log in $STATE/setup.log"
    : >"$STATE/setup.log"
    SECONDS=0
    UPDATING=$(if is_complete; then echo yes; fi)
    rm -f "$STATE/stamp"
    if [[ -f $STATE/ours && ! $UPDATING ]]; then # new, or half made
        contents -exec rm -rf {} +
        logged "$1" -m venv "$TOKENWEAVE_VENV"
    fi
    install_torch
    pip_install -e "${TOKENWEAVE_ROOT}[$extras]"
    fingerprint >"$STATE/stamp.new"
    mv "$STATE/stamp.new" "$STATE/stamp" # only now: a set-up that was cut short leaves no stamp
    say "set up in $SECONDS s"
}

setup() {
    local python
    GPUS=$(gpu_count)
    if is_current; then return; fi
    python=$(find_python)
    claim
    lock "$python"
    if ! is_current; then build "$python"; fi # else another set-up has just done it
    exec 9>&-
}
