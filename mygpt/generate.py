"""Text generation: tokens sampled one after another, for several prompts at once.

Shapes: B prompts, T tokens of the longest one, V vocab_size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mygpt.distributed import padded_length
from mygpt.model import GPT, KeyValueCache
from shards.tokenizer import Tokenizer

# Constants of SplitMix64 as int64.
_GOLDEN_GAMMA, _MIX_1, _MIX_2 = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class Sampling:
    """How many tokens to sample, and from which distribution. Raises ValueError if impossible."""

    max_new_tokens: int = 160
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # and of these from the fewest that have this probability together
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def trailing_space_note(prompts: Sequence[str]) -> str:
    """Return a line of advice if a prompt ends in a space, else ""."""
    for prompt in prompts:
        if prompt.endswith(" "):
            return (
                f"note: the prompt {prompt!r} ends in a space. GPT-2's BPE keeps a space with the "
                "word after it, so texts hardly ever continue so: leave the space out"
            )
    return ""


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: int | None = None
) -> list[list[int]]:
    """Return the tokens that `stream` yields for each prompt."""
    texts: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, sampling, stop):
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


def continued(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling
) -> list[str]:
    """Return each prompt with its continuation, as documents that begin with the prompt.

    Ids beyond the tokenizer's vocabulary, which a padded model may draw, are dropped.
    """
    eot, known = tokenizer.eot, tokenizer.n_vocab
    ids = generate(model, [[eot, *tokenizer.encode(p)] for p in prompts], sampling, stop=eot)
    return [
        prompt + tokenizer.decode([token for token in text if token < known])
        for prompt, text in zip(prompts, ids, strict=True)
    ]


@torch.no_grad()
def stream(
    model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: int | None = None
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, `max_new_tokens` times or until all texts have ended.

    A text ends before the token `stop`; from there on its entry is None. What prompt i draws
    depends on the seed, its tokens and i, not on the other prompts or on their number: as `sample`
    says, even the rounding of another batch size hardly ever changes it. No global generator is
    used.

    A text may outgrow the block. Its last half block then becomes the context: positions are
    absolute, so the tokens that move are computed again.

    Raises ValueError for prompts without tokens or with unknown ones.
    """
    _check_prompts(prompts, model.config.vocab_size)
    texts = [text_key(prompt, number) for number, prompt in enumerate(prompts)]
    contexts = [list(prompt) for prompt in prompts]
    ended = [False] * len(prompts)
    cache, step = None, None
    was_training = model.training
    model.eval()
    try:
        for left in range(sampling.max_new_tokens, 0, -1):
            if all(ended):
                break
            if cache is None or max(map(len, contexts)) > cache.capacity:
                logits, cache = _prefill(model, contexts, left)
                step = None
            else:
                last = torch.tensor([[context[-1]] for context in contexts])  # (B, 1)
                if cache.static:
                    step = step or RecordedStep(model, cache)
                    logits = step(last)  # (B, V)
                else:
                    logits = model.next_logits(last.to(cache.lengths.device), None, cache)
            position = sampling.max_new_tokens - left
            tokens = draw(logits, texts, position, sampling).tolist()
            for context, token in zip(contexts, tokens, strict=True):
                context.append(token)
            ended = [e or token == stop for e, token in zip(ended, tokens, strict=True)]
            yield [None if e else token for e, token in zip(ended, tokens, strict=True)]
    finally:
        model.train(was_training)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens: begin it with <|endoftext|>")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(
                f"prompt {row}: expected tokens from 0 to {vocab - 1}, found {min(prompt)} to "
                f"{max(prompt)}: encode it with the model's tokenizer"
            )


