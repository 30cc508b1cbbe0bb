"""Who am I, on what: from torchrun's environment, and refused in one line where it can't be."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mygpt import distributed
from mygpt.distributed import (
    Interrupt,
    Ranks,
    check_room,
    compute_dtype,
    find_device,
    peak_flops,
    start,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ancestor asked os.environ.get(['RANK']), a TypeError on every start."""
    monkeypatch.delenv("RANK", raising=False)
    with start("cpu") as ranks:
        assert ranks == Ranks(0, 0, 1, torch.device("cpu"))
        assert ranks.is_main
        assert ranks.sums([1.5, 2]) == [1.5, 2]
        assert ranks.of_main(7) == 7
        ranks.barrier()
        assert not torch.distributed.is_initialized()


def test_two_ranks_find_each_other(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "from mygpt.distributed import start\n"
        "with start('cpu') as ranks:\n"
        "    ranks.barrier()\n"
        "    found = (ranks.rank, ranks.local_rank, ranks.world_size, ranks.is_main)\n"
        "    sums, main = ranks.sums([ranks.rank + 1, 1e-17]), ranks.of_main(40 + ranks.rank)\n"
        f"    open(rf'{tmp_path}/{{ranks.rank}}', 'w').write(repr((found, sums, main)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run([*TORCHRUN, "2", str(script)], env=environment, check=True)
    assert (tmp_path / "0").read_text() == "((0, 0, 2, True), [3.0, 2e-17], 40)"
    assert (tmp_path / "1").read_text() == "((1, 1, 2, False), [3.0, 2e-17], 40)"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_room(2, "cuda")
    check_room(4, "cpu")
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"so 4, found 2: .*NPROC=n.*DEVICE=cpu"):
            check_room(4, device)


def test_the_check_is_a_command(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "mygpt.distributed"]
    assert subprocess.run([*command, "3", "--device", "cpu"], check=False).returncode == 0
    gpus = torch.cuda.device_count()
    refused = subprocess.run([*command, str(gpus + 1)], check=False)
    assert refused.returncode == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_devices_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto") == "cpu"
    with pytest.raises(ValueError, match="device mps is not there"):
        find_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto") == find_device("mps") == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")  # no collectives on MPS
    assert find_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == "cuda"


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_dtype(torch.device("cpu")) == torch.float32
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _=has_bf16, **__: _)
        assert compute_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Some new GPU", None),
    ],
)
def test_peaks_are_found_by_name(
    gpu: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noticed_and_obeyed_when_repeated(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, raise_signal = signal.getsignal(number), signal.raise_signal
    clock, obeyed = iter([10.0, 10.5, 11.5]), []
    monkeypatch.setattr(distributed.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(signal, "raise_signal", obeyed.append)
    with Interrupt().watch() as interrupt:
        assert not interrupt.seen
        raise_signal(number)
        raise_signal(number)
        assert interrupt.seen
        assert not obeyed
        raise_signal(number)
        assert obeyed == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before
