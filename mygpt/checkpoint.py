"""Checkpoints: folders that hold all of a run at a step boundary, and appear whole or not at all.

    RUN/checkpoints/step_00001000/    after 1,000 finished steps:
        model.safetensors             every parameter once, under its plain name
        optimizer.safetensors         the optimizer's tensors, flat
        state.json                    step, position in the data, settings, fingerprint, ...

Written to a temporary folder, fsynced, renamed: a folder named `step_N` is complete (promise 6).
Nothing in it is code: safetensors and JSON (promise 8). Version 1, whose state.json had the
`generation` of one dataset, is read as well.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shards import stored_json

FORMAT, VERSION = "mygpt-checkpoint", 2
# What wrappers put before the names of parameters: torch.compile, DDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_checkpoint_wrapped_module)\.")


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, in order."""
    folders = (run / "checkpoints").glob("step_" + "[0-9]" * 8)
    return sorted(int(folder.name.removeprefix("step_")) for folder in folders)


def find(target: Path, best: bool = False) -> Path:
    """Return the checkpoint `target`, or the newest one of the run `target`.

    With `best`, the checkpoint of the run that has the lowest validation loss. Raises
    FileNotFoundError if there is none.
    """
    if (target / "state.json").is_file():
        return target
    if best:
        found = best_of(target)
    else:
        found = folder_of(target, steps(target)[-1]) if steps(target) else None
    if found:
        return found
    if not target.is_dir():
        raise FileNotFoundError(f"expected a run in {target}, found no such folder: name another")
    kind = "a validated checkpoint" if best else "a checkpoint"
    raise FileNotFoundError(
        f"expected a run with {kind} in {target}, found none: let train.py reach its first one"
    )


def best_of(run: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, the newer of equals; None without any."""
    losses = {}
    for step in reversed(steps(run)):
        loss = read_state(folder_of(run, step))["val_loss"]
        if loss is not None and math.isfinite(loss):
            losses[step] = loss
    return folder_of(run, min(losses, key=losses.__getitem__)) if losses else None


def newest_run(root: Path) -> Path:
    """The run at or below `root` with the latest checkpoint; FileNotFoundError without any."""
    found = [path.parent for path in root.glob("**/checkpoints/step_*/state.json")]
    if not found:
        raise FileNotFoundError(
            f"no checkpoint of a run under {root}/: train one with `python train.py`, or name a run"
        )
    return max(found, key=lambda folder: (folder.stat().st_mtime_ns, folder.name)).parents[1]


def save(
    run: Path,
    step: int,
    model: nn.Module | Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of `step` finished steps and return its folder.

    `model` may be what `parameters` returns of it, with whole tensors where they were cut.
    `state` is JSON and holds the `val_loss` measured at this step, or None; step, format and
    version are added to it. Raises OSError where the disk is full or not writable; what was there
    before is then unharmed, and nothing of this one is left.
    """
    final = folder_of(run, step)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weights = parameters(model) if isinstance(model, nn.Module) else model
        _save_tensors(temporary / "model.safetensors", weights)
        _save_tensors(temporary / "optimizer.safetensors", optimizer)
        record = {"format": FORMAT, "version": VERSION, "step": step, **state}
        (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"cannot write the checkpoint {final} ({error}): the one before it is unharmed; make "
            "room, and the same command goes on from there"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(final.parent)
    _sync(run)
    return final


def prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Remove what killed writes left, and all checkpoints that are not to be kept.

    Kept are the `keep` newest, the best, and those of steps that `keep_every`, if not 0, divides.
    """
    for leftover in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    best = best_of(run)
    for step in steps(run)[:-keep]:
        folder = folder_of(run, step)
        if folder != best and not (keep_every and step % keep_every == 0):
            # Renamed first: a folder half deleted must not look complete.
            doomed = folder.with_name(f".{folder.name}.tmp")
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint, as version 2 has it.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or of another version.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no state.json")
    return {"spikes": None} | stored_json.read(path, FORMAT, {VERSION}, "use another checkpoint")


def note_val_loss(folder: Path, val_loss: float) -> None:
    """Add to a checkpoint the loss of a validation that was cut off before it was written."""
    path, temporary = folder / "state.json", folder / ".state.json.tmp"
    state = json.loads(path.read_text("utf-8")) | {"val_loss": val_loss}
    temporary.write_text(json.dumps(state, indent=1) + "\n", "utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(folder)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run's folder, made if need be; ValueError if another process trains there now."""
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is training in {run}: wait for it, or take another --log-dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Plain name → parameter, tied ones once, however DDP or torch.compile wrapped the model."""
    return {plain(name): parameter.detach() for name, parameter in model.named_parameters()}


def plain(name: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    return _WRAPPERS.sub("", name)


def load_model(
    folder: Path,
    model: nn.Module,
    share: Callable[[Tensor, Tensor], Tensor] = lambda whole, own: whole,
) -> None:
    """Fill the model's parameters from a checkpoint; ValueError if names or shapes do not match.

    `share` takes from a whole tensor what a parameter holds of it, where parameters are cut.
    """
    path, own = folder / "model.safetensors", parameters(model)
    stored = load_weights(folder)
    if different := sorted(stored.keys() ^ own.keys()):
        raise ValueError(f"{path} does not fit the model: {different[0]} is only in one of them")
    for name, tensor in stored.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{path} does not fit the model: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(own[name].shape)}"
            )
        own[name].copy_(share(tensor, own[name]))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint, on the CPU; ValueError if its file is damaged."""
    stored = _load_tensors(folder / "model.safetensors")
    return {plain(name): tensor for name, tensor in stored.items()}


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """The optimizer's tensors of a checkpoint, on the CPU; ValueError if the file is damaged."""
    return _load_tensors(folder / "optimizer.safetensors")


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove its folder, or restore it") from None


def _sync(path: Path) -> None:
    """Force a file or folder to disk; where folders can't be opened, renames need no help."""
    if os.name == "nt" and path.is_dir():
        return
    # Windows can flush only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
