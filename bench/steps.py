"""Training steps to be measured: train.py's own, and those it is compared with.

Each maker returns a step: a call trains on the next batch and returns the loss before the update.
All train on the same batches in the same order, which lie on the device before the clock starts;
ours and the plain one start from the same weights.
B: sequences of a batch, T: block size.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.benchmark import Timer

from bench import feeds
from bench.plain import PlainGPT
from mygpt.config import GPTConfig
from mygpt.distributed import DistributedContext, autocast, compute_dtype
from mygpt.model import GPT
from mygpt.run_config import RunRecord
from mygpt.settings import PRESETS
from mygpt.stopping import Stop
from mygpt.train_state import assemble
from shards.loader import TokenLoader
from train import train_step

Step = Callable[[], float]
BATCHES = 8  # that come again and again, so the loss falls
LEARNING_RATE, WEIGHT_DECAY, BETAS, GRAD_CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0
SEED = 1337
PROFILED_STEPS = 3
LONGEST_KERNELS = 40
SUSTAINED_SECONDS = 2.0


@dataclass(frozen=True)
class Workload:
    """Model, batch size and dataset folder that all contenders train with."""

    model: GPTConfig
    micro_batch_size: int
    device: str
    data: Path

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.micro_batch_size * self.model.block_size

    def build_data(self) -> None:
        """Write the dataset: random tokens, just enough for `BATCHES` batches."""
        feeds.build(self.data, BATCHES * self.tokens + 1, 1, self.model.vocab_size)

    def batches(self) -> "HeldBatches":
        """The batches (x, y), each (B, T), without end."""
        return HeldBatches(
            self.data, "train", self.micro_batch_size, self.model.block_size, device=self.device
        )


class HeldBatches(TokenLoader):
    """A loader that has read its first `BATCHES` batches and serves them in turn, without end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._held = cycle([TokenLoader.__next__(self) for _ in range(BATCHES)])
        self.wait_seconds = 0.0

    def __next__(self) -> feeds.Batch:
        return next(self._held)


def ours(work: Workload, compiled: bool) -> Step:
    """One step as train.py takes it, on one rank."""
    config = replace(
        PRESETS["gpt2"][1],
        model=work.model,
        seed=SEED,
        micro_batch=work.micro_batch_size,
        total_batch_size=work.tokens,
        max_lr=LEARNING_RATE,
        min_lr=LEARNING_RATE,
        warmup_steps=1,
        max_steps=10**9,
        weight_decay=WEIGHT_DECAY,
        beta1=BETAS[0],
        beta2=BETAS[1],
        grad_clip=GRAD_CLIP,
        compile=compiled,
    )
    ranks = DistributedContext(0, 0, 1, torch.device(work.device))
    state = assemble(RunRecord(config, "", {}), ranks, work.batches(), [])
    if compiled and work.device == "cpu":  # which train.py never does
        state.model.compile()
    stop = Stop(ranks)
    return lambda: train_step(state, stop).loss


def plain(work: Workload, compiled: bool) -> Step:
    """`PlainGPT` with torch's AdamW, from our initial weights."""
    model = plain_model(work.model, work.device)
    return usual_step(model, work.batches(), lambda run, x, y: run(x, y), compiled)


def plain_model(shape: GPTConfig, device: str) -> PlainGPT:
    """`PlainGPT` with our initial weights; on a GPU with a padded vocabulary, as nanoGPT's."""
    padded = shape.vocab_size + -shape.vocab_size % 64 if device == "cuda" else shape.vocab_size
    model = PlainGPT(shape, padded)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in GPT(shape).named_parameters():
            model.get_parameter(name)[: len(parameter)] = parameter
    return model.to(device)


def hugging_face(work: Workload, compiled: bool) -> Step:
    """GPT2LMHeadModel with its own loss."""
    torch.manual_seed(SEED)
    model = hugging_face_model(work.model, use_cache=False).to(work.device)
    loss_of = lambda run, x, y: run(input_ids=x, labels=x).loss  # noqa: E731
    return usual_step(model, work.batches(), loss_of, compiled)


