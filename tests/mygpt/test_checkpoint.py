"""Checkpoints are whole or absent, hold every tensor once under its plain name, and run no code."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mygpt import checkpoint
from shards import stored_json
from shards.cli import script


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


def test_prefixes_of_wrappers_are_no_part_of_a_name() -> None:
    layers = nn.ModuleDict({"_checkpoint_wrapped_module": Tied(), "module_2": nn.Linear(1, 1)})
    model = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"module": nn.ModuleDict({"h": layers})})})
    assert set(checkpoint.parameters(model)) == {
        *("h.wte.weight", "h.norm.weight", "h.norm.bias", "h.module_2.weight", "h.module_2.bias"),
    }


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


# The rules one by one, and what refusals say


def rewrite(folder: Path, **changes: object) -> None:
    """Change a state.json, and its checksum with it; what is changed to `...` is left out."""
    record = {**checkpoint.read_state(folder), **changes}
    record = {name: value for name, value in record.items() if value is not ...}
    content = json.dumps(stored_json.with_checksum(record))
    (folder / "state.json").write_text(content, "utf-8")


def message_of(error: type[Exception], call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are fsynced."""
    found = list[Path]()
    original = checkpoint.sync_folder
    monkeypatch.setattr(
        checkpoint, "sync_folder", lambda path: (found.append(path), original(path))[1]
    )
    return found


def test_the_state_that_is_written(tmp_path: Path, synced: list[Path]) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.bfloat16)}
    folder = checkpoint.save(tmp_path, 12, tensors, dict(reversed(tensors.items())), STATE)
    assert synced == [tmp_path]
    text = (folder / "state.json").read_text("utf-8")
    assert text.startswith('{\n "format": "mygpt-checkpoint",\n "version": 2,\n "step": 12,\n')
    assert text.endswith("\n}\n")
    record = json.loads(text)
    assert record.pop("checksum") and record == {
        "format": "mygpt-checkpoint",
        "version": 2,
        "step": 12,
        **STATE,
        "hashes": dict.fromkeys(
            ["model.safetensors", "optimizer.safetensors"], "198f74376d70bfa259fb12cdb7e43d49"
        ),
    }
    for loaded in (checkpoint.load_weights(folder), checkpoint.load_optimizer(folder)):
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "change",
    [
        {"c": torch.ones(2, 3)},
        {"a": torch.ones(6)},
        {"a": torch.ones(3, 2)},
        {"a": torch.ones(2, 3).view(torch.int32)},
        {"a": torch.zeros(2, 3)},
    ],
)
def test_the_hash_is_of_names_types_shapes_and_bytes(change: dict[str, torch.Tensor]) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(1)}
    hashes = {checkpoint._hash(one) for one in (tensors, tensors | change)}
    assert len(hashes) == 2


def test_a_vocabulary_of_ones_own_is_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (save(tmp_path, 1) / "tokenizer.json").read_text() == "{}"


def test_what_a_full_disk_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(checkpoint, "save_file", full)
    final = checkpoint.folder_of(tmp_path, 2)
    assert message_of(OSError, save, tmp_path, 2) == (
        f"cannot write the checkpoint {final} (no room): the one before it is unharmed; make room "
        "and run the same command again to resume from it"
    )


def test_a_checkpoint_is_found(tmp_path: Path) -> None:
    folders = {step: save(tmp_path, step, loss) for step, loss in ((1, 2.0), (2, 1.0), (3, None))}
    (tmp_path / "checkpoints/step_1").mkdir()
    (tmp_path / "checkpoints/step_0000000x").mkdir()
    assert checkpoint.steps(tmp_path) == [1, 2, 3]
    assert checkpoint.find(tmp_path) == folders[3]
    assert checkpoint.find(tmp_path, best=True) == folders[2]
    for best in (False, True):
        assert checkpoint.find(folders[1], best) == folders[1]
    assert checkpoint.is_ours(tmp_path) and checkpoint.is_ours(folders[1])
    assert not checkpoint.is_ours(tmp_path / "checkpoints")


def test_a_damaged_state_is_not_the_best(tmp_path: Path) -> None:
    folders = [save(tmp_path, step, loss) for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5))]
    (folders[1] / "state.json").write_bytes(b"[")
    assert checkpoint.best_of(tmp_path) == folders[2]
    (folders[2] / "state.json").unlink()
    assert checkpoint.best_of(tmp_path) == folders[0]


