"""Compiles the head's kernels for an H100, which takes no GPU: prints the bytes that each spills.

    python -m tests.unit.policy.compile_kernels FOLDER_OF_TRITON

In a process of its own: where Triton has been imported for its interpreter, it compiles nothing.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = {"room": 8192, "num_wanted": 101, "wanted_room": 128, "top_k": 100, "top_room": 128}
SIZES |= {"num_ids": 101, "ids_room": 128, "has_slope": True, "kind": "jsd", "clips": True}
WARPS = 16
TYPES = {"wanted": "*i64", "ids": "*i64", "top_ids": "*i64", "out": "*bf16"}
TYPES |= dict.fromkeys(("columns", "first_id", "stride", "sums_stride"), "i32")
TYPES |= dict.fromkeys(("alpha", "clip"), "fp32")


def main(triton_folder: Path) -> None:
    sys.path.append(str(triton_folder))
    from triton import knobs  # pyright: ignore[reportMissingModuleSource]

    from megasd.policy.head import kernels

    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        found = (
            kernels._statistics,
            kernels._logit_gradient,
            kernels._sum_over_equal_ids,
            kernels._divergence,
            kernels._divergence_gradient,
        )
        assembler = triton_folder / "triton/backends/nvidia/bin/ptxas"
        print(json.dumps({x.__name__: spilled_bytes(x, assembler, Path(folder)) for x in found}))


def spilled_bytes(kernel: Any, assembler: Path, folder: Path) -> int:
    import triton  # pyright: ignore[reportMissingModuleSource]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    names = kernel.arg_names
    types = {x: "constexpr" if x in SIZES else TYPES.get(x, "*fp32") for x in names}
    aligned = [x for x in names if types[x].startswith("*") or x == "columns"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={x: SIZES[x] for x in names if x in SIZES},
        attrs={(names.index(x),): [["tt.divisibility", 16]] for x in aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS}
    )
    text = folder / "kernel.ptx"
    text.write_text(compiled.asm["ptx"])
    command = [str(assembler), "-v", "-arch=sm_90a", "-o", "/dev/null", str(text)]
    said = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
    return sum(int(x) for x in re.findall(r"(\d+) bytes spill", said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
