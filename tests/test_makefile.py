"""What the targets of make run: values with spaces and quotes arrive as one word."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In place of Python: the words that it was given, one a line.
ECHO = '#!/bin/sh\nprintf "%s\\n" "$@"\n'


def words(folder: Path, target: str, **values: str) -> list[str]:
    """The words that the Python of an environment gets from `make TARGET NAME=VALUE ...`."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (folder / "bin" / name).write_text(ECHO)
        (folder / "bin" / name).chmod(0o755)
    (folder / "core").touch()
    given = [f"{name}={value}" for name, value in values.items()]
    command = ["make", "-s", "-C", str(ROOT), target, f"VENV={folder}", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("make")]


@pytest.mark.parametrize(
    ("source", "name", "out"),
    [
        ("books.txt", "", "data/books"),
        ("corpus/", "", "data/corpus"),
        ("crawl/*.jsonl.gz", "", "data/crawl"),
        ("crawl/*.jsonl.gz", "web", "data/web"),
        ("s3://bucket/prefix", "", "data/prefix"),
        ("my books/vol 1.txt", "", "data/vol_1"),
        ("my books/*.txt", "", "data/my_books"),
        ("my books/", "", "data/my_books"),
        ("it's mine.txt", "my books", "data/my books"),
    ],
)
def test_data(source: str, name: str, out: str, tmp_path: Path) -> None:
    values = {"INPUT": source, "ARGS": "--workers 2"} | ({"NAME": name} if name else {})
    assert words(tmp_path, "data", **values) == [
        *("-m", "prepare", source, "--out", out, "--workers", "2")
    ]


def test_the_other_targets(tmp_path: Path) -> None:
    run, data = "log/it's a run", "data/my books"
    for target in ("train-small", "train-gpu4"):
        given = words(tmp_path, target, RUN=run, DATA=data)
        assert {run, data} <= set(given), given
    for device, found in {"auto": "cuda", "cpu": "cpu"}.items():  # never a CPU unasked
        given = words(tmp_path, "train-gpu4", DEVICE=device)
        assert given[given.index("--device") + 1] == found
    assert words(tmp_path, "eval", RUN=run, DATA=data) == ["eval.py", run, "--data", data]
    assert words(tmp_path, "sample", RUN=run, PROMPT="don't go")[1:5] == [
        *(run, "--no-loss", "--prompt", "don't go")
    ]
    assert words(tmp_path, "report", RUN=run)[:3] == ["-m", "mygpt.report", run]
    assert words(tmp_path, "export", RUN=f"{run}/")[-2:] == [f"{run}/", "exported/it's a run"]
    assert words(tmp_path, "export", RUN=run, OUT="a b")[-1] == "a b"
    assert data in words(tmp_path, "verify-resume", DATA=data)
