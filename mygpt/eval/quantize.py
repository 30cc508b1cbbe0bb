"""Weights in the form in which single tokens are generated fastest.

Generating a token mostly takes the time to read every weight once, so smaller weights are faster.
The result gives logits but can't be trained or saved. On a CPU only the matrices change and
activations stay fp32: rounding those would save no memory traffic.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mygpt.model import GPT

MAX_KERNEL_ROWS = 31  # with more, a plain matrix product is faster than torch's int8 kernel


def with_weights(model: GPT, kind: Literal["fp32", "bf16", "int8"]) -> GPT:
    """Return the model in evaluation mode with its matrices as `kind`; `model` is not changed.

    "fp32": the same numbers to rounding, in the memory layout fastest for one row. "bf16": 8 bits
    of mantissa. "int8": 255 steps per row of the matrix, on CPUs only, else a `ValueError`.
    Embeddings and other parameters are shared with `model`.
    """
    device = model.wte.weight.device.type
    if device != "cpu":
        if kind == "int8":
            raise ValueError(f"int8 weights are for CPUs, found {device}: use bf16 there")
        return model.eval() if kind == "fp32" else copy.deepcopy(model).bfloat16().eval()
    result = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    convert = {"fp32": _column_major, "bf16": BFloat16Linear, "int8": Int8Linear}[kind]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            result.set_submodule(name, convert(module))
    return result.eval()


def _column_major(linear: nn.Linear) -> nn.Linear:
    """The same layer, its matrix (out, in) stored as (in, out).

    A product with one row then reads memory sequentially, which was 1.3 x faster here. Hugging
    Face's GPT-2 stores most of its matrices that way.
    """
    result = nn.Linear(linear.in_features, linear.out_features, device="meta")
    result.weight = nn.Parameter(linear.weight.detach().T.contiguous().T, requires_grad=False)
    result.register_parameter("bias", linear.bias)
    return result


class BFloat16Linear(nn.Module):
    """Linear layer with bf16 weights, fp32 in and out."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())  # (out, in)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.add_bias(F.linear(x.bfloat16(), self.weight).float())

    def add_bias(self, y: Tensor) -> Tensor:
        """Add the bias, if there is one, in place."""
        return y if self.bias is None else y.add_(self.bias)


class Int8Linear(BFloat16Linear):
    """Linear layer with int8 weights and one scale per output, fp32 in and out."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (out,)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = x.flatten(0, -2).bfloat16()  # (R, in)
        # The kernel reads 32 weights at a time, past the end of a row of any other width.
        if len(rows) <= MAX_KERNEL_ROWS and self.weight.size(1) % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).float()  # (R, out)
        else:
            y = F.linear(rows, self.weight.bfloat16()).float() * self.scale
        return self.add_bias(y.unflatten(0, x.shape[:-1]))
