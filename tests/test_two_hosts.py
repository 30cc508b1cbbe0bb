"""A run over two hosts, one of which is killed: two network namespaces with a cable between them.

A namespace has its own interfaces, addresses and ports, as a machine has. Making one takes root, or
a container that may; where that is not so, the test says so and is skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mygpt import checkpoint, log
from tests.dataset import VOCABULARY, write_dataset

ROOT = Path(__file__).parents[1]
LONG = 250  # seconds: a busy machine, not a slow program
STEPS = 150
FLAGS = f"""--vocab-size {VOCABULARY} --block-size 16 --n-layers 1 --n-heads 2 --n-embed 8
    --total-batch-size 128 --micro-batch 2 --device cpu --max-steps {STEPS} --val-interval 75
    --checkpoint-interval 20 --keep 99 --dropout 0.2 --optimizer adamw""".split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's"),
]


class Host:
    """A network namespace: its name, its interface, its address."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = f"mygpt-{os.getpid()}-{number}"
        self.interface = f"veth{number}"
        self.address = f"10.77.0.{number + 1}"

    def torchrun(self, main: "Host", data: Path, run: Path) -> subprocess.Popen[str]:
        """Start this host's half of the run, as docs/recipes/two-machines.md has it."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--node-rank", str(self.number), "--nproc-per-node", "1"]
        command += ["--master-addr", main.address, "--master-port", "29500", str(ROOT / "train.py")]
        command += ["tiny", "--data", str(data), "--log-dir", str(run), *FLAGS]
        environment = {"GLOO_SOCKET_IFNAME": self.interface, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        """Everything that runs on it, at once."""
        pids = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        for pid in pids.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else."""
    here, there = Host(0), Host(1)
    ip = shutil.which("ip")
    if ip is None:
        pytest.skip("network namespaces need the `ip` command (iproute2)")
    for host in (here, there):
        made = subprocess.run([ip, "netns", "add", host.name], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
    inside = [f"ip -n {host.name}" for host in (here, there)]
    try:
        lines = [
            f"{inside[0]} link add {here.interface} type veth peer name {there.interface} "
            f"netns {there.name}"
        ]
        for host, prefix in zip((here, there), inside, strict=True):
            lines.append(f"{prefix} address add {host.address}/24 dev {host.interface}")
            lines += [f"{prefix} link set {name} up" for name in ("lo", host.interface)]
        for line in lines:
            subprocess.run(line.split(), check=True)
        yield here, there
    finally:
        for host in (here, there):
            host.kill()
            subprocess.run([ip, "netns", "delete", host.name], check=False)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_done(run: Path) -> int:
    return max(log.read(run).train, default=0) if (run / "log.txt").is_file() else 0


def final_bytes(run: Path) -> list[bytes]:
    folder = checkpoint.find(run)
    assert folder == checkpoint.folder_of(run, STEPS)
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def test_a_host_dies_and_the_run_goes_on(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Killed on one host, then asked to stop on one, then left alone: bitwise the quiet run."""
    data = write_dataset(tmp_path / "data").folder
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"

    def start(run: Path) -> list[subprocess.Popen[str]]:
        return [host.torchrun(hosts[0], data, run) for host in hosts]

    def end(halves: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
        errors = [half.communicate(timeout=LONG)[1] for half in halves]
        return [(half.returncode, text) for half, text in zip(halves, errors, strict=True)]

    for code, errors in end(start(quiet)):
        assert code == 0, errors

    halves = start(troubled)
    wait(lambda: steps_done(troubled) >= 50)
    hosts[1].kill()
    begun = time.monotonic()
    (code, errors), _ = end(halves)
    assert time.monotonic() - begun < 120  # and not for as long as a rank is patient
    assert code == 1
    assert "rank 0 of 2 lost the others (" in errors
    left = checkpoint.steps(troubled)[-1]
    assert 40 <= left < STEPS

    halves = start(troubled)
    wait(lambda: steps_done(troubled) >= left + 30)
    halves[1].terminate()  # what a scheduler does first
    (_, errors), _ = end(halves)
    assert "lost the others" not in errors
    assert f"stopped by SIGTERM at step {checkpoint.steps(troubled)[-1]} of {STEPS}" in (
        troubled / "log.txt"
    ).read_text("utf-8")

    for code, errors in end(start(troubled)):
        assert code == 0, errors
    assert final_bytes(troubled) == final_bytes(quiet)
    assert log.read(troubled).train == log.read(quiet).train
