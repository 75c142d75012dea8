"""Files up to 500 lines, functions up to 60; the loop is a page, a method two thirds of one."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("megasd", "tools", "tests")
FILE_LINES, FUNCTION_LINES = 500, 60
SHORTER = {"megasd/loop/train.py": 150, "megasd/algorithms/[a-z]*.py": 120}


def too_long(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    limit = min([FILE_LINES, *(limit for glob, limit in SHORTER.items() if path.match(glob))])
    if lines > limit:
        yield f"{path}: {lines} lines, the limit is {limit}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                where = f"{path}:{node.lineno}: {node.name}"
                yield f"{where}: {length} lines, the limit is {FUNCTION_LINES}"


def main() -> None:
    files = sorted(file for folder in FOLDERS for file in Path(folder).rglob("*.py"))
    faults = [fault for file in files for fault in too_long(file)]
    print("\n".join(faults) or f"lengths: {len(files)} files within their limits")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
