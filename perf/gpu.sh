#!/usr/bin/env bash
# Everything that one GPU can tell, in at most 8 minutes: is it right, then how fast is it. From a machine that has torch,
# triton, transformers, cuda-python and pytest; nothing is downloaded, and models are random weights made on the GPU.
#
#   bash perf/gpu.sh [--output FOLDER] [--dry-run]
#
# In turn: tests (marker gpu) of the kernels and of the runtime; `tokenweave calibrate`; the runtime against transformers
# and against what the GPU can do, and where a step's time goes by kernel; the stand-in for TP=8 (its wire is simulated);
# the fused kernel's speed, and what GEMMs lose to it; compute-sanitizer, where there is one. FOLDER (perf/results)
# receives fused-one-gpu-* and runtime-one-gpu-*, each as .json and .md, with date, GPU, versions and commit.
#
# Each part has a time limit, and all together have TOTAL_S (480 s): what does not fit any more is reported as skipped. A
# part that fails does not keep the others from running. Exit code 0: all passed, no goal was missed; 1: not; 2: nothing ran.
# --dry-run needs no GPU: it collects the tests, compiles the kernels, and runs the measurements' lines on the CPU, tiny.
# PYTHON: the interpreter that has torch (.venv/bin/python where there is one, else python3).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [[ -z ${PYTHON-} ]]; then PYTHON=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3); fi
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
TOTAL_S=${TOTAL_S:-480}

OUTPUT=perf/results
DRY=
while (($#)); do
    case $1 in
    --output) OUTPUT=${2:?--output needs a folder}; shift 2 ;;
    --dry-run) DRY=--dry-run; shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' perf/gpu.sh; exit ;;
    *) echo "unknown argument $1: see the head of $0" >&2; exit 2 ;;
    esac
done

summary=()
part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 status=0 start=$SECONDS
    shift 2
    limit=$((limit < TOTAL_S - SECONDS ? limit : TOTAL_S - SECONDS))
    if ((limit < 5)); then
        summary+=("FAIL: $name: skipped, $TOTAL_S s are over")
        return
    fi
    echo "== $name (at most $limit s): $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@" || status=$?
    ((status == 124 || status == 137)) && name+=" (took too long)"
    summary+=("$( ((status)) && echo FAIL || echo pass ): $name, $((SECONDS - start)) s")
}

tests() { # NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider "$@"
}

runtime() { # PART SECONDS
    part "runtime: $1" "$2" "$PYTHON" -m perf.gpu --output "$OUTPUT" --only "$1" $DRY
}

sanitizer() { # NAME OPTIONS...
    local name=$1 tool
    shift
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
    if [[ -z $tool ]]; then
        summary+=("skipped: $name: compute-sanitizer is not on PATH or in /usr/local/cuda*/bin")
        return
    fi
    # Without torch's cache of memory each tensor is an allocation, so that a sanitizer sees where it ends.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$name" 40 "$tool" --tool "$name" "$@" --error-exitcode 9 \
        "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider tests/kernels/test_fused_gpu.py -k sanitizers
}

if ! "$PYTHON" -c 'import pytest, torch, transformers' 2>/dev/null; then
    echo "$PYTHON has no torch, transformers and pytest: run launch/test.sh once, which makes .venv, or set PYTHON" >&2
    exit 2
fi
mkdir -p "$OUTPUT" || exit 2
if [[ -n $DRY ]]; then
    tests "tests" 120 --collect-only
    part "fused kernel" 120 "$PYTHON" -m perf.fused_one_gpu --dry-run
else
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "$PYTHON has no torch that sees a GPU: set PYTHON, or add --dry-run" >&2
        exit 2
    fi
    nvidia-smi --query-gpu=name,driver_version,memory.used,utilization.gpu --format=csv,noheader
    tests "tests of the kernels" 150 --timeout=60 tests/kernels
    tests "tests of the runtime" 80 --timeout=60 --ignore=tests/kernels tests
    part "calibrate" 40 "$PYTHON" -m tokenweave.cli calibrate --no-progress
fi
for name in equality two_ranks; do runtime "$name" 50; done
for name in prefill decode kernels throughput predicted stand_in; do runtime "$name" 60; done
if [[ -z $DRY ]]; then
    part "fused kernel: speed" 60 "$PYTHON" -m perf.fused_one_gpu --output "$OUTPUT" --only speed
    part "fused kernel: GEMMs" 45 "$PYTHON" -m perf.fused_one_gpu --output "$OUTPUT" --only gemms
    sanitizer memcheck --report-api-errors no # torch tries calls that may fail
    sanitizer synccheck
fi

printf '%s\n' "== summary, $SECONDS s" "${summary[@]}"
[[ ! " ${summary[*]}" =~ " FAIL: " ]]
