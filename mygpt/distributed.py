"""Process group: the ranks that train one model, their devices and collectives."""

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

# Process-group timeout. What the main rank does alone, such as writing a checkpoint, takes less.
TIMEOUT = timedelta(minutes=10)
# Exit code of a rank that lost the others. It is lower than that of any fault: a scheduler looks
# at the highest code, and so sees the fault.
EXIT_LOST = 1

# Dense bf16 peak in FLOP/s from the datasheet, by a part of torch's device name. The first match
# counts, so more specific names come first.
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

_FIXED_SHAPES = {"cuda"}  # types of device


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank, as numbered by torchrun, and its collectives.

    With a world size of 1 every collective returns its argument.
    """

    rank: int
    local_rank: int  # among the ranks of this machine
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for values that must not wait for a GPU

    @property
    def is_main(self) -> bool:
        """True for the one rank that writes files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_reduce_mean(self, values: torch.Tensor) -> list[float]:
        """Average each of `values`, (n,) on the device, over the ranks, in float64.

        The only point of a step that synchronises with the device.
        """
        if self.world_size == 1:
            return values.tolist()
        total = values.double()
        dist.all_reduce(total)
        return (total / self.world_size).tolist()

    def all_reduce_max_async(self, value: int) -> Callable[[], int]:
        """Start a maximum over the ranks, and return a function that waits for the result.

        On the CPU, so it never waits for queued work of a GPU.
        """
        largest = torch.tensor(value)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> int:
            work.wait()
            return int(largest)

        return result

    def all_gather_object(self, value: Value) -> list[Value]:
        """Return every rank's value, in rank order; on the CPU."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_object(self, value: Value) -> Value:
        """Return the main rank's value, on every rank; on the CPU."""
        values: list[Any] = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.all_reduce_sum([0])


class LaggedMax:
    """Maximum over the ranks that costs no waiting: a call returns that of the call before.

    Its messages have arrived in the meantime. All ranks must call `exchange` equally often.
    """

    def __init__(self) -> None:
        self._pending: Callable[[], int] | None = None

    def exchange(self, value: int, ranks: DistributedContext) -> int:
        """Give this call's value, and return the maximum of the previous one's, at first 0.

        With a world size of 1, return the value itself.
        """
        if ranks.world_size == 1:
            return value
        previous, self._pending = self._pending, ranks.all_reduce_max_async(value)
        return previous() if previous else 0


def find_device(name: str) -> str:
    """Resolve "auto" to CUDA, else MPS, else CPU; return any other name as it is.

    Raises ValueError if "mps" is requested and not available; see `check_room` for "cuda".
    """
    available = {
        "cuda": torch.cuda.is_available(),
        # Apple's GPU: there is only one, and neither gloo nor NCCL supports it.
        "mps": torch.backends.mps.is_available() and os.environ.get("WORLD_SIZE", "1") == "1",
        "cpu": True,
    }
    if name == "auto":
        return next(kind for kind, found in available.items() if found)
    if not available[name] and name != "cuda":
        raise ValueError(f"device {name} is not there: use --device auto or --device cpu")
    return name


def check_room(ranks_here: int, device: str) -> None:
    """Raise ValueError for more ranks on this machine than it has GPUs, if they need them."""
    gpus = torch.cuda.device_count()
    if find_device(device) == "cuda" and ranks_here > gpus:
        raise ValueError(
            f"expected a GPU for each rank, so {ranks_here}, found {gpus}: start fewer ranks "
            "(make: NPROC=n, torchrun: --nproc_per_node=n) or use the CPU "
            "(make: DEVICE=cpu, train.py: --device cpu)"
        )


class RanksLost(ConnectionError):
    """Another rank has exited, hangs or can't be reached."""


@contextmanager
def init_distributed(
    device: str = "auto", deterministic: bool = False, timeout: timedelta = TIMEOUT
) -> Iterator[DistributedContext]:
    """Join torchrun's process group for the duration of the block, if it started this process.

    Device: "auto", "cuda" (NCCL), "mps" or "cpu" (gloo). `deterministic` requests bitwise
    repeatable kernels. Raises ValueError, before anything starts, if the device or a GPU for each
    rank is missing. Errors of the network become RanksLost, also those raised in the block.
    """
    check_room(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device)
    kind = find_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU multiplies fp32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if os.environ.get("RANK") is None:
        # cuda:0, not cuda: some functions of torch need the index.
        yield DistributedContext(
            0, 0, 1, torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        )
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
            store=_store(timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=here if kind == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
        yield DistributedContext(rank, local_rank, world_size, here, control)
    except RuntimeError as error:
        if not _is_network_error(error):
            raise
        raise RanksLost(
            f"rank {rank} of {world_size} lost the others ({_first_sentence(error)}): one has "
            "ended, hangs or can't be reached, see its own last lines; run the same command again "
            "to resume from the last checkpoint"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(timeout: timedelta) -> dist.Store:
    """Return the key-value store through which ranks exchange their addresses."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun --max-restarts keeps one store, with the addresses of ranks that have ended.
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_network_error(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeError: recognise its source path or its words.
    return isinstance(error, dist.DistError) or bool(re.search("gloo|pair closure", str(error)))


def _first_sentence(error: RuntimeError) -> str:
    """Return the error's first sentence, without gloo's source path and advice."""
    text = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(error).strip())
    return re.split(r"\.\s|\n", text)[0]


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: bf16 on GPUs, fp16 on those without it, else fp32."""
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def autocast(device: torch.device) -> torch.autocast | nullcontext[None]:
    """Return the context of mixed precision on this device, a null context for fp32."""
    dtype = compute_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def has_fixed_shapes(device: torch.device) -> bool:
    """Return whether batches are padded to few shapes: on CUDA, where each new one costs time.

    Blocks are compiled for it, and cuDNN builds a plan for its attention.
    """
    return device.type in _FIXED_SHAPES


def padded_length(n_tokens: int, limit: int, device: torch.device) -> int:
    """Return `n_tokens`, or with fixed shapes the next multiple of 64 up to `limit`."""
    return min(limit, n_tokens + -n_tokens % 64) if has_fixed_shapes(device) else n_tokens


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s; None for CPUs and GPUs not in the table."""
    if device.type != "cuda":
        return None
    own = torch.cuda.get_device_name(device)
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in own), None)
