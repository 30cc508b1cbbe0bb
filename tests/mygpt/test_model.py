import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mygpt import loss
from mygpt.config import GPTConfig, GPTConfigSmall
from mygpt.loss import MeanLoss, token_losses
from mygpt.model import GPT, KeyValueCache

SHAPE = {"block_size": 16, "vocab_size": 131, "n_layers": 2, "n_heads": 3, "n_embed": 24}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(**changes) -> GPT:
    """A small model whose weights are large enough for differences to show."""
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(rows: int = 3, tokens: int = 16, vocab: int = 131) -> tuple[torch.Tensor, torch.Tensor]:
    idx, targets = torch.randint(0, vocab, (2, rows, tokens))
    targets[torch.rand(rows, tokens) < 0.3] = -1
    return idx, targets


def plain_loss(model: GPT, idx: torch.Tensor, targets: torch.Tensor, **options) -> torch.Tensor:
    logits, _ = model(idx)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, **options
    )


# --- the shape of the model


def test_parameter_counts():
    with torch.device("meta"):
        gpt2, small = GPT(GPTConfig()), GPT(GPTConfigSmall())
    assert gpt2.num_params() == 124_439_808
    assert gpt2.num_params(non_embedding=True) == 85_056_000
    assert small.num_params(non_embedding=True) == pytest.approx(10.6e6, rel=0.01)
    assert small.num_params() == pytest.approx(30.0e6, rel=0.01)
    assert gpt2.flops_per_token() == pytest.approx(857e6, rel=0.003)


def test_the_head_is_the_embedding():
    model = make()
    assert model.lm_head.weight is model.wte.weight
    assert model.state_dict().keys() - dict(model.named_parameters()).keys() == {"lm_head.weight"}


def test_layer_names_are_nanogpts():
    names = {name.removeprefix("h.0.") for name, _ in make(n_layers=1).named_parameters()}
    layers = {name.rsplit(".", 1)[0] for name in names}
    assert layers == {
        *("wte", "wpe", "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        "ln_f",
    }


def test_without_bias_there_is_none():
    names = [name for name, _ in make(bias=False).named_parameters()]
    assert not any("bias" in name for name in names)


def test_initial_weights():
    model = GPT(GPTConfig(vocab_size=2000, n_layers=8, n_heads=1, n_embed=64))
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all(), name


def test_an_untrained_model_knows_nothing():
    model, (idx, targets) = GPT(GPTConfig(**SHAPE)), batch()
    assert model(idx, targets)[1].item() == pytest.approx(math.log(131), abs=0.1)


# --- attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flash_attention_equals_manual(dtype):
    flash, (idx, targets) = make().to(dtype), batch()
    manual = GPT(flash.config, flash=False).to(dtype)
    manual.load_state_dict(flash.state_dict())
    torch.testing.assert_close(flash(idx)[0], manual(idx)[0])
    for model in (flash, manual):
        model(idx, targets)[1].backward()
    for (name, a), b in zip(flash.named_parameters(), manual.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_no_token_sees_a_later_one():
    model, (idx, _) = make(), batch(rows=1)
    logits, _ = model(idx)
    changed = idx.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 131
    difference = (model(changed)[0] - logits).abs().amax(2)[0]
    assert difference[:9].max() < 1e-5
    assert difference[9:].min() > 1e-3


def test_dropout_acts_in_training_only():
    model, (idx, targets) = make(dropout=0.5), batch()
    assert model(idx, targets)[1] != model(idx, targets)[1]
    model.eval()
    assert model(idx, targets)[1] == model(idx, targets)[1]
    clean = GPT(GPTConfig(**SHAPE))
    clean.load_state_dict(model.state_dict())
    assert torch.equal(model(idx)[0], clean(idx)[0])


def test_manual_attention_drops_out_as_well():
    model = GPT(GPTConfig(**SHAPE, dropout=0.5), flash=False)
    q = torch.ones(1, 1, 4, 8)
    dropped = model.h[0].attn.attention(q, q, q, None, dropout_p=0.5, is_causal=True)
    assert not torch.allclose(dropped, torch.ones(()))


def test_more_tokens_than_the_block_are_refused():
    with pytest.raises(ValueError, match="at most block_size 16 tokens, found 17"):
        make()(torch.zeros(1, 17, dtype=torch.int64))


# --- the head and the loss


def assert_same_gradients(model: GPT, oracle: GPT, **tolerance) -> None:
    for (name, a), b in zip(model.named_parameters(), oracle.parameters(), strict=True):
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(a.grad, b.grad, msg=message, **tolerance)


def test_loss_and_gradients_equal_cross_entropy_on_all_logits():
    model, (idx, targets) = make(), batch()
    oracle = copy.deepcopy(model)
    logits, loss = model(idx, targets)
    assert logits is None
    expected = plain_loss(oracle, idx, targets)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()  # as a gradient scaler or an accumulation would
    (3 * expected).backward()
    assert_same_gradients(model, oracle)


@pytest.mark.parametrize("function", [None, loss.row_probabilities], ids=["in place", "to compile"])
@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("vocab", [64, 65, 127, 128])
def test_any_number_of_rows_and_words(rows, vocab, function):
    """Rows below, at and above one chunk; vocabularies that need padding and that do not."""
    x = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, vocab, (rows,))
    targets[0] = vocab - 1
    loss = MeanLoss.apply(x, weight, targets, function)
    expected = F.cross_entropy(x @ weight.T, targets, ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, weight)))


