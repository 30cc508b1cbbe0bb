"""Tokenise text into a dataset of memory-mapped shards.

    python -m prepare SOURCE... --out data/NAME

Rerunning a killed run resumes it; rerunning a finished one says so and does nothing.
"""

import sys

import tyro

from prepare.options import Options
from shards.cli import EXIT_INTERRUPTED, one_line_errors


def main() -> None:
    """Parse the flags and prepare."""
    options = tyro.cli(Options, prog="python -m prepare")
    with one_line_errors():
        from prepare.job import run  # after the flags, so that --help answers at once

        try:
            run(options)
        except KeyboardInterrupt:
            print("\ninterrupted: finished work is kept, the same command goes on", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
