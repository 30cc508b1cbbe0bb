"""Optimizers: AdamW, Muon for the matrices of the blocks, and the learning-rate schedule.

The training loop sets `group["lr"] = learning_rate(step, ...)` in every parameter group.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mygpt.config import OPTIMIZERS, check_shapes
from mygpt.model import GPT

_DECAY_FRACTION = 0.5  # part of a "wsd" run over which the learning rate falls


@dataclass(frozen=True)
class Horizon:
    """The length of a run, `max_steps`, as it was fixed before step `since`."""

    since: int
    max_steps: int


def learning_rate(
    step: int,
    *,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    schedule: Literal["cosine", "wsd"] = "cosine",
    horizons: Sequence[Horizon] = (),
) -> float:
    """Return the learning rate of step `step`, counted from 0.

    It rises linearly to max_lr during the warm-up. "cosine" then falls along half a cosine until
    max_steps, as for GPT-3; "wsd" (warm-up, stable, decay; MiniCPM, section 4) stays at max_lr and
    falls linearly over the last half of the steps. From max_steps on the rate is min_lr.
    `horizons`: those of a "wsd" run whose length was revised on its way; max_steps is the last.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    if schedule == "cosine":
        progress = (step - warmup_steps) / (max_steps - warmup_steps)
        coeff = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        coeff = wsd_coefficient(step, horizons or [Horizon(0, max_steps)])
    return min_lr + coeff * (max_lr - min_lr)


def wsd_coefficient(step: int, horizons: Sequence[Horizon]) -> float:
    """Return the height of a "wsd" schedule after its warm-up, from 1 down to 0.

    The decay begins at half of the horizon in force. From then on a new horizon changes its slope,
    and never raises the learning rate.
    """
    passed = [h for h in horizons if h.since <= step]
    coeff = 1.0
    for horizon, until in zip(passed, [*(h.since for h in passed[1:]), step], strict=True):
        begins: float = horizon.since
        if coeff == 1.0:
            begins = max(begins, (1 - _DECAY_FRACTION) * horizon.max_steps)
        left = (horizon.max_steps - until) / (horizon.max_steps - begins)
        coeff *= min(1.0, max(0.0, left))
    return coeff


def configure_optimizers(
    model: GPT,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[Optimizer]:
    """Return the optimizers of a GPT, with each parameter in one group of one of them.

    "adamw": decay on tensors of dim >= 2, none on biases and layer norms. "muon": Muon with decay
    on the matrices of the blocks, AdamW without decay on all other parameters.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    if optimizer == "adamw":
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [AdamW(groups, betas=betas, fused=True)]
    matrices = [p for p in model.h.parameters() if p.dim() >= 2]
    others = [*model.embeddings, *vectors]
    return [
        Muon(matrices, weight_decay=weight_decay),
        AdamW(others, weight_decay=0.0, betas=betas, fused=True),
    ]


class Muon(Optimizer):
    """Momentum with orthogonalized updates, for matrices only.

    Keller Jordan's Muon (kellerjordan.github.io/posts/muon) with updates scaled to the RMS of
    AdamW's, 0.2 (Moonlight, arXiv 2502.16982), so that both share a learning rate. Equals
    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` except for the dtype of the iteration: here
    `dtype`, by default bf16 on GPUs and fp32 on CPUs, few of which multiply bf16 fast. The
    fused c_attn (3C, C) is orthogonalized as one matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = self._update(p, p.grad, group["momentum"])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))

    def _update(self, p: Tensor, grad: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        dtype = self.dtype or (torch.float32 if p.device.type == "cpu" else torch.bfloat16)
        return newton_schulz(grad.lerp(buffer, momentum).to(dtype))  # Nesterov momentum


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values brought close to 1.

    Five Newton-Schulz iterations with the coefficients of Keller Jordan's Muon.
    """
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x if wide is matrix else x.T


def state_tensors(optimizers: Iterable[Optimizer], model: GPT) -> dict[str, Tensor]:
    """Return the optimizer state as "PARAMETER.KEY" -> tensor; empty before the first step."""
    return {
        f"{name}.{key}": value
        for name, parameter, optimizer in _named(optimizers, model)
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(
    optimizers: Iterable[Optimizer],
    model: GPT,
    tensors: Mapping[str, Tensor],
    own: Collection[Tensor] | None = None,
) -> None:
    """Copy what `state_tensors` returned into the optimizers, or only that of parameters in `own`.

    Raises ValueError, and changes nothing, if any tensor is missing, left over or of another shape.
    """
    named = list(_named(optimizers, model))
    expected = {
        f"{name}.{key}": shape
        for name, parameter, optimizer in named
        for key, shape in _state_shapes(optimizer, parameter).items()
    }
    actual = {name: tensor.shape for name, tensor in tensors.items()}
    remedy = "resume with the model and optimizer that wrote it"
    check_shapes(expected, actual, "optimizer state", remedy)
    for name, parameter, optimizer in named:
        if own is None or parameter in own:
            optimizer.state[parameter] = {
                key: tensors[f"{name}.{key}"].to(parameter.device, copy=True)
                for key in _state_shapes(optimizer, parameter)
            }


def allocate_state(
    optimizers: Iterable[Optimizer], model: GPT, own: Collection[Tensor] | None = None
) -> None:
    """Allocate zeroed optimizer state without a step, which communicates under ZeRO-1."""
    for _, parameter, optimizer in _named(optimizers, model):
        if own is None or parameter in own:
            optimizer.state[parameter] = {
                key: parameter.new_zeros(shape)
                for key, shape in _state_shapes(optimizer, parameter).items()
            }


def _named(optimizers: Iterable[Optimizer], model: GPT) -> Iterator[tuple[str, Tensor, Optimizer]]:
    """Yield every parameter with its name and its optimizer."""
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    return ((name, p, owner[p]) for name, p in model.named_parameters())


def _state_shapes(optimizer: Optimizer, parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the state of one parameter."""
    keys = OPTIMIZERS[type(optimizer).__name__.lower()].state
    return {key: () if key == "step" else tuple(parameter.shape) for key in keys}
