#!/usr/bin/env bash
# Runs a program on the GPUs of several machines, by plain ssh: see --help.
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=nodes.sh
source "$(dirname "${BASH_SOURCE[0]}")/nodes.sh"

usage() {
    cat <<'END'
usage: launch/ssh.sh --hosts HOST,HOST[,...] [--nproc N] [options] [-- PROGRAM]

Starts torchrun on every host over ssh, and shows what they say, each line after its host's name. All ranks form one
tensor-parallel group. When a host fails, or on Ctrl-C, all are stopped; the exit code is that of the first that failed.

  launch/ssh.sh --hosts gpu1,gpu2 --nproc 8 -- -m tokenweave.cli generate --model /models/llama 'Once upon a time'
  launch/ssh.sh --hosts gpu1,gpu2 --nproc 8 -- my_script.py --its options

PROGRAM is what torchrun takes: a script and its arguments, or -m MODULE ... (default: `tokenweave generate` with the
embedded model). Every host needs this repository with its environment (launch/generate.sh makes it) and the model at
the same paths, and an ssh login without a password.

  --hosts H1,H2,...     names or addresses, also user@host; ranks go in this order
  --nproc N             ranks, that is GPUs, of each host (default: 8)
  --folder DIR          the repository on the hosts (default: where it is here)
  --python PATH         the Python there (default: .venv/bin/python in that folder)
  --master-addr HOST    how the others reach the first host (default: its name in --hosts)
  --master-port PORT    a free port on the first host (default: 29500)
  --env NAME            pass this variable on, if it is set; as often as needed. Those that begin with NCCL_, GLOO_,
                        TOKENWEAVE_ or HF_, OMP_NUM_THREADS and CUDA_VISIBLE_DEVICES are passed on in any case
  --timeout-s SECONDS   stop everything after so long (default: no limit)
  --dry-run             print the commands, and run nothing
  -h, --help            this help

docs/multi-node.md says more.
END
}

GRACE_S=40 # for hosts to end their ranks, before the connections are cut; torchrun gives them 30 s
hosts='' nproc=8 folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) python='' address='' port=29500 limit='' dry=''
names=(OMP_NUM_THREADS CUDA_VISIBLE_DEVICES) arguments=()
while (($#)); do
    option=${1%%=*} value=${1#*=} width=1
    if [[ $1 != *=* ]]; then value=${2-} width=2; fi
    case $option in
        --hosts | --nproc | --folder | --python | --master-addr | --master-port | --env | --timeout-s)
            [[ $value ]] || die "$option needs a value; see --help"
            case $option in
                --hosts) hosts=$value ;;
                --nproc) nproc=$value ;;
                --folder) folder=$value ;;
                --python) python=$value ;;
                --master-addr) address=$value ;;
                --master-port) port=$value ;;
                --env)
                    [[ $value =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
                        die "--env must name a variable, not '$value'; see --help"
                    names+=("$value")
                    ;;
                --timeout-s) limit=$value ;;
            esac
            shift "$width"
            ;;
        --dry-run) dry=yes && shift ;;
        -h | --help)
            usage
            exit
            ;;
        --) shift && arguments=("$@") && break ;;
        *) die "unknown option $1; what torchrun is to run comes after --; see --help" ;;
    esac
