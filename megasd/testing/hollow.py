"""Model folders of the true Qwen3 sizes without their weights: for dry runs of real recipes.

The safetensors files have headers like the real ones and a hole in place of the numbers: one says
16 GB and takes as much of the disk as the names of its tensors. Every weight reads as 0.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from megasd.planner.presets import EXPERTS, SIZES
from megasd.testing.tiny import tiny_tokenizer
from megasd.weights.hf_folder import INDEX_FILE, SINGLE_FILE
from megasd.weights.tables import table_for

Size = Literal["1.7B", "4B", "8B", "32B", "30B-A3B", "235B-A22B"]

FILE_BYTES = 20 * 10**9  # the dense models are one file


def hollow_qwen3(folder: Path | str, size: Size = "8B", *, layers: int | None = None) -> Path:
    """Writes a Qwen3 of `size` into `folder`, bfloat16, with the tiny tokenizer; returns `folder`.

    `layers`: only so many of its layers. The disk must allow files with holes; most do.
    """
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    sizes, has_experts = dict(SIZES[size]), "moe_intermediate_size" in SIZES[size]
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config: Any = AutoConfig.for_model(
        "qwen3_moe" if has_experts else "qwen3",
        **sizes,
        **(EXPERTS if has_experts else {}),
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=vocabulary[str(tokenizer.eos_token)],
        pad_token_id=vocabulary[str(tokenizer.pad_token)],
        architectures=["Qwen3MoeForCausalLM" if has_experts else "Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_holes(folder, table_for(config.to_dict()).hf_shapes())
    return folder


def _write_holes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """One safetensors file, or several and an index: what is opened is mapped file by file."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    room = FILE_BYTES
    for name, shape in shapes.items():
        needed = 2 * math.prod(shape)
        if needed > room:
            files.append({})
            room = FILE_BYTES
        files[-1][name] = shape
        room -= needed
    if len(files) == 1:
        return _write_hole(folder / SINGLE_FILE, files[0])
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_hole(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def _write_hole(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16: the header's length, the header, and nothing behind it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
