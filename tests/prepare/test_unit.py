"""Shards that are full go on in a further one; the index knows where every document lies."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import unit as unit_module
from prepare.batch import Batch
from prepare.encode import AuditError, Encoded, encode
from prepare.file_types import JSONL
from prepare.input_file import InputFile, Slice
from prepare.plan import Plan, Unit, UnitResult
from prepare.quarantine import BadDocuments, BadLimit
from prepare.split import HASH, VAL_SOURCE, SplitRule
from prepare.unit import Exclusions, SplitWriter, UnitReader, write_unit
from shards import tokenizer
from tests.prepare.support import (
    COMPRESSORS,
    EOT,
    expected,
    held,
    law,
    make,
    shrink,
    text_of,
    texts,
    write_jsonl,
)


def test_the_index_of_a_shard(tmp_path: Path) -> None:
    documents = [text_of("train"), "é <|endoftext|>", text_of("val"), "a b\n", text_of("train")]
    offsets = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.md").write_text("three small words")
    out = make(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.md", "--val-fraction", 0.1)
    sources = {"a.jsonl": 0, "b.md": 1}
    wanted = expected(
        [
            *(("a.jsonl", *p) for p in zip(offsets, documents, strict=True)),
            ("b.md", 0, "three small words"),
        ]
    )
    for side in ("train", "val"):
        lengths = [len(document.tokens) for document in wanted[side]]
        assert pq.read_table(out / f"{side}_00000.docs.parquet").to_pylist() == [
            {
                "offset": sum(lengths[:number]),
                "source": sources[document.source],
                "row": document.row,
                "text_bytes": document.text_bytes,
                "continued": False,
            }
            for number, document in enumerate(wanted[side])
        ]
        tokens = np.load(out / f"{side}_00000.npy", allow_pickle=False)
        assert tokens.tolist() == [token for document in wanted[side] for token in document.tokens]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_full_shard_is_followed_by_another(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MAX_SHARD_TOKENS=500, BATCH_BYTES=200, READ_BYTES=300)
    documents = texts(200)
    offsets = write_jsonl(tmp_path / "plain", documents)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix]((tmp_path / "plain").read_bytes()))
    out = make(tmp_path / "out", path)
    assert held(out) == expected((path.name, *p) for p in zip(offsets, documents, strict=True))
    shards = json.loads((out / "manifest.json").read_bytes())["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards[:2]] == ["train_00000.npy", "train_00000_001.npy"]
    assert [shard["file"] for shard in shards] == sorted(shard["file"] for shard in shards)
    assert all(500 <= shard["tokens"] < 1200 for shard in shards[:-1])


def test_a_document_longer_than_a_shard_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MAX_SHARD_TOKENS=100, PIECE_BYTES=100, READ_BYTES=50)
    content = "".join(texts(30))
    (tmp_path / "long.txt.gz").write_bytes(COMPRESSORS[".gz"](content.encode()))
    write_jsonl(tmp_path / "a.jsonl", fillers := [text_of("train"), text_of("val")])
    out = make(tmp_path / "out", tmp_path / "long.txt.gz", tmp_path / "a.jsonl")
    side = next(s for s, found in held(out).items() if found[0].source == "long.txt.gz")
    assert held(out)[side][0].tokens == law(content)
    shards = json.loads((out / "manifest.json").read_bytes())["splits"][side]["shards"]
    assert len(shards) > 3
    for number, shard in enumerate(shards):
        index = pq.read_table(out / shard["index"]).to_pylist()
        first = np.load(out / shard["file"])[0]
        assert index[0]["continued"] == (number > 0)
        assert (first == EOT) == (number == 0)
    assert sum(shard["documents"] for shard in shards) == 1 + sum(
        document.source == "a.jsonl" for document in held(out)[side]
    )
    assert len(fillers) == 2


# A unit by itself, without the command


NOTHING = Exclusions()


def reader_of(
    path: Path,
    exclusions: Exclusions = NOTHING,
    limit: BadLimit | None = None,
    rule: str = HASH,
    **plan: object,
) -> UnitReader:
    """The reader of unit 7, which is a file of JSON lines."""
    status = path.stat()
    file = InputFile(path.name, str(path), status.st_size, status.st_mtime_ns, JSONL)
    unit = Unit(7, (Slice(0, 0, status.st_size),), status.st_size)
    return UnitReader(
        Plan((file,), SplitRule(rule, 0.1), (unit,), (), **plan), unit, exclusions, limit
    )


def batch_of(*values: str, **more: object) -> Batch:
    count = len(values)
    texts = pa.array(values, pa.large_string())
    return Batch(texts, np.zeros(count, np.int32), np.arange(count), **more)


@pytest.fixture
def unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Batch]]:
    """Batches to be read, whatever the file holds."""
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    batches = list[Batch]()
    monkeypatch.setattr(unit_module, "read", lambda files, slices: iter(batches))
    return batches


def test_a_unit_and_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, BATCH_BYTES=20)
    train, val = text_of("train"), text_of("val")
    documents = [train, "", train, val, "é", train]
    rows = write_jsonl(tmp_path / "a.jsonl", documents)
    exclusions = Exclusions(indices=np.array([1, 2]))
    reader = reader_of(tmp_path / "a.jsonl", exclusions, first_source=3)
    firsts = []

    def noted(*arguments: object, audit_first: bool) -> Encoded:
        firsts.append(audit_first)
        return encode(*arguments, audit_first)

    monkeypatch.setattr(unit_module, "encode", noted)
    result = write_unit(reader, tmp_path, tokenizer.load())
    assert firsts[0] and len(firsts) > 1 and not any(firsts[1:])
    assert (result.unit, result.warnings, result.bad, result.stopped) == (7, [], [], False)
    assert (result.read, result.empty, result.duplicates) == (6, 1, 1)
    for split, kept in (("train", [0, 4, 5]), ("val", [3])):
        (shard,) = result.shards[split]
        assert (shard.file, shard.index) == (f"{split}_00007.npy", f"{split}_00007.docs.parquet")
        wanted = [law(documents[number]) for number in kept]
        assert np.load(tmp_path / shard.file).tolist() == [t for tokens in wanted for t in tokens]
        index = pq.read_table(tmp_path / shard.index)
        assert index.schema.equals(unit_module.INDEX_SCHEMA)
        assert index.to_pydict() == {
            "offset": np.cumsum([0, *map(len, wanted)])[:-1].tolist(),
            "source": [3] * len(kept),
            "row": [rows[number] for number in kept],
            "text_bytes": [len(documents[number].encode()) for number in kept],
            "continued": [False] * len(kept),
        }


def test_after_a_failed_audit_the_unit_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [text_of("train")] * 5)
    reader = reader_of(tmp_path / "a.jsonl")
    tokenizers = []

    def fails_once(tokenizer: object, *arguments: object, **more: object) -> Encoded:
        tokenizers.append(tokenizer)
        if len(tokenizers) == 1:
            raise AuditError("they differ")
        return encode(tokenizer, *arguments, **more)

    monkeypatch.setattr(unit_module, "encode", fails_once)
    result = write_unit(reader, tmp_path, tokenizer.load())
    assert result.warnings == ["unit 7 was encoded by tiktoken alone: they differ"]
    assert result.read == 5 and [shard.documents for shard in result.all_shards()] == [5]
    assert tokenizers == [tokenizer.load(), tokenizer.load().reference_only()]


@pytest.mark.parametrize(("change", "found"), [("grown", "changed"), ("removed", "gone")])
def test_a_file_that_changed_is_named(change: str, found: str, tmp_path: Path) -> None:
    write_jsonl(path := tmp_path / "a.jsonl", [text_of("train")])
    reader = reader_of(path)
    size = path.stat().st_size
    with pytest.MonkeyPatch.context() as patch:

        def then_changed(*arguments: object) -> Iterator[Batch]:
            yield batch_of("x")
            path.unlink() if change == "removed" else path.write_bytes(b"{}")

        patch.setattr(unit_module, "read", then_changed)
        with pytest.raises(ValueError) as caught:
            write_unit(reader, tmp_path, tokenizer.load())
    assert str(caught.value) == (
        f"expected a.jsonl with {size} bytes as when the dataset was started, found that file "
        f"{found}: restore it and run again, or prepare into another --out"
    )


def test_duplicates_are_known_by_both_halves_of_their_hash_or_by_index() -> None:
    held_out = np.array([[1, 0], [1, 2], [4, 5], [4, 6], [9, 9]], np.uint64)
    hashes = np.array([[1, 1], [1, 2], [4, 6], [4, 6], [4, 0], [9, 9], [2, 2]], np.uint64)
    is_val = np.array([0, 0, 0, 1, 0, 0, 0], bool)
    indices = np.arange(10, 17)

    def excluded(exclusions: Exclusions) -> list[int]:
        mask = exclusions.mask(indices, hashes, is_val)
        assert mask.dtype == bool and mask.shape == (7,)
        return np.flatnonzero(mask).tolist()

    some = np.array([2, 10, 13, 15])
    assert excluded(Exclusions()) == []
    assert excluded(Exclusions(some)) == [0, 3, 5]
    assert excluded(Exclusions(None, held_out)) == [1, 2, 5]
    assert excluded(Exclusions(some, held_out)) == [0, 1, 2, 3, 5]
    assert excluded(Exclusions(None, held_out[:0])) == []


def test_documents_are_counted_once_and_pieces_go_with_them(
    unread: list[Batch], tmp_path: Path
) -> None:
    train, val = text_of("train"), text_of("val")
    unread += [
        batch_of(train, "", val, train),
        batch_of(train),
        batch_of(train, continued=True),  # of the document before
        batch_of(val, train, train),
        batch_of(),
    ]
    result = UnitResult(7, {})
    reader = reader_of(tmp_path / "a.jsonl", Exclusions(indices=np.array([1, 3, 4, 7])))
    found = [
        (len(batch.texts), in_train.tolist(), in_val.tolist())
        for batch, in_train, in_val in reader.read(result)
    ]
    assert found == [
        (4, [True, False, False, False], [False, False, True, False]),
        (1, [False], [False]),
        (1, [False], [False]),
        (3, [False, True, False], [True, False, False]),
    ]
    assert (result.read, result.empty, result.duplicates) == (8, 1, 3)


def test_training_text_that_is_held_out_is_left_out(unread: list[Batch], tmp_path: Path) -> None:
    train, val = text_of("train"), text_of("val")
    unread.append(batch_of(train, val, "x"))
    hashes = unit_module.document_hashes(batch_of(train, val))
    result = UnitResult(7, {})
    exclusions = Exclusions(hashes=hashes[np.argsort(hashes[:, 0])])
    ((_, in_train, in_val),) = reader_of(tmp_path / "a.jsonl", exclusions).read(result)
    assert in_train.tolist() == [False, False, True] and in_val.tolist() == [False, True, False]
    assert result.duplicates == 1


def test_the_split_of_a_batch(unread: list[Batch], tmp_path: Path) -> None:
    train, val = text_of("train"), text_of("val")
    unread += [batch_of(train, val, split="val"), batch_of(train, val, split="train")]
    found = list(reader_of(tmp_path / "a.jsonl").read(UnitResult(7, {})))
    assert [in_val.tolist() for *_, in_val in found] == [[True] * 2, [False] * 2]
    reader = reader_of(tmp_path / "a.jsonl", rule=VAL_SOURCE)
    files = (*reader.plan.files, InputFile("v", "v", 1, 1, JSONL, val=True))
    reader = replace(reader, plan=replace(reader.plan, files=files))
    unread[:] = [batch_of(train, val)]
    unread[0].sources[:] = [1, 0]
    ((_, in_train, in_val),) = reader.read(UnitResult(7, {}))
    assert in_val.tolist() == [True, False] and in_train.tolist() == [False, True]


@pytest.mark.parametrize(("max_bad", "batches"), [(None, 4), (6, 4), (5, 3), (2, 1)])
def test_beyond_the_limit_reading_stops(
    max_bad: int | None, batches: int, unread: list[Batch], tmp_path: Path
) -> None:
    bad = [BadDocuments(0, position, "broken", 1 + position) for position in range(3)]
    unread += [batch_of("a", bad=bad[:2]), batch_of("b"), batch_of(bad=bad[2:]), batch_of("c", "d")]
    unread.insert(1, batch_of("e"))
    limit = None if max_bad is None else BadLimit(max_bad, 1000)
    result = UnitResult(7, {})
    reader = reader_of(tmp_path / "a.jsonl", limit=limit)
    found = list(reader.read(result))
    assert len(found) == batches
    assert result.stopped == (max_bad in (5, 2))
    assert result.bad == (bad[:2] if max_bad == 2 else bad)
    read = {4: 5, 3: 3, 1: 1}[batches]
    assert result.read == read + sum(one.documents for one in result.bad)
    again = write_unit(reader, tmp_path, tokenizer.load())
    assert (again.stopped, again.read, again.bad) == (result.stopped, result.read, result.bad)
    # That a file was replaced explains more than what is bad in it.
    write_jsonl(tmp_path / "a.jsonl", ["y", "z"])
    with pytest.raises(ValueError, match=r"a\.jsonl .* found that file changed"):
        list(reader.read(UnitResult(7, {})))


def test_shards_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MAX_SHARD_TOKENS=4)
    lengths = [3, 1, 2, 3, 5, 1]
    ids = np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])
    with SplitWriter(tmp_path, "val_00002", 5) as writer:
        for number, own in enumerate(ids):
            batch = batch_of("", "x", continued=number == 3)
            batch.sources[:], batch.rows[:] = [0, number], [0, 10 * number]
            tokens = pa.array([b"\0" * 6, own.tobytes()], pa.large_binary())
            encoded = Encoded(tokens, np.array([1, 100 + number]))
            writer.write(batch, encoded, np.array([False, False]))
            writer.write(batch, encoded, np.array([False, True]))
        assert len(writer.shards) == 3, "those that are finished"
    names = ["val_00002", "val_00002_001", "val_00002_002", "val_00002_003"]
    assert [shard.file for shard in writer.shards] == [f"{name}.npy" for name in names]
    for name, own in zip(names, ([0, 1], [2, 3], [4], [5]), strict=True):
        tokens = np.load(tmp_path / f"{name}.npy")
        assert tokens.tolist() == [token for number in own for token in ids[number]]
        assert pq.read_table(tmp_path / f"{name}.docs.parquet").to_pydict() == {
            "offset": [0, lengths[own[0]]][: len(own)],
            "source": [5 + number for number in own],
            "row": [10 * number for number in own],
            "text_bytes": [100 + number for number in own],
            "continued": [number == 3 for number in own],
        }