def _prefill(model: GPT, contexts: list[list[int]], left: int) -> tuple[Tensor, KeyValueCache]:
    """Return the logits (B, V) after each context, cut if it exceeds the block, and the cache.

    The cache has room for `left` more tokens, up to the block size.
    """
    block, device = model.config.block_size, model.wte.weight.device
    for context in contexts:
        if len(context) > block:
            del context[: len(context) - max(1, block // 2)]
    rows = [torch.tensor(context) for context in contexts]
    longest = max(map(len, rows))
    padding = padded_length(longest, block, device) - longest
    idx = F.pad(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), (0, padding)).to(device)
    lengths = torch.tensor([len(context) for context in contexts], device=device)
    capacity = padded_length(min(block, longest + left), block, device)
    cache = KeyValueCache(model, len(contexts), capacity, static=device.type == "cuda")
    return model.next_logits(idx, lengths, cache), cache


class RecordedStep:
    """One more token for every row of a static cache, recorded as a CUDA graph and replayed.

    A token takes some 200 kernels, each shorter than Python needs to launch it. The logits are
    always returned in the same memory.
    """

    def __init__(self, model: GPT, cache: KeyValueCache) -> None:
        self.tokens = torch.zeros_like(cache.lengths)[:, None]  # (B, 1)
        self.graph = torch.cuda.CUDAGraph()
        lengths = cache.lengths.clone()
        # As torch's documentation of CUDA graphs requires: warm up on another stream, so that
        # libraries initialise themselves, then record.
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            for _ in range(2):
                model.next_logits(self.tokens, None, cache)
                cache.lengths.copy_(lengths)  # the first real token overwrites what was stored
        current.wait_stream(other)
        # The loader pins memory on its own thread meanwhile, which only "thread_local" permits.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = model.next_logits(self.tokens, None, cache)
        cache.lengths.copy_(lengths)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append the tokens (B, 1), on any device; return the logits (B, V) after them."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


def text_key(prompt: Sequence[int], number: int) -> int:
    """Return the 64-bit key of the noise of one text: different prompts draw differently."""
    return _hash(np.array([*prompt, number], np.int64).tobytes())


def draw(logits: Tensor, texts: Sequence[int], position: int, sampling: Sampling) -> Tensor:
    """Sample the token (B,) at `position` of the texts with these keys from logits (B, V)."""
    if sampling.temperature == 0:
        return logits.argmax(1)
    gumbel = noise(sampling.seed, texts, position, logits.size(1), logits.device)
    return sample(logits, gumbel, sampling)


def noise(
    seed: int, texts: Sequence[int], position: int, vocab: int, device: torch.device
) -> Tensor:
    """Return Gumbel noise (B, V) for the tokens at `position` of the texts with these keys.

    Counter-based: the noise of a position is the same whatever was drawn before, on any device.
    Made where the logits are, for all texts at once, by SplitMix64 (Steele, Lea, Flood, 2014)
    from a hash of (seed, text, position).
    """
    starts = [_hash(f"{seed} {text} {position}".encode()) for text in texts]
    if device.type == "cpu":  # numpy multiplies int64 faster
        bits = splitmix64(np.array(starts)[:, None], np.arange(vocab))
    else:
        start, counter = torch.tensor(starts, device=device), torch.arange(vocab, device=device)
        bits = splitmix64(start[:, None], counter)
    uniform = (torch.as_tensor(bits).float() + 0.5) * 2**-32  # above 0
    return uniform.neg_().log1p_().neg_().log_().neg_()  # log1p keeps the smallest apart


def splitmix64(start: Any, counter: Any) -> Any:
    """Return 32 bits per counter, arrays or tensors of int64, which wraps around."""
    bits = start + counter * _GOLDEN_GAMMA
    bits ^= _shift(bits, 30)
    bits *= _MIX_1
    bits ^= _shift(bits, 27)
    bits *= _MIX_2
    bits ^= _shift(bits, 31)
    return _shift(bits, 32)


def _shift(bits: Any, n: int) -> Any:
    """Shift int64 to the right with zeros following: the operator repeats the sign."""
    return (bits >> n) & (2 ** (64 - n) - 1)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def sample(logits: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """Sample one token (B,) per row of logits (B, V), as a function of Gumbel noise (B, V).

    Gumbel-max: the largest sum of a logit and its noise is a sample of the softmax. An error of
    1e-6 in the logits, as between batch sizes, changes a token with about that probability only.
    """
    if sampling.temperature == 0:
        return logits.argmax(1)
    logits = logits.float() / sampling.temperature
    tokens = None
    if 0 < sampling.top_k < logits.size(1):
        logits, tokens = logits.topk(sampling.top_k)  # (B, K), most likely first
    elif sampling.top_p < 1:
        logits, tokens = logits.sort(descending=True)  # (B, V)
    if sampling.top_p < 1:
        probs = logits.softmax(1)
        before = _cumulative(probs) - probs  # probability of all more likely tokens
        logits = logits.masked_fill(before >= sampling.top_p, -torch.inf)
    if tokens is None:
        return (logits + noise).argmax(1)
    largest = (logits + noise.gather(1, tokens)).argmax(1, keepdim=True)  # (B, 1)
    return tokens.gather(1, largest).squeeze(1)


def _cumulative(probs: Tensor) -> Tensor:
    """Return cumulative sums (B, V), on the CPU where torch has no deterministic CUDA kernel."""
    if probs.is_cuda and torch.are_deterministic_algorithms_enabled():
        return probs.cpu().cumsum(1).to(probs.device)
    return probs.cumsum(1)
