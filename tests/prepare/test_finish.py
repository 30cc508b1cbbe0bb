"""What is left out is counted, listed and limited."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from prepare import job
from prepare.finish import losses
from prepare.plan import Unit
from prepare.quarantine import (
    BROKEN,
    UNLISTED,
    BadDocuments,
    BadLimit,
    Entry,
    check_bad,
    list_bad,
)
from tests.prepare.support import (
    contents,
    held,
    make,
    quarantine,
    run,
    shrink,
    text_of,
    texts,
    write_jsonl,
)


def corpus(path: Path, good: int, bad: int) -> Path:
    write_jsonl(path, texts(good, words=3))
    with open(path, "a") as file:
        file.writelines(['{"text": null}\n'] * bad)
    return path


@pytest.mark.parametrize(
    ("good", "bad", "flags", "allowed"),
    [
        (100, 10, [], True),
        (100, 11, [], False),
        (15_000, 15, [], True),  # a thousandth of the documents read
        (15_000, 16, [], False),
        (100, 0, ["--max-bad", 0], True),
        (100, 1, ["--max-bad", 0], False),
        (100, 50, ["--max-bad", 50], True),
    ],
)
def test_how_many_may_be_bad(
    good: int, bad: int, flags: list, allowed: bool, tmp_path: Path
) -> None:
    source = corpus(tmp_path / "a.jsonl", good, bad)
    outcome = run(source, "--out", tmp_path / "out", *flags)
    assert outcome.code == (0 if allowed else 2), outcome.err
    assert len(quarantine(tmp_path / "out")) == bad
    if allowed:
        held(tmp_path / "out")
    else:
        first = quarantine(tmp_path / "out")[0]
        assert (
            f"found {bad}, the first in a.jsonl at {first['position']} (expected a string in"
            in outcome.error
        )
        assert "quarantine.jsonl" in outcome.error
        assert "--max-bad" in outcome.error
        assert not (tmp_path / "out/manifest.json").exists()


def test_raising_max_bad_goes_on_from_what_is_finished(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a.jsonl", 100, 20)
    assert run(source, "--out", tmp_path / "out").code == 2
    shard = (tmp_path / "out/train_00000.npy").stat().st_mtime_ns
    outcome = run(source, "--out", tmp_path / "out", "--max-bad", 20)
    assert "Resuming: 1 of 1 unit finished." in outcome.out
    assert (tmp_path / "out/train_00000.npy").stat().st_mtime_ns == shard
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["counts"]["quarantined"] == 20


def test_without_bad_documents_the_list_is_empty(tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus(tmp_path / "a.jsonl", 100, 0))
    assert (out / "quarantine.jsonl").read_bytes() == b""


def test_the_summary(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a.jsonl", 1000, 3)
    outcome = run(source, "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    for side in ("train", "val"):
        split = manifest["splits"][side]
        share = split["tokens"] / sum(s["tokens"] for s in manifest["splits"].values())
        assert (
            f"{split['tokens']:,} tokens ({share:.1%}), {split['documents']:,} documents, 1 shard"
        ) in outcome.out
    assert "1,003 read = 1,000 written + 0 empty + 3 quarantined" in outcome.out
    assert "MB/s" in outcome.out
    assert str(tmp_path / "out") in outcome.out


def entry(documents: int = 1, lost: int = 0, reason: str = "bad") -> Entry:
    return Entry("a.txt", 7, reason, documents, 0, lost)


@pytest.mark.parametrize(
    ("documents", "text", "bad", "max_bad", "allowed"),
    [
        (100, 10**9, entry(1, 10**6), None, True),
        (100, 10**9, entry(1, 2 * 10**6), None, False),  # more than a thousandth of the text
        (100, 10**6, entry(1, 64 << 10), None, True),
        (100, 10**6, entry(1, (64 << 10) + 1), None, False),
        (2, 10**6, entry(1, 49 * 10**6), None, False),  # a file of two
        (100, 99 * 10**6, entry(1, 10**6), 1, True),  # the same share of both
        (100, 98 * 10**6, entry(1, 2 * 10**6), 1, False),
        (100, 98 * 10**6, entry(1, 2 * 10**6), 2, True),
        (100, 0, entry(100, 10**6), 100, True),
    ],
)
def test_how_much_text_may_be_bad(
    documents: int, text: int, bad: Entry, max_bad: int | None, allowed: bool
) -> None:
    if allowed:
        check_bad([bad], documents, text, BadLimit(max_bad, text))
        return
    with pytest.raises(ValueError, match="bytes of text in bad documents") as caught:
        check_bad([bad], documents, text, BadLimit(max_bad, text))
    assert f"of {text + bad.bytes:,} bytes" in str(caught.value)
    assert "a.txt at 7" in str(caught.value)
    needed = int(str(caught.value).partition("raise --max-bad to ")[2].split()[0])
    check_bad([bad], documents, text, BadLimit(needed, text))
    with pytest.raises(ValueError, match="bad documents"):
        check_bad([bad], documents, text, BadLimit(needed - 1, text))


@pytest.fixture
def mostly_latin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus with a large text in which one byte is not UTF-8."""
    shrink(monkeypatch, PIECE_BYTES=50_000)
    folder = tmp_path / "corpus"
    write_jsonl(folder / "a.jsonl", texts(100))
    (folder / "b.txt").write_bytes(b"many words " * 10_000 + b"caf\xe9 " + b"words " * 10_000)
    return folder


