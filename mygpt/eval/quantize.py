"""A model's weights in the form in which one token after another is computed fastest.

What a token takes is mostly the time to read every weight once, so smaller ones are faster. Such
a model writes text and gives logits; it can't be trained or saved. On a CPU only the matrices
change, and what flows between them stays fp32: rounding costs nothing where nothing is read.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mygpt.model import GPT

MANY_ROWS = 32  # from here on torch multiplies whole matrices faster than its int8 kernel


def with_weights(model: GPT, kind: Literal["fp32", "bf16", "int8"]) -> GPT:
    """The same model in evaluation mode, its matrices as `kind`; `model` itself is not changed.

    "fp32" gives the same numbers to rounding, its matrices lying in memory as one row reads them
    fastest. "bf16" rounds them to 8 bits of mantissa, "int8" to 255 steps a row of the matrix.
    Embeddings and what has no matrix are shared with `model`. "int8" on anything but a CPU is a
    `ValueError`.
    """
    device = model.wte.weight.device.type
    if device != "cpu":
        if kind == "int8":
            raise ValueError(f"int8 weights are for CPUs, found {device}: use bf16 there")
        return model.eval() if kind == "fp32" else copy.deepcopy(model).bfloat16().eval()
    made = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    form = {"fp32": _columns, "bf16": BFloat16Linear, "int8": Int8Linear}[kind]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            made.set_submodule(name, form(module))
    return made.eval()


def _columns(linear: nn.Linear) -> nn.Linear:
    """The same layer, its matrix (out, in) stored as (in, out).

    One row times it then reads memory in one direction, which was 1.3 x faster here. Hugging
    Face's GPT-2 stores most of its matrices that way.
    """
    made = nn.Linear(linear.in_features, linear.out_features, device="meta")
    made.weight = nn.Parameter(linear.weight.detach().T.contiguous().T, requires_grad=False)
    made.register_parameter("bias", linear.bias)
    return made


class BFloat16Linear(nn.Module):
    """A linear layer with bf16 weights, from fp32 to fp32."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())  # (out, in)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return _sum(F.linear(x.bfloat16(), self.weight).float(), self.bias)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale for each of its outputs, from fp32 to fp32."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (out,)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.bfloat16())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = x.flatten(0, -2).bfloat16()  # (R, in)
        # torch's kernel reads 32 weights at a time and does not look where a row ends.
        if len(rows) < MANY_ROWS and self.weight.size(1) % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).float()  # (R, out)
        else:
            y = F.linear(rows, self.weight.bfloat16()).float() * self.scale
        return _sum(y.unflatten(0, x.shape[:-1]), self.bias)


def _sum(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)
