"""Text from a model: tokens drawn one after another, for several prompts at once.

B: prompts, T: tokens of the longest one, V: vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mygpt.model import GPT, KeyValueCache


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, drawn as `stream` says."""
    texts: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    ):
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


@torch.no_grad()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, over and over, as they are drawn.

    A prompt's text ends before the token `stop`: from there on its entry is None, and nothing
    more is yielded once all have ended. The logits are divided by `temperature`, 0 takes the
    likeliest token; only the `top_k` likeliest tokens are drawn, and of those only the fewest
    that have probability `top_p` together. What prompt i draws depends on `seed` and i, not on
    the other prompts, and no global generator is touched.

    A text may outgrow the block. When it does, its last half block becomes the context: learned
    positions are absolute, so the tokens that move are computed anew.

    Raises ValueError for prompts without tokens or with unknown ones, and impossible settings.
    """
    _check(model, prompts, temperature, top_k, top_p)
    chance = [np.random.default_rng([seed, row]) for row in range(len(prompts))]
    contexts = [list(prompt) for prompt in prompts]
    ended = [False] * len(prompts)
    cache, device = None, model.wte.weight.device
    step: Callable[[Tensor], Tensor] | None = None
    was_training = model.training
    model.eval()
    try:
        for left in range(max_new_tokens, 0, -1):
            if all(ended):
                break
            if cache is None or max(map(len, contexts)) > cache.capacity:
                logits, cache = _begin(model, contexts, left)
                step = None
            else:
                step = step or (Recorded if cache.static else Step)(model, cache)
                logits = step(torch.tensor([[context[-1]] for context in contexts]))  # (B, V)
            uniform = torch.tensor([1 - rng.random() for rng in chance], device=device)  # (0, 1]
            tokens = sample(logits, uniform, temperature, top_k, top_p).tolist()
            for context, token in zip(contexts, tokens, strict=True):
                context.append(token)
            ended = [e or token == stop for e, token in zip(ended, tokens, strict=True)]
            yield [None if e else token for e, token in zip(ended, tokens, strict=True)]
    finally:
        model.train(was_training)


def _check(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> None:
    vocab = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens: begin it with <|endoftext|>")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(
                f"prompt {row}: expected tokens from 0 to {vocab - 1}, found {min(prompt)} to "
                f"{max(prompt)}: encode it with the model's tokenizer"
            )
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def _begin(model: GPT, contexts: list[list[int]], left: int) -> tuple[Tensor, KeyValueCache]:
    """Logits (B, V) after each context, cut if it is longer than the block, and the cache.

    The cache has room for `left` more tokens, as far as the block goes.
    """
    block, device = model.config.block_size, model.wte.weight.device
    for context in contexts:
        if len(context) > block:
            del context[: len(context) - max(1, block // 2)]
    rows = [torch.tensor(context) for context in contexts]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)
    ends = [len(context) for context in contexts]
    lengths = None if min(ends) == max(ends) else torch.tensor(ends, device=device)
    capacity = min(block, idx.size(1) + left)
    cache = KeyValueCache(model, len(contexts), capacity, static=device.type == "cuda")
    return model.next_logits(idx, lengths, cache), cache


class Step:
    """One token more for every row of a cache: tokens (B, 1) to the logits (B, V) after them."""

    def __init__(self, model: GPT, cache: KeyValueCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """`tokens` may lie on any device."""
        device = self.cache.lengths.device
        return self.model.next_logits(tokens.to(device), None, self.cache)


class Recorded(Step):
    """The same as a CUDA graph: recorded once, then started as a whole for every token.

    A token takes some 200 kernels, each shorter than it takes Python to start it. The cache must
    be static. The logits lie in the same memory every time.
    """

    def __init__(self, model: GPT, cache: KeyValueCache) -> None:
        super().__init__(model, cache)
        self.tokens = torch.zeros_like(cache.lengths)[:, None]  # (B, 1)
        self.graph = torch.cuda.CUDAGraph()
        # As torch's documentation on CUDA graphs has it: first run on another stream, so that
        # libraries set themselves up, then record. What the runs wrote is written over by the
        # first true token, once the lengths are what they were.
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._dry_run()
        current.wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.logits = self._dry_run()

    def _dry_run(self) -> Tensor:
        """The step, after which the cache is as long as it was."""
        logits = super().__call__(self.tokens)
        self.cache.lengths -= 1
        return logits

    def __call__(self, tokens: Tensor) -> Tensor:
        """As `Step`."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.cache.lengths += 1
        return self.logits


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """One token for each row of logits (B, V): (B,), a function of `uniform` (B,) in (0, 1].

    Row b is drawn by inverting its distribution function at `uniform[b]`.
    """
    if temperature == 0:
        return logits.argmax(1)
    logits = logits.float() / temperature
    tokens = None
    if top_k is not None and top_k < logits.size(1):
        logits, tokens = logits.topk(top_k)  # (B, K), likeliest first
    elif top_p < 1:
        logits, tokens = logits.sort(descending=True)  # (B, V)
    probs = logits.softmax(1)
    if top_p < 1:
        before = _cumulative(probs) - probs  # what the likelier tokens have together
        probs = probs.masked_fill(before >= top_p, 0.0)
    cumulative = _cumulative(probs)
    threshold = uniform.to(probs)[:, None] * cumulative[:, -1:]  # above 0: falls on no gap
    drawn = torch.searchsorted(cumulative, threshold)  # (B, 1)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def _cumulative(probs: Tensor) -> Tensor:
    """Sums from the left, (B, V). CUDA has no deterministic kernel for them, and says so."""
    if probs.is_cuda and torch.are_deterministic_algorithms_enabled():
        return probs.cpu().cumsum(1).to(probs.device)
    return probs.cumsum(1)
