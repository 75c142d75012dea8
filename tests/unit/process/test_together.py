"""Objects between ranks go through one door, which has no deadline."""

import ast
from pathlib import Path

import megasd

# It looks for broken networks, with deadlines of its own.
ELSEWHERE = {"process/together.py", "doctor/preflight.py"}


def test_no_object_travels_on_a_group_with_a_deadline() -> None:
    root = Path(megasd.__file__).parent
    found = {
        f"{file.relative_to(root)}:{node.lineno}"
        for file in root.rglob("*.py")
        if str(file.relative_to(root)) not in ELSEWHERE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        if "_object" in node.attr or node.attr in ("barrier", "new_group", "monitored_barrier")
        if ast.unparse(node.value) in ("dist", "torch.distributed")
    }
    assert not found, "megasd.process.together has it"
