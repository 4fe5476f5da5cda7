#!/usr/bin/env bash
# Everything about the fused kernel that one GPU can tell, in some 8 minutes: tests, sanitizers, then timings.
#
#   bash perf/gpu.sh [--output FOLDER] [--dry-run]
#
# FOLDER (perf/results) receives the tables. --dry-run needs no GPU: it collects the tests, and compiles the kernels.
# PYTHON: the interpreter that has torch (.venv/bin/python where there is one, else python3). A part that fails does not keep the others from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [[ -z ${PYTHON-} ]]; then PYTHON=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3); fi
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

OUTPUT=perf/results
DRY=
while (($#)); do
    case $1 in
    --output) OUTPUT=${2:?--output needs a folder}; shift 2 ;;
    --dry-run) DRY=--dry-run; shift ;;
    -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//p}' perf/gpu.sh; exit ;;
    *) echo "unknown argument $1: see the head of $0" >&2; exit 2 ;;
    esac
done

summary=()
part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 status=0 start=$SECONDS
    shift 2
    echo "== $name (at most $limit s): $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@" || status=$?
    ((status == 124 || status == 137)) && name+=" (took too long)"
    summary+=("$( ((status)) && echo FAIL || echo pass ): $name, $((SECONDS - start)) s")
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
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$name" 60 "$tool" --tool "$name" "$@" --error-exitcode 9 \
        "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider tests/kernels/test_fused_gpu.py -k sanitizers
}

if ! "$PYTHON" -c 'import pytest, torch' 2>/dev/null; then
    echo "$PYTHON has no torch and pytest: run launch/test.sh once, which makes .venv, or set PYTHON" >&2
    exit 2
fi
if [[ -n $DRY ]]; then
    part "tests" 120 "$PYTHON" -m pytest -m gpu -q --collect-only tests/kernels tests/test_cuda.py
    part "timings" 120 "$PYTHON" -m perf.fused_one_gpu --dry-run
else
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "$PYTHON has no torch that sees a GPU: set PYTHON, or add --dry-run" >&2
        exit 2
    fi
    nvidia-smi --query-gpu=name,driver_version,memory.used,utilization.gpu --format=csv,noheader
    part "tests of the kernel" 150 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --timeout=100 tests/kernels
    part "tests of the runtime" 70 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --timeout=60 tests/test_cuda.py
    sanitizer memcheck --report-api-errors no # torch tries calls that may fail
    sanitizer synccheck
    part "speed" 80 "$PYTHON" -m perf.fused_one_gpu --output "$OUTPUT" --only speed
    part "GEMMs" 60 "$PYTHON" -m perf.fused_one_gpu --output "$OUTPUT" --only gemms
fi

printf '%s\n' "== summary" "${summary[@]}"
[[ ! " ${summary[*]}" =~ " FAIL: " ]]
