import contextlib
import functools
import hashlib
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mygpt.config import GPTConfig
from mygpt.generate import Sampling, generate, noise, sample, splitmix64, stream
from mygpt.model import GPT, KeyValueCache

VOCAB, BLOCK = 61, 12


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    shape = {"block_size": BLOCK, "vocab_size": VOCAB, "n_layers": 2, "n_heads": 2, "n_embed": 16}
    model = GPT(GPTConfig(**shape, dropout=0.2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def uncached(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Greedy decoding as one would write it first: the whole context anew for every token."""
    model.eval()
    context, text = list(prompt), []
    for _ in range(n):
        if len(context) > BLOCK:
            context = context[-(BLOCK // 2) :]
        with torch.no_grad():
            token = int(model(torch.tensor([context]))[0][0, -1].argmax())
        context.append(token)
        text.append(token)
    model.train()
    return text


PROMPTS = [[5], [7, 8, 9, 10, 11], [1, 2], list(range(12)), list(range(20, 50))]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("n", [1, 5, 40])
def test_greedy_equals_the_uncached_model(model, prompt, n):
    """Within the block, up to its end, and sliding several times beyond it."""
    assert generate(model, [prompt], Sampling(n, temperature=0)) == [uncached(model, prompt, n)]


class Graph(TorchDispatchMode):
    """A CUDA graph on a CPU: the operators that were recorded, repeated in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            if any(returned.alias_info for returned in function._schema.returns):
                if function._schema.is_mutable:  # else a view, of memory that is the same still
                    function(*args, **kwargs)
                continue
            again = function(*args, **kwargs)
            for old, new in zip(*map(tensors, (result, again)), strict=True):
                old.copy_(new)


def tensors(result) -> list[torch.Tensor]:
    every = result if isinstance(result, tuple | list) else [result]
    return [one for one in every if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_gpu_records_and_repeats_is_the_same_text(model, monkeypatch, temperature):
    """All that needs a GPU is replaced by what does the same on a CPU."""
    expected = generate(model, PROMPTS, Sampling(40, temperature=temperature))
    stream = mock.Mock(wait_stream=lambda other: None)
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    modes = []
    monkeypatch.setattr(
        "torch.cuda.graph",
        lambda graph, capture_error_mode: modes.append(capture_error_mode) or graph,
    )
    monkeypatch.setattr("torch.cuda.Stream", lambda: stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: stream)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    static = functools.partial(KeyValueCache, static=True)
    monkeypatch.setattr("mygpt.generate.KeyValueCache", lambda *args, **_: static(*args))
    assert generate(model, PROMPTS, Sampling(40, temperature=temperature)) == expected
    assert set(modes) == {"thread_local"}  # a thread that pins memory must not end the recording


def test_a_gpu_sees_few_shapes_and_writes_the_same_text(monkeypatch):
    """Prompts and caches of any length: cuDNN would build a plan for the attention of each."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(block_size=150, vocab_size=VOCAB, n_layers=2, n_heads=2, n_embed=16))
    prompts = [[[5] * length] for length in (1, 62, 63, 65, 149)]
    expected = [generate(model, prompt, Sampling(3)) for prompt in prompts]
    monkeypatch.setattr("mygpt.distributed._FIXED_SHAPES", {"cpu"})
    shapes, step = set(), GPT.next_logits

    def noted(self, idx, lengths, cache):
        if idx.size(1) > 1:
            shapes.add((idx.size(1), cache.capacity))
        return step(self, idx, lengths, cache)

    monkeypatch.setattr(GPT, "next_logits", noted)
    assert [generate(model, prompt, Sampling(3)) for prompt in prompts] == expected
    assert shapes == {(64, 64), (64, 128), (128, 128), (150, 150)}


def test_prompts_of_different_lengths_do_not_disturb_each_other(model):
    together = generate(model, PROMPTS, Sampling(40, temperature=0))
    assert together == [uncached(model, prompt, 40) for prompt in PROMPTS]


def test_draws_of_a_prompt_do_not_depend_on_the_others(model):
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 3}
    together = generate(model, [[5], [5], [9, 9, 9]], Sampling(30, **options))
    assert together[0] != together[1]
    assert generate(model, [[5]], Sampling(30, **options)) == together[:1]
    assert (
        generate(model, [[5], [8, 7, 6, 5], [9, 9, 9]], Sampling(30, **options))[2] == together[2]
    )


def test_a_seed_repeats_itself_and_another_does_not(model):
    first, second, other = (generate(model, [[5]], Sampling(30, seed=seed)) for seed in (4, 4, 5))
    assert first == second != other


def test_touches_neither_the_generators_nor_the_mode(model):
    model.train()
    state = torch.get_rng_state()
    generate(model, [[5]], Sampling(3))
    assert model.training and torch.equal(state, torch.get_rng_state())
    abandoned = stream(model, [[5]], Sampling(3))
    next(abandoned)
    abandoned.close()
    assert model.training


def test_prompts_are_left_as_they_were(model):
    prompt = list(range(30))
    generate(model, [prompt], Sampling(5))
    assert prompt == list(range(30))


def test_stops_before_the_stop_token(model):
    free = generate(model, [[5], [6]], Sampling(40, seed=2))
    stop = free[0][9]
    cut = generate(model, [[5], [6]], Sampling(40, seed=2), stop=stop)
    for text, whole in zip(cut, free, strict=True):
        assert text == whole[: whole.index(stop) if stop in whole else None]


def test_a_stream_ends_when_all_texts_have(model):
    [text] = generate(model, [[5]], Sampling(40, seed=2))
    tokens = list(stream(model, [[5]], Sampling(40, seed=2), stop=text[3]))
    end = text.index(text[3])
    assert tokens == [[token] for token in text[:end]] + [[None]]


def test_nothing_asked_for_is_nothing(model):
    assert generate(model, [[5], [6]], Sampling(0)) == [[], []]
    assert generate(model, [], Sampling(4)) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, 61]], {}, "expected tokens from 0 to 60, found 1 to 61"),
        ([[-1]], {}, "expected tokens from 0 to 60, found -1 to -1"),
        ([[1]], {"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ([[1]], {"top_k": -1}, "top_k must be 0 or more, got -1"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
    ],
)
def test_impossible_requests_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, Sampling(3, **options))


# --- one draw


def frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    """How often each token is drawn, with the noise of many positions."""
    n = 20_000
    gumbel = noise(3, range(n), 0, len(logits), CPU)
    drawn = sample(logits.expand(n, -1), gumbel, Sampling(**options))
    return torch.bincount(drawn, minlength=len(logits)) / n


CPU = torch.device("cpu")
NOISE = 0.014  # four standard deviations of a frequency of 1/2 among 20,000
LOGITS = torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0, -1.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    expected = (LOGITS / temperature).softmax(0)
    found = frequencies(LOGITS, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=NOISE)


def test_top_k_keeps_the_k_likeliest():
    kept = torch.tensor([0.0, 0, 1, 0, 1, 0]) > 0
    expected = LOGITS.masked_fill(~kept, -torch.inf).softmax(0)
    torch.testing.assert_close(frequencies(LOGITS, top_k=2), expected, rtol=0, atol=NOISE)
    everything = LOGITS.softmax(0)
    torch.testing.assert_close(frequencies(LOGITS, top_k=99), everything, rtol=0, atol=NOISE)


@pytest.mark.parametrize(("top_p", "count"), [(0.1, 1), (0.62, 1), (0.64, 2), (0.88, 3), (1.0, 6)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, count):
    """The probabilities are 0.621, 0.228, 0.084, 0.051, 0.011 and 0.004, in order of size."""
    order = LOGITS.argsort(descending=True)
    expected = torch.full_like(LOGITS, -torch.inf)
    expected[order[:count]] = LOGITS[order[:count]]
    found = frequencies(LOGITS, top_p=top_p)
    torch.testing.assert_close(found, expected.softmax(0), rtol=0, atol=NOISE)


def test_top_p_is_taken_among_the_top_k():
    found = frequencies(LOGITS, top_k=3, top_p=0.9)
    assert found.gt(0).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("extreme", [-1e30, 1e30])
def test_a_token_of_probability_zero_is_never_drawn(options, extreme):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    gumbel = torch.tensor([[1e30, extreme, 0.0, 1e30]])
    assert int(sample(logits, gumbel, Sampling(**options))) in (1, 2)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 1e-40}])
def test_a_diverged_model_draws_tokens_that_exist(options):
    """Its logits may be anything."""
    for value in (torch.nan, torch.inf, -torch.inf, 1e38):
        logits = torch.tensor([[0.0, value, 1.0, value]])
        assert int(sample(logits, noise(0, [0], 0, 4, CPU), Sampling(**options))) in range(4)


def test_rounding_hardly_ever_changes_a_token():
    """Of 2,000 draws among 5,000 tokens none changes with an error of 1e-6 in every logit.

    By inversion of the distribution some three would, whatever the order of the tokens.
    """
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)).expand(2000, -1)
    error = 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    gumbel = noise(5, range(len(logits)), 0, 5000, CPU)
    before, after = (sample(x, gumbel, Sampling()) for x in (logits, logits + error))
    assert torch.equal(before, after)
    assert not torch.equal(before, sample(logits + 1e5 * error, gumbel, Sampling()))


def test_a_text_does_not_depend_on_how_many_are_drawn_beside_it(model):
    alone = generate(model, [[1, 2]], Sampling(40, seed=9))
    assert generate(model, [[1, 2]] * 5, Sampling(40, seed=9))[0] == alone[0]


def test_prompts_draw_differently_though_the_model_ignores_them(model):
    drawn = [generate(model, [prompt], Sampling(1, 1e30, seed=9))[0] for prompt in ([1], [2], [3])]
    assert len({tuple(tokens) for tokens in drawn}) == 3


def test_the_likeliest_token_at_temperature_zero():
    assert sample(LOGITS[None], torch.randn(1, 6), Sampling(temperature=0.0)).tolist() == [2]


def test_the_noise_is_splitmix64_of_a_hash():
    """With Python's integers, and the generator as its authors publish it."""
    digest = hashlib.blake2b(b"7 -3 11", digest_size=8).digest()
    state, mask, expected = int.from_bytes(digest, "little"), 2**64 - 1, []
    for _ in range(1000):
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        uniform = ((z ^ z >> 31) >> 32) + 0.5
        expected.append(-math.log(-math.log1p(-uniform * 2**-32)))
        state = state + 0x9E3779B97F4A7C15 & mask
    found = noise(7, [5, -3], 11, 1000, CPU)[1]
    torch.testing.assert_close(found, torch.tensor(expected))
    tensors = splitmix64(torch.tensor([state - 2**63, 1])[:, None], torch.arange(1000))
    arrays = splitmix64(np.array([state - 2**63, 1])[:, None], np.arange(1000))
    assert tensors.tolist() == arrays.tolist()  # on a GPU as on a CPU


def test_noise_differs_with_seed_text_and_position_and_is_finite_at_its_ends(monkeypatch):
    every = [noise(*key, 50, CPU) for key in ((1, [1], 1), (2, [1], 1), (1, [2], 1), (1, [1], 2))]
    assert len({tuple(row.flatten().tolist()) for row in every}) == 4
    for bits in (0, 2**32 - 1):
        monkeypatch.setattr("mygpt.generate.splitmix64", lambda *_, bits=bits: np.array([[bits]]))
        assert -torch.inf <= noise(0, [0], 0, 1, CPU).item() < 30


def test_without_temperature_no_noise_is_made(model, monkeypatch):
    monkeypatch.delattr("mygpt.generate.noise")
    assert generate(model, [[5]], Sampling(3, temperature=0)) == [uncached(model, [5], 3)]
