"""What moves the weights: AdamW, Muon for the matrices of the blocks, and the learning rate.

The training loop calls `learning_rate` before every step and sets, in every parameter group,
`group["lr"] = lr * group["lr_scale"]`.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mygpt.model import GPT


def learning_rate(
    step: int,
    *,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    schedule: Literal["cosine", "wsd"] = "cosine",
    decay_fraction: float = 0.5,
) -> float:
    """The learning rate of step `step`, counted from 0: up in a line to max_lr, down to min_lr.

    "cosine" falls along half a cosine from the end of the warm-up to max_steps, as for GPT-3.
    "wsd" (warm-up, stable, decay; MiniCPM, section 4) stays at max_lr and falls in a line over
    the last `decay_fraction` of the steps. From max_steps on the rate is min_lr.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    if schedule == "cosine":
        progress = (step - warmup_steps) / (max_steps - warmup_steps)
        coeff = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        coeff = min(1.0, (max_steps - step) / (decay_fraction * max_steps))
    return min_lr + coeff * (max_lr - min_lr)


def configure_optimizers(
    model: GPT,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    max_lr: float = 6e-4,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    muon_lr_scale: float = 1.0,
) -> list[Optimizer]:
    """The optimizers of a GPT: each of its parameters is in one group of one of them.

    "adamw": decay on tensors of two and more dimensions, none on biases and gains. "muon": the
    matrices of the blocks go to Muon, with decay and `muon_lr_scale` times the learning rate,
    all the rest to AdamW, without decay.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    decay = {"weight_decay": weight_decay, "lr_scale": 1.0}
    no_decay = {"weight_decay": 0.0, "lr_scale": 1.0}
    if optimizer == "adamw":
        groups = [{"params": matrices, **decay}, {"params": rest, **no_decay}]
        return [AdamW(groups, lr=max_lr, betas=betas, fused=True)]
    embeddings = [model.wte.weight, model.wpe.weight]
    matrices = [p for p in model.h.parameters() if p.dim() >= 2]
    return [
        Muon([{"params": matrices, **decay, "lr_scale": muon_lr_scale}], lr=max_lr),
        AdamW([{"params": embeddings + rest, **no_decay}], lr=max_lr, betas=betas, fused=True),
    ]


class Muon(Optimizer):
    """Momentum whose every step is made orthogonal: all directions of a matrix move alike.

    Keller Jordan's Muon (kellerjordan.github.io/posts/muon), with steps as large as AdamW's
    (Moonlight, arXiv 2502.16982: an RMS of 0.2), so that both can share a learning rate. Equals
    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` but for the dtype of the iteration, which
    here is `dtype`, or if None bf16 on GPUs and fp32 on CPUs: few of them multiply bf16 fast.
    Takes matrices only.
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
        """Move every matrix that has a gradient."""
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
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        dtype = self.dtype or (torch.float32 if p.device.type == "cpu" else torch.bfloat16)
        return orthogonal(grad.lerp(mean, momentum).to(dtype))  # Nesterov's momentum


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values brought near 1.

    Five Newton-Schulz steps of an odd polynomial that is steep at 0, from Keller Jordan's Muon.
    """
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(
            x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return x if wide is matrix else x.T


# What an optimizer keeps of every parameter once it has taken a step.
_STATE = {AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


def state_tensors(optimizers: Iterable[Optimizer], model: GPT) -> dict[str, Tensor]:
    """All that the optimizers remember, as "PARAMETER.KEY" -> tensor; nothing before a step."""
    return {
        f"{name}.{key}": value
        for name, parameter, optimizer in _owned(optimizers, model)
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(
    optimizers: Iterable[Optimizer],
    model: GPT,
    tensors: Mapping[str, Tensor],
    own: Collection[Tensor] | None = None,
) -> None:
    """Give the optimizers what `state_tensors` returned: bit for bit, copied to their devices.

    With `own`, only the state of the parameters in there is given; all of it is checked. Raises
    ValueError, and changes nothing, if a tensor is missing, left over or of another shape.
    """
    owned = list(_owned(optimizers, model))
    expected = {
        f"{name}.{key}": () if key == "step" else tuple(parameter.shape)
        for name, parameter, optimizer in owned
        for key in _STATE[type(optimizer)]
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"optimizer state {name}: expected {expected.get(name, 'none')}, found "
                f"{found.get(name, 'none')}: resume with the model and optimizer that wrote it"
            )
    for name, parameter, optimizer in owned:
        if own is None or parameter in own:
            optimizer.state[parameter] = {
                key: tensors[f"{name}.{key}"].to(parameter.device, copy=True)
                for key in _STATE[type(optimizer)]
            }


def begin_state(
    optimizers: Iterable[Optimizer], model: GPT, own: Collection[Tensor] | None = None
) -> None:
    """Give the optimizers the zeros they begin with, of the parameters in `own` or of all.

    The memory that steps need is then taken without a step, in which ranks wait for one another.
    """
    for _, parameter, optimizer in _owned(optimizers, model):
        if own is None or parameter in own:
            optimizer.state[parameter] = {
                key: parameter.new_zeros(() if key == "step" else parameter.shape)
                for key in _STATE[type(optimizer)]
            }


def _owned(optimizers: Iterable[Optimizer], model: GPT) -> Iterator[tuple[str, Tensor, Optimizer]]:
    """Every parameter with its name and the optimizer that moves it."""
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    return ((name, p, owner[p]) for name, p in model.named_parameters())
