"""How a process that is one of several ranks ends: without Python's own end."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a command and leave with its exit code: on the spot, if torchrun started the process.

    gloo frees tensors on threads of its own, for which they need Python's lock. One that waits for
    it in the moment in which Python begins to end aborts the process instead, with "terminate
    called without an active exception", and a run that was well finished would count as crashed.
    """
    try:
        code = main()
    except SystemExit as exit_:
        if not isinstance(exit_.code, int):
            raise
        code = exit_.code
    if "RANK" not in os.environ:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whose reader has gone, or which is closed
            stream.flush()
    os._exit(code)
