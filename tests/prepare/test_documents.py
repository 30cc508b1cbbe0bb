"""What can be read is read whole; what can't is listed with its source, place and reason."""

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import documents as documents_module
from prepare.sources import find_files
from tests.prepare.support import (
    COMPRESSORS,
    contents,
    expected,
    held,
    make,
    quarantine,
    repaired,
    run,
    shrink,
    text_of,
    texts,
    write_jsonl,
)

FILLERS = [text_of("train"), text_of("val")]
anything = st.text(st.characters(), max_size=12)  # lone surrogates included
sizes = st.integers(1, 60)


def json_line(draw: st.DrawFn, text: str) -> str:
    """One of the many ways to write {"text": text}."""
    escaped = json.dumps(text, ensure_ascii=draw(st.booleans()) or repaired(text) != text)
    more = draw(
        st.sampled_from(["", ', "n": NaN', ', "n": {"text": 1}', ', "n": [1e400, "\\u2028"]'])
    )
    gap = draw(st.sampled_from(["", " ", "\t"]))
    return f'{gap}{{"x": null,{gap}"text"{gap}:{escaped}{more}}}{gap}'


@st.composite
def jsonl(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, str]]]:
    """The bytes of a jsonl file and its documents: (where the line begins, text)."""
    content, documents = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])), []
    for text in [*FILLERS, *draw(st.lists(anything, max_size=8))]:
        content += draw(st.sampled_from([b"", b"\n", b"  \r\n"])) if documents else b""
        documents.append((len(content) if documents else 0, text))
        content += json_line(draw, text).encode() + draw(st.sampled_from([b"\n", b"\r\n"]))
    return (content[:-1] if draw(st.booleans()) else content), documents


@settings(max_examples=40)
@given(file=jsonl(), unit=st.integers(20, 300), block=st.integers(40, 200), batch=sizes)
def test_jsonl_of_every_spelling_in_units_of_every_size(
    file: tuple[bytes, list[tuple[int, str]]],
    unit: int,
    block: int,
    batch: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("jsonl")
    content, documents = file
    (folder / "a.jsonl").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, MIN_UNIT_BYTES=unit, READ_BYTES=block, BATCH_BYTES=batch)
        out = make(folder / "out", folder / "a.jsonl", "--text-column", "text")
    assert held(out) == expected(("a.jsonl", row, text) for row, text in documents if text)
    counts = json.loads((out / "manifest.json").read_bytes())["counts"]
    assert counts["empty"] == sum(not text for _, text in documents)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_bad_lines(suffix: str, tmp_path: Path) -> None:
    bad = {
        b'{"text": null}': "expected a string in 'text', found null",
        b'{"text": 5}': "expected a string in 'text', found a int",
        b'{"text": ["a"]}': "expected a string in 'text', found a list",
        b'{"body": "x"}': "expected a string in 'text', found no such field",
        b'["text"]': "expected a JSON object, found a list",
        b'"text"': "expected a JSON object, found a str",
        b'{"text": "cut off': "Unterminated string",
        b"not JSON": "Expecting value",
        b'{"text": "\xff"}': "can't decode byte 0xff",
        b'{"text": "a"} {"text": "b"}': "Extra data",
        b"[" * 100_000: "JSON nested too deeply",
        b"{'text': 'a'}": "Expecting property name",
    }
    good = [json.dumps({"text": text}).encode() for text in texts(50)]
    lines, places, offset = [], [], 0
    for number, line in enumerate([*good[:5], *bad, *good[5:]]):
        if line in bad:
            places.append(offset)
        lines.append(line + b"\n" * (1 + number % 2))
        offset += len(lines[-1])
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESSORS[suffix](b"".join(lines)))
    out = make(tmp_path / "out", tmp_path / f"a.jsonl{suffix}", "--max-bad", 99)  # by bytes
    assert len([d for side in held(out).values() for d in side]) == 50
    entries = quarantine(out)
    assert [entry["position"] for entry in entries] == places
    for entry, reason in zip(entries, bad.values(), strict=True):
        assert entry["source"] == f"a.jsonl{suffix}"
        assert reason in entry["reason"]
        assert "\n" not in entry["reason"]


