#!/usr/bin/env bash
# Sets up what is needed, then runs `tokenweave generate` on N ranks: see --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
    cat <<'END'
usage: launch/generate.sh [launch options] [options of tokenweave generate] [PROMPT ...]

Sets up an environment of its own (the first run takes a minute or more), then runs `tokenweave generate` on N ranks
with torchrun. Without prompts and options for it, the embedded model adds a few numbers, woven, and a timeline of that
is written to tokenweave-trace.json and a picture beside it.

  launch/generate.sh
  launch/generate.sh --model PATH_OR_HUB_ID --nproc 4 'Once upon a time'
  echo '12+34=' | launch/generate.sh -

launch options:
  --nproc N           ranks on this machine (default: 8, 4 or 2, as there are GPUs; with
                      fewer 2, on the CPU: on one GPU give --nproc 1)
  --nnodes N          machines (default: 1). On several machines, start this script on each, with the same arguments and
  --node-rank R         this machine's number, 0 to N-1,
  --master-addr HOST    a name or address of machine 0 that all can reach,
  --master-port PORT    a free port on machine 0
  -h, --help          this help, then that of tokenweave generate

environment:
  TOKENWEAVE_VENV     the virtual environment (default: .venv in the repository)
  TOKENWEAVE_PYTHON   the Python to make it with (default: the first one of 3.11 or newer)
  OMP_NUM_THREADS     threads of each rank (default: cores / ranks)
END
}

visible_gpus() {
    local all
    all=$(gpu_count)
    if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
        echo "$all"
    elif [[ -z $CUDA_VISIBLE_DEVICES || $CUDA_VISIBLE_DEVICES == -1* || $all == 0 ]]; then
        echo 0
    else
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    fi
}

default_nproc() {
    local gpus
    gpus=$(visible_gpus)
    echo $((gpus < 4 ? 2 : gpus < 8 ? 4 : 8)) # most models' heads divide by powers of two
}

# Split the command line: launch options into variables, all else into `args`.
nproc='' nnodes=1 node_rank='' master_addr='' master_port='' help='' args=()
while (($#)); do
    option=${1%%=*} value=${1#*=} width=1
    if [[ $1 != *=* ]]; then value=${2-} width=2; fi
    case $option in
        --nproc | --nnodes | --node-rank | --master-addr | --master-port)
            [[ $value ]] || die "$option needs a value; see --help"
            option=${option#--}
            printf -v "${option//-/_}" '%s' "$value"
            shift "$width"
            ;;
        -h | --help)
            help=yes
            shift
            ;;
        --)
            args+=("$@")
            break
            ;;
        *)
            args+=("$1")
            shift
            ;;
    esac
done

positive() { [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1 must be a whole number such as 2, not '$2'"; }
nproc=${nproc:-$(default_nproc)}
positive --nproc "$nproc"
positive --nnodes "$nnodes"
if ((nnodes > 1)); then
    [[ $node_rank && $master_addr && $master_port ]] ||
        die "--nnodes $nnodes needs --node-rank, --master-addr and --master-port on every machine; see --help"
    [[ $node_rank == 0 ]] || positive --node-rank "$node_rank"
    ((node_rank < nnodes)) || die "--node-rank must be 0 to $((nnodes - 1)), not $node_rank"
    positive --master-port "$master_port"
    rendezvous=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port "$master_port")
elif [[ $master_addr || $master_port || ${node_rank:-0} != 0 ]]; then
    die "--node-rank, --master-addr and --master-port are for several machines: give --nnodes as well"
else # as torchrun --standalone does it: port 0 is any free port. By number, since a machine's own name may not resolve
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --rdzv-id "tokenweave-$$" --local-addr 127.0.0.1)
fi

if [[ $help ]]; then
    usage
    setup
    printf '\n'
    exec "$VENV_PYTHON" -m tokenweave.cli generate --help
fi

setup
if ((${#args[@]} == 0)); then
    args=(--overlap weave --trace tokenweave-trace.json '12+34=' '7+8=' '250+250=' '123+456=' '999+1=')
fi
for arg in "${args[@]}"; do
    # torchrun gives its ranks no terminal to read from, but it does pass a pipe on
    if [[ $arg == - && -t 0 ]]; then
        say "reading prompts from the terminal, one a line; end with Ctrl-D"
        exec < <(cat)
    fi
done
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
exec "$VENV_PYTHON" "$TOKENWEAVE_ROOT/launch/ranks.py" "${rendezvous[@]}" --nproc-per-node "$nproc" \
    -m -- tokenweave.cli generate "${args[@]}" # after --, torchrun takes no option for an abbreviation of its own