def hugging_face_model(shape: GPTConfig, **options: Any) -> Any:
    """GPT2LMHeadModel of a shape, without dropout, randomly initialised."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_embd=shape.n_embed,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_inner=shape.n_hidden,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        **options,
    )
    return GPT2LMHeadModel(config)


def usual_step(
    model: torch.nn.Module,
    batches: Iterator[feeds.Batch],
    loss_of: Callable[[Any, Tensor, Tensor], Tensor],
    compiled: bool,
    accumulation: int = 1,
    rates: Iterator[float] | None = None,
) -> Step:
    """Forward, backward, clipping and AdamW, in the order and with the settings of our own step.

    As in nanoGPT only matrices decay, and AdamW is fused on a GPU, else torch's default.
    """
    device, rates = next(model.parameters()).device, rates or repeat(LEARNING_RATE)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    fused = device.type == "cuda" or None
    adamw = torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=fused)
    run = torch.compile(model) if compiled else model

    def step() -> float:
        lr, total = next(rates), torch.zeros((), device=device)
        for group in adamw.param_groups:
            group["lr"] = lr
        for _ in range(accumulation):
            x, y = next(batches)
            with autocast(device):
                loss = loss_of(run, x, y) / accumulation
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        adamw.step()
        adamw.zero_grad()
        return total.item()

    return step


def product_rates(device: str, size: int, seconds: float = SUSTAINED_SECONDS) -> dict[str, float]:
    """FLOP/s of one square matrix product, in bf16 on a GPU that has it, else in fp32.

    "burst": the best of three short measurements. "sustained": over so many seconds without a
    pause, as in training, where a GPU's power limit lowers its clock.
    """
    a = torch.randn(size, size, device=device).to(compute_dtype(torch.device(device)))
    timer = Timer(
        "a @ b", globals={"a": a, "b": a.T.contiguous()}, num_threads=torch.get_num_threads()
    )
    few, flops = 3 if device == "cpu" else 30, 2 * float(size) ** 3
    shortest = min(timer.timeit(few).mean for _ in range(3))
    sustained = timer.timeit(math.ceil(seconds / shortest)).mean
    return {"burst": flops / shortest, "sustained": flops / sustained}


HEAD_PRODUCTS, HEAD_LOSS = "head: matrix products", "head: softmax, loss, gradient"
BLOCK_PRODUCTS, ATTENTION = "blocks: matrix products", "blocks: attention"
NORMS, OPTIMIZER, CLIPPING = "blocks: norms, GELU, sums", "AdamW", "norm of the gradient, clipping"
OTHER = "everything else"


def profile(work: Workload, compiled: bool) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of our step by torch's profiler, longest first.

    "parts": each part of the step and its share; "kernels": the longest kernels of a GPU, or
    operators of a CPU, with their calls per step.
    """
    on_gpu = work.device == "cuda"
    step = ours(work, compiled)
    for _ in range(PROFILED_STEPS):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(
        activities=activities,
        record_shapes=True,
        acc_events=True,  # there is one cycle; torch 2.11 warns without
    ) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
    return {
        "parts": _parts(profiler, on_gpu, work.model),
        "kernels": _longest_kernels(profiler, on_gpu),
    }


def _parts(profiler: Any, on_gpu: bool, shape: GPTConfig) -> list[dict[str, Any]]:
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:
            continue  # a GPU's kernel: its time is counted with the operator that launched it
        sizes = {n for dims in event.input_shapes if isinstance(dims, list) for n in dims}
        spent[part_of_step(event.key.lower(), sizes, shape)] += _step_ms(event, on_gpu)
    total = sum(spent.values())
    return [
        {"part": name, "ms": round(ms, 1), "share": round(ms / total, 3)}
        for name, ms in sorted(spent.items(), key=lambda item: -item[1])
    ]


def _longest_kernels(profiler: Any, on_gpu: bool) -> list[dict[str, Any]]:
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == where]
    events.sort(key=lambda event: -_step_ms(event, on_gpu))
    return [
        {
            "kernel": event.key,
            "calls": round(event.count / PROFILED_STEPS, 1),
            "ms": round(_step_ms(event, on_gpu), 3),
        }
        for event in events[:LONGEST_KERNELS]
    ]


def _step_ms(event: Any, on_gpu: bool) -> float:
    """Milliseconds per step that an event took itself, on the GPU or on the CPU."""
    micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return micros / 1000 / PROFILED_STEPS


def part_of_step(operator: str, sizes: set[int], shape: GPTConfig) -> str:
    """The part of a step that an operator belongs to, by its name and the sizes of its inputs."""
    has_vocab = any(shape.vocab_size <= n < shape.vocab_size + 128 for n in sizes)
    if "adam" in operator:
        return OPTIMIZER
    if any(word in operator for word in ("foreach", "linalg_vector_norm")):
        return CLIPPING
    if any(word in operator for word in ("attention", "flash", "fmha")):
        return ATTENTION
    if any(word in operator for word in ("mm", "gemm", "cutlass", "nvjet")):
        return HEAD_PRODUCTS if has_vocab else BLOCK_PRODUCTS
    if has_vocab:
        return HEAD_LOSS
    norms = ("layer_norm", "gelu", "add", "triton", "compiled", "copy_")
    return NORMS if any(word in operator for word in norms) else OTHER
