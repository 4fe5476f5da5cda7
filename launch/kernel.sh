#!/usr/bin/env bash
# Sets up what is needed, then checks and measures the fused kernel on N GPUs: see --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
    cat <<'END'
usage: launch/kernel.sh [--nproc N] [--output DIR] [--reference DIR] [--quick] [--dry-run]

Checks and measures the fused AllReduce + RMSNorm kernel on the GPUs of one machine, which NVLink should join. Sets up an
environment of its own first (see launch/generate.sh). Takes a few minutes, and wants the GPUs for itself.

  1. Correctness: every implementation that the GPUs can use against fp64, and bitwise equal on all of them. A wrong one
     is named, and ends the run.
  2. Figures 10 and 4 of the TokenWeave paper: the kernel by CTA count, beside NCCL, torch's multimem all-reduce and
     FlashInfer's fused kernel (where installed), each with an RMSNorm.
  3. Verdict on 8 GPUs, hidden size 8192, bf16: 8192 rows in at most 530 us by 4 CTAs and 800 us by 2, 256 rows in 24 us.

It prints its tables and the verdict, and writes kernel.md, kernel.json, plots and CSV files; tokenweave_figure_4.csv and
_10.csv have the published columns, for `tokenweave plan --collectives DIR`. Exit code 0: right, and fast enough or not
judged; 1: not.

  --nproc N         ranks, one GPU each (default: all GPUs; 2 in a dry run)
  --output DIR      where to write (default: a folder of the day in perf/results; in a dry run, a temporary one)
  --reference DIR   the folder with the published CSV files, to plot them beside ours
  --quick           fewer checks, row counts and rounds, in about a minute; judged all the same
  --dry-run         without GPUs: the same steps on CPU ranks, tiny, by the kernel's host twins. No measurement
  -h, --help        this help

environment: TOKENWEAVE_VENV, TOKENWEAVE_PYTHON as for launch/generate.sh
END
}

nproc='' dry='' args=()
while (($#)); do
    option=${1%%=*} value=${1#*=} width=1
    if [[ $1 != *=* ]]; then value=${2-} width=2; fi
    case $option in
        --nproc | --output | --reference)
            [[ $value ]] || die "$option needs a value; see --help"
            if [[ $option == --nproc ]]; then nproc=$value; else args+=("$option=$value"); fi
            shift "$width"
            ;;
        --quick) args+=("$1") && shift ;;
        --dry-run) dry=yes args+=("$1") && shift ;;
        -h | --help)
            usage
            exit
            ;;
        *) die "unknown option $1; see --help" ;;
    esac
done
[[ ! $nproc || $nproc =~ ^([2-9]|[1-9][0-9])$ ]] || die "--nproc must be a whole number from 2 on, not '$nproc'"

setup
if [[ ! $nproc ]]; then
    if [[ $dry ]]; then nproc=2; else nproc=$("$VENV_PYTHON" -c 'import torch; print(torch.cuda.device_count())'); fi
fi
((nproc > 1)) || die "the kernel joins two GPUs or more, torch sees $nproc; --dry-run needs none"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$TOKENWEAVE_ROOT${PYTHONPATH:+:$PYTHONPATH} # for perf, which is not installed
exec "$VENV_PYTHON" "$TOKENWEAVE_ROOT/launch/ranks.py" --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 \
    --rdzv-id "tokenweave-kernel-$$" --local-addr 127.0.0.1 --nproc-per-node "$nproc" \
    -m -- perf.kernel_many_gpus "${args[@]}"
