"""Tokenize text into a dataset of memory-mapped shards.

    python -m prepare SOURCE... --out data/NAME

Running the command again resumes an interrupted dataset; a finished one is left as it is.
"""

import errno

from shards.cli import end_on_interrupt, one_line_errors

if __name__ == "__main__":
    end_on_interrupt()

import tyro

from prepare.options import Options

# What to do when the operating system refuses; other errors say it themselves.
REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EROFS: "mount it for writing, or give another --out",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "check that disk",
}


def main() -> None:
    """Parse the flags and run the job."""
    with one_line_errors(": finished work is kept, the same command resumes"):
        options = tyro.cli(Options, prog="python -m prepare")
        from prepare.job import run  # NumPy and Arrow are loaded only after --help has answered

        try:
            run(options)
        except OSError as error:
            if error.errno not in REMEDIES:
                raise
            raise OSError(
                f"expected to read the sources and write to {options.out}, found {error}: "
                f"{REMEDIES[error.errno]} and run the same command again (finished work is kept)"
            ) from None


if __name__ == "__main__":
    main()
