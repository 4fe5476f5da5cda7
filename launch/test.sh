#!/usr/bin/env bash
# Sets up what is needed, then runs every check: ruff, mypy, and the tests last. Arguments go to pytest, e.g. --full.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
cd "$TOKENWEAVE_ROOT"

failed=()
check() {
    say "$*"
    "$VENV_PYTHON" -m "$@" || failed+=("$*")
}
check ruff check .
check ruff format --check .
check mypy

say "pytest $*"
status=0
"$VENV_PYTHON" -m pytest "$@" || status=$?
if ((${#failed[@]})); then
    say "failed before the tests:$(printf ' [%s]' "${failed[@]}")"
    ((status)) || status=1
fi
exit "$status"
