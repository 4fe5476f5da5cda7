#!/usr/bin/env bash
#SBATCH --job-name=tokenweave
#SBATCH --ntasks-per-node=1
# Runs a program on the GPUs of several machines, by Slurm: see --help.
set -euo pipefail
ROOT=${TOKENWEAVE_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)} # sbatch runs a copy of this file elsewhere
# shellcheck source-path=SCRIPTDIR source=nodes.sh
source "$ROOT/launch/nodes.sh"

usage() {
    cat <<'END'
usage: launch/slurm.sh --nodes N --gpus-per-node [TYPE:]G [options] [-- PROGRAM]

Submits a job (sbatch) in which srun starts torchrun once on each node. All ranks form one tensor-parallel group; they
meet on the first node. Inside a job or an allocation (salloc) it runs srun at once, with that job's nodes and GPUs.

  launch/slurm.sh --nodes 2 --gpus-per-node 8 -- -m tokenweave.cli generate --model /models/llama 'Once upon a time'
  launch/slurm.sh --nodes 2 --gpus-per-node h100:8 --sbatch --partition=gpu --sbatch --time=30 -- my_script.py --option

PROGRAM is what torchrun takes: a script and its arguments, or -m MODULE ... (default: `tokenweave generate` with the
embedded model). All nodes need this repository with its environment (launch/generate.sh makes it) and the model at the
same paths, as on a shared file system.

  --nodes N             machines (inside a job: those it has)
  --gpus-per-node [TYPE:]G
                        GPUs, and so ranks, of each, such as 8 or h100:8 (inside a job: those it has)
  --gres gpu:[TYPE:]G   the same, on a cluster that wants it so; other resources may follow after a comma
  --nproc N             ranks of each node, if not one for each GPU
  --python PATH         the Python (default: .venv/bin/python in the repository)
  --port PORT           a free port on the first node (default: 20000 + the job's number, modulo 10000)
  --sbatch OPTION       an option for sbatch, such as --sbatch --time=30; as often as needed
  --dry-run             print the commands, and run nothing
  -h, --help            this help

docs/multi-node.md says more.
END
}

ask() { # OPTION VALUE: for GPUs, in Slurm's words; into `asking` as they are, and their number into `gpus`
    local kind='([A-Za-z0-9_.-]+:)?' count='([1-9][0-9]{0,5})'
    [[ ! $gpus ]] || die "--gpus-per-node and --gres ask for the same, the GPUs of a node; give one of them"
    if [[ $1 == --gres ]]; then
        [[ $2 =~ (^|,)gpu:$kind$count(,|$) ]] ||
            die "--gres must ask for GPUs, such as gpu:8 or gpu:h100:8, not '$2'; see --help"
        gpus=${BASH_REMATCH[3]}
    else
        [[ $2 =~ ^$kind$count$ ]] || die "--gpus-per-node must be a number such as 8, or h100:8, not '$2'; see --help"
        gpus=${BASH_REMATCH[2]}
    fi
    asking=("$1" "$2")
}

nodes=${SLURM_JOB_NUM_NODES-} gpus='' nproc='' python=$ROOT/.venv/bin/python port='' dry=''
asking=() submitting=() arguments=()
while (($#)); do
    option=${1%%=*} value=${1#*=} width=1
    if [[ $1 != *=* ]]; then value=${2-} width=2; fi
    case $option in
        --nodes | --gpus-per-node | --gres | --nproc | --python | --port | --sbatch)
            [[ $value ]] || die "$option needs a value; see --help"
            case $option in
                --nodes) nodes=$value ;;
                --gpus-per-node | --gres) ask "$option" "$value" ;;
                --nproc) nproc=$value ;;
                --python) python=$value ;;
                --port) port=$value ;;
                --sbatch) submitting+=("$value") ;;
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

run() {
    if [[ $dry ]]; then quoted "$@" && echo; else exec "$@"; fi
}

[[ $nodes ]] || die "--nodes is needed, such as --nodes 2; see --help"
whole --nodes "$nodes"
if [[ $nproc ]]; then whole --nproc "$nproc"; fi
if [[ $port ]]; then whole --port "$port"; fi
if ((${#arguments[@]} == 0)); then arguments=("${DEFAULT_PROGRAM[@]}"); fi

if [[ ! ${SLURM_JOB_ID-} ]]; then
    [[ $gpus || $nproc ]] || die "--gpus-per-node is needed, such as --gpus-per-node 8; see --help"
    command -v sbatch >/dev/null || [[ $dry ]] || die "no sbatch here; log in to the Slurm cluster, or use launch/ssh.sh"
    run sbatch --nodes "$nodes" --ntasks-per-node 1 ${asking[@]+"${asking[@]}"} \
        ${submitting[@]+"${submitting[@]}"} --export "ALL,TOKENWEAVE_ROOT=$ROOT" "$ROOT/launch/slurm.sh" \
        --nodes "$nodes" --nproc "${nproc:-$gpus}" --python "$python" ${port:+--port "$port"} -- "${arguments[@]}"
    exit
fi

given=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE-}} # the former may be h100:8; after --gres there is the latter
nproc=${nproc:-${gpus:-${given##*:}}}
[[ $nproc ]] || die "the job names no GPUs; give --gpus-per-node, or --nproc for ranks without"
names=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
first=${names%%$'\n'*}
[[ $first ]] || die "scontrol names no node of ${SLURM_JOB_NODELIST}"
port=${port:-$((20000 + SLURM_JOB_ID % 10000))}
set_apart "${arguments[@]}"
cd "$ROOT"
# --kill-on-bad-exit: a node that fails ends the others. --label: each line after its task's number.
run srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1 --label \
    "$python" launch/ranks.py --nnodes "$nodes" --nproc-per-node "$nproc" --rdzv-backend c10d \
    --rdzv-endpoint "$first:$port" --rdzv-id "tokenweave-$SLURM_JOB_ID" --rdzv-conf join_timeout=300 "${program[@]}"
