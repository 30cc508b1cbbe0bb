import copy

import pytest
import torch

from mygpt.config import GPTConfig
from mygpt.model import GPT
from mygpt.optim import (
    Muon,
    allocate_state,
    configure_optimizers,
    load_state_tensors,
    newton_schulz,
    state_tensors,
)

SHAPE = {"block_size": 8, "vocab_size": 65, "n_layers": 2, "n_heads": 2, "n_embed": 16}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def train(model: GPT, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        idx = torch.randint(0, 65, (2, 8), generator=generator)
        model(idx, idx.roll(-1, 1))[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


# --- which tensor goes where


def test_adamw_decays_what_has_two_dimensions():
    model = GPT(GPTConfig(**SHAPE))
    [adamw] = configure_optimizers(model, weight_decay=0.2)
    decayed, rest = adamw.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert {names[p].split(".")[-1] for p in rest["params"]} == {"weight", "bias"}
    assert all(
        ".ln_" in names[p] or "ln_f" in names[p] or "bias" in names[p] for p in rest["params"]
    )
    assert sorted(names[p] for group in (decayed, rest) for p in group["params"]) == sorted(
        names.values()
    )


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest_without_decay():
    model = GPT(GPTConfig(**SHAPE))
    muon, adamw = configure_optimizers(model, optimizer="muon", weight_decay=0.2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    muons = [names[p] for group in muon.param_groups for p in group["params"]]
    assert muons == [name for name, p in model.named_parameters() if "h." in name and p.dim() == 2]
    adamws = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted(muons + adamws) == sorted(names.values())
    assert [g["weight_decay"] for g in muon.param_groups + adamw.param_groups] == [0.2, 0.0]


def test_decay_and_nothing_else_shrinks_a_weight_without_gradient():
    model = GPT(GPTConfig(**SHAPE))
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in configure_optimizers(model, optimizer="muon", weight_decay=0.1):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        optimizer.step()
    for (name, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        is_matrix = name.startswith("h.") and now.dim() == 2
        torch.testing.assert_close(now, was * (0.95 if is_matrix else 1.0))


# --- Muon


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)])
def test_muon_in_bf16_is_torchs(shape):
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    muon = Muon([ours], **options, dtype=torch.bfloat16)
    oracle = torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        oracle.step()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 128)])
def test_orthogonal_keeps_the_directions_and_evens_out_their_sizes(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    sizes = u.T @ newton_schulz(matrix) @ v.T  # diagonal: the singular vectors stay
    torch.testing.assert_close(sizes, torch.diag(sizes.diagonal()), atol=1e-9, rtol=0.0)
    even = sizes.diagonal()[s > 0.1 * s.max()]
    assert even.min() > 0.6 and even.max() < 1.3


def test_muon_moves_by_the_rms_of_adamw():
    parameter = torch.nn.Parameter(torch.zeros(64, 256))
    parameter.grad = torch.randn(64, 256)
    Muon([parameter], lr=1.0, weight_decay=0.0).step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


# --- the state, by name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_comes_back_bit_for_bit(optimizer):
    model = GPT(GPTConfig(**SHAPE))
    optimizers = configure_optimizers(model, optimizer=optimizer)
    train(model, optimizers, 3)
    saved = {name: tensor.clone() for name, tensor in state_tensors(optimizers, model).items()}

    other = copy.deepcopy(model)
    others = configure_optimizers(other, optimizer=optimizer)
    load_state_tensors(others, other, saved)
    restored = state_tensors(others, other)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)

    train(model, optimizers, 4)
    train(other, others, 4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(saved["wte.weight.exp_avg"], restored["wte.weight.exp_avg"])  # a copy


def test_state_is_named_after_the_parameters():
    model = GPT(GPTConfig(**SHAPE))
    optimizers = configure_optimizers(model, optimizer="muon")
    assert state_tensors(optimizers, model) == {}
    train(model, optimizers, 1)
    names = state_tensors(optimizers, model).keys()
    matrices = [name for name, p in model.named_parameters() if "h." in name and p.dim() == 2]
    others = [name for name, _ in model.named_parameters() if name not in matrices]
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert names == {f"{name}.momentum_buffer" for name in matrices} | {
        f"{name}.{key}" for name in others for key in keys
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_to_some_parameters_only(optimizer):
    model = GPT(GPTConfig(**SHAPE))
    optimizers = configure_optimizers(model, optimizer=optimizer)
    train(model, optimizers, 1)
    saved = dict(state_tensors(optimizers, model))
    own = {model.wte.weight, model.h[1].mlp.c_fc.weight}
    kept = ("wte.", "h.1.mlp.c_fc.weight.")
    for give in (load_state_tensors, allocate_state):
        fresh = configure_optimizers(model, optimizer=optimizer)
        give(fresh, model, *([saved] if give is load_state_tensors else []), own)
        assert state_tensors(fresh, model).keys() == {n for n in saved if n.startswith(kept)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_begun_as_a_first_step_begins_it(optimizer):
    model = GPT(GPTConfig(**SHAPE))
    other = copy.deepcopy(model)
    found = []
    for each in (model, other):
        optimizers = configure_optimizers(each, optimizer=optimizer)
        if each is other:
            allocate_state(optimizers, each)
            begun = {n: (t.shape, t.dtype) for n, t in state_tensors(optimizers, each).items()}
        train(each, optimizers, 2)
        found.append(state_tensors(optimizers, each))
    assert begun == {name: (t.shape, t.dtype) for name, t in found[0].items()}
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize("own", [None, ()])
@pytest.mark.parametrize("fault", ["missing", "left over", "shape"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(fault, own):
    model = GPT(GPTConfig(**SHAPE))
    optimizers = configure_optimizers(model)
    train(model, optimizers, 1)
    tensors = dict(state_tensors(optimizers, model))
    name = "h.1.ln_2.bias.exp_avg"
    if fault == "missing":
        del tensors[name]
    elif fault == "left over":
        name = "h.2.ln_2.bias.exp_avg"
        tensors[name] = torch.zeros(16)
    else:
        tensors[name] = torch.zeros(17)
    fresh = configure_optimizers(model)
    with pytest.raises(ValueError, match=name):
        load_state_tensors(fresh, model, tensors, own)
    assert state_tensors(fresh, model) == {}
