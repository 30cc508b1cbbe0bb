"""Forecast of a plan for --plan: tokens, time, disk and memory, extrapolated from a sample."""

import shutil
import time
from collections.abc import Sequence
from itertools import islice

from prepare.documents import read
from prepare.encode import encode
from prepare.file_types import describe_left_out
from prepare.plan import Plan, Unit
from prepare.text import PIECE_BYTES
from prepare.workspace import Workspace
from shards.cli import counted
from shards.tokenizer import Tokenizer, load

SAMPLED_UNITS = 3
# Disk bytes per byte of text: two per token, and few texts have less than two bytes per token.
DISK_PER_BYTE = 1.1
# Memory of a worker by itself: interpreter, libraries, vocabulary, the encoder's cache.
BASE_BYTES = 450 << 20


def forecast(plan: Plan, tokenizer: Tokenizer | None, workers: int) -> str:
    """Describe the work for people. Encodes the first batch of a few units.

    `tokenizer` is None if it is yet to be trained: then GPT-2's counts the tokens.
    """
    untrained = "" if tokenizer else " of GPT-2's vocabulary, more than of one trained on the text"
    tokenizer = tokenizer or load()
    text = tokens = documents = 0
    started = time.perf_counter()
    step = max(1, len(plan.units) // SAMPLED_UNITS)
    for unit in plan.units[::step][:SAMPLED_UNITS]:
        with_text = (batch for batch in read(plan.files, unit.slices) if len(batch.texts))
        for batch in islice(with_text, 1):
            encoded = encode(tokenizer, batch, audit_first=False)
            text += int(encoded.text_bytes.sum())
            tokens += int(encoded.lengths.sum())
            documents += len(encoded.text_bytes)
    seconds = time.perf_counter() - started
    weight = sum(unit.weight for unit in plan.units)
    per_byte = tokens / max(text, 1)
    largest = max((unit.weight for unit in plan.units), default=0)
    ratio = weight / max(text, 1)
    stored = sum(file.size for file in plan.files)
    other = f"\nother      {describe_left_out(plan.left_out)}: not read" if plan.left_out else ""
    return f"""\
files      {len(plan.files):,}, {stored / 1e6:,.1f} MB, about {weight / 1e6:,.1f} MB of text{other}
split      {plan.rule.rule}, {plan.rule.val_fraction:g} for validation
units      {len(plan.units):,}, the largest of about {largest / 1e6:,.1f} MB of text
documents  about {documents * ratio:,.0f}
tokens     about {weight * per_byte:,.0f}{untrained}
disk       about {weight * per_byte * 2 / 1e6:,.1f} MB
time       about {seconds * ratio / workers:,.0f} s with {counted(workers, "worker")}
memory     about {BASE_BYTES >> 20} MB per worker, and three times what one document or row group
           has above {PIECE_BYTES >> 20} MB (25 times a stretch without white space)"""


def check_disk_space(units: Sequence[Unit], workspace: Workspace) -> None:
    """Raise OSError if the disk clearly has no room for the units."""
    if workspace.folder.remote:
        return
    needed = int(sum(unit.weight for unit in units) * DISK_PER_BYTE)
    free = shutil.disk_usage(workspace.folder.local).free
    if needed > free:
        raise OSError(
            f"expected about {needed / 1e9:.1f} GB free for {workspace.folder}, found "
            f"{free / 1e9:.1f} GB: make room, or give an --out on another disk"
        )
