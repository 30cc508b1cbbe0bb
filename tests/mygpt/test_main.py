"""The `mygpt` command runs what each word names, from the tree and from an installed wheel."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import mygpt
from mygpt.__main__ import COMMANDS, check, script_path
from tests.training import BATCH, MODEL, environment

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def test_every_package_and_data_file_is_installed() -> None:
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")}
    found = {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders}
    assert {*PACKAGES} == {*found, "mygpt.scripts"}
    data = PROJECT["tool"]["setuptools"]["package-data"]
    named = {name.replace(".", "/") + f"/{file}" for name in data for file in data[name]}
    files = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in data_files(name)}
    assert named == files


def data_files(package: str) -> list[Path]:
    folder = ROOT / package.replace(".", "/")
    return [path for path in folder.glob("*.*") if path.is_file() and path.suffix != ".py"]


def test_the_scripts_are_all_there_is_at_the_top() -> None:
    """They are installed as mygpt.scripts, with whatever Python file lies beside them."""
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"mygpt.scripts": "."}
    assert {path.name for path in ROOT.glob("*.py")} == {"train.py", "eval.py"}
    assert script_path("train.py") == ROOT / "train.py"


def test_the_version_is_that_of_the_package() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mygpt.__version__"}


def test_help_version_and_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (["--help"], 0), (["-h", "x"], 0), ([], 2), (["--version"], 0):
        with pytest.raises(SystemExit) as exit_:
            check(words)
        assert exit_.value.code == code
    assert capsys.readouterr().out.endswith(f"\n{mygpt.__version__}\n")
    with pytest.raises(SystemExit) as exit_:
        check(["trian", "tiny"])
    assert exit_.value.code == 2
    assert "found 'trian': did you mean train?" in capsys.readouterr().err
    for word in COMMANDS:
        check([word, "--help"])


@pytest.mark.parametrize("word", ["train", "prepare", "export"])
def test_a_word_runs_its_program(word: str) -> None:
    """`python -m mygpt` from anywhere: one script, one module, one command of a module."""
    command = [sys.executable, "-m", "mygpt", word, "--help"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert {"train": "Presets: tiny", "prepare": "--val-fraction", "export": "--best"}[word] in (
        done.stdout
    )


@pytest.mark.slow
def test_installed_it_works_in_an_empty_folder(tmp_path: Path) -> None:
    """A wheel in an environment of its own: text to tokens, training, evaluation, export."""
    source, wheels, venv, work = (tmp_path / name for name in ("source", "wheels", "venv", "work"))
    ignored = shutil.ignore_patterns(".*", "tests", "data", "log", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run([*pip, "wheel", str(source), *offline, "--wheel-dir", str(wheels)])
    run([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    [packages] = venv.glob("lib/python*/site-packages")
    # The dependencies are those of this environment, but not its own link to this tree.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    [wheel] = wheels.glob("*.whl")
    run([*pip, "--python", str(venv / "bin/python"), "install", "--no-deps", str(wheel)])
    work.mkdir()
    (work / "books.txt").write_text("It was a dark and stormy night.\n" * 400)
    shape = [*MODEL.split()[2:], *BATCH.split(), "--max-steps", "2"]
    for line in (
        "prepare books.txt --out data/books",
        f"train tiny --log-dir log/books {' '.join(shape)}",
        "eval --json --max-new-tokens 3 --device cpu",
        "sample log/books --prompt It --max-new-tokens 3 --device cpu",
        "report log/books",
        "export log/books exported/books",
        f"verify-resume tiny --data data/books --steps 1 {' '.join(shape[:-2])}",
    ):
        found = run([str(venv / "bin/mygpt"), *line.split()], work)
        assert "python eval.py" not in found and "Traceback" not in found
    code = "import mygpt, sys; print(mygpt.__version__, mygpt.__file__)"
    version, file = run([str(venv / "bin/python"), "-c", code], work).split()
    assert version == mygpt.__version__
    assert Path(file).is_relative_to(packages)


def run(command: list[str], folder: Path | None = None) -> str:
    variables = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
