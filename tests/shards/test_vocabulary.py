"""Other vocabularies than GPT-2's: the same law, and files that Hugging Face's library reads."""

import json
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import pre_tokenizers, trainers

from shards import encoder, tokenizer
from shards.tokenizer import Tokenizer
from shards.vocabulary import END_OF_TEXT, Vocabulary, merges, parse

ODD = [
    "'s",
    "’s",
    "ß",
    "e\u0301",
    "字",
    "한",
    "ا",
    "42",
    "½",
    "_",
    "—",
    "😀",
    "\u3000",
    "\x85",
    "\0",
]
TEXT = (
    "def naïve(self): return 'it''s 1984', self.größe\n\n    # 東京, Привет, <|endoftext|> 🙂\t\r\n"
)
any_text = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*ODD, " ", "  ", "\n", "return", " self", "aaaa", "e"])).map("".join),
)


def train(size: int, specials: list[str]) -> dict[str, Any]:
    """What `tokenizers` itself makes of this file, its special tokens first."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([Path(__file__).read_text("utf-8"), TEXT * 9], trainer)
    return json.loads(theirs.to_str())


@lru_cache
def made(kind: str) -> Tokenizer:
    if kind == "p50k_base":
        return tokenizer.load(kind)
    specials = {"last": [], "first": [END_OF_TEXT], "several": ["<pad>", END_OF_TEXT, "<x>"]}
    return tokenizer.from_json(json.dumps(train(700, specials[kind])).encode(), kind)


KINDS = ("last", "first", "several", "p50k_base")


@lru_cache
def law(kind: str) -> tiktoken.Encoding:
    """tiktoken's encoding by the bytes that each id stands for."""
    ranks = {token: i for i, token in enumerate(made(kind).vocabulary()) if token}
    return tiktoken.Encoding("x", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


@lru_cache
def theirs(kind: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(made(kind).to_json().decode())


@pytest.mark.parametrize(
    ("kind", "n_vocab", "eot"),
    [("last", 701, 700), ("first", 700, 0), ("several", 700, 1), ("p50k_base", 50281, 50256)],
)
def test_the_ids(kind: str, n_vocab: int, eot: int) -> None:
    own = made(kind)
    assert (own.n_vocab, own.eot, len(own.vocabulary())) == (n_vocab, eot, n_vocab)
    assert own.decode([eot]) == END_OF_TEXT
    assert own.byte_lengths()[eot] == 0
    assert own.name == (kind if kind == "p50k_base" else f"bpe-{n_vocab}")
    assert own._fast is not None, "gigatoken takes every one of them"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=any_text)
def test_any_text(kind: str, text: str) -> None:
    own = made(kind)
    ids = own.encode(text)
    assert ids == law(kind).encode_ordinary(text)
    assert own.reference_only().encode(text) == ids
    assert own.decode(ids) == text
    if END_OF_TEXT not in text:
        # tokenizers has other Unicode tables than both encoders here.
        known = "".join(character for character in text if ord(character) < 0x250)
        assert theirs(kind).encode(known).ids == own.encode(known)


@pytest.mark.parametrize("kind", ["several", "p50k_base"])
def test_code_points_pieces_and_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, reference = made(kind), law(kind)
    ranges = encoder.differing_code_points()
    texts = [f"{chr(code)}'s {chr(code)}" for first, last in ranges for code in range(first, last)]
    texts += [" " * n + "x" + "\n" * n for n in range(60)]
    texts += [Path(__file__).read_text("utf-8"), *(chr(code) * 3 for code in range(0x80, 0x800))]
    expected = [reference.encode_ordinary(text) for text in texts]
    ids, offsets = own.encode_batch(pa.array(texts))
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected
    monkeypatch.setattr(tokenizer, "PIECE", 50)
    monkeypatch.setattr(encoder, "PART_BYTES", 50)
    assert own.encode(texts[-1]) == own.encode_reference(texts[-1]).tolist() == expected[-1]
    whole = "".join(texts)
    assert own.encode(whole) == reference.encode_ordinary(whole)


def test_openais_names() -> None:
    assert tokenizer.load("r50k_base") is tokenizer.load("gpt2"), "it has the same file"
    p50k = tokenizer.load("p50k_base")
    assert p50k is tokenizer.load("p50k_base")
    assert p50k.hash == "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"
    assert p50k.encode("if x:\n        y") == [361, 2124, 25, 198, 50262, 331]


def test_the_file_is_a_function_of_the_vocabulary(tmp_path: Path) -> None:
    for kind in KINDS[:-1]:  # p50k_base is large; what reads it is the same
        own = made(kind)
        path = tmp_path / "tokenizer.json"
        path.write_bytes(own.to_json())
        assert tokenizer.load(path).to_json() == own.to_json()
        assert tokenizer.load(tmp_path).identity == own.identity, "the folder does too"
        assert tokenizer.open_tokenizer(own.identity, "nowhere", tmp_path).identity == own.identity


def test_gpt2s_file_is_gpt2() -> None:
    gpt2 = tokenizer.load()
    assert tokenizer.from_json(gpt2.to_json(), "x", known=True) is gpt2


def test_a_file_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(made("last").to_json())
    with pytest.raises(ValueError, match=rf"{made('first').hash[:12]}.*{made('last').hash[:12]}"):
        tokenizer.open_tokenizer(made("first").identity, tmp_path)


def test_merges_are_those_of_training() -> None:
    trained = train(700, [])
    content = json.dumps(trained).encode()
    own = parse(content, "x")
    assert len(list(merges(own.tokens))) == len(trained["model"]["merges"]) == 700 - 256
    written = [" ".join(merge) for merge in trained["model"]["merges"]]  # as older versions do
    old = trained | {"model": trained["model"] | {"merges": written}}
    assert parse(json.dumps(old).encode(), "x") == own
    assert json.loads(own.to_json())["model"]["merges"] == trained["model"]["merges"]


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        *parents, last = path
        for name in parents:
            record = record[name]
        del record[last]

    return change


def with_value(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        *parents, last = path
        for name in parents:
            record = record[name]
        record[last] = value

    return change


def swap(record: dict[str, Any]) -> None:
    vocabulary, names = record["model"]["vocab"], list(record["model"]["vocab"])
    a, b = names[400], names[500]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


ADDED = {"id": 700, "content": "  ", "special": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value({"type": "NFC"}, "normalizer"), "no normalizer, found NFC"),
        (with_value({"type": "Whitespace"}, "pre_tokenizer"), "pattern .* found Whitespace"),
        (with_value(None, "pre_tokenizer"), "pattern .* found None"),
        (with_value(True, "pre_tokenizer", "add_prefix_space"), "no prefix space"),
        (with_value(False, "pre_tokenizer", "use_regex"), "GPT-2's pattern"),
        (with_value("WordPiece", "model", "type"), "type BPE of the model, found WordPiece"),
        (with_value(0.1, "model", "dropout"), "dropout None of the model, found 0.1"),
        (with_value("##", "model", "continuing_subword_prefix"), "found ##"),
        (with_value([ADDED], "added_tokens"), "that are special, found '  '"),
        (without("model", "vocab", "!"), "each id from 0 once"),
        (with_value(5, "model", "vocab", "!"), "each id from 0 once"),
        (with_value("0", "model", "vocab", "!"), "'<' not supported|not supported between"),
        (with_value(700, "model", "vocab", "漢"), "tokens of bytes, found '漢'"),
        (swap, "ids in the order of the merges"),
        (without("model", "merges"), "'merges'"),
        (without("model"), "'model'"),
        (with_value([["Ġ", "t"]], "model", "merges"), "merge 0 of|merge 1 of None"),
    ],
)
def test_other_tokenizers_are_refused(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    record = train(700, [])
    change(record)
    with pytest.raises(ValueError, match=message) as caught:
        parse(json.dumps(record).encode(), "x/tokenizer.json")
    text = str(caught.value)
    assert "x/tokenizer.json" in text and "--vocab-size" in text and "\n" not in text


def test_a_file_without_an_end_of_text_gets_one() -> None:
    record = train(700, [])
    assert parse(json.dumps(record).encode(), "x").specials == {END_OF_TEXT: 700}
    with_value([{"id": 700, "content": "<pad>", "special": True}], "added_tokens")(record)
    own = parse(json.dumps(record).encode(), "x")
    assert own.specials == {"<pad>": 700, END_OF_TEXT: 701} and own.tokens[700:] == (b"", b"")


def test_bytes_are_the_least_vocabulary_and_16_bits_the_limit() -> None:
    letters = [bytes([byte]) for byte in range(256)]
    least = Vocabulary((*letters, b""), {END_OF_TEXT: 256})
    assert tokenizer.of_vocabulary(least).encode("né") == [ord("n"), 0xC3, 0xA9]
    with pytest.raises(ValueError, match=r"each byte as a token before .* for b'\\x00'"):
        Vocabulary((*letters[1:], b"ab", b""), {END_OF_TEXT: 256})
    many = (*letters, *(b"%x" % i for i in range(1 << 16)), b"")
    with pytest.raises(ValueError, match="257 to 65536 token ids, found 65793"):
        Vocabulary(many, {END_OF_TEXT: len(many) - 1})


def test_damaged_files_are_one_line() -> None:
    for content in (b"", b"[]", b"{", b"\xff"):
        with pytest.raises(ValueError, match=r"x/tokenizer\.json") as caught:
            parse(content, "x/tokenizer.json", known=True)
        assert "restore it" in str(caught.value)