def test_logits_of_any_size():
    """Where the target's probability underflows, the loss is still the difference of logits."""
    x, weight = torch.eye(3), torch.tensor([[900.0, -900, 0], [0, 0, 0], [-900, 900, 0]])
    for targets in (torch.tensor([2, 0, 1]), torch.tensor([0, 2, -1])):
        expected = F.cross_entropy(x @ weight.T, targets, ignore_index=-1, reduction="none")
        for function in (None, loss.row_losses):
            torch.testing.assert_close(token_losses(x, weight, targets, function), expected)


def test_the_vocabulary_is_padded_for_the_product_alone():
    weight = torch.randn(131, 24)
    wide = loss.pad_vocabulary(weight)
    assert wide.shape == (256, 24)
    assert torch.equal(wide[:131], weight) and wide[131:].eq(0).all()
    assert loss.pad_vocabulary(wide) is wide


def test_nothing_to_learn_is_no_loss():
    model, (idx, targets) = make(), batch()
    _, loss = model(idx, torch.full_like(targets, -1))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("target", [131, -2])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    idx, targets = batch()
    targets[0, 0] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        make()(idx, targets)


def test_without_gradients_the_loss_is_the_same():
    model, (idx, targets) = make(), batch()
    with torch.no_grad():
        _, loss = model(idx, targets)
    assert loss == model(idx, targets)[1]
    assert not loss.requires_grad


def test_token_losses_are_the_terms_of_the_loss():
    model, (idx, targets) = make(), batch()
    losses = model.token_losses(idx, targets)
    expected = plain_loss(model, idx, targets, reduction="none").view(3, 16)
    torch.testing.assert_close(losses, expected.detach())
    assert losses[targets == -1].eq(0).all()
    torch.testing.assert_close(losses.sum() / (targets != -1).sum(), model(idx, targets)[1])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 65536.0)])
def test_under_autocast_the_loss_is_fp32_and_the_gradients_are_close(dtype, scale):
    model, (idx, targets) = make(), batch()
    oracle = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=dtype):
        _, loss = model(idx, targets)
    assert loss.dtype == torch.float32
    (scale * loss).backward()
    plain_loss(oracle, idx, targets).backward()
    torch.testing.assert_close(loss, plain_loss(oracle, idx, targets), rtol=0.02, atol=0.0)
    for a, b in zip(model.parameters(), oracle.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad / scale - b.grad).norm() < 0.05 * b.grad.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_computed_twice_give_the_same_gradients(dropout):
    """Bit for bit, with the same dropout the second time; without gradients nothing is repeated."""
    model, (idx, targets) = make(dropout=dropout), batch()
    results, passes = [], []
    model.h[0].register_forward_pre_hook(lambda *_: passes.append(model.gradient_checkpointing))
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(5)
        _, loss = model(idx, targets)
        model.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert passes == [False, True, True]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    with torch.no_grad():
        model(idx, targets)
    assert len(passes) == 4


