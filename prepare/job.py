"""The whole job: plan the work, start or resume it, run its units, write the manifest."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from tqdm import tqdm

from prepare import finish
from prepare.dedup import collect_held_out, find_duplicates, validation_units
from prepare.forecast import check_disk_space, forecast
from prepare.options import Options
from prepare.plan import Plan, Unit, UnitResult, make_plan, requested_tokenizer, unit_number
from prepare.quarantine import BadLimit
from prepare.resume import finished_plan, start_or_resume, takes_all_text
from prepare.split import VAL_SOURCE
from prepare.unit_functions import (
    HashDocuments,
    RestoreShards,
    SampleText,
    WriteShards,
    publish_in_background,
)
from prepare.worker_pool import run_local, run_ray
from prepare.workspace import (
    ARRAYS,
    HASHES,
    HELD_OUT,
    HELD_OUT_HASHES,
    WORK,
    Folder,
    Workspace,
)
from shards.cli import counted
from shards.manifest import MANIFEST_NAME, Manifest
from shards.tokenizer import GPT2, Tokenizer
from shards.vocabulary import TOKENIZER_NAME

Result = TypeVar("Result")


def run(options: Options) -> None:
    """Prepare the dataset `options.out`, or resume it. Raises ValueError or OSError."""
    options.check()
    workspace = Workspace(Folder(options.out))
    workspace.check_folder()
    base = _require_manifest(workspace) if options.append else None
    started = time.perf_counter()
    # Plan before anything is written, so that a mistyped source leaves no folder behind.
    all_text = takes_all_text(workspace)
    plan = make_plan(options, base, all_text)
    if options.plan:
        print(forecast(plan, requested_tokenizer(options, base), options.workers))
        return
    with workspace.locked(options.task):
        manifest = workspace.manifest()
        if manifest and (finished := finished_plan(options, workspace, manifest, plan)):
            plan, touched = finished
            Job(options, workspace, plan, manifest).restore(manifest, touched)
            if workspace.stored_plan(manifest.generation + 1) is None:  # no append is in progress
                workspace.remove_intermediates()
            print(f"{options.out} is complete: nothing to do.")
            return
        if manifest and plan.generation != manifest.generation + 1:
            plan = make_plan(options, manifest, all_text)  # another append has ended since
        if manifest:
            _check_shards(workspace, manifest)  # before hours of work, and again after them
        with workspace.plan_locked():
            plan = start_or_resume(options, workspace, plan)
        job = Job(options, workspace, plan, manifest)
        if not options.finish:
            job.run_units()
        if not options.task:
            job.write_manifest(started)


def _require_manifest(workspace: Workspace) -> Manifest:
    """Return the complete dataset to append to. Raises ValueError if there is none."""
    manifest = workspace.manifest()
    if manifest is None:
        raise ValueError(
            f"expected a complete dataset in {workspace.folder} to append to, found none: "
            "run prepare without --append to its end first"
        )
    return manifest


def _check_shards(workspace: Workspace, manifest: Manifest) -> None:
    """Raise ValueError if a shard of a dataset is missing or damaged."""
    if faulty := workspace.faulty(manifest.shards):
        raise ValueError(
            f"expected all shards in {workspace.folder}, found {len(faulty)} missing or damaged "
            f"({min(faulty)}, ...): restore them, or run the command that made them again"
        )


@dataclass(frozen=True)
class Job:
    """A plan that is carried out in a workspace."""

    options: Options
    workspace: Workspace
    plan: Plan
    manifest: Manifest | None  # the complete dataset in the folder, if there is one

    @property
    def bad_limit(self) -> BadLimit:
        """How much of the text may be bad."""
        return BadLimit(self.options.max_bad, sum(unit.weight for unit in self.plan.units))

    def restore(self, manifest: Manifest, touched: set[int]) -> None:
        """Prepare again what the finished plan lacks, and compare what came from touched files.

        Raises ValueError if a unit's tokens are no longer those of the manifest.
        """
        plan, workspace = self.plan, self.workspace
        stored = [shard for shard in manifest.shards if shard.generation == plan.generation]
        faulty = workspace.faulty(stored)
        incomplete = {unit_number(shard) for shard in stored if shard.file in faulty}
        units = [
            unit
            for unit in plan.units
            if unit.number in incomplete or touched & {part.file for part in unit.slices}
        ]
        if not incomplete <= {unit.number for unit in units}:
            _check_shards(workspace, manifest)
        self.provide_tokenizer()
        if units:
            print(
                f"Preparing {len(units)} of {counted(len(plan.units), 'unit')} again: missing or "
                f"damaged {counted(len(faulty), 'shard')}, another time on "
                f"{counted(len(touched), 'source')}."
            )
            workspace.remove(ARRAYS)  # those of an append in progress are other ones
            self._find_exclusions(plan.units)
            function = RestoreShards(plan, workspace, stored, faulty, touched)
            for _ in tqdm(self._run(function, units), "restore", len(units), unit="unit"):
                pass
            workspace.remove(ARRAYS)
        if touched:
            workspace.store_plan(plan)

    def run_units(self) -> None:
        """Run the unfinished units, or those of one task, showing progress."""
        workspace, units = self.workspace, self.plan.units
        if self.options.task:
            number, tasks = map(int, self.options.task.split("/"))
            units = units[number - 1 :: tasks]
        finished = workspace.results(units)
        pending = [unit for unit in units if unit.number not in finished]
        if finished:
            print(f"Resuming: {len(finished)} of {counted(len(units), 'unit')} finished.")
        check_disk_space(pending, workspace)
        limit = self.bad_limit
        if pending:
            self._find_exclusions(units, limit)
            self.provide_tokenizer().encode("")  # forked workers inherit what that loads
        # On a cluster each node publishes its shards; uploads, too, are spread over the workers.
        workers_publish = self.options.engine != "local" or workspace.folder.remote
        write = WriteShards(self.plan, workspace, workers_publish, limit)
        written = self._run(write, pending)
        new = publish_in_background(written, workspace)
        every = chain(finished.values(), new)
        results = finish.stop_early(every, self.plan, workspace.folder, limit)
        _show_progress(islice(results, len(finished), None), units, pending)

    def provide_tokenizer(self) -> Tokenizer:
        """Return the plan's tokenizer; train it and write its file if the folder lacks it."""
        plan, workspace = self.plan, self.workspace
        if plan.vocabulary != GPT2 and not workspace.folder.exists(TOKENIZER_NAME):
            tokenizer = requested_tokenizer(self.options) or self._train_vocabulary()
            workspace.store_tokenizer(tokenizer, self.manifest)
        return workspace.tokenizer(plan)

    def _train_vocabulary(self) -> Tokenizer:
        from prepare import vocabulary  # and with it the package tokenizers

        self._find_exclusions(self.plan.units)
        units = self.plan.units
        limit = vocabulary.sample_limit(sum(unit.weight for unit in units))
        found = self._run(SampleText(self.plan, self.workspace, limit), units)
        return vocabulary.train_tokenizer(found, len(units), limit, self.options.vocab_size)

    def _run(self, function: Callable[[Unit], Result], units: Sequence[Unit]) -> Iterator[Result]:
        """Call a function on each unit, here or on a Ray cluster; yield results in any order."""
        if self.options.engine == "ray":
            return run_ray(function, units, self.options.address)
        # An object store's client that was used before a fork may hang after it.
        remote = self.workspace.folder.remote or any(file.remote for file in self.plan.files)
        return run_local(function, units, self.options.workers, "spawn" if remote else None)

    def _find_exclusions(self, units: Sequence[Unit], limit: BadLimit | None = None) -> None:
        """Store which documents of the units to leave out. Raises ValueError beyond the limit."""
        plan, workspace = self.plan, self.workspace
        if plan.dedup:
            # All but the first of equal documents. Validation text is planned first, so it stays.
            self._hash_documents(HASHES, units, limit)
            find_duplicates(workspace, units)
        elif plan.rule.rule == VAL_SOURCE and workspace.load_array(HELD_OUT_HASHES) is None:
            # Training text that is also validation text, of this generation or an earlier one.
            held_out = list(validation_units(plan))
            self._hash_documents(HELD_OUT, held_out, limit)
            collect_held_out(plan, self.manifest, workspace, held_out)
        # Otherwise none: an earlier run has stored them, or the split is by content (or position),
        # where equal documents come into the same split.

    def _hash_documents(self, folder: str, units: Sequence[Unit], limit: BadLimit | None) -> None:
        """Hash the documents of the units that are not hashed yet, showing progress."""
        hashed = self.workspace.folder.listing(f"{WORK}/{folder}")
        pending = [unit for unit in units if f"{unit.name}.npy" not in hashed]
        results = self._run(HashDocuments(self.plan, self.workspace, folder, limit), pending)
        if limit:
            results = finish.stop_early(results, self.plan, self.workspace.folder, limit)
        for _ in tqdm(results, "hash", len(pending), unit="unit"):
            pass

    def write_manifest(self, started: float) -> None:
        """Write quarantine.jsonl, then the manifest, which completes the dataset.

        Raises ValueError if units are missing, too many documents are bad or a split is empty.
        """
        plan, workspace = self.plan, self.workspace
        folder, finished = workspace.folder, workspace.results(plan.units)
        missing = [unit.number for unit in plan.units if unit.number not in finished]
        if missing:
            raise ValueError(
                f"expected {len(plan.units)} finished units in {folder}, found {len(missing)} "
                f"missing or damaged (unit {missing[0]}, ...): run the tasks that have not ended"
            )
        if self.manifest:
            _check_shards(workspace, self.manifest)
        results = [plan.inspection(), *(finished[unit.number] for unit in plan.units)]
        manifest = finish.build_manifest(plan, results, self.provide_tokenizer(), self.manifest)
        entries = finish.store_quarantine(results, plan, folder, self.bad_limit)
        try:
            finish.check_splits(manifest, entries)
        except ValueError:
            workspace.discard_plan(plan)  # every remedy changes the plan
            raise
        text = finish.summary(plan, manifest, results, entries, time.perf_counter() - started)
        workspace.log(*(warning for result in results for warning in result.warnings), text)
        folder.write_json(MANIFEST_NAME, manifest.to_dict())
        workspace.remove_intermediates()
        print(text)
        print(f"The dataset is in {folder}: python -m shards info {shlex.quote(str(folder))}")


def _show_progress(
    results: Iterator[UnitResult], units: Sequence[Unit], pending: Sequence[Unit]
) -> None:
    """Iterate over the results of the pending units, showing text, tokens/s and time left."""
    weights = {unit.number: unit.weight for unit in units}
    total, tokens = sum(weights.values()), 0
    finished = total - sum(unit.weight for unit in pending)
    with tqdm(
        total=total, initial=finished, desc="prepare", unit="B", unit_scale=True, mininterval=0.5
    ) as bar:
        for result in results:
            tokens += sum(shard.tokens for shard in result.all_shards())
            seconds = bar.format_dict["elapsed"] or 1
            bar.set_postfix_str(f"{tokens / seconds / 1e6:.1f}M tokens/s", refresh=False)
            bar.update(weights[result.unit])
