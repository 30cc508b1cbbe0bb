"""Checkpoints: the complete state of a run after some step, in a folder that appears whole.

    RUN/checkpoints/step_00001000/    after 1,000 finished steps:
        model.safetensors             every parameter once, under its plain name
        optimizer.safetensors         the optimizer's tensors, flat
        state.json                    step, position in the data, settings, fingerprint, ...,
                                      hashes of the tensors, and a checksum of itself

A temporary folder is filled, fsynced and renamed: a folder named `step_N` is complete (promise 6).
Only safetensors and JSON are read, which can't run code (promise 8). Hashes are verified whenever
tensors are loaded, so a flipped bit is a ValueError (promise 10).
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mygpt.config import check_shapes
from mygpt.distributed import DistributedContext
from shards import stored_json
from shards.cli import script
from shards.files import atomic_file, atomic_folder, lock, sync_folder
from shards.vocabulary import TOKENIZER_NAME

FORMAT, VERSION = "mygpt-checkpoint", 2
OTHER = "restore it, or use another checkpoint"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
# Keys of GradScaler.state_dict(); empty where it is disabled.
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
# Prefixes that torch.compile, DDP and activation checkpointing put into parameter names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class _Spikes:
    """State of `mygpt.spikes.Spikes` in state.json."""

    norms: list[float]  # latest gradient norms
    in_a_row: int  # consecutive skipped steps, up to now


@dataclass(frozen=True)
class _State:
    """Types of what state.json must hold."""

    step: int
    loader: dict[str, Any]  # `TokenLoader.state_dict`
    scaler: dict[str, float]  # `GradScaler.state_dict`
    fingerprint: str  # of the dataset
    generations: dict[str, int]  # of the dataset's sources, by name
    config: dict[str, Any]  # settings of the run
    val_loss: Any  # a number, NaN included, or None
    spikes: _Spikes | None = None
    hashes: dict[str, str] = field(default_factory=dict)  # of the tensors, by file

    def __post_init__(self) -> None:
        if type(self.val_loss) not in (int, float, type(None)):
            raise ValueError(f"expected a number or null for val_loss, found {self.val_loss!r}")
        if self.scaler and self.scaler.keys() != SCALER:
            raise ValueError(f"expected {sorted(SCALER)} in scaler, found {sorted(self.scaler)}")


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` finished steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints, ascending."""
    folders = (run_dir / "checkpoints").glob("step_" + "[0-9]" * 8)
    return sorted(int(folder.name.removeprefix("step_")) for folder in folders)


def is_ours(path: Path) -> bool:
    """Return whether a folder is a run with checkpoints or one of its checkpoints."""
    return (path / "checkpoints").is_dir() or (path / "state.json").is_file()


def find(target: Path, best: bool = False) -> Path:
    """Return the checkpoint `target`, or the newest one of the run `target`.

    With `best`, the checkpoint of the run that has the lowest validation loss. Raises
    FileNotFoundError if there is none.
    """
    if (target / "state.json").is_file():
        return target
    if best and (found := best_of(target)):
        return found
    if not best and (finished := steps(target)):
        return folder_of(target, finished[-1])
    if not target.is_dir():
        raise FileNotFoundError(
            f"expected a run in {target}, found no such folder in {Path.cwd()}: name one by its "
            "path from here"
        )
    kind = "a validated checkpoint" if best else "a checkpoint"
    raise FileNotFoundError(
        f"expected a run with {kind} in {target}, found none: let train.py reach its first one"
    )


def best_of(run_dir: Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss, the newer of equals, if any.

    Those with a damaged state.json don't count.
    """
    losses = {}
    for step in reversed(steps(run_dir)):
        with suppress(ValueError, OSError):
            loss = read_state(folder_of(run_dir, step))["val_loss"]
            if loss is not None and math.isfinite(loss):
                losses[step] = loss
    return folder_of(run_dir, min(losses, key=losses.__getitem__)) if losses else None


def newest_intact(run_dir: Path) -> tuple[int, list[str]]:
    """Return the step of the newest checkpoint that is not damaged, and the faults of newer ones.

    The step is -1 if there is none. Reads all tensors of the checkpoints that it looks at.
    """
    faults: list[str] = []
    for step in reversed(steps(run_dir)):
        try:
            load_weights(folder_of(run_dir, step))
            load_optimizer(folder_of(run_dir, step))
            return step, faults
        except (ValueError, OSError) as error:
            faults.append(str(error))
    return -1, faults


def agree_on_newest(run_dir: Path, ranks: DistributedContext) -> tuple[int, list[str]]:
    """Return what `newest_intact` finds on the main rank, on all ranks.

    Raises ValueError, on all of them, if there are checkpoints and all are damaged.
    """
    newest, faults = ranks.broadcast_object(newest_intact(run_dir) if ranks.is_main else (-1, []))
    if faults and newest < 0:
        raise ValueError(f"every checkpoint of {run_dir} is damaged, the newest: {faults[0]}")
    return newest, faults


def set_aside(run_dir: Path, after: int) -> None:
    """Rename the checkpoints of steps later than `after`: these steps can be saved again."""
    for step in steps(run_dir):
        if step > after:
            folder = folder_of(run_dir, step)
            shutil.rmtree(damaged := folder.with_name(f"{folder.name}.damaged"), ignore_errors=True)
            os.rename(folder, damaged)


def newest_run(root: Path) -> Path:
    """Return the run at or below `root` with the latest checkpoint, or raise FileNotFoundError."""
    found = [path.parent for path in root.glob("**/checkpoints/step_*/state.json")]
    if not found:
        raise FileNotFoundError(
            f"no checkpoint of a run under {root}/ in {Path.cwd()}: train one with "
            f"`{script('train.py')}`, or name a run by its path from here"
        )
    return max(found, key=lambda folder: (folder.stat().st_mtime_ns, folder.name)).parents[1]


def save(
    run_dir: Path,
    step: int,
    model: nn.Module | Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint after `step` finished steps and return its folder.

    `model` may be what `parameters` returns of one, with full tensors. `state` is JSON and holds
    "val_loss", the validation loss at this step or None; format, version and step are added.
    Raises OSError if the disk is full or not writable, and then leaves nothing behind.
    """
    final = folder_of(run_dir, step)
    weights = parameters(model) if isinstance(model, nn.Module) else model
    record = {"format": FORMAT, "version": VERSION, "step": step, **state}
    try:
        with atomic_folder(final) as temporary:
            record["hashes"] = {
                name: _save_tensors(temporary / name, tensors)
                for name, tensors in ((MODEL, weights), (OPTIMIZER, optimizer))
            }
            if (run_dir / TOKENIZER_NAME).is_file():  # the model can't be used without it
                shutil.copyfile(run_dir / TOKENIZER_NAME, temporary / TOKENIZER_NAME)
            (temporary / "state.json").write_bytes(_state_bytes(record))
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write the checkpoint {final} ({error}): the one before it is unharmed; make "
            "room and run the same command again to resume from it"
        ) from error
    sync_folder(run_dir)
    return final


