"""Which documents are exact duplicates of an earlier one, in memory that does not grow with them.

The hashes of all documents lie on disk, one file a unit. They are gone through by ranges of the
hash, so that each range fits in memory; the first occurrence in plan order is kept.
"""

from collections.abc import Sequence

import numpy as np

from prepare.plan import Unit
from prepare.work import load_array, save_array
from prepare.workspace import Workspace

# Documents compared at once: some 40 bytes each.
AT_ONCE = 1 << 22
HASHES = "hashes"


def find_duplicates(workspace: Workspace, units: Sequence[Unit]) -> None:
    """Write, for each unit, the places of the documents to drop. All units must be hashed."""
    total = sum(len(_hashes(workspace, unit)) for unit in units)
    ranges = -(-total // AT_ONCE) or 1
    drops: dict[int, list[np.ndarray]] = {unit.number: [] for unit in units}
    for number in range(ranges):
        for unit, places in _duplicates_in(workspace, units, number, ranges):
            drops[unit].append(places)
    for number, parts in drops.items():
        places = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
        save_array(workspace, f"drops/{number:05d}.npy", places)


def _duplicates_in(
    workspace: Workspace, units: Sequence[Unit], number: int, ranges: int
) -> list[tuple[int, np.ndarray]]:
    """(unit, places) of the duplicates whose hash lies in one range of several."""
    hashes, owners, places = [], [], []
    for unit in units:
        of_unit = _hashes(workspace, unit)
        inside = of_unit[:, 1] % np.uint64(ranges) == number
        inside &= of_unit.any(axis=1)
        hashes.append(of_unit[inside])
        places.append(np.flatnonzero(inside))
        owners.append(np.full(len(places[-1]), unit.number))
    together = np.concatenate(hashes)
    # A stable sort: of equal hashes the one that is first in plan order stays first.
    order = np.lexsort((together[:, 1], together[:, 0]))
    again = np.zeros(len(order), bool)
    again[order[1:]] = (together[order[1:]] == together[order[:-1]]).all(axis=1)
    owner, place = np.concatenate(owners)[again], np.concatenate(places)[again]
    return [(int(unit), place[owner == unit]) for unit in np.unique(owner)]


def _hashes(workspace: Workspace, unit: Unit) -> np.ndarray:
    found = load_array(workspace, f"{HASHES}/{unit.number:05d}.npy")
    assert found is not None
    return found
