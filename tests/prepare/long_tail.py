"""Memory of one worker over many gigabytes of text of which one word in ten was never met before.

    python -m tests.prepare.long_tail --gigabytes 20 --minutes 60

Writes the text to a temporary folder, prepares it with one worker, and prints its resident memory
after each gigabyte; ends when the text or the time does.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from tests.prepare.test_memory import MEGABYTE, long_tail

FILE_MEGABYTES = 1000
SECONDS = 2.0  # between two looks at the process


def main() -> None:
    """Write the text, prepare it, and print what the worker's memory was."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--gigabytes", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder) / "text", options.gigabytes)
        watch(Path(folder), 60 * options.minutes)


def write_files(folder: Path, gigabytes: int) -> None:
    """Write files of a gigabyte, no two of which have their rare words in common."""
    folder.mkdir()
    text = long_tail(gigabytes * FILE_MEGABYTES)
    for number in range(gigabytes):
        with open(folder / f"{number:03d}.txt", "wb") as file:
            file.writelines(islice(text, FILE_MEGABYTES))


def watch(folder: Path, seconds: float) -> None:
    """Prepare the files in a process of its own, and follow its memory."""
    command = [sys.executable, "-m", "prepare", "text", "--out", "data", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output
        )
    deadline, peak, told, done = time.monotonic() + seconds, 0.0, 0.0, 0.0
    while process.poll() is None and time.monotonic() < deadline:
        peak = max(peak, resident(process.pid))
        done = max(done, prepared(folder / "data/.prepare/units"))  # removed at the end
        if done >= told + 1:
            told = done
            print(
                f"{done:5.1f} GB  now {resident(process.pid):4.0f} MB  most {peak:4.0f} MB",
                flush=True,
            )
        time.sleep(SECONDS)
    ended = "ended" if process.poll() is not None else "stopped"
    process.kill()
    print(f"{ended} with {process.wait()} after {done:.1f} GB, most {peak:.0f} MB")


def resident(process: int) -> float:
    """Return the megabytes of memory that a process has now; 0 if it has ended."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 / MEGABYTE if found else 0.0


def prepared(units: Path) -> float:
    """Return the gigabytes of text in finished units."""
    records = [json.loads(path.read_bytes()) for path in units.glob("*.json")]
    shards = [s for record in records for split in record["shards"].values() for s in split]
    return sum(shard["text_bytes"] for shard in shards) / (1000 * MEGABYTE)


if __name__ == "__main__":
    main()
