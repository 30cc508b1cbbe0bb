"""A command compared with what its folder holds: an unfinished plan, or finished generations.

Each generation of a dataset keeps the plan that made it, so that a command that was run before is
recognized, and one whose sources have changed since is refused:

    manifest  stored plans                               the command
    no        none                                       starts
    no        its own                                    resumes
    no        another, and no work would be lost         starts over
    no        another                                    is refused
    yes       its own, of a finished generation          restores what is missing; else does nothing
    yes       its own, of the next generation            resumes an append
    yes       others, and it appends sources not in them starts the next generation
    yes       others                                     is refused
"""

from dataclasses import asdict, fields, replace

from prepare.file_types import is_of_first_kinds
from prepare.options import Options
from prepare.plan import Plan, make_plan
from prepare.workspace import REFUSED, Workspace
from shards.cli import counted
from shards.manifest import Manifest
from shards.tokenizer import GPT2


def takes_all_text(workspace: Workspace) -> bool:
    """Return the dataset's rule for folders: True if they give everything that is text.

    False for a dataset that was started when they gave only `FIRST_KINDS`, so that the same command
    finds the same files. Where no plan tells, the sources do.
    """
    if stored := workspace.stored_plan(0):
        return stored.all_text
    manifest = workspace.manifest()
    return manifest is None or any(not is_of_first_kinds(one.name) for one in manifest.sources)


def start_or_resume(options: Options, workspace: Workspace, plan: Plan) -> Plan:
    """Return the plan to run, stored in the workspace.

    A stored one of the same generation gives way to another if that loses no work. Otherwise raises
    ValueError if they differ, because the options do or a source has changed since.
    """
    stored = workspace.stored_plan(plan.generation)
    if stored and (difference := _difference(workspace, stored, plan)):
        if options.task or options.finish or not _may_be_replaced(workspace, stored, plan):
            raise ValueError(difference)
        print("Starting over: what other sources or options had left unfinished here is removed.")
        workspace.discard_plan(stored)
        stored = None
    if stored is None:
        # If the generation before was killed right after its manifest. A first one has nothing to
        # remove but what another task, started at the same moment in an object store, is writing.
        if plan.generation:
            workspace.remove_intermediates()
        workspace.store_plan(plan)
        return plan
    workspace.folder.remove_file(REFUSED)
    return stored


def _may_be_replaced(workspace: Workspace, stored: Plan, plan: Plan) -> bool:
    """Return True for an unfinished plan that was refused, has no finished unit or can't be ended.

    The last is for appends, of which one that can't be finished must not block every other.
    """
    if workspace.folder.exists(REFUSED) or not workspace.results(stored.units):
        return True
    paths = {file.real_path for file in plan.files}
    others = [file for file in stored.files if file.real_path not in paths]
    return plan.generation > 0 and any(file.status() != (file.size, file.mtime) for file in others)


def finished_plan(
    options: Options, workspace: Workspace, manifest: Manifest, plan: Plan
) -> tuple[Plan, set[int]] | None:
    """Return the plan of the finished generation that a command repeats, None if it is a new one.

    With it come the indices of touched files, whose time has changed but not their size. Raises
    ValueError if other things have, or if the sources are neither those of the dataset nor new.
    """
    if not options.append:
        if stored := workspace.stored_plan(0):
            return _compare(options, workspace, manifest, stored, plan)
        # Copied here without its plan, or made by myGPT 0.2.
        _check_same_dataset(workspace, manifest, plan)
        return plan, set()
    paths = {file.real_path for file in plan.files}
    generation_of: dict[str, int] = {}
    for generation in range(manifest.generation + 1):
        stored = workspace.stored_plan(generation)
        if stored is None:
            if _has_sources_of(manifest, generation, plan):
                return replace(plan, units=(), generation=generation), set()
            continue
        stored_paths = {file.real_path: generation for file in stored.files}
        if paths == stored_paths.keys():
            return _compare(options, workspace, manifest, stored, plan)
        generation_of |= stored_paths
    for file in plan.files:
        if file.real_path in generation_of:
            raise ValueError(
                f"expected sources that are not in {workspace.folder} yet, found {file.name} of "
                f"generation {generation_of[file.real_path]}: leave it out"
            )
    return None


