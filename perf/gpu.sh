#!/usr/bin/env bash
# Everything that one GPU can tell, in at most 8 minutes: is it right, then how fast is it. From a machine that has torch,
# triton, transformers, cuda-python, pytest, pytest-timeout and hypothesis, and a C compiler; nothing is
# downloaded, and models are random weights made on the GPU. Its goals are for an H100 of 80 GB that does nothing else.
#
#   bash perf/gpu.sh [--output FOLDER] [--dry-run]
#
# In turn: tests (marker gpu) of the kernels and of the runtime; `tokenweave calibrate`; the runtime against transformers
# and against what the GPU can do, and where a step's time goes by kernel; the stand-in for TP=8 (its wire is simulated);
# the fused kernel's speed, and what GEMMs lose to it; compute-sanitizer, where there is one. FOLDER (perf/results)
# receives fused-one-gpu-* and runtime-one-gpu-*, each as .json and .md, with date, GPU, versions and commit.
#
# It prints each part's name, what the part says, and a summary of all parts at the end. Each has a time limit, and all
# together have TOTAL_S (480 s; TOTAL_S=1200 bash perf/gpu.sh gives more): what does not fit any more is reported as skipped.
# A part that fails does not keep the others from running. Exit code 0: all passed, no goal was missed; 1: not; 2: nothing ran.
# --dry-run needs no GPU: it collects the tests, compiles the kernels, and runs the measurements' lines on the CPU, tiny.
# PYTHON: the interpreter that has torch (.venv/bin/python where there is one, else python3).
set -uo pipefail
FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [[ -z ${PYTHON-} ]]; then PYTHON=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3); fi
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
TOTAL_S=${TOTAL_S:-480}

OUTPUT=perf/results
DRY=
while (($#)); do
    case $1 in
    --output)
        [[ ${2-} ]] || { echo "--output needs a folder; see --help" >&2; exit 2; }
        if [[ $2 == /* ]]; then OUTPUT=$2; else OUTPUT=$FROM/$2; fi
        shift 2
        ;;
    --dry-run) DRY=--dry-run; shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' perf/gpu.sh; exit ;;
    *) echo "unknown argument $1; see --help" >&2; exit 2 ;;
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

# What is missing is said now, and not when minutes are over.
needed=(pytest pytest_timeout hypothesis torch transformers)
[[ -n $DRY ]] || needed+=(triton cuda.bindings.nvrtc)
missing=$("$PYTHON" -c '
import importlib, sys
for name in sys.argv[1:]:
    try: importlib.import_module(name)
    except ImportError: print(name)' "${needed[@]}") || missing="no Python"
if [[ -n $missing ]]; then
    echo "$PYTHON cannot import: ${missing//$'\n'/, }; run launch/test.sh once, which makes .venv, or set PYTHON" >&2
    exit 2
fi
mkdir -p "$OUTPUT" || exit 2
mapfile -t files < <(grep -rl 'mark\.gpu' tests --include='test_*.py' --exclude-dir=kernels)
if [[ -n $DRY ]]; then
    tests "tests" 120 --collect-only tests/kernels "${files[@]}"
    part "fused kernel" 120 "$PYTHON" -m perf.fused_one_gpu --dry-run
else
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "$PYTHON has no torch that sees a GPU: set PYTHON, or add --dry-run" >&2
        exit 2
    fi
    if ! said=$("$PYTHON" -c 'from triton.runtime import driver; driver.active.get_current_target()' 2>&1); then
        echo "Triton cannot reach the GPU; it needs a C compiler and the headers of Python: ${said##*$'\n'}" >&2
        exit 2
    fi
    nvidia-smi --query-gpu=name,driver_version,memory.used,utilization.gpu --format=csv,noheader
    tests "tests of the kernels" 150 --timeout=60 tests/kernels
    tests "tests of the runtime" 80 --timeout=60 "${files[@]}"
    part "calibrate" 40 "$PYTHON" -m tokenweave.cli calibrate --no-progress
fi
for name in equality two_ranks; do runtime "$name" 50; done
for name in prefill decode kernels sampling throughput predicted stand_in; do runtime "$name" 60; done
if [[ -z $DRY ]]; then
    part "fused kernel: speed" 60 "$PYTHON" -m perf.fused_one_gpu --output "$OUTPUT" --only speed
    part "fused kernel: GEMMs" 45 "$PYTHON" -m perf.fused_one_gpu --output "$OUTPUT" --only gemms
    sanitizer memcheck --report-api-errors no # torch tries calls that may fail
    sanitizer synccheck
fi

printf '%s\n' "== summary, $SECONDS s" "${summary[@]}"
[[ ! " ${summary[*]}" =~ " FAIL: " ]]
