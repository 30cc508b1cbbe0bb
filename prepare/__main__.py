"""Tokenise text into a dataset of memory-mapped shards.

    python -m prepare SOURCE... --out data/NAME

Rerunning a killed run resumes it; rerunning a finished one says so and does nothing.
"""

import tyro

from prepare.options import Options
from shards.cli import one_line_errors


def main() -> None:
    """Parse the flags and prepare."""
    options = tyro.cli(Options, prog="python -m prepare")
    with one_line_errors(": finished work is kept, the same command goes on"):
        from prepare.job import run  # after the flags, so that --help answers at once

        run(options)


if __name__ == "__main__":
    main()
