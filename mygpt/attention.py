"""Which of torch's attention kernels a GPU runs fastest: measured once, before a run's first step.

On an H100 or newer cuDNN's may beat flash attention, on older ones it does not run. Not measured
by us yet: no GPU was at hand.
"""

import time
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mygpt.config import GPTConfig
from mygpt.distributed import compute_dtype

# "torch" leaves the choice to torch, as on a CPU.
Kernel = Literal["torch", "flash", "cudnn"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_TURNS = 20


def fastest(shape: GPTConfig, rows: int, device: torch.device) -> Kernel:
    """The kernel that takes the least time for `rows` rows, forwards and backwards.

    "torch" where there is no choice: on a CPU, and where results must be repeatable.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return "torch"
    seconds = {name: _seconds(name, shape, rows, device) for name in KERNELS[1:]}
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < float("inf") else "torch"


def _seconds(name: str, shape: GPTConfig, rows: int, device: torch.device) -> float:
    """The best time of one forward and backward pass; infinite where the kernel does not run."""
    size = (rows, shape.n_heads, shape.block_size, shape.n_embed // shape.n_heads)  # B, H, T, D
    dtype = compute_dtype(device)
    q, k, v = (torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    best = float("inf")
    try:
        with sdpa_kernel(_BACKENDS[name]):
            for _ in range(_TURNS):
                torch.cuda.synchronize()
                start = time.perf_counter()
                y = F.scaled_dot_product_attention(q, k, v, dropout_p=shape.dropout, is_causal=True)
                torch.autograd.grad(y, (q, k, v), q)
                torch.cuda.synchronize()
                best = min(best, time.perf_counter() - start)
    except RuntimeError:  # "No available kernel": too old a GPU, or a head of a width it has not
        return float("inf")
    return best


def use(kernel: Kernel) -> None:
    """Let every attention of this process take that kernel, where it can; before compilation."""
    torch.backends.cuda.enable_flash_sdp(kernel != "cudnn")
    # Torch would take this one before cuDNN's.
    torch.backends.cuda.enable_mem_efficient_sdp(kernel != "cudnn")
    torch.backends.cuda.enable_cudnn_sdp(kernel != "flash")
