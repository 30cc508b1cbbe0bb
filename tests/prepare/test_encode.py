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


@pytest.mark.parametrize("filler", ["x", "é", "日", "word "])
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
    batch = batch_of(text)
    encode(tokenizer, batch, audit_first=True)
    assert audited and max(audited) < 5000
    monkeypatch.setattr(Tokenizer, "encode_reference", lambda *_: np.zeros(1, np.uint32))
    with pytest.raises(AuditError, match="source 0 at 0"):
        encode(tokenizer, batch, audit_first=True)


def batch_of(*values: str) -> Batch:
    count = len(values)
    return Batch(pa.array(values), np.zeros(count, np.int32), np.arange(count))


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that tiktoken is asked for."""
    shrink(monkeypatch, AUDITED_ONE_IN=1 << 40)
    found = list[str]()
    original = Tokenizer.encode_reference
    monkeypatch.setattr(
        Tokenizer,
        "encode_reference",
        lambda self, text: (found.append(text), original(self, text))[1],
    )
    return found


def test_what_is_audited(audited: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load()
    for first, wanted in ((False, []), (True, ["one"])):
        encode(tokenizer, batch_of("one", "two", "three"), audit_first=first)
        assert audited == wanted
    encode(tokenizer, batch_of(""), audit_first=True)
    assert audited == ["one", ""]
    shrink(monkeypatch, AUDITED_ONE_IN=1)
    encode(tokenizer, batch_of("four", "five"), audit_first=False)
    assert audited[2:] == ["four", "five"]


@pytest.mark.parametrize(("length", "head"), [(99, 99), (200, 200), (201, 100), (1000, 100)])
def test_the_head_of_a_text_without_a_cut(
    length: int, head: int, audited: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, AUDITED_CHARACTERS=100, MAX_AUDITED_BYTES=200)
    encode(load(), batch_of("x" * length), audit_first=True)
    assert audited == ["x" * head]


@pytest.mark.parametrize("text", ["some words", "word " * 100])
@pytest.mark.parametrize("wrong", ["another id", "one more"])
def test_the_tokens_that_are_written_are_audited(
    text: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of another call of the encoder, and none may be left over."""
    shrink(monkeypatch, AUDITED_CHARACTERS=1000)
    tokenizer = load()
    ids, offsets = tokenizer.encode_batch(pa.array([text, "two"]))
    if wrong == "another id":
        ids = np.concatenate([ids[:1] + np.uint32(1), ids[1:]])
    else:
        ids, offsets = np.insert(ids, offsets[1], 7), offsets + np.array([0, 1, 1])
    original = Tokenizer.encode_batch

    def once(self: Tokenizer, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        return (ids, offsets) if len(texts) == 2 else original(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", once)
    with pytest.raises(AuditError) as caught:
        encode(tokenizer, batch_of(text, "two"), audit_first=True)
    assert str(caught.value) == ("gigatoken and tiktoken differ on the document of source 0 at 0")


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
