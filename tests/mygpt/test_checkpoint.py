"""Checkpoints are whole or absent, hold every tensor once under its plain name, and run no code."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mygpt import checkpoint


class Tied(nn.Module):
    """Two layers that share a weight, as wte and lm_head do."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wte = nn.Embedding(7, 3)
        self.lm_head = nn.Linear(3, 7, bias=False)
        self.lm_head.weight = self.wte.weight
        self.norm = nn.LayerNorm(3)


STATE: dict[str, Any] = {
    "val_loss": None,
    "loader": {"position": 5},
    "scaler": {},
    "fingerprint": "f00d",
    "generations": {"x": 0},
    "config": {},
}


def save(run: Path, step: int, val_loss: float | None = None, seed: int = 0) -> Path:
    state = {**STATE, "val_loss": val_loss}
    return checkpoint.save(run, step, Tied(seed), {"m": torch.full((2, 2), step)}, state)


def test_everything_comes_back_bitwise(tmp_path: Path) -> None:
    model = Tied(seed=1)
    folder = checkpoint.save(tmp_path, 10, model, {"m": torch.randn(3)}, STATE)
    assert folder == tmp_path / "checkpoints" / "step_00000010" == checkpoint.find(tmp_path)
    other = Tied(seed=2)
    checkpoint.load_model(folder, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert other.lm_head.weight is other.wte.weight
    assert set(checkpoint.load_optimizer(folder)) == {"m"}
    state = checkpoint.read_state(folder)
    assert (state["format"], state["version"], state["step"]) == ("mygpt-checkpoint", 2, 10)


def test_names_are_plain_and_tied_weights_stored_once(tmp_path: Path) -> None:
    model = Tied()
    model.compile(backend="eager")  # in place: a wrapper would prefix every name
    folder = checkpoint.save(tmp_path, 1, model, {}, STATE)
    header = (folder / "model.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert set(names) - {"__metadata__"} == {"wte.weight", "norm.weight", "norm.bias"}


def test_wrapped_models_are_saved_and_loaded_under_plain_names(tmp_path: Path) -> None:
    """In both directions: whatever wraps the model that writes, and the one that reads."""
    inner = Tied(seed=1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = [torch.compile(inner, backend="eager"), DistributedDataParallel(inner)]
        wrapped.append(torch.compile(wrapped[1], backend="eager"))
        for step, model in enumerate(wrapped):
            assert set(dict(model.named_parameters())) != set(dict(inner.named_parameters()))
            folder = checkpoint.save(tmp_path, step, model, {}, STATE)
            for other in (Tied(seed=2), torch.compile(Tied(seed=2), backend="eager")):
                checkpoint.load_model(folder, other)
                found = checkpoint.parameters(other)
                assert list(found) == ["wte.weight", "norm.weight", "norm.bias"]
                assert all(torch.equal(found[name], p) for name, p in inner.named_parameters())
    finally:
        dist.destroy_process_group()


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:4], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*: restore"):
            checkpoint.load_model(folder, Tied())
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is damaged"):
        checkpoint.load_optimizer(folder)


@pytest.mark.skipif(os.name == "nt", reason="there are no named pipes")
def test_a_pipe_for_a_file_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for name in ("model", "optimizer"):
        (folder / f"{name}.safetensors").unlink()
        os.mkfifo(folder / f"{name}.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_model(folder, Tied())
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_optimizer(folder)


def test_a_late_validation_is_added(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    before = checkpoint.read_state(folder)
    checkpoint.note_val_loss(folder, 2.5)
    assert checkpoint.read_state(folder) == before | {"val_loss": 2.5}
    assert checkpoint.best_of(tmp_path) == folder
    assert len(list(folder.iterdir())) == 3


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"tensor bias: expected shape \(7,\), found none"):
        checkpoint.load_model(folder, nn.Linear(3, 7))
    other = Tied()
    other.norm = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"norm.bias: expected shape \(4,\), found \(3,\)"):
        checkpoint.load_model(folder, other)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    files = sorted(path.name for path in save(tmp_path, 1).iterdir())
    assert files == ["model.safetensors", "optimizer.safetensors", "state.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from mygpt import checkpoint
from shards import files
from tests.mygpt.test_checkpoint import save

run = Path(sys.argv[1])
places = [(checkpoint, "_save_tensors", 0), (checkpoint, "_save_tensors", 1)]
places += [(files, "sync_file", 0), (files, "sync_file", 2), (files, "sync_folder", 0)]
for module, name, calls in places:
    if (child := os.fork()) == 0:
        original, left = getattr(module, name), calls
        def killer(*args):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return original(*args)
        setattr(module, name, killer)
        save(run, 20)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert checkpoint.steps(run) == [10], name
    assert list((run / "checkpoints").glob(".step_*.tmp"))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked writers")
def test_a_killed_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    before = save(tmp_path, 10)
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True)
    checkpoint.load_model(before, Tied())
    checkpoint.prune(tmp_path, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [before]
    assert checkpoint.steps(tmp_path) == [10]
    assert save(tmp_path, 20) == checkpoint.find(tmp_path)


def test_a_failing_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(tmp_path, 10)

    def full(*_: object) -> None:
        raise checkpoint.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*step_00000020 \(No space l"):
        save(tmp_path, 20)
    assert list((tmp_path / "checkpoints").iterdir()) == [before]


def test_those_of_round_steps_are_kept_as_well(tmp_path: Path) -> None:
    for step in range(5, 45, 5):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, keep=1, keep_every=20)
    assert checkpoint.steps(tmp_path) == [20, 40]
    save(tmp_path, 45)
    checkpoint.prune(tmp_path, keep=1, keep_every=0)
    assert checkpoint.steps(tmp_path) == [45]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    """Ancestors overwrote the best checkpoint when validation got worse."""
    for step, loss in [(1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, 3.5), (6, None)]:
        save(tmp_path, step, loss)
        checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert checkpoint.best_of(tmp_path) == checkpoint.folder_of(tmp_path, 2)
    save(tmp_path, 7, 3.0)
    assert checkpoint.best_of(tmp_path) == checkpoint.folder_of(tmp_path, 7)
    save(tmp_path, 8, math.nan)
    save(tmp_path, 1, math.nan)
    assert checkpoint.best_of(tmp_path) == checkpoint.folder_of(tmp_path, 7)


def test_without_checkpoints(tmp_path: Path) -> None:
    for best in (False, True):
        with pytest.raises(FileNotFoundError, match=r"expected a run with .*: let train\.py"):
            checkpoint.find(tmp_path, best)
    assert checkpoint.best_of(tmp_path) is None
    checkpoint.prune(tmp_path, keep=1)
    with pytest.raises(FileNotFoundError, match=r"python train\.py"):
        checkpoint.newest_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no state\.json"):
        checkpoint.read_state(tmp_path)


def test_the_newest_run_is_that_of_the_newest_checkpoint(tmp_path: Path) -> None:
    for at, (name, step) in enumerate([("a", 1), ("deep/b", 9), ("a", 2)]):
        os.utime(save(tmp_path / name, step), (at, at))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "a"
    assert checkpoint.newest_run(tmp_path / "deep") == tmp_path / "deep" / "b"


def test_another_version_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    state = checkpoint.read_state(folder)
    (folder / "state.json").write_text(json.dumps(state | {"version": 3}))
    with pytest.raises(ValueError, match="expected format mygpt-checkpoint version 2 in"):
        checkpoint.read_state(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected a JSON object in .*state\.json"):
        checkpoint.read_state(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    """Any bit of the tensors, by a seeded sample; the file is a valid one all the same."""
    folder = save(tmp_path, 10)
    path, random = folder / name, np.random.default_rng(7)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")  # where safetensors' header ends
    for _ in range(100):
        bit = int(random.integers(8 * begin, 8 * len(whole)))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{name} is damaged: expected the hash"):
            checkpoint.load_weights(folder)
            checkpoint.load_optimizer(folder)


def test_an_edited_or_renamed_state_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"position": 5', '"position": 6'))
    with pytest.raises(ValueError, match=r"state\.json was altered"):
        checkpoint.read_state(folder)
    (folder / "state.json").write_text(text)
    folder.rename(renamed := checkpoint.folder_of(tmp_path, 6))
    with pytest.raises(ValueError, match=r"expected step 6 in .*, found 4"):
        checkpoint.read_state(renamed)


def test_the_newest_intact_one_is_taken(tmp_path: Path) -> None:
    assert checkpoint.newest_intact(tmp_path) == (-1, [])
    save(tmp_path, 2)
    (save(tmp_path, 1, val_loss=1.0) / "state.json").unlink()  # an older one is never looked at
    assert checkpoint.newest_intact(tmp_path) == (2, [])
    assert checkpoint.best_of(tmp_path) is None
    (save(tmp_path, 3) / "model.safetensors").write_bytes(b"")
    checkpoint.folder_of(tmp_path, 5).mkdir()
    step, faults = checkpoint.newest_intact(tmp_path)
    assert (step, [("no state.json" in f, "damaged" in f) for f in faults]) == (
        2,
        [(True, False), (False, True)],
    )
    checkpoint.set_aside(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [1, 2]
    save(tmp_path, 3)
