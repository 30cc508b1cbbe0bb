"""Which plan this run follows: a new one, the one that was begun, or none because all is done."""

from typing import Any

from prepare.plan import Plan, make_plan
from prepare.request import Request
from prepare.workspace import Workspace
from shards.manifest import Manifest


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
    if (begun, first.rule) != (now, plan.rule.record()):
        raise ValueError(
            f"expected a new folder, found another dataset in {workspace.folder} ({len(begun)} "
            f"sources, split {first.rule}): give another --out, or --append to add to it"
        )
