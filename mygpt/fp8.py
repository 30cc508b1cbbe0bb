"""The blocks' matrix products in 8-bit floating point, forwards and backwards: `train.py --fp8`.

Activations and weights are rounded to e4m3, gradients to e5m2 (arXiv 2209.05433), every tensor
scaled by its own largest value just before. Weights, biases, sums and the head stay what they are,
so checkpoints do not know of it. Needs a GPU of compute capability 8.9 or more; not measured yet.

Shapes: N rows, I features in, O features out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mygpt.model import GPT

MULTIPLE = 16  # both sides of a matrix must be multiples of this: what the hardware multiplies
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def check_fp8(device: torch.device) -> None:
    """Raise ValueError where the hardware has no such products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    found = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    raise ValueError(f"fp8 needs a GPU of the Ada, Hopper or a later kind, found {found}: omit it")


def use_fp8(model: GPT) -> None:
    """Let the linear layers of the blocks multiply in fp8, in place and under their names.

    Before the model is compiled. Raises ValueError if a matrix does not fit the hardware.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            sides = tuple(module.weight.shape)
            if any(side % MULTIPLE for side in sides):
                raise ValueError(
                    f"fp8 needs widths that are multiples of {MULTIPLE}, found {sides} in {name}: "
                    "change --n-embed or --n-hidden, or omit it"
                )
            made = Float8Linear(module.in_features, module.out_features, device="meta")
            made.weight = module.weight
            made.register_parameter("bias", module.bias)
            model.set_submodule(name, made)


class Float8Linear(nn.Linear):
    """A linear layer whose three products are taken in fp8."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in the dtype in which autocast multiplies."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        y = Float8Product.apply(x.flatten(0, -2), self.weight, dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


class Float8Product(torch.autograd.Function):
    """x @ weight.T for x (N, I) and weight (O, I)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, O) in `dtype`."""
        x8, x_scale = scaled(x, E4M3)
        weight8, weight_scale = scaled(weight, E4M3)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return product(x8, x_scale, weight8.T, weight_scale, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of x and weight."""
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad8, scale = scaled(grad, E5M2)
        x_grad = product(grad8, scale, weight8, weight_scale, x_dtype)
        return x_grad, product(grad8.T, scale, x8, x_scale, weight_dtype), None


def scaled(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor divided by a scale () that makes its largest value the largest of `dtype`."""
    largest = tensor.detach().abs().amax().float().clamp(min=1e-12)
    limit = torch.finfo(dtype).max
    scale = largest / limit
    return (tensor.float() / scale).clamp(-limit, limit).to(dtype), scale


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of scaled fp8 matrices in `dtype`, laid out as the hardware reads them."""
    columns = b.T.contiguous().T  # the second matrix column by column; a copy unless it is so
    return torch._scaled_mm(a.contiguous(), columns, a_scale, b_scale, out_dtype=dtype)
