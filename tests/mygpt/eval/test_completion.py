"""Text that comes in pieces is the whole text; a kept cache changes nothing but the work."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from mygpt.config import GPTConfig
from mygpt.eval import completion
from mygpt.eval.completion import HELP, Completer, TextStream, continuations, converse
from mygpt.generate import Sampling, generate
from mygpt.model import GPT
from shards.cli import printable_text
from shards.tokenizer import Tokenizer, load
from shards.vocabulary import END_OF_TEXT, Vocabulary
from tests.mygpt.support import decided

pytestmark = pytest.mark.usefixtures("quick")

EOT = 256
STOP = 257  # which this model never writes
BYTES = [bytes([i]) for i in range(256)]  # a vocabulary of single bytes
RANKS = {byte: i for i, byte in enumerate(BYTES)}
SHAPE = GPTConfig(block_size=24, vocab_size=260, n_layers=2, n_heads=2, n_embed=16)
GREEDY = Sampling(temperature=0, max_new_tokens=9)


def bytes_tokenizer(eot: int) -> Tokenizer:
    """A tokenizer of single bytes."""
    encoding = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=RANKS, special_tokens={})
    vocabulary = Vocabulary((*RANKS, b"", b""), {END_OF_TEXT: eot})
    return Tokenizer("bytes", 256, eot, "", vocabulary, _reference=encoding)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return decided(GPT(SHAPE).eval())


@given(st.lists(st.one_of(st.binary(max_size=5), st.text(max_size=3).map(str.encode))))
def test_pieces_are_the_whole(parts: list[bytes]) -> None:
    decoder, text = TextStream(parts), ""
    for token, part in enumerate(parts):
        piece = decoder.push(token)
        text += piece
        if part.isascii():
            assert len(piece) >= len(part)  # nothing is held back without need
    text += decoder.push(len(parts) + 3)  # ids beyond the vocabulary stand for nothing
    assert text + decoder.end() == b"".join(parts).decode("utf-8", "replace")


def test_a_character_of_several_tokens_comes_when_it_is_whole() -> None:
    decoder = TextStream(BYTES)
    assert [decoder.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


@pytest.mark.parametrize("show", [False, True])
def test_continuations_are_what_generate_draws(
    model: GPT, show: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    how = Sampling(temperature=1.0, top_k=40, top_p=0.9, seed=3, max_new_tokens=30)
    drawn = generate(model, [[EOT, 70]] * 3, how, stop=EOT)
    expected = [bytes(t for t in row if t < 256).decode("utf-8", "replace") for row in drawn]
    assert continuations(model, [EOT, 70], 3, how, bytes_tokenizer(EOT), show) == expected
    assert capsys.readouterr().out == (printable_text(expected[0]) + "\n" if show else "")


def test_a_text_in_turns_is_the_text_at_once(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    completer, read, text = Completer(model, GREEDY), [], [EOT]
    whole = GPT.next_logits

    def counted(self: GPT, idx: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(idx.size(1))
        return whole(self, idx, *rest)

    monkeypatch.setattr(GPT, "next_logits", counted)
    for typed in ([EOT, 65, 66], [67, 68, 69, 70], []):
        text = text + typed if len(text) > 1 else typed
        expected = generate(model, [text], Sampling(9, temperature=0))[0][: 24 - len(text) + 1]
        read.clear()
        found = list(completer.complete(typed, stop=999))
        assert len(found) == 9
        assert found[: len(expected)] == expected
        if len(text) + 9 <= 24:
            # Of the text so far only what is new, and the last token that was written.
            assert read == [len(typed) + (text != typed), *[1] * 8]
        text += found
    assert len(text) > SHAPE.block_size


def test_a_text_longer_than_the_block_goes_on(model: GPT) -> None:
    completer = Completer(model, GREEDY)
    assert len(list(completer.complete([EOT] * 60, stop=999))) == 9
    with pytest.raises(ValueError, match="no tokens"):
        completer.clear()
        next(completer.complete([], stop=999))


def conversation(completer: Completer, *typed: str) -> None:
    lines = iter(typed)

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    converse(completer, bytes_tokenizer(STOP), read)


def test_a_conversation(model: GPT, capsys: pytest.CaptureFixture[str]) -> None:
    conversation(Completer(model, GREEDY), "ab", "", "/new", "ab")
    tokens = generate(model, [[STOP, *b"ab"]], Sampling(18, temperature=0))[0]
    first, second = (
        bytes(token for token in part if token < 256).decode("utf-8", "replace")
        for part in (tokens[:9], tokens[9:])
    )
    written = printable_text(f"{first}{second}{first}")
    assert capsys.readouterr().out == f"{HELP}\n{written}\n"


def test_a_space_at_the_end_is_noted_once(model: GPT, capsys: pytest.CaptureFixture[str]) -> None:
    conversation(Completer(model, GREEDY), "ab", "a ", "b ")
    assert capsys.readouterr().out.count("note: the prompt 'a ' ends in a space") == 1
    conversation(Completer(model, GREEDY), "ab", "a\n")
    assert "note" not in capsys.readouterr().out


def test_the_end_of_a_document_is_shown(
    model: GPT, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Completer, "complete", lambda *_: iter([98, 99]))
    conversation(Completer(model, GREEDY), "a")
    assert capsys.readouterr().out == f"{HELP}\nbc\n<|endoftext|>\n"


def test_ctrl_c_stops_the_text_and_keeps_what_there_is(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, turns = Completer.complete, []

    def interrupted(self: Completer, tokens: list[int], stop: int) -> Iterator[int]:
        turns.append([])
        for token in whole(self, tokens, stop):
            turns[-1].append(token)
            if len(turns) == 1 and len(turns[0]) == 4:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(Completer, "complete", interrupted)
    conversation(Completer(model, GREEDY), "ab", "")
    assert [len(turn) for turn in turns] == [4, 9]
    assert turns[0] + turns[1] == generate(model, [[STOP, *b"ab"]], Sampling(13, temperature=0))[0]


def test_control_characters_of_a_sample_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2 = load("gpt2")
    ids = gpt2.encode("a\x1b[31m\nb")
    monkeypatch.setattr(completion, "stream", lambda *_, **__: iter([[one] for one in ids]))
    texts = completion.continuations(None, [0], 1, Sampling(), gpt2, show=True)  # type: ignore[arg-type]
    assert texts == ["a\x1b[31m\nb"]
    assert capsys.readouterr().out == "a\\x1b[31m\nb\n"
