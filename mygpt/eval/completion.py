"""Text as it is generated: samples, streamed to a terminal, and interactive completion.

T: tokens, V: vocabulary.
"""

import codecs
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from typing import Any

import torch
from torch import Tensor

from mygpt.eval import summary
from mygpt.generate import Sampling, draw, stream, trailing_space_note
from mygpt.model import GPT, KeyValueCache
from mygpt.stopping import Interrupt
from shards.cli import printable_text
from shards.tokenizer import Tokenizer


class TextStream:
    """Incremental decoder: tokens to text, each character as soon as its bytes are complete.

    `vocabulary` holds the bytes of every token id; ids beyond it, as a model with a padded
    vocabulary may draw, are empty. Bytes that are not UTF-8 become U+FFFD, as in `decode`.
    """

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that the token completes, perhaps none."""
        is_known = token < len(self._vocabulary)
        return self._decoder.decode(self._vocabulary[token] if is_known else b"")

    def end(self) -> str:
        """Return what is left of an incomplete character."""
        return self._decoder.decode(b"", final=True)


def continuations(
    model: GPT,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling,
    tokenizer: Tokenizer,
    show: bool = False,
) -> list[str]:
    """Sample `count` continuations of the prompt's tokens, each to the end of its document.

    With `show` the first of them is printed as it is generated.
    """
    vocabulary = tokenizer.vocabulary()
    texts = [""] * count
    decoders = [TextStream(vocabulary) for _ in texts]
    for tokens in stream(model, [prompt] * count, sampling, stop=tokenizer.eot):
        pieces = [
            "" if token is None else decoder.push(token)
            for token, decoder in zip(tokens, decoders, strict=True)
        ]
        if show:
            print(printable_text(pieces[0]), end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    ends = [decoder.end() for decoder in decoders]
    if show:
        print(printable_text(ends[0]))
    return [text + end for text, end in zip(texts, ends, strict=True)]


def draw_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    count: int,
    sampling: Sampling,
    labels: Mapping[str, Any],
    show: bool,
) -> list[dict[str, Any]]:
    """Return `count` samples of each prompt, {"prompt", "text", **labels}; with `show`, print them.

    On a terminal a single sample of a prompt is printed while it is generated.
    """
    if note := trailing_space_note(prompts):
        print(note, file=sys.stderr)
    live = show and count == 1 and sys.stdout.isatty()
    samples: list[dict[str, Any]] = []
    for prompt in prompts:
        if live:
            title = summary.title({"prompt": prompt, **labels}, len(samples) + 1)
            print(f"\n--- {title}\n{printable_text(prompt)}", end="", flush=True)
        ids = [tokenizer.eot, *tokenizer.encode(prompt)]  # as every document begins in training
        for text in continuations(model, ids, count, sampling, tokenizer, live):
            samples.append({"prompt": prompt, "text": prompt + text, **labels})
            if show and not live:
                print(f"\n--- {summary.title(samples[-1], len(samples))}")
                print(printable_text(prompt + text))
    return samples


class Completer:
    """A text that the user and the model write in turns.

    The cache keeps keys and values of the text, so only new tokens are computed, until the text
    outgrows the block: then its last half block is computed again, as in `mygpt.generate.stream`.
    """

    def __init__(self, model: GPT, sampling: Sampling) -> None:
        self._model = model.eval()
        self.sampling = sampling
        self._sampled = 0  # tokens of all texts so far
        self.logits = torch.empty(0)  # (1, V), from which the last token was drawn
        self.clear()

    def clear(self) -> None:
        """Start a new text."""
        self._new: list[int] = []  # tokens that the cache does not hold yet
        self._context: list[int] = []  # tokens in the cache
        self._cache = KeyValueCache(self._model, 1, self._model.config.block_size)

    def complete(self, tokens: Sequence[int], stop: int) -> Iterator[int]:
        """Append `tokens` to the text, then yield the model's continuation up to `stop`.

        `stop` becomes part of the text but is not yielded. If the caller stops iterating earlier,
        the text keeps the tokens yielded so far. Raises ValueError for a text without tokens.
        """
        self._new.extend(tokens)
        if not self._new:
            raise ValueError("the text has no tokens: begin it with <|endoftext|>")
        sampling = self.sampling
        for _ in range(sampling.max_new_tokens):
            self.logits = logits = self._next_logits()  # (1, V)
            token = int(draw(logits, [0], self._sampled, sampling))
            self._sampled += 1
            self._new.append(token)
            if token == stop:
                return
            yield token

    def _next_logits(self) -> Tensor:
        """Logits (1, V) after the text, computing only its new tokens."""
        block_size = self._model.config.block_size
        if len(self._context) + len(self._new) > block_size:
            text = self._context + self._new
            self.clear()
            self._new = text[-max(1, block_size // 2) :]
        idx = torch.tensor([self._new], device=self._model.wte.weight.device)  # (1, T)
        self._context += self._new
        self._new = []
        return self._model.next_logits(idx, None, self._cache)


HELP = """Type a text and the model continues it. Enter alone: continue; /new: start a new text;
Ctrl-C: interrupt the model; Ctrl-D: quit."""


def converse(
    completer: Completer, tokenizer: Tokenizer, read: Callable[[str], str] = input
) -> None:
    """Complete what the user types, in turns, until the input ends.

    Every text begins with <|endoftext|>, as every document in training does.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 don't end the talk
    print(HELP)
    vocabulary, start = tokenizer.vocabulary(), [tokenizer.eot]
    noted = False
    while True:
        try:
            typed = read("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if typed == "/new":
            completer.clear()
            start = [tokenizer.eot]
            continue
        if not noted and (note := trailing_space_note([typed])):
            noted = True
            print(note)
        text, written = TextStream(vocabulary), 0
        # A flag and not an exception, which could leave the cache half updated.
        with Interrupt().watch() as interrupt:
            for token in completer.complete(start + tokenizer.encode(typed), tokenizer.eot):
                print(printable_text(text.push(token)), end="", flush=True)
                written += 1
                if interrupt.seen:
                    break
        start = []
        is_ended = not interrupt.seen and written < completer.sampling.max_new_tokens
        print(text.end() + "\n<|endoftext|>" * is_ended, end="", flush=True)
