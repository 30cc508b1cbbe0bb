"""Which rank this is, of how many, and on which device: one small record, made once, handed down.

python -m mygpt.distributed 4 [--device cuda]    can 4 ranks start here? exit code 2 if not
"""

import argparse
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

# Dense bf16 peak of a GPU in FLOP/s, from its datasheet, by a part of torch's name for it; the
# first that fits counts, so the more special name comes first.
_PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "Tesla T4": 65e12,
}


@dataclass(frozen=True)
class Ranks:
    """One process among `world_size` that train the same model, as torchrun numbers them."""

    rank: int
    local_rank: int  # among the ranks of this machine
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the one rank that writes and talks."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64; all ranks get the same numbers."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def of_main(self, value: int) -> int:
        """The main rank's value, on every rank."""
        return round(self.sums([value if self.is_main else 0])[0])

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.sums([0])


def find_device(name: str) -> str:
    """The kind of device `name` stands for: itself, or for "auto" CUDA, else MPS, else CPU.

    Raises ValueError where a device is asked for by name and is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        # Apple's GPU is one, and neither gloo nor NCCL speaks to it.
        "mps": torch.backends.mps.is_available() and os.environ.get("WORLD_SIZE", "1") == "1",
        "cpu": True,
    }
    if name == "auto":
        return next(kind for kind, found in there.items() if found)
    if not there[name] and name != "cuda":
        raise ValueError(f"device {name} is not there: use --device auto or --device cpu")
    return name


def check_room(ranks_here: int, device: str) -> None:
    """Raise ValueError if more ranks are asked for on this machine than it has GPUs."""
    gpus = torch.cuda.device_count()
    if find_device(device) == "cuda" and ranks_here > gpus:
        raise ValueError(
            f"expected a GPU for each rank, so {ranks_here}, found {gpus}: start fewer ranks "
            "(make: NPROC=n, torchrun: --nproc_per_node=n) or use the CPU "
            "(make: DEVICE=cpu, train.py: --device cpu)"
        )


@contextmanager
def start(device: str = "auto", deterministic: bool = False) -> Iterator[Ranks]:
    """Join the other ranks if torchrun started this process; leave them at the end of the block.

    Device: "auto", "cuda", "mps" or "cpu". CUDA ranks speak NCCL, CPU ranks gloo. `deterministic`
    asks torch for bitwise repeatable kernels. Raises ValueError before anything is started if the
    device or a GPU for each rank is not there.
    """
    check_room(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device)
    kind = find_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU multiplies fp32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if os.environ.get("RANK") is None:
        yield Ranks(0, 0, 1, torch.device(kind))
        return
    rank, local_rank, world_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        here = torch.device(kind, local_rank)
        dist.init_process_group("nccl", device_id=here)
    else:
        here = torch.device(kind)
        dist.init_process_group("gloo")
    try:
        yield Ranks(rank, local_rank, world_size, here)
    finally:
        dist.destroy_process_group()


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: bf16 on GPUs that have it, fp16 on older ones, else fp32."""
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 peak of a GPU in FLOP/s; None for a CPU or a GPU not in the table."""
    if device.type != "cuda":
        return None
    own = torch.cuda.get_device_name(device)
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in own), None)


class Interrupt:
    """A flag that SIGINT and SIGTERM raise instead of killing; it is looked at between steps."""

    def __init__(self) -> None:
        self.seen = False
        self._since = 0.0

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if not self.seen:
            self.seen, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > 1:
            # Whoever asks again does not want to wait for the step. Not so at once: torchrun
            # passes on a Ctrl-C that its ranks have had from the terminal already.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextmanager
    def watch(self) -> Iterator["Interrupt"]:
        """Catch the two signals inside the block and give them back afterwards."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._raise_flag) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def main() -> int:
    """The check of `check_room`, for the Makefile: torchrun would bury the line in a traceback.

    "auto" means GPUs here: who asks for several ranks and finds none is not served by a CPU.
    """
    parser = argparse.ArgumentParser(description="Can that many ranks start on this machine?")
    parser.add_argument("ranks", type=int)
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    asked = parser.parse_args()
    try:
        check_room(asked.ranks, "cuda" if asked.device == "auto" else asked.device)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
