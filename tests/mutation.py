"""Mutation testing: edits of one file that its own tests do not notice.

    pip install mutmut==3.8.0 'pytest<9.1'
    python -m tests.mutation shards/order.py

mutmut edits each function in turn (an operator, a number, a default, a removed argument ...) and
runs those tests of the file's own test module that call it, in a copy of this folder. Printed are
the edits that survive, as diffs, and the score. Constants of a module and decorated functions are
not mutated.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Functions to mutate if not all, as mutmut names them.
FUNCTIONS = {"mygpt/schedule.py": "*learning_rate*"}
# Tests that must notice, as `pytest -k` selects them; the others take long and notice no more.
TESTS = {
    "mygpt/checkpoint.py": "not kill and not plain",
    "prepare/encode.py": "not wrong_one and not fast",
    "prepare/split.py": "rule or by_position or fraction and not larger",
    "prepare/unit.py": "not index_of and not followed",
    "shards/loader.py": "not every_window and not together_are and not number_of and not 1024-0 "
    "and not ragged-2 and not grow and not open_files and not lies_ahead",
    "shards/manifest.py": "not damage_anywhere",
}
PACKAGES = ["prepare", "shards", "mygpt"]
OTHERS = ["bench", "docs", "tests", "train.py", "eval.py"]


def main() -> int:
    """Mutate the file on the command line; print survivors and the score."""
    file = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in [*PACKAGES, *OTHERS]:
            path = ROOT / name
            (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / name)
        settings = (ROOT / "pyproject.toml").read_text() + configuration(file)
        (copy / "pyproject.toml").write_text(settings)
        command = [sys.executable, "-m", "mutmut"]
        pattern = f"{file.removesuffix('.py').replace('/', '.')}.{FUNCTIONS.get(file, '*')}"
        subprocess.run([*command, "run", "--max-children", "1", pattern], cwd=copy, check=True)
        found = subprocess.run(
            [*command, "results", "--all", "true"], cwd=copy, check=True, capture_output=True
        )
        lines = [line.strip() for line in found.stdout.decode().splitlines()]
        outcomes = dict(line.split(": ") for line in lines if ": " in line)
        outcomes = {name: outcome for name, outcome in outcomes.items() if outcome != "not checked"}
        survivors = [
            name for name, outcome in outcomes.items() if outcome in ("survived", "no tests")
        ]
        for name in survivors:
            subprocess.run([*command, "show", name], cwd=copy, check=True)
    print(f"{file}: {len(outcomes) - len(survivors)} of {len(outcomes)} mutants noticed")
    return 0


def configuration(file: str) -> str:
    """Return mutmut's part of pyproject.toml; a list of strings is the same in JSON and TOML."""
    package, name = file.split("/")
    tests = [f"tests/{package}/test_{name}", "-k", TESTS.get(file, "")]
    values = {
        "source_paths": PACKAGES,
        "only_mutate": [file],
        "also_copy": OTHERS,
        "pytest_add_cli_args_test_selection": tests,
        "pytest_add_cli_args": ["-m", "not slow", "-p", "no:cacheprovider"],
        "timeout_multiplier": 3.0,  # for loops that no longer end
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n[tool.mutmut]\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
