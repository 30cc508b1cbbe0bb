"""The machine: versions, and its GPU's clocks, power and memory once per second."""

import shutil
import subprocess

import torch

from bench import table
from bench.gpu.setting import Setting
from bench.train import device_name

PACKAGES = ("torch", "triton", "transformers", "numpy", "pyarrow", "tiktoken", "gigatoken")
SAMPLED = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
    "megabytes": "memory.used",
    "percent_busy": "utilization.gpu",
}
QUERY = ("--format=csv,noheader,nounits", f"--query-gpu={','.join(SAMPLED.values())}", "-l", "1")


def watch(setting: Setting) -> None:
    """Note the versions, then a sample per second until this process is killed."""
    setting.note(
        {"machine": table.machine("gpu", PACKAGES), "device": device_name(setting.device)}
        | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    )
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    state = subprocess.run(
        [program, "-q", "-d", "CLOCK,POWER,PERFORMANCE"],
        capture_output=True,
        text=True,
        check=False,
    )
    setting.note({"nvidia-smi": state.stdout})
    with subprocess.Popen([program, *QUERY], stdout=subprocess.PIPE, text=True) as sampler:
        assert sampler.stdout is not None
        for line in sampler.stdout:
            if sample := parse(line):
                setting.note({"sample": sample})


def parse(line: str) -> dict[str, float]:
    """Return the numbers of one line of nvidia-smi by name, without those it does not have."""
    words = [word.strip() for word in line.split(",")]
    named = zip(SAMPLED, words, strict=False)
    return {name: float(word) for name, word in named if word.replace(".", "", 1).isdigit()}
