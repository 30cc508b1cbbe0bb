"""Probes that `mygpt.doctor` runs in separate processes, where a crash or a hang does no harm.

    python -m mygpt.doctor.probes compile cpu
    python -m mygpt.doctor.probes reduce gloo 0 2 /tmp/rendezvous

Each prints one line with its result and exits with 0, or dies.
"""

import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

MEBIBYTE = 2**18  # fp32 numbers
TIMEOUT = timedelta(seconds=45)  # of the process group


def compile_(device: str) -> str:
    """Compile a function with something to fuse, and check its result against eager mode."""
    torch.manual_seed(0)
    x = torch.randn(64, 64, device=device)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ x, approximate="tanh") * 2

    started = time.perf_counter()
    torch.testing.assert_close(torch.compile(compute)(x), compute(x), rtol=1e-3, atol=1e-3)
    return f"works on {device}; {time.perf_counter() - started:.1f} s for a small function"


def reduce(backend: str, rank: str, world_size: str, rendezvous: str) -> str:
    """Join the other ranks through a file and all-reduce a megabyte; returns milliseconds."""
    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=TIMEOUT,
    )
    numbers = torch.full((MEBIBYTE,), float(rank), device=device)
    dist.all_reduce(numbers)
    expected = sum(range(int(world_size)))
    if numbers[-1].item() != expected:
        raise ValueError(f"expected the sum {expected}, found {numbers[-1].item()}")
    started = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(numbers)
    numbers.sum().item()  # waits for a GPU
    milliseconds = (time.perf_counter() - started) / 3 * 1e3
    dist.destroy_process_group()
    return f"{milliseconds:.1f}"


PROBES: dict[str, Callable[..., str]] = {"compile": compile_, "reduce": reduce}

if __name__ == "__main__":
    print(PROBES[sys.argv[1]](*sys.argv[2:]))
