"""The bench's corpus: real files, each content once, the same documents in every form."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench import corpus
from tests.prepare.support import texts


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder that the corpus is built from; returns the documents that are fit for it."""
    found = texts(100)
    for number, text in enumerate(found):
        path = tmp_path / f"root/{number % 3}/{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8", newline="")
        if number < 10:
            path.with_suffix(".md").write_text(text, "utf-8", newline="")
    (tmp_path / "root/binary.py").write_bytes(b"\xff\xfe")
    (tmp_path / "root/empty.py").write_bytes(b"")
    (tmp_path / "root/long.py").write_bytes(b"x" * (corpus.LARGEST_DOCUMENT + 1))
    (tmp_path / "root/program.exe").write_bytes(b"no text by its name")
    (tmp_path / "root/link.py").symlink_to(tmp_path / "root/program.exe")
    monkeypatch.setattr(corpus, "_roots", lambda: [tmp_path / "root"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def test_every_form_holds_the_same(documents: list[str]) -> None:
    made = corpus.build(1)
    rows = pq.read_table(made.parquet)["text"].to_pylist()
    assert sorted(rows) == sorted(documents)
    lines = made.jsonl.read_bytes().splitlines()
    assert [json.loads(line)["text"] for line in lines] == rows
    assert made.txt.read_bytes() == "".join(f"{text}\n" for text in rows).encode()
    sample = pq.read_table(made.sample)["text"].to_pylist()
    assert sample == rows[::8]
    assert made.documents == 100
    assert made.text_bytes == sum(len(text.encode()) for text in rows)
    assert made.sample_bytes == sum(len(text.encode()) for text in sample)


def test_no_more_than_was_asked_for(documents: list[str]) -> None:
    wanted = sum(len(text.encode()) for text in documents) // 2
    made = corpus.build(wanted / 1e6)
    assert wanted <= made.text_bytes < wanted + 1000
    assert 30 < made.documents < 70


def test_code_alone(documents: list[str]) -> None:
    rows = pq.read_table(corpus.build(1, "code").parquet)["text"].to_pylist()
    assert set(rows) == set(documents)  # the .md files repeat some of them
    (corpus._roots()[0] / "0/0.py").rename(corpus._roots()[0] / "0/0.rst")
    (corpus._roots()[0] / "0/0.md").unlink()
    rows = pq.read_table(corpus.build(2, "code").parquet)["text"].to_pylist()
    assert set(rows) == set(documents[1:])


@pytest.mark.parametrize("kind", ["cjk", "long-tail"])
def test_made_text_is_the_same_each_time(kind: corpus.Kind) -> None:
    first, second = (list(islice(corpus._made(kind), 3)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 3
    for text in first:
        assert 5000 < len(text.encode()) < 7000


def test_one_word_in_ten_is_new() -> None:
    counts = Counter(
        word for text in islice(corpus._made("long-tail"), 600) for word in text.split()
    )
    once = sum(1 for count in counts.values() if count == 1)
    assert once / counts.total() == pytest.approx(0.1, abs=0.02)


def test_it_is_mixed_and_kept(documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = corpus.build(1)
    rows = pq.read_table(made.parquet)["text"].to_pylist()
    assert rows != sorted(rows)
    monkeypatch.setattr(corpus, "_roots", list)
    assert corpus.build(1) == made
