#!/usr/bin/env bash
# Sets up what is needed, then reproduces figures of the TokenWeave paper on the GPUs of this machine: see --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
export PYTHONPATH=$TOKENWEAVE_ROOT${PYTHONPATH:+:$PYTHONPATH} # for perf, which is not installed
exec "$VENV_PYTHON" -m perf.paper "$@"