def prune(run_dir: Path, keep: int, keep_every: int = 0, kept: int | None = None) -> None:
    """Remove what killed writers left, and all checkpoints that are not to be kept.

    Kept are the `keep` newest, the best, that of step `kept`, and those of steps that `keep_every`,
    if not 0, divides.
    """
    for leftover in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    best = best_of(run_dir)
    for step in steps(run_dir)[:-keep]:
        folder = folder_of(run_dir, step)
        if folder != best and step != kept and not (keep_every and step % keep_every == 0):
            # Rename before deleting: a half-deleted folder must not look complete.
            hidden = folder.with_name(f".{folder.name}.tmp")
            os.rename(folder, hidden)
            shutil.rmtree(hidden)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the `state.json` of a checkpoint.

    Raises FileNotFoundError if there is none, ValueError if it is damaged, of another version, or
    of another step than its folder's name says.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no state.json")
    record = stored_json.read(path, FORMAT, {VERSION}, OTHER)
    stored_json.build(_State, record, path, remedy=OTHER)
    named = re.fullmatch(r"step_(\d{8})", folder.name)
    if named and int(named[1]) != record["step"]:
        raise ValueError(
            f"expected step {int(named[1])} in {path}, found {record['step']}: the folder was "
            "renamed; name it as it was"
        )
    return record


def note_val_loss(folder: Path, val_loss: float) -> None:
    """Add the validation loss to a checkpoint that was saved before its validation ran."""
    state = read_state(folder) | {"val_loss": val_loss}
    with atomic_file(folder / "state.json") as file:
        file.write(_state_bytes(state))
    sync_folder(folder)


def _state_bytes(record: Mapping[str, Any]) -> bytes:
    # json, not orjson, which writes the NaN loss of a diverged run as null: "not validated".
    return (json.dumps(stored_json.with_checksum(record), indent=1) + "\n").encode()


def locked(run_dir: Path) -> AbstractContextManager[object]:
    """Return the held lock of the run's folder; ValueError if another process trains there."""
    message = f"another process is training in {run_dir}: wait for it, or give another --log-dir"
    return lock(run_dir / ".lock", message)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return plain name -> parameter, tied ones once, however the model is wrapped."""
    return {_WRAPPERS.sub("", name): p.detach() for name, p in model.named_parameters()}


def load_model(
    folder: Path,
    model: nn.Module,
    shard: Callable[[Tensor, Tensor], Tensor] = lambda full, parameter: full,
) -> None:
    """Load the model's parameters from a checkpoint; ValueError if names or shapes do not match.

    `shard` takes from a full tensor the shard that a parameter holds.
    """
    path, own, stored = folder / MODEL, parameters(model), load_weights(folder)
    expected = {name: parameter.shape for name, parameter in own.items()}
    actual = {name: tensor.shape for name, tensor in stored.items()}
    check_shapes(expected, actual, f"{path} does not fit the model: tensor", OTHER)
    for name, tensor in stored.items():
        own[name].copy_(shard(tensor, own[name]))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the parameters of a checkpoint, on the CPU; ValueError if the file is damaged."""
    return _load_tensors(folder / MODEL)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """Return the optimizer's tensors, on the CPU; ValueError if the file is damaged."""
    return _load_tensors(folder / OPTIMIZER)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors and return their hash."""
    on_cpu = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_file(on_cpu, path)
    return _hash(on_cpu)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    hashes = read_state(path.parent).get("hashes", {})  # none in checkpoints of version 0.2
    if not path.is_file():  # to open a named pipe would hang
        raise ValueError(f"{path} is damaged (it is missing, or no file): {OTHER}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {OTHER}") from None
    if path.name in hashes and hashes[path.name] != (actual := _hash(tensors)):
        raise ValueError(
            f"{path} is damaged: expected the hash {hashes[path.name][:12]}, found {actual[:12]}; "
            f"{OTHER}"
        )
    return tensors


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, types, shapes and bytes; xxh3 reads as fast as memory is."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
