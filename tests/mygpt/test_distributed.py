"""Who am I, on what: from torchrun's environment, and refused in one line where it can't be."""

import os
from pathlib import Path

import pytest
import torch

from mygpt import distributed
from mygpt.distributed import (
    DistributedContext,
    RanksLost,
    check_room,
    compute_dtype,
    find_device,
    init_distributed,
    peak_flops,
)
from tests.ranks import run_ranks, start_ranks


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ancestor asked os.environ.get(['RANK']), a TypeError on every start."""
    monkeypatch.delenv("RANK", raising=False)
    with init_distributed("cpu") as ranks:
        assert ranks == DistributedContext(0, 0, 1, torch.device("cpu"))
        assert ranks.is_main
        assert ranks.all_reduce_sum([1.5, 2]) == [1.5, 2]
        assert ranks.broadcast_object(7) == 7
        ranks.barrier()
        assert not torch.distributed.is_initialized()


def test_two_ranks_find_each_other(tmp_path: Path) -> None:
    script = (
        "import torch\n"
        "from mygpt.distributed import init_distributed\n"
        "with init_distributed('cpu') as ranks:\n"
        "    ranks.barrier()\n"
        "    found = (ranks.rank, ranks.local_rank, ranks.world_size, ranks.is_main)\n"
        "    sums = ranks.all_reduce_sum([ranks.rank + 1, 1e-17])\n"
        "    main = ranks.broadcast_object(40 + ranks.rank)\n"
        "    loss = [2.0, float('inf')][ranks.rank]\n"
        "    means = ranks.all_reduce_mean(torch.tensor([ranks.rank + 1, loss]))\n"
        "    values = (ranks.rank, 7 - ranks.rank)\n"
        "    largest = [ranks.all_reduce_max_async(value) for value in values]\n"
        "    agreed = [result() for result in largest]\n"
        "    text = repr((found, sums, main, means, agreed))\n"
        f"    open(rf'{tmp_path}/{{ranks.rank}}', 'w').write(text)\n"
    )
    run_ranks(2, script)
    agreed = "[3.0, 2e-17], 40, [1.5, inf], [1, 7])"
    assert (tmp_path / "0").read_text() == f"((0, 0, 2, True), {agreed}"
    assert (tmp_path / "1").read_text() == f"((1, 1, 2, False), {agreed}"


LOST = """
import os, signal, sys, time
from datetime import timedelta
from mygpt.distributed import EXIT_LOST, RanksLost, init_distributed

try:
    with init_distributed("cpu", timeout=timedelta(seconds=int(sys.argv[2]))) as ranks:
        ranks.barrier()
        if not ranks.is_main and sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if not ranks.is_main:
            time.sleep(600)
        ranks.barrier()
except RanksLost as lost:
    print(lost)
    sys.exit(EXIT_LOST)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
@pytest.mark.parametrize(
    ("end", "timeout", "words"),
    [
        ("killed", "200", "onnection"),
        pytest.param("silent", "15", "Timed out waiting 15000ms", marks=pytest.mark.slow),
    ],
)
def test_lost_ranks_end_the_others_in_one_line(end: str, timeout: str, words: str) -> None:
    """Whether a rank was killed, or only says nothing more for as long as one is patient."""
    processes = start_ranks(2, LOST, end, timeout)
    try:
        line, _ = processes[0].communicate(timeout=100)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    assert line.startswith("rank 0 of 2 lost the others (")
    assert words in line
    assert "resume from the last checkpoint" in line
    assert line.count("\n") == 1


def test_only_errors_of_the_network_mean_lost_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_store", lambda _: None)
    with pytest.raises(RuntimeError, match="size of tensor"), init_distributed("cpu"):
        torch.zeros(2) + torch.zeros(3)
    closed = RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed. Look there.")
    for error in (closed, torch.distributed.DistStoreError("Connection closed")):
        with (
            pytest.raises(RanksLost, match=r"rank 0 of 2 lost the others \(Connection closed\)"),
            init_distributed("cpu"),
        ):
            raise error


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_room(2, "cuda")
    check_room(4, "cpu")
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"so 4, found 2: .*NPROC=n.*DEVICE=cpu"):
            check_room(4, device)


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
