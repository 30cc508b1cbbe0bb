"""Plain text of any size: cutting it never changes a token."""

from pathlib import Path

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prepare import text
from prepare.batch import utf8_error
from prepare.input_file import byte_stream
from prepare.sources import find_files
from prepare.text import damage, next_cut, next_line, pieces, survey
from tests.prepare.support import (
    COMPRESSORS,
    LAW,
    expected,
    held,
    law,
    make,
    shrink,
    text_of,
    write_jsonl,
)

# What may go wrong at a cut: white space of every kind (some of it known to Unicode only, some to
# ASCII only), what joins on to it, what looks like it, and long runs.
FRAGMENTS = [
    " ", "  ", "\n", "\r\n", "\t", "\v", "\f", "\x1c", "\x85", "\u00a0", "\u1680", "\u180e",
    "\u2003", "\u2028", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "a", "word", "'s", "'ll",
    " 'S", "12", "½", "٣", "é", "の", "。", "привет", "e\u0301", "🙂🏽", "!", "...",
    "<|endoftext|>", "\x00", "\x7f", "a" * 40, " " * 40, "の" * 20, "1" * 30, "\u088f", "\ua7ce",
]  # fmt: skip
adversarial = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)
sizes = st.integers(1, 50)


def input_file(path: Path, content: bytes, suffix: str = "") -> tuple[str, str | None]:
    """Write a text file; returns its path and its compression."""
    path = path / f"text.txt{suffix}"
    path.write_bytes(COMPRESSORS[suffix](content))
    (file,) = find_files([str(path)])
    return file.path, file.compression