def test_most_of_a_corpus_does_not_vanish(mostly_latin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lost = (mostly_latin / "b.txt").stat().st_size
    outcome = run(mostly_latin, "--out", out)
    assert f"found {lost:,}, most of them in corpus/b.txt at 0 (invalid UTF-8" in outcome.error
    assert f"left out   {lost:,} of " in outcome.out
    assert not (out / "manifest.json").exists()
    needed = outcome.error.partition("--max-bad to ")[2].split()[0]
    outcome = run(mostly_latin, "--out", out, "--max-bad", needed)
    assert outcome.code == 0, outcome.err
    assert f"left out   {lost:,} of " in outcome.out
    assert "           corpus/b.txt at 0: invalid UTF-8" in outcome.out
    assert quarantine(out)[0]["bytes"] == lost
    held(out)


def test_a_mended_source_starts_over(mostly_latin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(mostly_latin, "--out", out).code == 2
    (mostly_latin / "b.txt").write_text("many words " * 10_000)
    assert "Starting over" in run(mostly_latin, "--out", out).out
    held(out)


def test_a_broken_file_is_named_however_little_is_lost() -> None:
    entries = [entry(reason="null"), entry(reason=f"{BROKEN}: zlib inflate failed")]
    assert losses(entries, 100)[1:] == [f"           a.txt at 7: {BROKEN}: zlib inflate failed"]
    escape = Entry("\x1b[2J.txt", 7, BROKEN, 1, 0)
    assert losses([escape], 0)[1] == f"           \\x1b[2J.txt at 7: {BROKEN}"
    lines = losses(entries * 20, 100)
    assert len(lines) == 12
    assert "and 10 more: see quarantine.jsonl" in lines[-1]


def test_the_list_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MAX_LISTED=5, MIN_UNIT_BYTES=200)
    source = corpus(tmp_path / "a.jsonl", 100, 80)
    out = make(tmp_path / "out", source, "--max-bad", 80)
    entries = quarantine(out)
    assert [e["documents"] for e in entries] == [1, 1, 1, 1, 76]
    assert entries[-1]["reason"] == UNLISTED
    held(out)


def test_broken_files_are_always_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MAX_LISTED=2)
    listed: list[BadDocuments] = []
    for _ in range(2):
        bad = [BadDocuments(0, i, "null", bytes=5) for i in range(3)]
        list_bad(listed, [*bad, BadDocuments(0, 9, f"{BROKEN}: cut", 4, 100)])
    assert [(one.documents, one.bytes) for one in listed] == [(1, 5), (5, 25), (4, 100), (4, 100)]


