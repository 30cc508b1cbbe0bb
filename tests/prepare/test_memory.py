"""A worker's memory does not grow with the input: measured in processes of their own."""

import gzip
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.prepare.support import ROOT, held, law, make

MOST = 700  # MB, resident
MEGABYTE = 1_000_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")


# The kernel counts what a process had before exec, its parent's memory, in its ru_maxrss, so the
# process says for itself what it had since; its forked workers never had another's.
DRIVER = """
import re, resource
from prepare.__main__ import main
main()
own = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def resident(*arguments: object) -> float:
    """Prepare in a process of its own; the most memory that it or a worker of it had, in MB."""
    command = [sys.executable, "-c", DRIVER, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024 / MEGABYTE


def prose(megabytes: int) -> Iterator[bytes]:
    """Lines of words, a megabyte at a time, as varied as costs nothing."""
    chance = np.random.default_rng(0)
    words = np.array([b"%s%d" % (b"word"[: i % 5], i) for i in range(3000)], object)
    megabyte = b" ".join(words[chance.integers(0, len(words), 180_000)])[:MEGABYTE]
    for number in range(megabytes):
        yield b"%d " % number + megabyte[:-200] + b"\n"


def random_words(megabytes: int) -> Iterator[bytes]:
    """Words of eight letters on average, hardly one of which comes twice."""
    chance = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)
    for _ in range(megabytes):
        yield letters[np.minimum(chance.integers(0, 30, MEGABYTE - 1), 26)].tobytes() + b"\n"


def long_tail(megabytes: int) -> Iterator[bytes]:
    """As web text: one word in ten was never met before."""
    for common, rare in zip(prose(megabytes), random_words(megabytes), strict=True):
        yield common[:900_000] + b" " + rare[-100_000:]


def write(path: Path, megabytes: int, text: Callable[[int], Iterator[bytes]] = prose) -> Path:
    """A text file; compressed where its name says so."""
    compress = path.suffix == ".gz"
    with gzip.open(path, "wb", 1) if compress else open(path, "wb") as file:
        file.writelines(text(megabytes))
    return path


def test_a_row_group_of_128_mb(tmp_path: Path) -> None:
    texts = [
        block[start : start + 20_000] for block in prose(134) for start in range(0, 10**6, 20_000)
    ]
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "large.parquet")
    assert pq.ParquetFile(tmp_path / "large.parquet").num_row_groups == 1
    for workers in (1, 2):
        arguments = (tmp_path / "large.parquet", "--out", tmp_path / f"{workers}")
        assert resident(*arguments, "--workers", workers) < MOST


def test_rows_that_repeat_one_text(tmp_path: Path) -> None:
    """Stored once in the file, they are a gigabyte of text."""
    text = next(prose(1))[:20_000].decode()
    pq.write_table(pa.table({"text": [text] * 50_000}), tmp_path / "same.parquet")
    assert (tmp_path / "same.parquet").stat().st_size < MEGABYTE
    (tmp_path / "val.txt").write_text("validation text")
    arguments = ("--val-source", tmp_path / "val.txt", "--workers", 1)
    assert resident(tmp_path / "same.parquet", *arguments, "--out", tmp_path / "out") < MOST


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "split", "sizes"),
    [
        ("a.txt", "position", (120, 400)),
        ("a.txt.gz", "given", (120, 400)),
        pytest.param("a.txt", "given", (200, 2000), marks=SLOW),
        pytest.param("a.txt.gz", "given", (200, 2000), marks=SLOW),
        pytest.param("a.txt", "position", (200, 2000), marks=SLOW),
        pytest.param("a.txt.gz", "position", (200, 2000), marks=SLOW),
    ],
)
def test_one_text_of_any_size(
    name: str, split: str, sizes: tuple[int, int], tmp_path: Path
) -> None:
    """It is read as a stream: most of what a longer text has more is never in memory.

    What allocators and the encoder keep grows for a while: of a.txt on two cores to 255 MB at 200
    MB of text, 470 at 2,000, 514 at 3,000 and at 4,000.
    """
    (tmp_path / "val.txt").write_text("validation text")
    validation = {"given": ("--val-source", tmp_path / "val.txt"), "position": ()}[split]
    most = {}
    for megabytes in sizes:
        path = write(tmp_path / name, megabytes)
        out = tmp_path / f"{megabytes}"
        most[megabytes] = resident(path, *validation, "--out", out, "--workers", 1)
    small, large = sizes
    assert most[large] < MOST
    assert most[large] < most[small] + min(300, (large - small) / 2), most


@pytest.mark.parametrize(
    ("text", "megabytes"),
    [
        (random_words, 120),
        pytest.param(long_tail, 3000, marks=[SLOW, pytest.mark.timeout(1800)]),
    ],
)
def test_words_that_never_repeat(
    text: Callable[[int], Iterator[bytes]], megabytes: int, tmp_path: Path
) -> None:
    """The encoder caches each word that it meets: 160 MB of these took 1.7 GB."""
    path = write(tmp_path / "a.txt", megabytes, text)
    assert resident(path, "--out", tmp_path / "out", "--workers", 1) < MOST
    path.unlink()


def a_large_cell(path: Path) -> None:
    """A quoted cell of many lines, just below what a document may have."""
    with open(path, "wb") as file:
        file.write(b'id,text\n1,"')
        file.writelines(prose(60))
        file.write(b'"\n')


def a_cell_too_large(path: Path) -> None:
    with gzip.open(path, "wb", 1) as file:
        file.write(b'id,text\n1,"')
        file.writelines(line.replace(b" ", b'""', 9) for line in prose(300))
        file.write(b'"\n2,text\n')


def zeros_in_an_archive(path: Path) -> None:
    """A gigabyte in four megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a.txt", "w") as member:
            for _ in range(1024):
                member.write(b"0" * (1 << 20))
        archive.writestr("b.txt", "text")


def tags(path: Path) -> None:
    path.write_bytes(b"<b>x</b>" * (1 << 19))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write", "documents"),
    [
        ("a.csv", a_large_cell, "1 written + 0 empty + 0 quarantined"),
        ("a.csv.gz", a_cell_too_large, "1 written + 0 empty + 1 quarantined"),
        ("a.zip", zeros_in_an_archive, "1 written + 0 empty + 1 quarantined"),
        ("a.html", tags, "1 written + 0 empty + 0 quarantined"),
    ],
)
def test_the_other_formats(
    name: str, write: Callable[[Path], None], documents: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    (tmp_path / "val.txt").write_text("validation text")
    out = tmp_path / "out"
    flags = ("--val-source", tmp_path / "val.txt", "--max-bad", 10**9, "--workers", 1)
    assert resident(tmp_path / name, *flags, "--out", out) < MOST
    documents = f"{2 + ('1 quarantined' in documents)} read = 2{documents[1:]}"
    assert documents in (out / "prepare.log").read_text()


@pytest.mark.parametrize("letter", ["x", "é", " ", "\n"])
def test_a_megabyte_of_one_letter_takes_no_minutes(letter: str, tmp_path: Path) -> None:
    text = letter * (MEGABYTE // len(letter.encode()))
    pq.write_table(pa.table({"text": ["before", text, "after"]}), tmp_path / "a.parquet")
    (tmp_path / "val.txt").write_text("validation text")
    start = time.process_time()
    out = make(tmp_path / "out", tmp_path / "a.parquet", "--val-source", tmp_path / "val.txt")
    assert time.process_time() - start < 20
    assert [document.tokens for document in held(out)["train"]][1] == law(text)