@given(content=adversarial, piece=sizes, block=sizes, suffix=st.sampled_from(["", ".gz"]))
def test_pieces_have_the_tokens_of_the_whole(
    content: str, piece: int, block: int, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = input_file(tmp_path_factory.mktemp("text"), content.encode(), suffix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_BYTES", piece)
        patch.setattr(text, "READ_BYTES", block)
        parts = list(pieces(*file))
    assert b"".join(part for _, part in parts) == content.encode()
    assert [offset for offset, _ in parts] == [
        sum(len(part) for _, part in parts[:number]) for number in range(len(parts))
    ]
    # No pre-token runs from a character that is no white space into one that is.
    assert not any(part.decode()[-1].isspace() for _, part in parts[:-1])
    tokens = [token for _, part in parts for token in LAW.encode_ordinary(part.decode())]
    assert tokens == LAW.encode_ordinary(content)


@given(content=adversarial, block=sizes, data=st.data())
def test_the_next_cut_is_a_safe_one_and_the_first(
    content: str, block: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = content.encode()
    file = input_file(tmp_path_factory.mktemp("text"), whole)
    offset = data.draw(st.integers(0, len(whole)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "READ_BYTES", block)
        cut = next_cut(file[0], offset)
    assert offset <= cut <= len(whole)
    head, tail = whole[:cut].decode(), whole[cut:].decode()
    assert LAW.encode_ordinary(head) + LAW.encode_ordinary(tail) == LAW.encode_ordinary(content)
    assert cut in (0, len(whole)) or (not head[-1].isspace() and tail[0] in " \t\n\r\f\v")
    # No place before it is one that any reader of the rule would call safe.
    stretch = [whole[i - 1 : i + 1] for i in range(max(offset, 1), cut)]
    assert not any(chr(a) > " " and a < 0x7F and chr(b) in " \t\n\r\f\v" for a, b in stretch)


@given(content=adversarial, block=sizes, data=st.data())
def test_the_next_line(
    content: str, block: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = content.encode()
    file = input_file(tmp_path_factory.mktemp("text"), whole)
    offset = data.draw(st.integers(0, len(whole)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "READ_BYTES", block)
        assert next_line(*file, offset) == (whole.find(b"\n", offset) + 1 or len(whole))


def test_text_without_ascii_is_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 100)
    monkeypatch.setattr(text, "READ_BYTES", 50)
    file = input_file(tmp_path, "这是一个很长的文档。\n".encode() * 50)
    assert max(len(part) for _, part in pieces(*file)) < 200
    assert next_cut(file[0], 31) == 61


@example(content="🙂".encode()[:3] + b"$", block=3)  # the next block does not finish it
@given(content=st.binary(max_size=60) | adversarial.map(str.encode), block=sizes)
def test_a_survey_tells_the_hash_the_size_and_whether_it_is_text(
    content: bytes, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = input_file(tmp_path_factory.mktemp("text"), content, ".gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "READ_BYTES", block)
        found = survey(*file)
    assert (found.error is None) == (utf8_error(content) is None)
    if found.error is None:
        digest = xxhash.xxh3_128_intdigest(content)
        assert found.digest.tolist() == [[digest >> 64, digest & (2**64 - 1)]]
        assert found.size == len(content)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_stream_begins_anywhere(suffix: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 5
    file = input_file(tmp_path, content, suffix)
    for offset in (0, 1, 700, len(content)):
        with byte_stream(*file, offset) as stream:
            assert stream.read() == content[offset:]
    with byte_stream(file[0]) as stream:
        assert stream.read() == COMPRESSORS[suffix](content) == Path(file[0]).read_bytes()


def test_damage_is_not_a_disk_that_fails(tmp_path: Path) -> None:
    file = input_file(tmp_path, b"x")
    assert damage(file[0], OSError("one\n  two")) == "unreadable from here on: one two"
    Path(file[0]).unlink()
    with pytest.raises(FileNotFoundError):
        damage(file[0], OSError("one"))


class TestLargeTexts:
    """A large text goes through the command in pieces, and over several units and shards."""

    @settings(max_examples=40)
    @given(content=adversarial, piece=sizes, unit=sizes, shard=sizes, data=st.data())
    def test_one_document_stays_one(
        self,
        content: str,
        piece: int,
        unit: int,
        shard: int,
        data: st.DataObject,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        folder = tmp_path_factory.mktemp("large")
        content = "begin" + content
        suffix = data.draw(st.sampled_from(["", ".gz"]))
        (folder / f"corpus.txt{suffix}").write_bytes(COMPRESSORS[suffix](content.encode()))
        fillers = [text_of("train"), text_of("val")]
        offsets = write_jsonl(folder / "other.jsonl", fillers)
        with pytest.MonkeyPatch.context() as patch:
            shrink(
                patch, PIECE_BYTES=piece, READ_BYTES=data.draw(sizes), BATCH_BYTES=data.draw(sizes),
                MIN_UNIT_BYTES=unit, MAX_UNIT_BYTES=unit, MAX_SHARD_TOKENS=shard,
            )  # fmt: skip
            sources = (folder / f"corpus.txt{suffix}", folder / "other.jsonl")
            out = make(folder / "out", *sources)
        wanted = [(f"corpus.txt{suffix}", 0, content)]
        wanted += [("other.jsonl", *pair) for pair in zip(offsets, fillers, strict=True)]
        assert held(out) == expected(wanted)

    @pytest.mark.parametrize("suffix", COMPRESSORS)
    def test_by_position(
        self, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shrink(
            monkeypatch, PIECE_BYTES=300, READ_BYTES=100, MIN_UNIT_BYTES=500, MAX_SHARD_TOKENS=99
        )
        content = "".join(
            f"line {number} of many, it's\t{number * 7919}\n" for number in range(300)
        )
        (tmp_path / f"book.md{suffix}").write_bytes(COMPRESSORS[suffix](content.encode()))
        out = make(tmp_path / "out", tmp_path / f"book.md{suffix}")
        found = held(out)
        (train,), (val,) = found["train"], found["val"]
        assert train.tokens == law(content[: train.text_bytes])
        assert val.tokens == law(content[train.text_bytes :])
        assert len(list(out.glob("train_*.npy"))) > 10

    def test_many_units_of_one_text(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shrink(monkeypatch, PIECE_BYTES=300, READ_BYTES=100, MIN_UNIT_BYTES=500)
        content = "".join(
            f"line {number} of many, it's\t{number * 7919}\n" for number in range(300)
        )
        (tmp_path / "corpus").mkdir()
        for name, whole in (("a", content), ("b", text_of("train")), ("c", text_of("val"))):
            (tmp_path / f"corpus/{name}.txt").write_text(whole)
        out = make(tmp_path / "out", tmp_path / "corpus")
        held_sides = held(out)
        wanted = [("corpus/a.txt", 0, content), ("corpus/b.txt", 0, text_of("train"))]
        assert held_sides == expected([*wanted, ("corpus/c.txt", 0, text_of("val"))])
        assert len(list(out.glob("*_0*.npy"))) > 10
