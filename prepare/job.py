"""The whole job: plan the work, start or resume it, run its units, write the manifest."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

from tqdm import tqdm

from prepare import finish
from prepare.dedup import collect_held_out, find_duplicates, validation_units
from prepare.forecast import check_disk_space, forecast
from prepare.options import Options
from prepare.plan import Plan, Unit, UnitResult, make_plan
from prepare.ray import run_ray
from prepare.split import GIVEN
from prepare.tasks import HashDocuments, WriteShards, publish_meanwhile
from prepare.worker_pool import run_local
from prepare.workspace import HASHES, HELD_OUT, QUARANTINE, WORK, Folder, Workspace
from shards.files import to_json
from shards.manifest import FILE_NAME, Manifest
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
        plan = start_or_resume(options, workspace, new_plan)
        if plan is None:
            print(f"{options.out} is complete: nothing to do.")
            return
        if not options.finish:
            _run_units(plan, workspace, options)
        if not options.task:
            _finish(plan, workspace, tokenizer, options.max_bad, started)


def start_or_resume(options: Options, workspace: Workspace, plan: Plan) -> Plan | None:
    """Return the plan to run, stored in the workspace, or None if its dataset is complete.

    Raises ValueError if the folder holds another dataset, or if a source has changed since.
    """
    manifest, stored = workspace.manifest(), workspace.stored_plan()
    if options.append:
        return _start_or_resume_append(options, workspace, plan, stored)
    if stored is not None and stored.generation == 0:
        _check_same_plan(workspace, stored, plan)
    elif manifest is not None:  # it has grown, or was copied here without its plan
        _check_same_sources(workspace, manifest.prefix(0), plan)
    else:
        workspace.store_plan(plan)
    if manifest is None:
        return plan
    if stored is None or stored.generation <= manifest.generation:  # no append is under way
        workspace.close()
    return None


def _start_or_resume_append(
    options: Options, workspace: Workspace, plan: Plan, stored: Plan | None
) -> Plan | None:
    """Start or resume an append; None if it repeats the last one, which is complete."""
    manifest = _complete_dataset(workspace)
    generation = stored.generation if stored else 0
    is_finished = 0 < generation == manifest.generation
    if is_finished and make_plan(options, manifest.prefix(generation - 1)) == stored:
        workspace.close()
        return None
    if plan.generation != manifest.generation + 1:  # another append ended since it was made
        plan = make_plan(options, manifest)
    if stored is not None and generation > manifest.generation:
        _check_same_plan(workspace, stored, plan)
    else:
        workspace.close()  # if the last append was killed right after its manifest
        workspace.store_plan(plan)
    return plan


def _complete_dataset(workspace: Workspace) -> Manifest:
    """Return the complete dataset to append to. Raises ValueError if there is none."""
    manifest = workspace.manifest()
    if manifest is None:
        raise ValueError(
            f"expected a complete dataset in {workspace.folder} to append to, found none: "
            "run prepare without --append to its end first"
        )
    return manifest


def _check_same_plan(workspace: Workspace, stored: Plan, plan: Plan) -> None:
    """Raise ValueError, naming what differs, unless the two plans are the same."""
    if stored == plan:
        return
    files = {file.path: file for file in plan.files}
    same_paths = [file.path for file in stored.files] == list(files)
    for file in stored.files:
        if files.get(file.path) != file and (same_paths or file.path not in files):
            actual = "changed" if file.path in files else "gone, or not among those given"
            raise ValueError(
                f"expected the source {file.name} as it was when {workspace.folder} was started, "
                f"found that file {actual}: restore it, or give another --out"
            )
    names = [field.name for field in fields(Plan) if field.name != "units"]
    differing = [name for name in names if getattr(stored, name) != getattr(plan, name)]
    raise ValueError(
        f"expected the sources and options with which {workspace.folder} was started, found other "
        f"{' and '.join(differing) or 'units'}: repeat them, or give another --out"
    )


def _check_same_sources(workspace: Workspace, manifest: Manifest, plan: Plan) -> None:
    """Raise ValueError unless a finished dataset was made from the sources of the plan."""
    stored = [(source.name, source.bytes) for source in manifest.sources]
    planned = [(file.name, file.size) for file in plan.files]
    if (stored, manifest.split_rule) != (planned, asdict(plan.rule)):
        raise ValueError(
            f"expected a new folder, found another dataset in {workspace.folder} ({len(stored)} "
            f"sources, split {manifest.split_rule}): give another --out, or --append to add to it"
        )


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
    if waiting and plan.dedup:
        _hash_documents(plan, workspace, HASHES, units, runner)
        find_duplicates(workspace, units)
    elif waiting and plan.rule.rule == GIVEN and workspace.load_array(f"{HELD_OUT}/hashes") is None:
        held_out = list(validation_units(plan))
        _hash_documents(plan, workspace, HELD_OUT, held_out, runner)
        collect_held_out(plan, workspace, held_out)
    workspace.remove_staged(waiting)
    # On a cluster each node publishes its shards; uploads, too, are spread over the workers.
    by_workers = options.engine != "local" or workspace.folder.remote
    written = runner(WriteShards(plan, workspace, publish=by_workers), waiting)
    _show_progress(publish_meanwhile(written, workspace), units, waiting)


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
            f"(unit {missing[0]}, ...): run the tasks that have not ended"
        )
    results = [finished[unit.number] for unit in plan.units]
    base = workspace.manifest() if plan.generation else None
    manifest = finish.build_manifest(plan, results, tokenizer, base)
    earlier = (folder.read(QUARANTINE) or b"").splitlines()
    entries = finish.quarantine(plan, results, [json.loads(line) for line in earlier])
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    folder.write(QUARANTINE, "".join(lines).encode())
    finish.check_bad(manifest, entries, max_bad)
    try:
        finish.check_splits(manifest)
    except ValueError:
        workspace.abandon(results)  # every remedy changes the plan
        raise
    text = finish.summary(manifest, results, time.perf_counter() - started)
    workspace.log(*(warning for result in results for warning in result.warnings), text)
    folder.write(FILE_NAME, to_json(manifest.to_json()))
    workspace.close()
    print(text)
    print(f"The dataset is in {folder}: python -m shards info {folder}")
