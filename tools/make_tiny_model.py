"""Writes a random tiny model as a Hugging Face folder: `make_tiny_model.py FOLDER [--seed N]`.

The defaults are the quickstart's model: a Qwen3 of 306,000 parameters that learn on two CPU cores.
"""

import argparse
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from megasd.testing.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe

FAMILIES = {"qwen3": tiny_qwen3, "qwen3_moe": tiny_qwen3_moe, "llama": tiny_llama}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--seed", type=int, default=0)
    sizes = {"hidden": 96, "layers": 3, "heads": 3, "kv_heads": 1, "head_dim": 32}
    for name, default in {**sizes, "intermediate": 256}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    disable_progress_bar()
    arguments = vars(parser.parse_args())
    print(FAMILIES[arguments.pop("family")](**arguments))


if __name__ == "__main__":
    main()
