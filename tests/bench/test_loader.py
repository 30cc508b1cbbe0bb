"""What bench.loader feeds is what it says, and its table says what was measured."""

import itertools
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import feeds, loader, worker
from bench.loader import CONTENDERS, NANOGPT, OURS, Options, as_text, is_measured, run
from shards.checks import verify
from shards.manifest import Manifest
from tests.bench.support import InThisProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    feeds.build(made, 40_000, 4)
    return made


def test_the_dataset_is_one(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.splits["train"].tokens == 40_000
    assert [len(manifest.splits[split].shards) for split in ("train", "val")] == [4, 1]
    assert all(not faults for _, faults in verify(manifest))
    shards = [np.load(path) for path in sorted(folder.glob("train_*.npy"))]
    assert np.array_equal(np.concatenate(shards), np.fromfile(folder / "train.bin", np.uint16))


@pytest.mark.parametrize("name", [name for name in CONTENDERS if is_measured(name, Options())])
def test_every_feed_serves_rows_of_the_dataset(folder: Path, name: str) -> None:
    text = np.fromfile(folder / "train.bin", np.uint16).astype(np.int64)
    beginnings = {tuple(text[i : i + 4]): i for i in range(len(text) - 3)}
    for x, y in islice(CONTENDERS[name].feed(folder), 4):
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (feeds.BATCH, feeds.BLOCK)
        for row, targets in zip(x.cpu().numpy(), y.cpu().numpy(), strict=True):
            at = beginnings[tuple(row[:4])]
            assert np.array_equal(row, text[at : at + feeds.BLOCK])
            assert np.array_equal(targets, text[at + 1 : at + 1 + feeds.BLOCK])


@pytest.mark.parametrize("name", ["a strided view", "torch's DataLoader"])
def test_rivals_without_replacement_serve_no_row_twice(folder: Path, name: str) -> None:
    batches = 2  # of 36 to 39 windows
    rows = torch.cat([x for x, _ in islice(CONTENDERS[name].feed(folder), batches)])
    assert len({tuple(row.tolist()) for row in rows}) == batches * feeds.BATCH


def test_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "Worker", InThisProcess)
    monkeypatch.setattr(loader, "WARM_BATCHES", 1)
    monkeypatch.setattr(loader, "TIMED_AT_ONCE", 1)
    threads = torch.get_num_threads()
    try:
        found = run(Options(megatokens=1, shards=3, seconds=0.001, rounds=2, peers=False))
    finally:
        torch.set_num_threads(threads)
    json.dumps(found)
    rivals = ["a strided view", "torch's DataLoader", NANOGPT]
    assert [row["what"] for row in found["rows"] if "GPU" not in row["what"]] == [OURS, *rivals]
    for row in found["rows"]:
        assert len(row["million_tokens_s"]["runs"]) == 2
        assert row["million_tokens_s"]["low"] > 0
    by_name = {row["what"]: row for row in found["rows"]}
    assert by_name[NANOGPT]["of_nanogpt"] == 1
    text = as_text(found)
    for name, row in by_name.items():
        assert f"| {name} " in text and str(row["million_tokens_s"]["median"]) in text
    assert "batches of 16 × 1024" in text


def test_a_machine_at_a_standstill_is_measured_all_the_same() -> None:
    """No time is so short that it passes without a batch."""
    rates = loader.rates_of(itertools.repeat(None), seconds=0)
    assert min(rates.values()) > 0


def test_options_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="above 0"):
        run(Options(rounds=0))