def test_the_column_is_found_beyond_odd_lines(tmp_path: Path) -> None:
    lines = ['{"version": 1}', "", "rubbish"]
    lines += [json.dumps({"score": float("nan"), "content": text}) for text in texts(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = make(tmp_path / "out", tmp_path / "a.jsonl")
    assert sum(map(len, held(out).values())) == 60
    assert [entry["position"] for entry in quarantine(out)] == [0, 16]


@pytest.mark.parametrize(
    ("column", "flags"),
    [("text", []), ("content", []), ("body", ["--text-column", "body"])],
)
def test_the_text_column(column: str, flags: list[str], tmp_path: Path) -> None:
    documents = texts(60)
    write_jsonl(tmp_path / "corpus/a.jsonl", documents, column)
    table = {"other": ["x"] * 60, column: documents, "z": [b"1"] * 60}
    pq.write_table(pa.table(table), tmp_path / "corpus/b.parquet")
    out = make(tmp_path / "out", tmp_path / "corpus", *flags)
    sides = held(out)
    for side in sides.values():
        half = len(side) // 2
        assert [document.tokens for document in side[:half]] == [d.tokens for d in side[half:]]


def test_a_missing_text_column_lists_those_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1], "raw": [b"x"]}), tmp_path / "a.parquet")
    error = run(tmp_path / "a.parquet", "--out", tmp_path / "out").error
    assert "expected a text column text or content in a.parquet, found body, raw" in error