@pytest.mark.parametrize("workers", [1, 2])
def test_it_ends_inside_a_unit(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MAX_BATCH_ROWS=100)
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_jsonl(sources[0], texts(50))
    sources[1].write_text("1\n" * 1000)
    command = [*sources, "--out", tmp_path / "out", "--workers", workers]
    assert "found 100, the first in b.jsonl at 0" in run(*command).error
    assert len(quarantine(tmp_path / "out")) == 100
    work = tmp_path / "out/.prepare"
    assert not any(any((work / name).glob("*")) for name in ("units", "staging"))
    make(tmp_path / "out", *sources, "--max-bad", 1000)
    assert contents(tmp_path / "out") == contents(
        make(tmp_path / "whole", *sources, "--max-bad", 1000)
    )


@pytest.mark.parametrize("flags", [[], ["--max-bad", 20]])
def test_it_ends_as_soon_as_too_much_is_bad(
    flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=1000)
    source = tmp_path / "a.jsonl"
    source.write_text("1\n" * 1000)
    write_jsonl(tmp_path / "b.jsonl", texts(1000))
    original, units = job.run_local, list[int]()

    def counted(work: Callable, given: Sequence[Unit], *rest: object) -> Iterator:
        for result in original(work, given, *rest):
            units.append(1)
            yield result

    monkeypatch.setattr(job, "run_local", counted)
    error = run(source, tmp_path / "b.jsonl", "--out", tmp_path / "out", *flags).error
    assert "the first in a.jsonl at 0" in error
    assert len(units) < 40  # of some hundred
    assert len(quarantine(tmp_path / "out")) >= 500
    assert (
        "the first in a.jsonl at 0"
        in run(source, tmp_path / "b.jsonl", "--out", tmp_path / "out", *flags).error
    )


def test_a_split_far_from_what_was_requested_is_said(tmp_path: Path) -> None:
    large = text_of("train") + " and so on" * 500
    documents = [large, *(f"{i} {text_of('val')}" for i in range(40)), text_of("val")]
    write_jsonl(tmp_path / "a.jsonl", documents)
    outcome = run(tmp_path / "a.jsonl", "--out", tmp_path / "out")
    (note,) = [line for line in outcome.out.splitlines() if line.startswith("note")]
    assert "of the tokens are validation text, not 10%: whole documents are drawn" in note
    assert "(42 documents): cut long ones, or give --val-source" in note
    (tmp_path / "long.txt").write_text("word " * 300 + "\n" + "word " * 700)
    outcome = run(tmp_path / "long.txt", "--out", tmp_path / "long", "--val-fraction", 0.9)
    assert "validation text, not 90%" in outcome.out
    (tmp_path / "last.txt").write_text("word " * 800 + "\n" + "word " * 150 + "\nword\n")
    outcome = run(tmp_path / "last.txt", "--out", tmp_path / "last")
    assert "not 10%: it is cut at the end of a line, and some lines are long" in outcome.out
    many = [f"document {i}" for i in range(3000)]
    write_jsonl(tmp_path / "many.jsonl", many)
    assert "\nnote" not in run(tmp_path / "many.jsonl", "--out", tmp_path / "many").out


def test_one_book_and_what_lies_beside_it(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("a line\n" * 1000)
    outcome = run(book, "--out", tmp_path / "out")
    assert "2 written + 0 empty + 0 quarantined (the two parts of a text count" in outcome.out
    assert "900 documents" not in outcome.out and "1 document, 1 shard\n" in outcome.out
    for number in range(3):
        (tmp_path / "more").mkdir(exist_ok=True)
        (tmp_path / "more" / f"{number}.txt").write_text(f"{number} " * 100)
        (tmp_path / "more" / f"{number}.png").write_bytes(b"\0")
    (tmp_path / "more" / "notes.pdf").write_bytes(b"%PDF")
    command = (tmp_path / "more", "--val-source", book)
    for options in (["--plan"], []):
        outcome = run(*command, "--out", tmp_path / "more-out", *options)
        assert "other      3 .png, 1 .pdf: not read" in outcome.out
    (tmp_path / "more" / "new.png").write_bytes(b"\0")  # no text: the dataset stays what it is
    assert "nothing to do" in run(*command, "--out", tmp_path / "more-out").out


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_text_in_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve café\n".encode(encoding) * 100)
    error = run(tmp_path / "a.txt", "--out", tmp_path / "out").error
    assert f"text in {encoding.title().replace('Utf', 'UTF')}" in error
    assert "iconv -f" in error
