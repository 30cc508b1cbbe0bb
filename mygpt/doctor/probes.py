"""What `mygpt.doctor` tries out in processes of their own, where a crash or a hang does no harm.

    python -m mygpt.doctor.probes compile cpu
    python -m mygpt.doctor.probes reduce gloo 0 2 /tmp/meeting-point

Each prints one line about what it found and exits with 0, or dies.
"""

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

MEGABYTE = 2**18  # fp32 numbers
PATIENCE = timedelta(seconds=45)  # for ranks that do not come


def compile_(device: str) -> str:
    """Compile a function with a loop to fuse, and compare what it computes."""
    torch.manual_seed(0)
    x = torch.randn(64, 64, device=device)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ x, approximate="tanh") * 2

    begun = time.perf_counter()
    torch.testing.assert_close(torch.compile(compute)(x), compute(x), rtol=1e-3, atol=1e-3)
    return f"works on {device}; {time.perf_counter() - begun:.1f} s for a small function"


def reduce(backend: str, rank: str, world_size: str, meeting_point: str) -> str:
    """Meet the other ranks at a file and add up a megabyte with them."""
    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting_point}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=PATIENCE,
    )
    numbers = torch.full((MEGABYTE,), float(rank), device=device)
    dist.all_reduce(numbers)
    expected = sum(range(int(world_size)))
    if numbers[-1].item() != expected:
        raise ValueError(f"expected the sum {expected}, found {numbers[-1].item()}")
    begun = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(numbers)
    numbers.sum().item()  # waits for a GPU
    milliseconds = (time.perf_counter() - begun) / 3 * 1e3
    dist.destroy_process_group()
    return f"{milliseconds:.1f}"


PROBES: dict[str, Callable[..., str]] = {"compile": compile_, "reduce": reduce}


def main(args: Sequence[str]) -> int:
    """Run the probe named first, with what follows."""
    name, *others = args
    print(PROBES[name](*others))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
