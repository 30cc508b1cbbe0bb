"""JSON files of a run that say their format and version: `config.json` and `state.json`."""

import json
from pathlib import Path
from typing import Any


def read(path: Path, kind: str, newest: int, if_damaged: str, if_other: str) -> dict[str, Any]:
    """The record in a file, as version 2 has it; version 1 knew one dataset and its `generation`.

    `kind` is the format that it must have, in a version up to `newest`. Raises ValueError, ending
    in the remedy `if_damaged` or `if_other`, for a file that is no JSON, or another record.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {if_damaged}") from None
    found = (record.get("format"), record.get("version"))
    if found not in [(kind, version) for version in range(1, newest + 1)]:
        raise ValueError(
            f"{path}: expected format {kind} version 1 to {newest}, found {found[0]} {found[1]}: "
            f"{if_other}"
        )
    if "generation" in record:
        # The name of an only dataset is that of its folder, and not compared.
        record["generations"] = {"data": record.pop("generation")}
    return record
