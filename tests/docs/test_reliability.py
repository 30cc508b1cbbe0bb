"""Every row of docs/RELIABILITY.md names a test that exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_is_named_is_there() -> None:
    text = (ROOT / "docs" / "RELIABILITY.md").read_text("utf-8")
    named = re.findall(r"(tests/[\w/]+\.py)?::(\w+)", text)
    assert len(named) > 25
    file = ""
    for given, name in named:
        file = given or file  # a second test of one row leaves the file out
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
    for path in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path
