"""Tokenize text into a dataset of memory-mapped shards.

    python -m prepare SOURCE... --out data/NAME

Running the command again resumes an interrupted dataset; a finished one is left as it is.
"""

import tyro

from prepare.options import Options
from shards.cli import one_line_errors


def main() -> None:
    """Parse the flags and run the job."""
    options = tyro.cli(Options, prog="python -m prepare")
    with one_line_errors(": finished work is kept, the same command goes on"):
        from prepare.job import run  # NumPy and Arrow are loaded only after --help has answered

        run(options)


if __name__ == "__main__":
    main()
