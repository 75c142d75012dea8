#!/usr/bin/env bash
# Everything: sets up .venv, then the checks that need no run, then all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/check --static
# shellcheck source=tools/setup.sh
. tools/setup.sh
export OMP_NUM_THREADS=1 # tests spawn up to four ranks
exec .venv/bin/python -m pytest "$@"
