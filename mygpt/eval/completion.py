"""Text as it is being written: token by token on a terminal, and completed at a prompt.

T: tokens, V: vocabulary.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mygpt.generate import sample, stream
from mygpt.model import GPT, KeyValueCache
from mygpt.stopping import Interrupt


class TextStream:
    """Tokens to text, each as soon as its bytes make whole characters.

    `vocabulary` holds the bytes of every token id; ids past its end stand for no text. Bytes that
    are not UTF-8 become U+FFFD, as when the whole is decoded at once.
    """

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that the token completes, maybe none."""
        known = token < len(self._vocabulary)
        return self._decoder.decode(self._vocabulary[token] if known else b"")

    def end(self) -> str:
        """What is left of a character that was never completed."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True)
class Sampling:
    """How text is drawn, as `mygpt.generate.stream` has it; `top_k` 0 draws among all tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 160


def continuations(
    model: GPT,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling,
    vocabulary: Sequence[bytes],
    eot: int,
    show: bool = False,
) -> list[str]:
    """`count` texts that go on after the prompt's tokens, each up to the end of its document.

    With `show` the first of them is printed as it comes.
    """
    texts = [""] * count
    decoders = [TextStream(vocabulary) for _ in texts]
    for tokens in stream(
        model,
        [prompt] * count,
        sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k or None,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=eot,
    ):
        pieces = [
            "" if token is None else decoders[row].push(token) for row, token in enumerate(tokens)
        ]
        if show:
            print(pieces[0], end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    ends = [decoder.end() for decoder in decoders]
    if show:
        print(ends[0])
    return [text + end for text, end in zip(texts, ends, strict=True)]


class Completer:
    """A text that grows by what it is given and by what the model writes.

    The keys and values of what was read are kept, so only new tokens are computed, until the text
    outgrows the block: then its last half block is read anew, as in `mygpt.generate.stream`.
    """

    def __init__(self, model: GPT, sampling: Sampling) -> None:
        self._model = model.eval()
        self.sampling = sampling
        self._chance = np.random.default_rng(sampling.seed)
        self.clear()

    def clear(self) -> None:
        """Begin a new text."""
        self._unread: list[int] = []
        self._context: list[int] = []  # tokens that the cache holds
        self._cache = KeyValueCache(self._model, 1, self._model.config.block_size)

    def complete(self, tokens: Sequence[int], stop: int) -> Iterator[int]:
        """Append `tokens` to the text, then yield what the model goes on with, up to `stop`.

        After `stop`, which belongs to the text and is not yielded, the model has said all it
        would. Whoever stops listening before that keeps the tokens yielded so far. Raises
        ValueError for a text without tokens.
        """
        self._unread.extend(tokens)
        if not self._unread:
            raise ValueError("the text has no tokens: begin it with <|endoftext|>")
        for _ in range(self.sampling.max_new_tokens):
            logits = self._read()  # (1, V)
            uniform = torch.tensor([1 - self._chance.random()], device=logits.device)  # (0, 1]
            how = self.sampling
            token = int(sample(logits, uniform, how.temperature, how.top_k or None, how.top_p))
            self._unread.append(token)
            if token == stop:
                return
            yield token

    def _read(self) -> Tensor:
        """Logits (1, V) after the text, of which only what is new is computed."""
        block = self._model.config.block_size
        if len(self._context) + len(self._unread) > block:
            text = self._context + self._unread
            self.clear()
            self._unread = text[-max(1, block // 2) :]
        device = self._model.wte.weight.device
        idx = torch.tensor([self._unread], device=device)  # (1, T)
        self._context += self._unread
        self._unread = []
        return self._model.next_logits(idx, None, self._cache)


HELP = """What you type is continued. Enter alone: go on; /new: begin anew; Ctrl-C: stop the text;
Ctrl-D: leave."""


def converse(
    completer: Completer,
    encode: Callable[[str], list[int]],
    vocabulary: Sequence[bytes],
    eot: int,
    read: Callable[[str], str] = input,
) -> None:
    """Let the user and the model write a text in turns, until the input ends.

    Every text begins with <|endoftext|>, as every document of the training did.
    """
    print(HELP)
    begun = False
    while True:
        try:
            typed = read("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if typed == "/new":
            completer.clear()
            begun = False
            continue
        tokens = encode(typed) if begun else [eot, *encode(typed)]
        begun = True
        text, written = TextStream(vocabulary), 0
        # A flag instead of an exception: the cache is never left half written.
        with Interrupt().watch() as interrupt:
            for token in completer.complete(tokens, eot):
                print(text.push(token), end="", flush=True)
                written += 1
                if interrupt.seen:
                    break
        ended = not interrupt.seen and written < completer.sampling.max_new_tokens
        print(text.end() + "\n<|endoftext|>" * ended, end="", flush=True)