def strings(values: list[bytes | None]) -> pa.Array:
    """A string column whose bytes nobody has checked."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)


@pytest.mark.parametrize("kind", ["string", "binary", "dictionary"])
def test_bad_rows(kind: str, tmp_path: Path) -> None:
    values: list[bytes | None] = [text.encode() for text in texts(200)]
    bad = {3: b"\xff", 60: None, 61: None, 110: b"ab\xed\xa0\x80", 199: b"cut \xe3\x81"}
    for row, value in bad.items():
        values[row] = value
    values[7] = values[120] = b""
    column = strings(values) if kind != "binary" else pa.array(values)
    column = column.dictionary_encode() if kind == "dictionary" else column
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=50)
    out = make(tmp_path / "out", tmp_path / "a.parquet")
    good = [(row, value) for row, value in enumerate(values) if row not in bad and value]
    assert held(out) == expected(("a.parquet", row, v.decode()) for row, v in good if v)
    entries = quarantine(out)
    assert sorted((entry["position"], entry["reason"][:30]) for entry in entries) == [
        (3, "invalid UTF-8 at byte 0: inval"),
        (60, "expected a string, found null"),
        (61, "expected a string, found null"),
        (110, "invalid UTF-8 at byte 2: inval"),
        (199, "invalid UTF-8 at byte 4: unexp"),
    ]
    counts = json.loads((out / "manifest.json").read_bytes())["counts"]
    assert (counts["read"], counts["empty"], counts["quarantined"]) == (200, 2, 5)


def test_a_column_of_nulls(tmp_path: Path) -> None:
    nulls = pa.array([None] * 5, pa.string())
    pq.write_table(pa.table({"text": nulls}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", FILLERS)
    out = make(tmp_path / "out", tmp_path / "a.parquet", tmp_path / "b.jsonl")
    assert [entry["position"] for entry in quarantine(out)] == [0, 1, 2, 3, 4]


def test_a_corrupt_page_loses_its_row_group_alone(tmp_path: Path) -> None:
    documents = texts(400, words=200)
    path = tmp_path / "a.parquet"
    table = pa.table({"text": documents})
    pq.write_table(table, path, row_group_size=100, compression="zstd", use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 100] = b"\x55" * 100
    path.write_bytes(content)
    out = make(tmp_path / "out", path, "--max-bad", 100)
    entries = quarantine(out)
    assert sum(entry["documents"] for entry in entries) + sum(map(len, held(out).values())) == 400
    first = entries[0]["position"]
    assert 100 <= first < 200
    assert entries == [entries[0] | {"source": "a.parquet", "documents": 200 - first}]
    assert entries[0]["reason"].startswith("unreadable from here on: ")
    good = [(row, text) for row, text in enumerate(documents) if not first <= row < 200]
    assert held(out) == expected(("a.parquet", *pair) for pair in good)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_parquet_file(share: float, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(100)}), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    write_jsonl(tmp_path / "b.jsonl", FILLERS)
    out = make(tmp_path / "out", path, tmp_path / "b.jsonl")
    (entry,) = quarantine(out)
    assert (entry["source"], entry["position"], entry["documents"]) == ("a.parquet", 0, 1)
    assert entry["reason"].startswith("unreadable from here on: ")


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_truncated_compressed_files(
    kind: str, suffix: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":  # too large to be looked at as a whole
        shrink(monkeypatch, PIECE_BYTES=2000, READ_BYTES=500)
    path = tmp_path / f"corpus/a.{kind}{suffix}"
    write_jsonl(path, texts(300))
    whole = COMPRESSORS[suffix](path.read_bytes() + os.urandom(6000).hex().encode())
    write_jsonl(tmp_path / "corpus/b.jsonl", FILLERS)
    for cut in (3, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        out = make(tmp_path / f"out{cut}", tmp_path / "corpus")
        (entry,) = quarantine(out)
        assert entry["source"] == f"corpus/a.{kind}{suffix}"
        assert entry["reason"].startswith("unreadable from here on: ")
        sides = held(out)
        if kind == "txt":
            assert sum(map(len, sides.values())) == 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_lines_before_the_break_are_kept(suffix: str, tmp_path: Path) -> None:
    """Whatever can be decompressed is read, though a larger read would fail."""
    path = tmp_path / f"a.jsonl{suffix}"
    write_jsonl(path, texts(300))
    content = path.read_bytes()
    whole = COMPRESSORS[suffix](content) + COMPRESSORS[suffix](os.urandom(50_000).hex().encode())
    path.write_bytes(whole[:-20_000])
    out = make(tmp_path / "out", path, "--max-bad", 300)
    assert sum(map(len, held(out).values())) == content.count(b"\n")
    (entry,) = quarantine(out)
    assert entry["source"] == f"a.jsonl{suffix}"
    # How much is missing can't be known; at least as much as there is may be.
    assert entry["bytes"] >= path.stat().st_size


def test_one_truncated_text_is_no_reason_to_fail_in_planning(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a line\n" * 100)[:-9])
    outcome = run(tmp_path / "a.txt.gz", "--out", tmp_path / "out")
    assert (
        "expected text in the sources, found none (0 empty and 1 bad document), the first"
        in outcome.error
    )


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("size", ["small", "large"])
def test_texts_that_are_not_utf8(
    size: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":
        shrink(monkeypatch, PIECE_BYTES=20, READ_BYTES=7, MIN_UNIT_BYTES=50)
    bad = [
        b"\xff",
        b"many words, then one byte \xe9 of Latin-1, then words",
        b"an end in \xf0\x9f\x99",
    ]
    for number, content in enumerate(
        [*bad, b"", text_of("train").encode(), text_of("val").encode()]
    ):
        path = tmp_path / f"corpus/{number}.txt{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(COMPRESSORS[suffix](content))
    out = make(tmp_path / "out", tmp_path / "corpus")
    entries = quarantine(out)
    sources = [f"corpus/{number}.txt{suffix}" for number in range(3)]
    assert sorted(entry["source"] for entry in entries) == sources
    assert all(entry["reason"].startswith("invalid UTF-8") for entry in entries)
    counts = json.loads((out / "manifest.json").read_bytes())["counts"]
    assert (counts["read"], counts["written"], counts["empty"]) == (6, 2, 1)
    held(out)


def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = texts(100)
    pq.write_table(pa.table({"text": documents}), tmp_path / "corpus.parquet", row_group_size=60)
    one = contents(make(tmp_path / "one", tmp_path / "corpus.parquet"))
    shrink(monkeypatch, BATCH_BYTES=100)
    assert contents(make(tmp_path / "two", tmp_path / "corpus.parquet")) == one


def test_several_members_in_a_compressed_file_are_one_text(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for suffix in (".gz", ".zst"):
        parts = [COMPRESSORS[suffix](part.encode()) for part in ("one ", "and ", "two")]
        (tmp_path / f"corpus/a.txt{suffix}").write_bytes(b"".join(parts))
    write_jsonl(tmp_path / "corpus/z.jsonl", FILLERS)
    out = make(tmp_path / "out", tmp_path / "corpus")
    tokens = [d.tokens for side in held(out).values() for d in side if "z.jsonl" not in d.source]
    assert tokens == [
        d.tokens for _, ds in expected([("", 0, "one and two")] * 2).items() for d in ds
    ]


def test_a_jsonl_line_longer_than_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=50, READ_BYTES=40, BATCH_BYTES=30)
    documents = ["word " * 200, *FILLERS, "other " * 100]
    offsets = write_jsonl(tmp_path / "a.jsonl", documents)
    out = make(tmp_path / "out", tmp_path / "a.jsonl", "--text-column", "text")
    rows = zip(offsets, documents, strict=True)
    assert held(out) == expected(("a.jsonl", row, text) for row, text in rows)


def test_a_jsonl_line_above_the_largest_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is bad, and read over without being held; the lines around it are not."""
    shrink(monkeypatch, MAX_DOCUMENT_BYTES=500, READ_BYTES=40, MIN_UNIT_BYTES=100)
    documents = ["before", "long " * 300, *FILLERS, "last"]
    offsets = write_jsonl(tmp_path / "a.jsonl", documents)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write(" " * 501)
    out = make(tmp_path / "out", tmp_path / "a.jsonl", "--text-column", "text")
    rows = [pair for pair in zip(offsets, documents, strict=True) if pair[1] != documents[1]]
    assert held(out) == expected(("a.jsonl", row, text) for row, text in rows)
    size = offsets[2] - offsets[1] - 1
    reason = "expected at most 500 bytes, found a line of {} bytes: split it"
    entries = [(entry["position"], entry["bytes"], entry["reason"]) for entry in quarantine(out)]
    end = (tmp_path / "a.jsonl").stat().st_size - 501
    assert entries == [
        (offsets[1], size, reason.format(f"{size:,}")),
        (end, 501, reason.format(501)),
    ]


