#!/usr/bin/env bash
# Everything: sets up .venv, then the checks that need no run, then all tests, in two processes.
# Arguments go to pytest: what they name is tested in one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/check --static
# shellcheck source=tools/setup.sh
. tools/setup.sh
export OMP_NUM_THREADS=1 # tests spawn up to four ranks
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20
exec .venv/bin/python -m pytest "$@"
