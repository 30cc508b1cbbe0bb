"""Which code it was: for figures that somebody may want to find again."""

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parents[1]


def version() -> str:
    """myGPT's version, and the commit where the source lies in a git repository.

    A "-dirty" after the commit says that files differ from it.
    """
    try:
        found = f"mygpt {importlib.metadata.version('mygpt')}"
    except importlib.metadata.PackageNotFoundError:
        found = "mygpt"
    if not (SOURCE / ".git").exists() or shutil.which("git") is None:
        return found
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{found} {done.stdout.strip()}".strip()
