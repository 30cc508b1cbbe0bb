"""The audit: a fast encoder that is wrong sends the whole unit to tiktoken, and says so."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prepare.batch import Batch
from prepare.encode import AuditError, encode
from shards.tokenizer import Tokenizer, load
from tests.prepare.support import contents, expected, held, make, shrink, texts, write_jsonl

SIZES = {"MIN_UNIT_BYTES": 4000, "BATCH_BYTES": 1000}


def spoil(patch: pytest.MonkeyPatch, wrong_text: str) -> None:
    """Make the fast encoder wrong in one token of each document that contains `wrong_text`."""
    right = Tokenizer.encode_batch

    def wrong(self: Tokenizer, given: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = right(self, given)
        if self._fast is not None:
            ids = ids.copy()
            for row, text in enumerate(given.to_pylist()):
                if wrong_text in text:
                    ids[offsets[row + 1] - 1] += 1
        return ids, offsets

    patch.setattr(Tokenizer, "encode_batch", wrong)


def corpus(folder: Path) -> tuple[Path, dict]:
    documents = texts(300)
    offsets = write_jsonl(folder / "corpus.jsonl", documents)
    rows = zip(offsets, documents, strict=True)
    return folder / "corpus.jsonl", expected(("corpus.jsonl", *pair) for pair in rows)


def test_a_right_encoder_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, **SIZES, AUDITED_ONE_IN=1)
    source, wanted = corpus(tmp_path)
    out = make(tmp_path / "out", source)
    assert held(out) == wanted
    assert "tiktoken alone" not in (out / "prepare.log").read_text()


@pytest.mark.parametrize("number", [0, 1, 57, 299])
def test_a_wrong_one_is_found_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, **SIZES, AUDITED_ONE_IN=1)
    source, wanted = corpus(tmp_path)
    right = contents(make(tmp_path / "right", source))
    spoil(monkeypatch, f"0/{number} ")
    out = make(tmp_path / "out", source)
    assert held(out) == wanted
    assert contents(out) == right
    warnings = [line for line in (out / "prepare.log").read_text().splitlines() if "alone" in line]
    assert len(warnings) == 1
    assert "was encoded by tiktoken alone: gigatoken and tiktoken differ" in warnings[0]


def test_the_first_document_of_each_unit_is_always_audited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, **SIZES)
    source, wanted = corpus(tmp_path)
    spoil(monkeypatch, "0/")
    out = make(tmp_path / "out", source)
    assert held(out) == wanted
    units = len(list(out.glob("train_*.npy")))
    assert (out / "prepare.log").read_text().count("tiktoken alone") == units > 3


def test_a_long_document_is_audited_by_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, AUDITED_CHARACTERS=100)
    write_jsonl(tmp_path / "corpus.jsonl", ["0/0 " + "word " * 100, *texts(60)])
    right = contents(make(tmp_path / "right", tmp_path / "corpus.jsonl"))
    assert "tiktoken alone" not in (tmp_path / "right/prepare.log").read_text()

    def wrong(self: Tokenizer, given: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = original(self, given)
        return (ids if self._fast is None else ids + np.uint32(1)), offsets

    original = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", wrong)
    assert contents(make(tmp_path / "out", tmp_path / "corpus.jsonl")) == right


@pytest.mark.parametrize("filler", ["x", "é", "word "])
def test_a_text_that_can_not_be_cut_is_audited_by_its_head(
    filler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiktoken takes a megabyte of one letter as a whole: seconds, and 80 bytes for each."""
    text, tokenizer = filler * 200_000, load()
    audited = list[int]()
    original = Tokenizer.encode_reference

    def noted(self: Tokenizer, text: str) -> np.ndarray:
        audited.append(len(text))
        return original(self, text)

    monkeypatch.setattr(Tokenizer, "encode_reference", noted)
    batch = Batch(pa.array([text]), np.zeros(1, np.int32), np.zeros(1, np.int64))
    encode(tokenizer, batch, audit_first=True)
    assert audited and max(audited) < 5000
    monkeypatch.setattr(Tokenizer, "encode_reference", lambda *_: np.zeros(1, np.uint32))
    with pytest.raises(AuditError, match="source 0 at 0"):
        encode(tokenizer, batch, audit_first=True)


def test_without_a_fast_encoder_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wanted = corpus(tmp_path)
    fast = contents(make(tmp_path / "fast", source))
    original = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, given: original(self.reference_only(), given)
    )
    slow = make(tmp_path / "slow", source)
    assert contents(slow) == fast
    assert held(slow) == wanted
