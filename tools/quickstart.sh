#!/usr/bin/env bash
# A tiny Qwen3 learns to add on two CPU cores, in minutes: a supervised warm start from random
# weights, then RLSD, in which the model that reads the answer is the teacher of itself.
# `tools/quickstart.sh [--seed N] [KEY=VALUE ...]`; the same seed gives the same numbers. Keys are set
# in both runs: `rollout.engine=vllm` samples with vLLM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seed=0 overrides=()
while [ $# -gt 0 ]; do
    case $1 in
    --seed) seed=${2:?--seed needs a number} && shift 2 ;;
    *.*=*) overrides+=("$1") && shift ;;
    *) echo "usage: tools/quickstart.sh [--seed N] [KEY=VALUE ...]" >&2 && exit 2 ;;
    esac
done

SECONDS=0
rm -rf runs/quickstart-inputs runs/quickstart-sft runs/quickstart
# shellcheck source=tools/setup.sh
QUICKSTART_SEED=$seed . tools/setup.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # a fixed number: sums round differently with another

.venv/bin/megasd train configs/quickstart_sft.yaml run.seed="$seed" "${overrides[@]}"
.venv/bin/megasd train configs/quickstart.yaml run.seed="$seed" model.path=runs/quickstart-sft/hf \
    "${overrides[@]}"
.venv/bin/python tools/quickstart_report.py runs/quickstart --seconds "$SECONDS"
