"""A prepare from options to summary: agree on the plan, run its units, write the manifest."""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from prepare import finish
from prepare.dedup import HASHES, OF_UNITS, find_duplicates, note_held_out, validation_units
from prepare.forecast import check_room, forecast
from prepare.options import Options
from prepare.plan import Plan, Unit, make_plan
from prepare.request import Request
from prepare.split import GIVEN
from prepare.tasks import HELD_OUT, HashDocuments, WriteShards, publish_meanwhile
from prepare.unit import Record
from prepare.worker_pool import run_local
from prepare.workspace import QUARANTINE, WORK, Folder, Workspace
from shards import tokenizer
from shards.manifest import FILE_NAME, Manifest

# --- Which plan this run follows: a new one, the one that was begun, or none because all is done.


def agree(request: Request, workspace: Workspace, plan: Plan) -> tuple[Plan, bool]:
    """The plan to follow and whether it is finished already; a new plan is recorded.

    `plan` is what the request comes to now. Raises ValueError where the folder was begun with other
    sources or options, or a source has changed since.
    """
    manifest, stored = workspace.manifest(), workspace.stored_plan()
    if request.append:
        return _agree_to_append(request, workspace, plan, stored)
    if stored is not None and stored["generation"] == 0:
        _compare(workspace, stored, plan.record())
    elif manifest is not None:
        _compare_with_manifest(workspace, manifest, plan)
    else:
        workspace.begin(plan)
    return plan, manifest is not None


def plan_now(request: Request, workspace: Workspace) -> Plan:
    """The plan that the request comes to now. Raises ValueError or OSError for bad input.

    Made before anything is written, so that a mistyped source leaves no folder behind.
    """
    return make_plan(request, _grown_from(workspace) if request.append else None)


def _grown_from(workspace: Workspace) -> Manifest:
    """The complete dataset that an append adds to. Raises ValueError where there is none."""
    manifest = workspace.manifest()
    if manifest is None:
        raise ValueError(
            f"expected a complete dataset in {workspace.folder} to append to, found none: "
            "run prepare without --append to its end first"
        )
    return manifest


def _agree_to_append(
    request: Request, workspace: Workspace, plan: Plan, stored: dict[str, Any] | None
) -> tuple[Plan, bool]:
    """The same for --append: the last append again, or one that goes on from what there is."""
    manifest = _grown_from(workspace)
    begun = stored["generation"] if stored else 0
    if begun == manifest.generation and begun > 0:
        last = make_plan(request, manifest.prefix(begun - 1))
        if last.record() == stored:
            return last, True
    if plan.generation != manifest.generation + 1:  # it grew since the plan was made
        plan = make_plan(request, manifest)
    if stored is not None and begun > manifest.generation:
        _compare(workspace, stored, plan.record())
    else:
        workspace.close()  # of the generation before, were it killed at its very end
        workspace.begin(plan)
    return plan, False


