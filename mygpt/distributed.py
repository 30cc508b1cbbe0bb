"""Which rank this is, of how many, and on which device: one small record, made once, handed down.

python -m mygpt.distributed 4 [--device cuda]    can 4 ranks start here? exit code 2 if not
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

# How long a rank waits for the others before it takes them for lost. What the main rank does alone,
# such as writing a checkpoint, must take less.
PATIENCE = timedelta(minutes=10)
# Of a process that lost them: less than any fault's that they may have ended with, so that a
# scheduler, which looks at the highest code, sees the fault.
EXIT_LOST = 1

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
    control: dist.ProcessGroup | None = None  # for numbers that must not wait for a GPU

    @property
    def is_main(self) -> bool:
        """True for the one rank that writes and talks."""
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64; all ranks get the same numbers."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_reduce_mean(self, values: torch.Tensor) -> list[float]:
        """Each of `values`, (n,) on the device, averaged over the ranks; the same on all of them.

        The one place where a step waits for its device.
        """
        if self.world_size == 1:
            return values.tolist()
        total = values.double()
        dist.all_reduce(total)
        return (total / self.world_size).tolist()

    def all_reduce_max_async(self, value: int) -> Callable[[], int]:
        """Begin to agree on the largest value of any rank; calling what is returned waits for it.

        It goes from CPU to CPU, whatever the device, so nothing that a GPU has to do is waited for.
        """
        largest = torch.tensor(value)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> int:
            work.wait()
            return int(largest)

        return result

    def all_gather_object(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of the ranks; from CPU to CPU."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_object(self, value: Value) -> Value:
        """Return the main rank's value on every rank; from CPU to CPU."""
        values: list[Any] = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_reduce_sum([0])


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
    """Raise ValueError if no ranks are asked for on this machine, or more than it has GPUs."""
    if ranks_here < 1:
        raise ValueError(f"expected at least 1 rank, found {ranks_here}: give NPROC=n")
    gpus = torch.cuda.device_count()
    if find_device(device) == "cuda" and ranks_here > gpus:
        raise ValueError(
            f"expected a GPU for each rank, so {ranks_here}, found {gpus}: start fewer ranks "
            "(make: NPROC=n, torchrun: --nproc_per_node=n) or use the CPU "
            "(make: DEVICE=cpu, train.py: --device cpu)"
        )


class RanksLost(ConnectionError):
    """Another rank has ended, hangs or can't be reached; the message says what to do."""


@contextmanager
def start(
    device: str = "auto", deterministic: bool = False, patience: timedelta = PATIENCE
) -> Iterator[Ranks]:
    """Join the other ranks if torchrun started this process; leave them at the end of the block.

    Device: "auto", "cuda", "mps" or "cpu". CUDA ranks speak NCCL, CPU ranks gloo. `deterministic`
    asks torch for bitwise repeatable kernels. Raises ValueError before anything is started if the
    device or a GPU for each rank is not there, and RanksLost, out of the block too, where others
    have ended, or do not answer for as long as `patience`.
    """
    check_room(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device)
    kind = find_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU multiplies fp32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if os.environ.get("RANK") is None:
        # With its number: some of torch's functions ask for it.
        yield Ranks(0, 0, 1, torch.device(kind, 0) if kind == "cuda" else torch.device(kind))
        return
    rank, local_rank, world_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    try:
        if kind == "cuda":
            torch.cuda.set_device(here)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=_store(patience),
            rank=rank,
            world_size=world_size,
            timeout=patience,
            device_id=here if kind == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=patience)
        yield Ranks(rank, local_rank, world_size, here, control)
    except RuntimeError as error:
        if not _is_of_the_network(error):
            raise
        raise RanksLost(
            f"rank {rank} of {world_size} lost the others ({_first_sentence(error)}): one has "
            "ended, hangs or can't be reached, see its own last lines; the same command goes on "
            "from the last checkpoint"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(patience: timedelta) -> dist.Store:
    """Where the ranks leave their addresses for one another."""
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    # torchrun --max-restarts keeps one for all restarts, with the addresses of ranks long gone.
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_of_the_network(error: RuntimeError) -> bool:
    # gloo has no exception of its own: its errors begin with the place in its source, or say this.
    return isinstance(error, dist.DistError) or bool(re.search("gloo|pair closure", str(error)))


def _first_sentence(error: RuntimeError) -> str:
    """Without gloo's source file, and without what it advises."""
    text = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(error).strip())
    return re.split(r"\.\s|\n", text)[0]


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: bf16 on GPUs that have it, fp16 on older ones, else fp32."""
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def autocast(device: torch.device) -> torch.autocast | nullcontext[None]:
    """Context of mixed precision on this device; does nothing where matrices stay in fp32."""
    dtype = compute_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 peak of a GPU in FLOP/s; None for a CPU or a GPU not in the table."""
    if device.type != "cuda":
        return None
    own = torch.cuda.get_device_name(device)
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in own), None)


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
