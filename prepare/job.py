"""The whole job: plan the work, start or resume it, run its units, write the manifest."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, TypeVar

from tqdm import tqdm

from prepare import finish
from prepare.dedup import collect_held_out, find_duplicates, validation_units
from prepare.forecast import check_disk_space, forecast
from prepare.options import Options
from prepare.plan import Plan, Unit, UnitResult, make_plan, unit_number
from prepare.ray import run_ray
from prepare.resume import repeated, start_or_resume
from prepare.split import GIVEN
from prepare.tasks import HashDocuments, RestoreShards, WriteShards, publish_meanwhile
from prepare.worker_pool import run_local
from prepare.workspace import (
    ARRAYS,
    HASHES,
    HELD_OUT,
    QUARANTINE,
    REFUSED,
    WORK,
    Folder,
    Workspace,
)
from shards.files import to_json
from shards.manifest import FILE_NAME, Manifest, Shard
from shards.tokenizer import Tokenizer, open_tokenizer
from shards.tokenizer import load as load_tokenizer

Result = TypeVar("Result")
# Calls a task on each unit and yields the results in any order.
Runner = Callable[[Callable[[Unit], Result], Sequence[Unit]], Iterator[Result]]


def run(options: Options) -> None:
    """Prepare the dataset `options.out`, or resume it. Raises ValueError or OSError."""
    options.check()
    workspace = Workspace(Folder(options.out))
    workspace.check_folder()
    base = _complete_dataset(workspace) if options.append else None
    # Fail fast without a vocabulary; forked workers share what this loads.
    tokenizer = open_tokenizer(base.tokenizer) if base else load_tokenizer()
    tokenizer.encode("")
    started = time.perf_counter()
    # Planned before anything is written, so that a mistyped source leaves no folder behind.
    new_plan = make_plan(options, base)
    if options.plan:
        print(forecast(new_plan, tokenizer, options.workers))
        return
    with workspace.locked(options.task):
        manifest = workspace.manifest()
        if manifest and (same := repeated(options, workspace, manifest, new_plan)):
            _restore(*same, manifest, workspace, options)
            if workspace.stored_plan(manifest.generation + 1) is None:  # no append is under way
                workspace.close()
            print(f"{options.out} is complete: nothing to do.")
            return
        if manifest and new_plan.generation != manifest.generation + 1:
            new_plan = make_plan(options, manifest)  # another append ended meanwhile
        if manifest:
            _check_shards(workspace, manifest)  # before hours of work, and again after them
        plan = start_or_resume(options, workspace, new_plan)
        if not options.finish:
            _run_units(plan, workspace, options)
        if not options.task:
            _finish(plan, workspace, tokenizer, options.max_bad, started)


def _restore(
    plan: Plan, touched: set[int], manifest: Manifest, workspace: Workspace, options: Options
) -> None:
    """Prepare anew what a finished generation lacks, and compare what came from touched files.

    Raises ValueError if a unit's tokens are no longer those of the manifest.
    """
    shards: dict[int, list[Shard]] = {}
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        if shard.generation == plan.generation:
            shards.setdefault(unit_number(shard), []).append(shard)
    faulty = workspace.faulty(chain.from_iterable(shards.values()))
    numbers = {number for number, parts in shards.items() if any(s.file in faulty for s in parts)}
    numbers |= {
        unit.number for unit in plan.units if any(part.file in touched for part in unit.slices)
    }
    units = [unit for unit in plan.units if unit.number in numbers]
    if len(units) < len(numbers):
        _check_shards(workspace, manifest)
    if units:
        print(
            f"Preparing {len(units)} of {len(plan.units)} units anew: {len(faulty)} shards are "
            f"missing or damaged, and {len(touched)} sources have another time."
        )
        runner = _runner(plan, workspace, options)
        workspace.remove(ARRAYS)  # those of an append that is under way are other ones
        _find_excluded(plan, workspace, plan.units, runner)
        task = RestoreShards(plan, workspace, shards, faulty, touched)
        for _ in tqdm(runner(task, units), total=len(units), desc="restore", unit="unit"):
            pass
        workspace.remove(ARRAYS)
    if touched:
        workspace.store_plan(plan)


def _check_shards(workspace: Workspace, manifest: Manifest) -> None:
    """Raise ValueError if a shard of a dataset is missing or damaged."""
    shards = (shard for split in manifest.splits.values() for shard in split.shards)
    if faulty := workspace.faulty(shards):
        raise ValueError(
            f"expected all shards in {workspace.folder}, found {len(faulty)} missing or damaged "
            f"({min(faulty)}, ...): restore them, or run the command that made them again"
        )


def _complete_dataset(workspace: Workspace) -> Manifest:
    """Return the complete dataset to append to. Raises ValueError if there is none."""
    manifest = workspace.manifest()
    if manifest is None:
        raise ValueError(
            f"expected a complete dataset in {workspace.folder} to append to, found none: "
            "run prepare without --append to its end first"
        )
    return manifest


def _run_units(plan: Plan, workspace: Workspace, options: Options) -> None:
    """Run the unfinished units, or those of one task, showing progress."""
    units = plan.units
    if options.task:
        number, tasks = map(int, options.task.split("/"))
        units = units[number - 1 :: tasks]
    finished = workspace.results(units)
    waiting = [unit for unit in units if unit.number not in finished]
    if finished:
        print(f"Resuming: {len(finished)} of {len(units)} units are finished.")
    check_disk_space(waiting, workspace)
    runner = _runner(plan, workspace, options)
    if waiting:
        _find_excluded(plan, workspace, units, runner)
    workspace.remove_staged(waiting)
    # On a cluster each node publishes its shards; uploads, too, are spread over the workers.
    by_workers = options.engine != "local" or workspace.folder.remote
    written = runner(WriteShards(plan, workspace, publish=by_workers), waiting)
    results = publish_meanwhile(written, workspace)
    judged = _judged(plan, workspace, list(finished.values()), results, options.max_bad)
    _show_progress(judged, units, waiting)


def _find_excluded(
    plan: Plan, workspace: Workspace, units: Sequence[Unit], runner: Runner[Any]
) -> None:
    """Store which documents to leave out, by --dedup or because they are validation text."""
    if plan.dedup:
        _hash_documents(plan, workspace, HASHES, units, runner)
        find_duplicates(workspace, units)
    elif plan.rule.rule == GIVEN and workspace.load_array(f"{HELD_OUT}/hashes") is None:
        held_out = list(validation_units(plan))
        _hash_documents(plan, workspace, HELD_OUT, held_out, runner)
        collect_held_out(plan, workspace, held_out)


def _judged(
    plan: Plan,
    workspace: Workspace,
    finished: Sequence[UnitResult],
    results: Iterable[UnitResult],
    max_bad: int | None,
) -> Iterator[UnitResult]:
    """Yield the results. Raises ValueError as soon as too much is bad, whatever is still to come.

    `finished` are the results of earlier runs.
    """
    weight = sum(unit.weight for unit in plan.units)
    bad = list(plan.bad)
    documents, lost = sum(one.documents for one in bad), sum(one.bytes for one in bad)
    seen: list[UnitResult] = []
    for result in chain(finished, results):
        seen.append(result)
        documents += sum(one.documents for one in result.bad)
        lost += sum(one.bytes for one in result.bad)
        if finish.is_hopeless(documents, lost, weight, max_bad):
            _check_bad(plan, workspace, seen, max_bad)
        if len(seen) > len(finished):
            yield result


def _check_bad(
    plan: Plan, workspace: Workspace, results: Sequence[UnitResult], max_bad: int | None
) -> list[finish.Entry]:
    """Write quarantine.jsonl and return the entries of this generation.

    Raises ValueError if too much of what was read for it is bad.
    """
    folder = workspace.folder
    earlier = finish.read_quarantine(folder.read(QUARANTINE) or b"", f"{folder}/{QUARANTINE}")
    earlier = [entry for entry in earlier if entry.generation < plan.generation]
    results = sorted(results, key=lambda result: result.unit)
    entries = finish.quarantine(plan, results)
    lines = [json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in earlier + entries]
    folder.write(QUARANTINE, "".join(lines).encode())
    documents = sum(one.documents for one in plan.bad) + sum(result.read for result in results)
    text = finish.text_bytes(results)
    try:
        finish.check_bad(entries, documents, text, max_bad)
    except ValueError:
        print(*finish.losses(entries, text), sep="\n")
        folder.write(REFUSED, b"")
        raise
    return entries


def _runner(plan: Plan, workspace: Workspace, options: Options) -> Runner[Any]:
    """Return the function that runs a task on units, here or on a Ray cluster."""
    if options.engine == "ray":
        return lambda task, units: run_ray(task, units, options.address)
    # An object store's client that was used before a fork may hang after it.
    remote = workspace.folder.remote or any(file.remote for file in plan.files)
    method = "spawn" if remote else None
    return lambda task, units: run_local(task, units, options.workers, method)


def _hash_documents(
    plan: Plan, workspace: Workspace, folder: str, units: Sequence[Unit], runner: Runner[None]
) -> None:
    """Hash the documents of the units that are not hashed yet, showing progress."""
    hashed = set(workspace.folder.names(f"{WORK}/{folder}"))
    waiting = [unit for unit in units if f"{unit.name}.npy" not in hashed]
    task = HashDocuments(plan, workspace, folder)
    for _ in tqdm(runner(task, waiting), total=len(waiting), desc="hash", unit="unit"):
        pass


def _show_progress(
    results: Iterator[UnitResult], units: Sequence[Unit], waiting: Sequence[Unit]
) -> None:
    """Iterate over the results of the waiting units, showing text, tokens/s and time left."""
    weights = {unit.number: unit.weight for unit in units}
    total, tokens = sum(weights.values()), 0
    finished = total - sum(unit.weight for unit in waiting)
    with tqdm(
        total=total, initial=finished, desc="prepare", unit="B", unit_scale=True, mininterval=0.5
    ) as bar:
        for result in results:
            tokens += sum(shard.tokens for shard in result.all_shards())
            seconds = bar.format_dict["elapsed"] or 1
            bar.set_postfix_str(f"{tokens / seconds / 1e6:.1f}M tokens/s", refresh=False)
            bar.update(weights[result.unit])


def _finish(
    plan: Plan, workspace: Workspace, tokenizer: Tokenizer, max_bad: int | None, started: float
) -> None:
    """Write quarantine.jsonl, then the manifest, which completes the dataset.

    Raises ValueError if units are missing, too many documents are bad or a split is empty.
    """
    folder, finished = workspace.folder, workspace.results(plan.units)
    missing = [unit.number for unit in plan.units if unit.number not in finished]
    if missing:
        raise ValueError(
            f"expected {len(plan.units)} finished units in {folder}, found {len(missing)} missing "
            f"or damaged (unit {missing[0]}, ...): run the tasks that have not ended"
        )
    results = [finished[unit.number] for unit in plan.units]
    base = workspace.manifest() if plan.generation else None
    manifest = finish.build_manifest(plan, results, tokenizer, base)
    if base:
        _check_shards(workspace, base)
    entries = _check_bad(plan, workspace, results, max_bad)
    try:
        finish.check_splits(manifest)
    except ValueError:
        workspace.abandon(plan)  # every remedy changes the plan
        raise
    text = finish.summary(manifest, results, entries, time.perf_counter() - started)
    workspace.log(*(warning for result in results for warning in result.warnings), text)
    folder.write(FILE_NAME, to_json(manifest.to_json()))
    workspace.close()
    print(text)
    print(f"The dataset is in {folder}: python -m shards info {folder}")
