"""Looking over all shards of a dataset in the background, while training goes on."""

import threading
import time
import weakref
from collections.abc import Sequence

from shards import remote
from shards.manifest import Manifest, Shard
from shards.reader import open_tokens
from shards.writer import DTYPE, npy_header

# Between two shards: the batches come first.
PAUSE_SECONDS = 0.001


class Sweep:
    """Opens each shard once, for its size and header, on a thread that ends with this object.

    Of a remote dataset the sizes in the store's listing are compared. `check` raises the first
    FileNotFoundError or ValueError found.
    """

    def __init__(self, parts: Sequence[tuple[Manifest, Sequence[Shard]]]) -> None:
        self.fault: Exception | None = None
        self._thread = threading.Thread(
            target=_sweep, args=(weakref.ref(self), parts), name="sweep", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what was found, if anything was."""
        if self.fault is not None:
            raise self.fault

    def join(self) -> None:
        """Wait until all has been looked at."""
        self._thread.join()


def _sweep(owner: "weakref.ref[Sweep]", parts: Sequence[tuple[Manifest, Sequence[Shard]]]) -> None:
    """Set `fault` of the sweep to the first thing that is wrong."""
    try:
        for manifest, shards in parts:
            if manifest.uri:
                _compare_sizes(manifest, shards)
                continue
            for shard in shards:
                open_tokens(manifest, shard)
                time.sleep(PAUSE_SECONDS)
                if owner() is None:
                    return
    except (ValueError, OSError) as error:
        if found := owner():
            found.fault = error


def _compare_sizes(manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Raise FileNotFoundError or ValueError for a shard that is missing or of another size."""
    sizes = remote.sizes(manifest.uri)
    for shard in shards:
        expected = len(npy_header(shard.tokens)) + shard.tokens * DTYPE.itemsize
        if (found := sizes.get(shard.file)) is None:
            raise FileNotFoundError(
                f"expected the shard {manifest.name(shard.file)}, found no such file: restore it, "
                "or prepare the dataset again"
            )
        if found != expected:
            raise ValueError(
                f"expected {expected} bytes in {manifest.name(shard.file)}, found {found}: restore "
                "it, or prepare the dataset again"
            )
