"""How every command of the project reports bad input: one line on stderr, exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
