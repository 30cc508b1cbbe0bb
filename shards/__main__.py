"""Look at a dataset, check it, and exchange it with other projects.

    python -m shards info data/demo --plot demo.png

Exit code: 0; 1 from `verify` when a shard is wrong; 2 for bad input, with one line that says how.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import tyro
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from shards.cli import one_line_errors
from shards.manifest import Manifest

# What reads tokens is imported by the commands, after the flags, so that --help answers at once.

EXIT_WRONG = 1


class Command(Protocol):
    """A subcommand: its fields are its flags."""

    def run(self) -> int:
        """Do it; returns the exit code."""


@dataclass(frozen=True)
class Info:
    """Say what a dataset is: tokenizer, splits, sources, document lengths."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """The dataset, or its address."""
    plot: Annotated[Path | None, arg(metavar="PNG")] = None
    """Draw document lengths, tokens per shard and the split into this file."""
    json: bool = False
    """Answer with one JSON object on one line."""

    def run(self) -> int:
        """Print the description, and draw the picture if one is asked for."""
        from shards import inspect

        manifest = Manifest.load(self.folder)
        facts = inspect.describe(manifest)
        print(json.dumps(facts) if self.json else inspect.as_text(facts))
        if self.plot:
            inspect.draw(manifest, self.plot)
        return 0


@dataclass(frozen=True)
class Show:
    """Print a document of a dataset, decoded, under a line that says where it comes from."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """The dataset, or its address."""
    split: Literal["train", "val"] = "val"
    """The side of the split."""
    document: int = 0
    """Which of its documents, from 0."""

    def run(self) -> int:
        """Print it."""
        from shards import inspect

        found = inspect.find_document(Manifest.load(self.folder), self.split, self.document)
        onward = f" on over {found.shards} shards" if found.shards > 1 else ""
        print(
            f"=== {self.split} document {self.document}: {found.source}, row {found.row}; "
            f"{found.file} from token {found.offset}{onward}, {len(found.ids):,} tokens ==="
        )
        print(found.text())
        return 0


@dataclass(frozen=True)
class Verify:
    """Check every hash, size, id and index of a dataset; exit code 1 if a shard is wrong."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """The dataset, or its address."""

    def run(self) -> int:
        """Read all of it; a line for each thing that is wrong."""
        from shards.checks import verify

        manifest = Manifest.load(self.folder)
        total = sum(split.tokens for split in manifest.splits.values())
        shards = wrong = 0
        with progress(total, "verify") as bar:
            for shard, faults in verify(manifest):
                for fault in faults:
                    bar.write(f"wrong: {fault}")
                shards, wrong = shards + 1, wrong + bool(faults)
                bar.update(shard.tokens)
        if wrong:
            print(f"{wrong} of {shards} shards are wrong; restore them, or prepare again")
            return EXIT_WRONG
        print(f"all {shards} shards are what the manifest says: {manifest.fingerprint}")
        return 0


@dataclass(frozen=True)
class Explain:
    """Say where each row of a training step came from, and how its text begins."""

    run_folder: Annotated[Path, arg(name="run")]
    """The run's folder."""
    step: int
    """The finished step, as log.txt counts them."""
    row: int | None = None
    """Only this row of the global batch, from 0, with the whole of its text."""
    data: UseAppendAction[tuple[str, ...]] = ()
    """Where its datasets lie now, if not where they lay; as the run's own --data."""
    json: bool = False
    """Answer with one JSON object a row, with the whole text, a line each."""

    def run(self) -> int:
        """Print the rows."""
        from shards import explain

        for row in explain.rows_of(self.run_folder, self.step, self.row, self.data):
            print(json.dumps(row.to_json()) if self.json else row.as_text(self.row is not None))
        return 0


@dataclass(frozen=True)
class Import:
    """Make a dataset of another project's token files (nanoGPT, llm.c, modded-nanogpt)."""

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...")]
    """The .bin files, with train or val as a word in their names."""
    out: Path
    """The new dataset's folder."""
    format: Literal["auto", "nanogpt", "llmc"] = "auto"
    """nanogpt: bare uint16; llmc: with a header of 256 int32; auto: by its magic number."""

    def run(self) -> int:
        """Copy the tokens and find the documents in them."""
        from shards.interop import import_files

        size = sum(path.stat().st_size for path in self.files if path.is_file())
        with progress(size // 2, "import") as bar:  # two bytes a token
            manifest = import_files(self.files, self.out, self.format, bar.update)
        print(
            f"{manifest.counts['written']:,} documents, "
            f"{sum(split.tokens for split in manifest.splits.values()):,} tokens in {self.out}: "
            f"python -m shards info {self.out}"
        )
        return 0


@dataclass(frozen=True)
class Export:
    """Write a dataset's tokens as another project's files (nanoGPT, llm.c, modded-nanogpt)."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """The dataset, or its address."""
    out: Path
    """The new folder for the .bin files."""
    format: Literal["nanogpt", "llmc"] = "nanogpt"
    """nanogpt: train.bin and val.bin; llmc: a file with a header for each shard."""

    def run(self) -> int:
        """Copy the tokens."""
        from shards.interop import export

        manifest = Manifest.load(self.folder)
        total = sum(split.tokens for split in manifest.splits.values())
        with progress(total, "export") as bar:
            names = export(manifest, self.out, self.format, bar.update)
        print(f"{len(names)} files in {self.out}: {names[0]} to {names[-1]}")
        return 0


COMMANDS: dict[str, Callable[..., Command]] = {
    "info": Info,
    "show": Show,
    "verify": Verify,
    "explain": Explain,
    "import": Import,
    "export": Export,
}


def progress(tokens: int, name: str) -> "tqdm[None]":
    """A progress bar that counts tokens."""
    return tqdm(total=tokens, unit=" tokens", unit_scale=True, desc=name, leave=False)


def main(args: Sequence[str] | None = None) -> int:
    """Parse the command line and run its command; returns the exit code."""
    with one_line_errors():
        command: Command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="python -m shards",
            description=__doc__,
            args=args,
            config=(FlagCreatePairsOff,),
        )
        return command.run()


if __name__ == "__main__":
    sys.exit(main())
