"""Who may import whom (docs: the layout), read from the source, and what a --help may load."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("prepare", "shards", "mygpt", "bench")
SCRIPTS = ("train", "eval")
# The model and what it is trained by stand alone: of the project they import each other only.
STANDALONE = {"mygpt.config", "mygpt.loss", "mygpt.model", "mygpt.optim"}
# Built on the core, which never imports them; train.py imports the trackers that a flag asks for.
ROOMS = {
    "prepare.formats",
    "shards.commands",
    *("mygpt.eval", "mygpt.report", "mygpt.doctor", "mygpt.hub", "mygpt.play", "mygpt.explain"),
    "mygpt.trackers",
}
MAY_IMPORT = {
    "prepare": {"prepare", "shards"},
    "shards": {"shards"},
    "mygpt": {"mygpt", "shards"},
    "train": {"mygpt", "shards"},
    "eval": {"mygpt", "shards"},
}
HEAVY = {"torch", "transformers"}


def source_files() -> list[Path]:
    scripts = [ROOT / f"{name}.py" for name in SCRIPTS]
    found = [path for path in scripts if path.exists()]
    return found + [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in source_files()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every name imported anywhere in a module, inside functions too, relative ones refused."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def imported_by(name: str, for_types: bool = True) -> set[str]:
    tree = ast.parse(FILES[name].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            node.body = []
    return set(imports(tree))


def of_the_project(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] in (*PACKAGES, *SCRIPTS)}


def test_there_is_something_to_look_at() -> None:
    assert {"prepare.unit", "shards.loader", "mygpt.model", "train"} <= FILES.keys()
    assert "shards.stream" in imported_by("shards.loader")
    assert "torch" in imported_by("shards.loader")


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_run_one_way(name: str) -> None:
    package = name.partition(".")[0]
    if package == "bench":  # it measures everything, and nothing imports it
        return
    for other in of_the_project(imported_by(name)):
        assert other.partition(".")[0] in MAY_IMPORT[package], f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(STANDALONE))
def test_the_model_stands_alone(name: str) -> None:
    assert of_the_project(imported_by(name)) <= STANDALONE


def room_of(name: str) -> str:
    """The room that a module belongs to, "" if it is in none."""
    room = ".".join(name.split(".")[:2])
    return room if room in ROOMS else ""


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_core_never_imports_rooms(name: str) -> None:
    assert FILES.keys() >= ROOMS
    core = name.startswith(("prepare.", "shards.", "mygpt.")) and name != "shards.__main__"
    if core and not room_of(name):
        assert not {room_of(other) for other in imported_by(name)} - {""}
    if name == "train":
        assert {room_of(other) for other in imported_by(name)} <= {"", "mygpt.trackers"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_offline_side_never_imports_torch(name: str) -> None:
    heavy = {other.partition(".")[0] for other in imported_by(name)} & HEAVY
    if name.startswith(("prepare", "shards")) and name != "shards.loader":
        assert not heavy
    if name == "mygpt.config":
        assert not heavy, "flags are parsed before torch is imported"


def test_there_is_no_ring() -> None:
    # Imports inside functions count: a ring hidden by lazy imports is one all the same.
    graph = {name: of_the_project(imported_by(name, for_types=False)) for name in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imported in a ring: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_files_are_empty(package: str) -> None:
    """All but mygpt's own, which holds the version and nothing else."""
    for path in (ROOT / package).rglob("__init__.py"):
        version = rb'__version__ = "\d+\.\d+\.\d+"\n' if path.parent == ROOT / "mygpt" else b""
        assert re.fullmatch(version, path.read_bytes())


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_happens_at_import(name: str) -> None:
    """A module's top level holds imports, definitions, values and the call that starts it."""
    allowed = (
        *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign),
        ast.If,
    )
    for node in ast.parse(FILES[name].read_text("utf-8")).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, allowed), f"{name}, line {node.lineno}"
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            assert test in ("TYPE_CHECKING", "__name__ == '__main__'"), f"{name}: if {test}"


HELP = """
import json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as exit_:
    print(json.dumps([exit_.code, sorted(sys.modules)]))
"""
COMMANDS = [
    *(
        "prepare",
        "shards",
        "mygpt.hub",
        "mygpt.report",
        "mygpt.doctor",
        "mygpt.play",
        "mygpt.explain",
    ),
    "mygpt.doctor.verify_resume",
    *(f"{name}.py" for name in SCRIPTS if name in FILES),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_before_anything_heavy(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HELP, command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,  # a tenth of a second; the true measure is what was loaded
    )
    text, _, answer = done.stdout.rstrip().rpartition("\n")
    code, loaded = json.loads(answer)
    assert not code
    assert "usage" in text.lower() and "--" in text
    assert not HEAVY & set(loaded)
    assert "tyro" in loaded or "argparse" in loaded