def _compare(workspace: Workspace, begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless the two plans are the same."""
    if begun == now:
        return
    files = {file["path"]: file for file in now["files"]}
    same_paths = [file["path"] for file in begun["files"]] == list(files)
    for file in begun["files"]:
        if files.get(file["path"]) != file and (same_paths or file["path"] not in files):
            found = "changed" if file["path"] in files else "gone, or not among those given"
            raise ValueError(
                f"expected the source {file['name']} as it was when {workspace.folder} was begun, "
                f"found it {found}: restore it, or give another --out"
            )
    differing = sorted(key for key in begun if begun[key] != now[key] and key != "units")
    raise ValueError(
        f"expected the sources and options with which {workspace.folder} was begun, found other "
        f"{' and '.join(differing) or 'units'}: repeat them, or give another --out"
    )


def _compare_with_manifest(workspace: Workspace, manifest: Manifest, plan: Plan) -> None:
    """The same for a finished dataset that has grown, or came here without its plan."""
    first = manifest.prefix(0)
    begun = [(source.name, source.bytes) for source in first.sources]
    now = [(file.name, file.size) for file in plan.files]
    if (begun, first.split_rule) != (now, plan.rule.record()):
        raise ValueError(
            f"expected a new folder, found another dataset in {workspace.folder} ({len(begun)} "
            f"sources, split {first.split_rule}): give another --out, or --append to add to it"
        )


Result = TypeVar("Result")
Engine = Callable[[Callable[[Unit], Result], Sequence[Unit]], Iterator[Result]]


def run(options: Options) -> None:
    """Make, or go on making, the dataset `options.out`. Raises ValueError or OSError."""
    request = Request(
        sources=options.sources,
        val_sources=options.val_source,
        split=options.split,
        val_fraction=options.val_fraction,
        text_column=options.text_column,
        dedup=options.dedup,
        append=options.append,
    )
    task = _task(options)
    workspace = Workspace(Folder(options.out))
    workspace.refuse_strangers()
    if options.plan:
        base = workspace.manifest() if options.append else None
        print(forecast(make_plan(request, base), tokenizer.load(), options.workers))
        return
    tokenizer.load().encode("")  # says now if there is no vocabulary; forked workers share it all
    started = time.perf_counter()
    planned = plan_now(request, workspace)
    with workspace.locked(f"-{task[0]}-of-{task[1]}" if task else ""):
        plan, done = agree(request, workspace, planned)
        if done:
            if not workspace.is_growing():
                workspace.close()
            print(f"{options.out} is complete: nothing to do.")
            return
        if not options.finish:
            _run_units(plan, workspace, options, task)
        if not task:
            _finish(plan, workspace, options.max_bad, started)


def _task(options: Options) -> tuple[int, int] | None:
    """(i, n) of --task i/n, i counted from 1. Raises ValueError for what can't be."""
    if options.workers < 1:
        raise ValueError(f"expected --workers of at least 1, found {options.workers}")
    if options.max_bad is not None and options.max_bad < 0:
        raise ValueError(f"expected --max-bad of at least 0, found {options.max_bad}")
    several = options.task or options.finish or options.engine != "local"
    if options.dedup and several:
        raise ValueError(
            "expected --dedup on one machine, found --task, --finish or --engine ray: which of two "
            "duplicates comes first is known only where all hashes are; leave one of them out"
        )
    if options.task is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", options.task)
    if found is None or int(found[1]) > int(found[2]) or options.finish:
        raise ValueError(
            f"expected --task i/n with i from 1 to n, and --finish in a run of its own, found "
            f"--task {options.task}: --task 1/8 is the first of eight"
        )
    return int(found[1]), int(found[2])


def _run_units(
    plan: Plan, workspace: Workspace, options: Options, task: tuple[int, int] | None
) -> None:
    """Run the units, or one task's, that are not finished yet, showing progress."""
    units = plan.units[task[0] - 1 :: task[1]] if task else plan.units
    finished = workspace.records(units)
    waiting = [unit for unit in units if unit.number not in finished]
    if finished:
        print(f"Resuming: {len(finished)} of {len(units)} units are finished.")
    check_room(waiting, workspace)
    engine = _engine(plan, workspace, options)
    if waiting and plan.dedup:
        _hash(units, engine, HashDocuments(plan, workspace, HASHES))
        find_duplicates(workspace, units)
    elif waiting and plan.rule.rule == GIVEN and not workspace.holds(HELD_OUT):
        held_out = list(validation_units(plan))
        _hash(held_out, engine, HashDocuments(plan, workspace, OF_UNITS))
        note_held_out(plan, workspace, held_out)
    workspace.remove_staged(waiting)
    # Other machines publish what they write, and an upload needs the worker's core as well.
    by_workers = options.engine != "local" or workspace.folder.remote
    written = engine(WriteShards(plan, workspace, by_workers), waiting)
    _show(publish_meanwhile(written, workspace), units, waiting)


def _hash(units: Sequence[Unit], engine: Engine[int], work: HashDocuments) -> None:
    """Hash the documents of the units for which that was not done yet, showing progress."""
    there = set(work.workspace.folder.names(f"{WORK}/{work.folder}"))
    left = [unit for unit in units if f"{unit.number:05d}.npy" not in there]
    for _ in tqdm(engine(work, left), total=len(left), desc="hash", unit="unit"):
        pass


def _show(records: Iterator[Record], units: Sequence[Unit], waiting: Sequence[Unit]) -> None:
    """Follow the units with a progress bar: text per second, tokens per second, time to go."""
    weights = {unit.number: unit.weight for unit in units}
    total, tokens = sum(weights.values()), 0
    before = total - sum(unit.weight for unit in waiting)
    with tqdm(
        total=total, initial=before, desc="prepare", unit="B", unit_scale=True, mininterval=0.5
    ) as bar:
        for record in records:
            tokens += record.tokens
            seconds = bar.format_dict["elapsed"] or 1
            bar.set_postfix_str(f"{tokens / seconds / 1e6:.1f}M tokens/s", refresh=False)
            bar.update(weights[record.unit])


def _engine(plan: Plan, workspace: Workspace, options: Options) -> Engine[Any]:
    """How units are run."""
    if options.engine == "ray":
        from prepare.ray import run_ray

        return lambda work, units: run_ray(work, units, options.address)
    # A client of an object store that was used before a fork may hang after it.
    remote = workspace.folder.remote or any(file.remote for file in plan.files)
    method = "spawn" if remote else None
    return lambda work, units: run_local(work, units, options.workers, method)


def _finish(plan: Plan, workspace: Workspace, max_bad: int | None, started: float) -> None:
    """Write quarantine.jsonl and, last of all, the manifest. Raises ValueError if it can't be."""
    done = workspace.records(plan.units)
    missing = [unit.number for unit in plan.units if unit.number not in done]
    if missing:
        raise ValueError(
            f"expected {len(plan.units)} finished units in {workspace.folder}, found "
            f"{len(missing)} missing (unit {missing[0]}, ...): run the tasks that have not ended"
        )
    records = [done[unit.number] for unit in plan.units]
    base = workspace.manifest() if plan.generation else None
    manifest = finish.build_manifest(plan, records, tokenizer.load(), base)
    before = (workspace.folder.read(QUARANTINE) or b"").splitlines()
    entries = finish.quarantine(plan, records, [json.loads(line) for line in before])
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    workspace.folder.write(QUARANTINE, "".join(lines).encode())
    finish.check_bad(manifest, entries, max_bad)
    try:
        finish.check_splits(manifest)
    except ValueError:
        workspace.abandon(records)  # every remedy makes another plan
        raise
    text = finish.summary(manifest, records, time.perf_counter() - started)
    workspace.log(*(warning for record in records for warning in record.warnings), text)
    workspace.folder.write_json(FILE_NAME, manifest.to_json())
    workspace.close()
    print(text)
    print(f"The dataset is in {workspace.folder}: python -m shards info {workspace.folder}")