def test_no_checkpoint_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for best, kind in ((False, "a checkpoint"), (True, "a validated checkpoint")):
        assert message_of(FileNotFoundError, checkpoint.find, tmp_path / "no", best) == (
            f"expected a run in {tmp_path / 'no'}, found no such folder in {tmp_path}: name one by "
            "its path from here"
        )
        assert message_of(FileNotFoundError, checkpoint.find, tmp_path, best) == (
            f"expected a run with {kind} in {tmp_path}, found none: let train.py reach its first "
            "one"
        )
    save(tmp_path, 1)  # not validated
    with pytest.raises(FileNotFoundError, match="a validated checkpoint"):
        checkpoint.find(tmp_path, best=True)
    message = message_of(FileNotFoundError, checkpoint.newest_run, tmp_path / "no")
    assert message == (
        f"no checkpoint of a run under {tmp_path / 'no'}/ in {tmp_path}: train one with "
        f"`{script('train.py')}`, or name a run by its path from here"
    )
    message = message_of(FileNotFoundError, checkpoint.read_state, tmp_path)
    assert message == f"{tmp_path} is no checkpoint: it has no state.json"


def test_of_equal_times_the_later_step_is_the_newest_run(tmp_path: Path) -> None:
    for name, step in (("a", 3), ("b", 4), ("c", 2)):
        folder = save(tmp_path / name, step)
        os.utime(folder, (9, 9))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "b"
    assert checkpoint.newest_run(tmp_path / "b") == tmp_path / "b"


class Rank:
    """A rank that gets what the main one sends."""

    def __init__(self, is_main: bool, sent: object = None) -> None:
        self.is_main, self.sent = is_main, sent

    def broadcast_object(self, value: object) -> object:
        self.own = value
        return value if self.is_main else self.sent


def test_ranks_agree_on_the_newest(tmp_path: Path) -> None:
    none = Rank(is_main=True)
    assert checkpoint.agree_on_newest(tmp_path, none) == (-1, [])
    folder = save(tmp_path, 5)
    assert checkpoint.agree_on_newest(tmp_path, Rank(is_main=True)) == (5, [])
    other = Rank(is_main=False, sent=(3, ["a fault"]))
    assert checkpoint.agree_on_newest(tmp_path, other) == (3, ["a fault"])
    assert other.own == (-1, []), "only the main rank reads"
    save(tmp_path, 4)
    for step in (4, 5):
        (checkpoint.folder_of(tmp_path, step) / "model.safetensors").write_bytes(b"")
    message = message_of(ValueError, checkpoint.agree_on_newest, tmp_path, Rank(is_main=True))
    begins = f"every checkpoint of {tmp_path} is damaged, the newest: {folder}/model.safetensors is"
    assert message.startswith(begins)
    assert checkpoint.agree_on_newest(tmp_path, Rank(False, (0, ["a fault"]))) == (0, ["a fault"])


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    aside = tmp_path / "checkpoints/step_00000003.damaged"
    (aside / "old").mkdir(parents=True)
    checkpoint.set_aside(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [1]
    names = {"step_00000001", "step_00000002.damaged", aside.name}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == names
    assert (aside / "state.json").is_file() and not (aside / "old").exists()


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (6, None), (7, None), (8, None)):
        save(tmp_path, step, loss)
    leftover = tmp_path / "checkpoints/.step_00000009.tmp"
    (leftover / "model.safetensors").mkdir(parents=True)
    removed = []
    original = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **how: (removed.append(path.name), original(path, **how))
    )
    checkpoint.prune(tmp_path, keep=1, keep_every=3, kept=4)
    assert checkpoint.steps(tmp_path) == [2, 3, 4, 6, 8]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    # Renamed first: what is half deleted is no checkpoint.
    assert removed == [leftover.name, ".step_00000001.tmp", ".step_00000007.tmp"]
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 6, 8]


def test_a_leftover_that_can_not_be_removed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints/.step_00000002.tmp").write_text("no folder")
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.steps(tmp_path) == [1]


