"""Error handling of every command of the project: one line on stderr for bad input, exit code 2."""

import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # the convention of shells for Ctrl-C
# Terminal escapes, all line ends, bidirectional overrides, and surrogates, which can't be printed.
CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def counted(count: int, noun: str) -> str:
    """Format a count with its noun: 1 document, 2,000 documents."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def printable_text(text: str) -> str:
    """Return a text of several lines with its control characters escaped."""
    return "\n".join(map(printable, text.split("\n")))


def printable(line: str) -> str:
    """Return a line, of a text or a name, with its control characters escaped as Python does."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), line)


def script(name: str) -> str:
    """Return how to call train.py or eval.py from here: as a file, or as the installed command."""
    return f"python {name}" if Path(name).is_file() else f"mygpt {name.removesuffix('.py')}"


@contextmanager
def one_line_errors(if_interrupted: str = "") -> Iterator[None]:
    """Exit with 2 and `error: ...` on one line for ValueError and OSError, with 130 for Ctrl-C.

    `if_interrupted` follows the word "interrupted". Messages say expected, found and what to do, so
    a traceback would add nothing. Any other exception is a bug and keeps its traceback.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _check_words(sys.argv[1:])
        yield
    except BrokenPipeError:
        # The reader of our output (`| head`) has closed it: not an error.
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("\ninterrupted" + if_interrupted, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError) as error:
        print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    finally:
        if before is _end:
            signal.signal(signal.SIGINT, _end)


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process with one line while modules are imported, which takes seconds.

    Inside `one_line_errors` it is a KeyboardInterrupt as ever, so that files are cleaned up.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"\ninterrupted\n")
    os._exit(EXIT_INTERRUPTED)


def _check_words(words: list[str]) -> None:
    """Raise ValueError for a command that is not UTF-8: its words could not be stored or shown."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"expected a command in UTF-8, found {word!a}: rename or retype it"
            ) from None


def require_values(options: Namespace) -> Namespace:
    """Return what argparse has parsed. Raises ValueError for `--flag=--`, its empty list."""
    for name, value in vars(options).items():
        if isinstance(value, list) and (not value or [] in value):
            raise ValueError(f"expected a value for --{name.replace('_', '-')}, found '--'")
    return options


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code, without finalising Python under torchrun.

    gloo frees tensors on its own threads, for which they take Python's lock. A thread that waits
    for it while the interpreter shuts down aborts the process ("terminate called without an active
    exception"), and a run that ended well would count as crashed.
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
        with suppress(OSError, ValueError):  # its reader has gone, or it is closed
            stream.flush()
    os._exit(code)
