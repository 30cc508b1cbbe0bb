"""How every command of the project reports bad input: one line on stderr, exit code 2."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells have it for Ctrl-C


@contextmanager
def one_line_errors(if_interrupted: str = "") -> Iterator[None]:
    """Turn a ValueError or OSError into `error: ...` on one line and exit code 2, Ctrl-C into 130.

    `if_interrupted` is what there is to say after "interrupted".
    Messages are written where the error is found (expected, found, what to do), so a traceback
    would add nothing for the reader. Any other exception is a fault of ours and keeps its own.
    """
    try:
        yield
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone: nothing is wrong and nobody listens.
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("\ninterrupted" + if_interrupted, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


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