def test_a_renamed_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    state = checkpoint.read_state(folder)
    for name in ("best", "step_00000004.damaged", "step_4"):
        shutil.copytree(folder, tmp_path / name)
        assert checkpoint.read_state(tmp_path / name) == state
    folder.rename(renamed := checkpoint.folder_of(tmp_path, 6))
    assert message_of(ValueError, checkpoint.read_state, renamed) == (
        f"expected step 6 in {renamed}/state.json, found 4: the folder was renamed; name it as it "
        "was"
    )


def test_what_a_state_must_hold(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    scaler = dict.fromkeys(
        ["scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"], 1.0
    )
    for good in ({"val_loss": 3}, {"scaler": scaler}, {"spikes": {"norms": [1.0], "in_a_row": 0}}):
        rewrite(folder, **good)
        checkpoint.read_state(folder)
    remedy = "restore it, or use another checkpoint"
    for bad, words in (
        ({"val_loss": "1"}, "expected a number or null for val_loss, found '1'"),
        ({"val_loss": True}, "expected a number or null for val_loss, found True"),
        ({"scaler": {"scale": 1.0}}, f"expected {sorted(scaler)} in scaler, found ['scale']"),
        ({"fingerprint": ...}, "fingerprint"),
        ({"version": 3}, "use the version of myGPT that wrote it, or"),
    ):
        original = (folder / "state.json").read_bytes()
        rewrite(folder, **bad)
        message = message_of(ValueError, checkpoint.read_state, folder)
        assert words in message and f"{folder}/state.json" in message
        assert message.endswith(remedy) or bad.keys() & {"val_loss", "scaler"}
        (folder / "state.json").write_bytes(original)
    (folder / "state.json").write_bytes(b"[")
    assert message_of(ValueError, checkpoint.read_state, folder).endswith(remedy)


def test_a_validation_that_diverged_is_noted(tmp_path: Path, synced: list[Path]) -> None:
    folder = save(tmp_path, 3)
    synced.clear()
    checkpoint.note_val_loss(folder, math.nan)
    assert synced == [folder]
    text = (folder / "state.json").read_text()
    assert '"val_loss": NaN' in text and text.endswith("\n}\n")
    assert text.startswith('{\n "format"')


def test_one_training_at_a_time(tmp_path: Path) -> None:
    with checkpoint.locked(tmp_path):
        assert (tmp_path / ".lock").exists()
        assert message_of(ValueError, checkpoint.locked, tmp_path) == (
            f"another process is training in {tmp_path}: wait for it, or give another --log-dir"
        )
    with checkpoint.locked(tmp_path):
        pass


def test_a_shard_of_each_tensor_is_loaded(tmp_path: Path) -> None:
    model = Tied(seed=1)
    folder = checkpoint.save(tmp_path, 1, model, {}, STATE)
    other = Tied(seed=2)
    seen = list[tuple[torch.Size, torch.Size]]()

    def negated(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        seen.append((full.shape, parameter.shape))
        assert any(parameter.data_ptr() == own.data_ptr() for own in other.parameters())
        return -full

    checkpoint.load_model(folder, other, negated)
    assert torch.equal(other.wte.weight, -model.wte.weight) and len(seen) == 3
    message = message_of(ValueError, checkpoint.load_model, folder, nn.Linear(3, 7, bias=False))
    assert message.startswith(
        f"{folder}/model.safetensors does not fit the model: tensor norm.bias:"
    )
    assert message.endswith(": restore it, or use another checkpoint")


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path, remedy = folder / "optimizer.safetensors", "restore it, or use another checkpoint"
    expected = checkpoint.read_state(folder)["hashes"][path.name][:12]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = message_of(ValueError, checkpoint.load_optimizer, folder)
    words = (
        rf"{re.escape(str(path))} is damaged: expected the hash {expected}, found [0-9a-f]{{12}}; "
    )
    assert re.fullmatch(words + remedy, message)
    rewrite(folder, hashes=...)  # as version 0.2 wrote it
    assert checkpoint.load_optimizer(folder).keys() == {"m"}
    path.write_bytes(b"")
    message = message_of(ValueError, checkpoint.load_optimizer, folder)
    assert message.startswith(f"{path} is damaged (Error") and message.endswith(f"): {remedy}")
    path.unlink()
    assert message_of(ValueError, checkpoint.load_optimizer, folder) == (
        f"{path} is damaged (it is missing, or no file): {remedy}"
    )