def test_gradients_accumulate():
    model, (idx, targets) = make(), batch()
    oracle = copy.deepcopy(model)
    for row in range(3):
        model(idx[row : row + 1], targets[row : row + 1])[1].backward()
        plain_loss(oracle, idx[row : row + 1], targets[row : row + 1]).backward()
    assert_same_gradients(model, oracle)


def test_a_second_backward_pass_is_refused_not_wrong():
    model, (idx, targets) = make(), batch()
    _, loss = model(idx, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_never_exist_whole():
    """No tensor of a training step is as large as the logits of the batch."""
    model = GPT(GPTConfig(block_size=512, vocab_size=4099, n_layers=1, n_heads=1, n_embed=8))
    idx = torch.randint(0, 4099, (4, 512))
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            tensors = result if isinstance(result, list | tuple) else [result]
            largest = max([largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
            return result

    with Sizes():
        model(idx, idx)[1].backward()
    assert largest <= 256 * 4160


class ProductsOfCuda(TorchFunctionMode):
    """Products of 16-bit tensors in fp32, which only CUDA has. `shapes`: of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "mm" in function.__name__ or "matmul" in function.__name__:
            self.shapes |= {
                tuple(x.shape) for x in (*args, *kwargs.values()) if hasattr(x, "shape")
            }
            if dtype := kwargs.pop("out_dtype", None):
                args = [x.to(dtype) for x in args]
        return function(*args, **kwargs)


@pytest.mark.parametrize("kernel", [None, loss.row_probabilities], ids=["eager", "compiled"])
def test_on_cuda_the_head_multiplies_aligned_matrices_into_fp32(kernel, monkeypatch):
    """Rows of 131 columns would not be aligned to 16 bytes, nor would their transpose."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x, weight = torch.randn(300, 24, requires_grad=True), torch.randn(131, 24, requires_grad=True)
    targets = torch.randint(-1, 131, (300,))
    with torch.autocast("cpu", dtype=torch.bfloat16), ProductsOfCuda() as products:
        mean = MeanLoss.apply(x, weight, targets, kernel)
        losses = token_losses(x.detach(), weight.detach(), targets, kernel and loss.row_losses)
    sizes = {n for shape in products.shapes for n in shape}
    assert sizes == {24, 256, 300 - 256}  # width, padded vocabulary and rows of a chunk, the rest
    found = torch.autograd.grad(mean, (x, weight))
    expected = F.cross_entropy(x @ weight.T, targets, ignore_index=-1)
    torch.testing.assert_close(
        (mean, losses.sum() / (targets != -1).sum()), (expected, expected), rtol=0.01, atol=0.0
    )
    for one, other in zip(found, torch.autograd.grad(expected, (x, weight)), strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert (one - other).norm() < 0.01 * other.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
def test_compiled_it_computes_the_same():
    model, (idx, targets) = make(), batch()
    oracle = copy.deepcopy(model)
    model.compile(backend="aot_eager")
    assert {name: p.shape for name, p in model.state_dict().items()} == {
        name: p.shape for name, p in oracle.state_dict().items()
    }
    _, loss = model(idx, targets)
    _, expected = oracle(idx, targets)
    torch.testing.assert_close(loss, expected)
    losses = model.token_losses(idx, targets)
    torch.testing.assert_close(losses, oracle.token_losses(idx, targets))
    loss.backward()
    expected.backward()
    assert_same_gradients(model, oracle)
    torch._dynamo.reset()


def test_ddp_sees_the_gradients(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1
    )
    try:
        model, (idx, targets) = make(), batch()
        oracle = copy.deepcopy(model)
        torch.nn.parallel.DistributedDataParallel(model)(idx, targets)[1].backward()
        plain_loss(oracle, idx, targets).backward()
        assert_same_gradients(model, oracle)
    finally:
        torch.distributed.destroy_process_group()


# --- the cache


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    idx = torch.tensor([row + [130] * (longest - len(row)) for row in rows])
    return idx, torch.tensor([len(row) for row in rows])


UNEVEN = [[3, 1, 5], [4, 2, 6], [5, 3, 7], [9, 7, 11], [14, 12, 16]]
EVEN = [[3, 3, 3], [4, 4, 4], [9, 9, 9], [10, 10, 10], [16, 16, 16]]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("ends", [UNEVEN, EVEN, EVEN[:2] + UNEVEN[3:]])
def test_cached_logits_equal_those_of_the_whole_text(ends, flash, static):
    """Rows continued by one and by several tokens, up to the full block, alike or not."""
    model = make().eval()
    if not flash:
        manual = GPT(model.config, flash=False).eval()
        manual.load_state_dict(model.state_dict())
        model = manual
    texts = torch.randint(0, 131, (3, 16)).tolist()
    cache, starts = KeyValueCache(model, 3, capacity=16, static=static), [0, 0, 0]
    for stop in ends:
        piece = [text[a:b] for text, a, b in zip(texts, starts, stop, strict=True)]
        idx, lengths = padded(piece)
        is_whole = lengths.min() == lengths.max()
        logits = model.next_logits(idx, None if is_whole else lengths, cache)
        for row, end in enumerate(stop):
            expected = model(torch.tensor([texts[row][:end]]))[0][0, -1]
            torch.testing.assert_close(logits[row], expected)
        starts = stop


@pytest.mark.parametrize("static", [False, True])
def test_the_first_tokens_of_a_cache_need_no_mask(static):
    """So that a GPU takes its causal kernel for a prompt, whatever room the cache has."""
    model, calls = make().eval(), []
    for block in model.h:
        block.attn.attention = lambda *qkv, **options: (
            calls.append(options) or manual(*qkv, **options)
        )
    manual = GPT(GPTConfig(**SHAPE), flash=False).h[0].attn.attention
    cache = KeyValueCache(model, 2, capacity=16, static=static)
    model.next_logits(*padded([[1, 2, 3], [4]]), cache)
    assert all(call["is_causal"] and call["attn_mask"] is None for call in calls)
    calls.clear()
    model.next_logits(torch.tensor([[5], [6]]), None, cache)
    assert not any(call["is_causal"] for call in calls)


def test_a_static_step_can_be_repeated_in_the_same_memory():
    """What a CUDA graph asks of a step: the same operators on the same shapes, nothing replaced."""
    model = make().eval()
    cache = KeyValueCache(model, 2, capacity=16, static=True)
    model.next_logits(*padded([[1, 2, 3], [4]]), cache)
    kept = (cache.buffer, cache.lengths)
    traces: list[list[object]] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
            numbers = [arg for arg in args if isinstance(arg, int)]
            traces[-1].append((str(function), shapes, numbers))
            return function(*args, **(kwargs or {}))

    for _ in range(3):
        traces.append([])
        with Calls():
            model.next_logits(torch.tensor([[5], [6]]), None, cache)
    assert traces[0] == traces[1] == traces[2]
    assert all(a is b for a, b in zip(kept, (cache.buffer, cache.lengths), strict=True))
    assert cache.lengths.tolist() == [6, 4]


def test_a_full_cache_is_an_error():
    model = make()
    cache = KeyValueCache(model, 1, capacity=16)
    model.next_logits(torch.zeros(1, 16, dtype=torch.int64), torch.tensor([16]), cache)
    with pytest.raises(ValueError, match="at most 16 tokens, the cache's capacity, found 17"):
        model.next_logits(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1]), cache)
