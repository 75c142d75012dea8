#!/usr/bin/env bash
# Everything: sets up .venv, then all tests, with the checks that need no run beside them. Arguments
# go to pytest: what they name is tested in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup.sh
. tools/setup.sh
export OMP_NUM_THREADS=1 # tests spawn up to four ranks
# Three processes on two cores: much of the time one of them waits for Slurm, an engine or a clock.
[ $# -gt 0 ] || set -- --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 20

static=$(mktemp)
trap 'rm -f "$static"' EXIT
nice bash tools/check --static >"$static" 2>&1 &
checks=$! failed=0
.venv/bin/python -m pytest "$@" || failed=$?
wait $checks || failed=1
cat "$static"
exit $failed