def test_a_line_longer_than_many_units_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=1000, READ_BYTES=100)
    write_jsonl(tmp_path / "a.jsonl", ["word " * 10_000, *FILLERS])
    blocks = 0
    original = documents_module.byte_blocks

    def counted(*arguments: object) -> Iterator[bytes]:
        nonlocal blocks
        for block in original(*arguments):  # type: ignore[arg-type]
            blocks += 1
            yield block

    monkeypatch.setattr(documents_module, "byte_blocks", counted)
    make(tmp_path / "out", tmp_path / "a.jsonl", "--text-column", "text")
    assert blocks < 3 * 50_000 / 100


def test_a_parquet_row_above_the_largest_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MAX_DOCUMENT_BYTES=500)
    documents = ["before", "é" * 251, *FILLERS, "last"]
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    out = make(tmp_path / "out", tmp_path / "a.parquet")
    rows = [pair for pair in enumerate(documents) if pair[0] != 1]
    assert held(out) == expected(("a.parquet", *pair) for pair in rows)
    reason = "expected at most 500 bytes, found 502 bytes: split it"
    entries = [(entry["position"], entry["bytes"], entry["reason"]) for entry in quarantine(out)]
    assert entries == [(1, 502, reason)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_that_can_not_be_cut(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the zeros that a decompression bomb holds; a text with white space may be of any size."""
    shrink(monkeypatch, MAX_DOCUMENT_BYTES=500, PIECE_BYTES=100, READ_BYTES=50)
    good = text_of("train") + " word" * 500
    for name, content in {"bad": b"words " * 9 + bytes(10_000), "good": good.encode()}.items():
        (tmp_path / f"{name}.txt{suffix}").write_bytes(COMPRESSORS[suffix](content))
    write_jsonl(tmp_path / "z.jsonl", FILLERS)
    out = make(tmp_path / "out", tmp_path / f"[bg]*.txt{suffix}", tmp_path / "z.jsonl")
    (entry,) = quarantine(out)
    assert entry["source"].endswith(f"/bad.txt{suffix}")
    assert "expected at most 500 bytes, found a stretch without white space" in entry["reason"]
    assert entry["bytes"] > 0
    assert sum(map(len, held(out).values())) == 3


@pytest.mark.parametrize("stored", ["little", "much"])
@pytest.mark.parametrize("kind", ["string", "dictionary"])
def test_a_long_text_that_is_stored_once(
    kind: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is bounded by the text that its rows decode to, not by what the file stores."""
    limits = {} if stored == "little" else {"BATCH_BYTES": 1000}
    shrink(monkeypatch, MAX_BATCH_BYTES=10_000, **limits)
    column = pa.array(["long " * 400] * 100 + FILLERS)
    column = column.dictionary_encode() if kind == "dictionary" else column
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    decoded = []
    original = documents_module.column_batch

    def noted(values: pa.Array, source: int, first: int) -> documents_module.Batch:
        decoded.append(len(values))
        return original(values, source, first)

    monkeypatch.setattr(documents_module, "column_batch", noted)
    out = make(tmp_path / "out", tmp_path / "a.parquet")
    assert 1 <= max(decoded) <= 5
    assert sum(map(len, held(out).values())) == 102


def test_a_nested_column_of_the_same_dotted_name(tmp_path: Path) -> None:
    documents = texts(60)
    table = {"a": [{"text": 1}] * 60, "a.text": documents}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    out = make(tmp_path / "out", tmp_path / "a.parquet", "--text-column", "a.text")
    assert held(out) == expected(("a.parquet", *pair) for pair in enumerate(documents))


def test_a_damaged_dictionary(tmp_path: Path) -> None:
    """Whatever byte is wrong, it is a bad file and no traceback."""
    documents = pa.array(texts(8) * 10).dictionary_encode()
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", compression="none")
    whole = (tmp_path / "a.parquet").read_bytes()
    write_jsonl(tmp_path / "z.jsonl", FILLERS)
    chance = random.Random(0)
    for number in range(60):
        content = bytearray(whole)
        content[chance.randrange(4, len(whole) - 8)] ^= 1 << chance.randrange(8)
        (tmp_path / "a.parquet").write_bytes(content)
        sources = (tmp_path / "a.parquet", tmp_path / "z.jsonl", "--max-bad", 1000)
        outcome = run(*sources, "--text-column", "text", "--out", tmp_path / f"{number}")
        assert outcome.code == 0 or outcome.error


def test_the_bytes_that_bad_documents_lose(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"words " * 1000 + b"\xe9")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": 5}\n[]\n' + b'{"text": "good"}\n' * 9)
    column = strings([b"good"] * 40 + [b"ab\xff"])
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1" + bytes(100))
    write_jsonl(tmp_path / "z.jsonl", FILLERS)
    names = ("a.txt", "b.jsonl", "c.parquet", "d.parquet", "z.jsonl")
    out = make(tmp_path / "out", *(tmp_path / name for name in names), "--text-column", "text")
    lost = [(entry["source"], entry["bytes"]) for entry in quarantine(out)]
    assert lost == [
        ("a.txt", 6001), ("b.jsonl", 11), ("b.jsonl", 2), ("c.parquet", 3), ("d.parquet", 416)
    ]  # fmt: skip


def test_batches_of_bad_or_empty_lines_are_bounded(tmp_path: Path) -> None:
    lines = b"1\n" * 100_000 + b'{"text": ""}\n' * 100_000
    (tmp_path / "a.jsonl").write_bytes(lines)
    (file,) = find_files([str(tmp_path / "a.jsonl")])
    batches = list(documents_module.read([file], [documents_module.Slice(0)]))
    assert sum(len(batch.bad) for batch in batches) == 100_000
    assert sum(len(batch.texts) for batch in batches) == 100_000
    assert max(len(batch.bad) + len(batch.texts) for batch in batches) <= 1 << 16