def _compare(
    options: Options, workspace: Workspace, manifest: Manifest, stored: Plan, plan: Plan
) -> tuple[Plan, set[int]]:
    """Return the plan as of the generation of `stored`, and the indices of touched files.

    Raises ValueError unless both plans are the same but for the times of files.
    """
    generation = stored.generation
    pairs = enumerate(zip(stored.files, plan.files, strict=False))
    touched = {i for i, (old, new) in pairs if old.size == new.size and old.mtime != new.mtime}
    if generation and touched:
        plan = make_plan(options, manifest.prefix(generation - 1), plan.all_text)
    elif generation != plan.generation:  # made to be the next one
        first = stored.first_source
        plan = replace(plan, units=stored.units, generation=generation, first_source=first)
    if plan.units == stored.units:
        files = list(stored.files)
        for i in touched:
            files[i] = replace(files[i], mtime=plan.files[i].mtime)
        stored = replace(stored, files=tuple(files))
    if difference := _difference(workspace, stored, plan):
        raise ValueError(difference)
    return plan, touched


def _difference(workspace: Workspace, stored: Plan, plan: Plan) -> str:
    """Return an error message that names what differs between two plans; "" if nothing does."""
    if stored == plan:
        return ""
    # A file is the same however it was named.
    stored, plan = (
        replace(one, files=tuple(replace(file, path=file.real_path) for file in one.files))
        for one in (stored, plan)
    )
    if stored == plan:
        return ""
    statuses = {file.path: (file.size, file.mtime) for file in plan.files}
    same_paths = [file.path for file in stored.files] == list(statuses)
    remedy = "restore it, rename it to append it as it is" if plan.generation else "restore it"
    for file in stored.files:
        is_missing = file.path not in statuses
        # With other files among the sources, these are what differs.
        has_changed = same_paths and statuses[file.path] != (file.size, file.mtime)
        if is_missing or has_changed:
            actual = "gone, or not among those given" if is_missing else "changed"
            return (
                f"expected the source {file.name} as it was when {workspace.folder} was started, "
                f"found that file {actual}: {remedy}, or give another --out"
            )
    names = [field.name for field in fields(Plan) if field.compare and field.name != "units"]
    differing = [name for name in names if getattr(stored, name) != getattr(plan, name)]
    if "rule" in differing:
        rules = asdict(stored.rule), asdict(plan.rule)
        differing.remove("rule")
        differing += [
            f"{'split' if name == 'rule' else name} ({plan_value} instead of {value})"
            for (name, value), plan_value in zip(rules[0].items(), rules[1].values(), strict=True)
            if value != plan_value
        ]
    columns = [" and ".join(sorted({f.column for f in p.files})) for p in (stored, plan)]
    if columns[0] != columns[1]:
        differing.append(f"text column ({columns[1]} instead of {columns[0]})")
    return (
        f"expected the sources and options with which {workspace.folder} was started, found other "
        f"{' and '.join(differing) or 'units'}: repeat them, or give another --out"
    )


def _check_same_dataset(workspace: Workspace, manifest: Manifest, plan: Plan) -> None:
    """Raise ValueError unless a finished dataset was made from the plan's sources by its rules."""
    same_rules = (manifest.split_rule, manifest.tokenizer.name == GPT2)
    rules = (asdict(plan.rule), plan.vocabulary == GPT2)
    if same_rules != rules or not _has_sources_of(manifest, 0, plan):
        raise ValueError(
            f"expected a new folder for {counted(len(plan.files), 'source')} split by "
            f"{asdict(plan.rule)}, found another dataset in {workspace.folder} "
            f"({counted(len(manifest.sources), 'source')}, split {manifest.split_rule}, tokenizer "
            f"{manifest.tokenizer.name}): give another --out, or --append to add to it"
        )


def _has_sources_of(manifest: Manifest, generation: int, plan: Plan) -> bool:
    """Return True if the plan's files have the names and sizes of a generation's sources."""
    stored = [(one.name, one.bytes) for one in manifest.sources if one.generation == generation]
    return stored == [(file.name, file.size) for file in plan.files]