done
[[ $hosts ]] || die "--hosts is needed, such as --hosts gpu1,gpu2; see --help"
IFS=, read -ra hosts <<<"$hosts"
for host in "${hosts[@]}"; do [[ $host && $host != -* ]] || die "--hosts has an empty or odd name '$host'; see --help"; done
whole --nproc "$nproc"
whole --master-port "$port"
if [[ $limit ]]; then whole --timeout-s "$limit"; fi
address=${address:-${hosts[0]##*@}} python=${python:-$folder/.venv/bin/python}
if ((${#arguments[@]} == 0)); then arguments=("${DEFAULT_PROGRAM[@]}"); fi
set_apart "${arguments[@]}"
environment=()
for name in $(compgen -e | grep -E '^(NCCL|GLOO|TOKENWEAVE|HF)_') "${names[@]}"; do
    if [[ -n ${!name+set} ]]; then environment+=("$name=${!name}"); fi
done

# What a host runs. It lives on its standard input: when that ends, since this script has, it ends the ranks.
remote() { # NODE_RANK
    local ranks
    ranks=$(quoted env ${environment[@]+"${environment[@]}"} "$python" launch/ranks.py --nnodes "${#hosts[@]}" \
        --node-rank "$1" --nproc-per-node "$nproc" --master-addr "$address" --master-port "$port" "${program[@]}")
    printf '%s' "exec 3<&0; cd $(quoted "$folder") || exit; $ranks </dev/null 3<&- & ranks=\$!; " \
        "{ cat <&3; kill -TERM \$ranks; } >/dev/null 2>&1 & watch=\$!; wait \$ranks; code=\$?; " \
        "kill \$watch 2>/dev/null; exit \$code"
}

connect() { # NODE_RANK COMMAND...: with the words of its ssh command
    local node=$1
    shift
    "$@" ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 \
        "${hosts[$node]}" "bash -c $(quoted "$(remote "$node")")"
}

if [[ $dry ]]; then
    for node in "${!hosts[@]}"; do
        connect "$node" quoted
        echo
    done
    exit
fi

work=$(mktemp -d) || exit
mkfifo "$work/open"
exec 9<>"$work/open" # nobody writes to it; it ends when this script does, however it ends
pids=() codes=() readers=() stopping='' failed=''

prefixed() { # HOST
    local line
    while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

start() { # NODE_RANK
    mkfifo "$work/said.$1"
    prefixed "${hosts[$1]}" <"$work/said.$1" 9>&- &
    readers+=($!)
    connect "$1" exec <"$work/open" >"$work/said.$1" 2>&1 9>&- &
    pids+=($!) codes+=('')
}

look() { # which hosts have ended; the first that failed is `failed`. False when all have ended
    local node left=1
    for node in "${!hosts[@]}"; do
        if [[ ${codes[node]} ]]; then continue; fi
        if kill -0 "${pids[node]}" 2>/dev/null; then left=0 && continue; fi
        codes[node]=0
        wait "${pids[node]}" || codes[node]=$?
        if [[ ${codes[node]} != 0 && ! $failed ]]; then failed=$node; fi
    done
    return $left
}

stop() { # let go of every host, and wait a while for them to end
    local node deadline=$((SECONDS + GRACE_S))
    exec 9>&-
    while look && ((SECONDS < deadline)); do sleep 0.1; done
    for node in "${!hosts[@]}"; do
        if [[ ! ${codes[node]} ]]; then kill -KILL "${pids[node]}" "${readers[node]}"; fi
    done
    wait "${readers[@]}"
    rm -rf "$work"
}

trap 'stopping=130' INT
trap 'stopping=143' TERM HUP
say "${#hosts[@]} hosts of $nproc ranks each; they meet at $address:$port"
for node in "${!hosts[@]}"; do start "$node"; done
while look && [[ ! $stopping && ! $failed ]]; do
    sleep 0.1
    if [[ $limit ]] && ((SECONDS >= limit)); then stopping=124; fi
done
if [[ $stopping == 124 ]]; then
    say "stopping all hosts: $limit s are over (--timeout-s)"
elif [[ $stopping ]]; then
    say "stopping all hosts"
elif [[ $failed ]]; then
    say "${hosts[failed]} ended with exit code ${codes[failed]}; what it reported is above"
    if look; then say "stopping the others"; fi
fi
blamed=$failed
stop
if [[ $stopping ]]; then exit "$stopping"; fi
if [[ $blamed ]]; then exit "${codes[blamed]}"; fi
