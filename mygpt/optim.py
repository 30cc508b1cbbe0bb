"""Optimizers: AdamW, and Muon for the matrices of the blocks.

The training loop sets `group["lr"] = learning_rate(step, config)` in every parameter group.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mygpt.config import OPTIMIZERS, check_shapes
from mygpt.model import GPT


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
