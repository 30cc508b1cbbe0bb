"""Look at a dataset, check it, and exchange it with other projects.

    python -m shards info data/demo --plot demo.png

Exit code: 0; 1 from `verify` when a shard is wrong; 2 for bad input, with one line that says how.
"""

import sys

from shards.cli import end_on_interrupt, one_line_errors, printable, printable_text

if __name__ == "__main__":
    end_on_interrupt()

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from shards.checks import verify
from shards.commands import explain, inspect, interop
from shards.manifest import Manifest

EXIT_WRONG = 1

Dataset = Annotated[Positional[str], arg(metavar="FOLDER")]


@dataclass(frozen=True)
class Info:
    """Say what a dataset is: tokenizer, splits, sources, document lengths."""

    folder: Dataset
    """The dataset's folder or URI."""
    plot: Annotated[Path | None, arg(metavar="PNG")] = None
    """Draw document lengths, tokens per shard and the split into this file."""
    json: bool = False
    """Print one JSON object on one line."""

    def run(self) -> int:
        """Print the description, and draw the picture if requested."""
        manifest = Manifest.load(self.folder)
        description = inspect.describe(manifest)
        print(json.dumps(description) if self.json else inspect.as_text(description))
        if self.plot:
            inspect.draw(manifest, self.plot)
        return 0


@dataclass(frozen=True)
class Show:
    """Print a document of a dataset, decoded, under a line that says where it comes from."""

    folder: Dataset
    """The dataset's folder or URI."""
    split: Literal["train", "val"] = "val"
    """The split of the document."""
    document: int = 0
    """The number of the document in the split, from 0."""

    def run(self) -> int:
        """Print the document."""
        found = inspect.find_document(Manifest.load(self.folder), self.split, self.document)
        onward = f" on over {found.shards} shards" if found.shards > 1 else ""
        print(
            f"=== {self.split} document {self.document}: {printable(found.source)}, row "
            f"{found.row}; "
            f"{found.file} from token {found.offset}{onward}, {len(found.ids):,} tokens ==="
        )
        print(printable_text(found.text()))
        return 0


@dataclass(frozen=True)
class Verify:
    """Check every hash, size, id and index of a dataset; exit code 1 if a shard is wrong."""

    folder: Dataset
    """The dataset's folder or URI."""

    def run(self) -> int:
        """Read every byte; print a line for each fault."""
        manifest = Manifest.load(self.folder)
        shards = wrong = 0
        with progress(total_tokens(manifest), "verify") as bar:
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
    """Only this row of the global batch, from 0, with its whole text."""
    data: UseAppendAction[tuple[str, ...]] = ()
    """The present location of its datasets, if they were moved; as the run's own --data."""
    json: bool = False
    """Print one JSON object per row and line, with the whole text."""

    def run(self) -> int:
        """Print the rows."""
        for row in explain.rows_of(self.run_folder, self.step, self.row, self.data):
            print(json.dumps(asdict(row)) if self.json else row.as_text(self.row is not None))
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
        size = sum(path.stat().st_size for path in self.files if path.is_file())
        with progress(size // 2, "import") as bar:  # two bytes per token
            manifest = interop.import_files(self.files, self.out, self.format, bar.update)
        print(
            f"{manifest.counts['written']:,} documents, {total_tokens(manifest):,} tokens in "
            f"{self.out}: python -m shards info {self.out}"
        )
        return 0


@dataclass(frozen=True)
class Export:
    """Write a dataset's tokens as another project's files (nanoGPT, llm.c, modded-nanogpt)."""

    folder: Dataset
    """The dataset's folder or URI."""
    out: Path
    """The new folder for the .bin files."""
    format: Literal["nanogpt", "llmc"] = "nanogpt"
    """nanogpt: train.bin and val.bin; llmc: one file with a header per shard."""

    def run(self) -> int:
        """Copy the tokens."""
        manifest = Manifest.load(self.folder)
        with progress(total_tokens(manifest), "export") as bar:
            names = interop.export(manifest, self.out, self.format, bar.update)
        print(f"{len(names)} files in {self.out}: {names[0]} to {names[-1]}")
        return 0


Command = Info | Show | Verify | Explain | Import | Export
COMMANDS: dict[str, Callable[..., Command]] = {
    kind.__name__.lower(): kind for kind in get_args(Command)
}


def total_tokens(manifest: Manifest) -> int:
    """Return the token count of all splits."""
    return sum(split.tokens for split in manifest.splits.values())


def progress(tokens: int, name: str) -> "tqdm[None]":
    """Return a progress bar that counts tokens."""
    return tqdm(total=tokens, unit=" tokens", unit_scale=True, desc=name, leave=False)


def main(args: Sequence[str] | None = None) -> int:
    """Parse the command line, run its command and return the exit code."""
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
