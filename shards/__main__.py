"""Look at a dataset, check it, and exchange it with other projects.

    python -m shards info data/demo --plot demo.png

Exit code: 0; 1 from `verify` when a shard is wrong; 2 for bad input, with one line that says how.
"""

import sys

from shards.cli import counted, end_on_interrupt, one_line_errors

if __name__ == "__main__":
    end_on_interrupt()

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, get_args

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from shards.checks import tokenizer_faults, verify
from shards.commands.explain import Explain
from shards.commands.inspect import Info, Show
from shards.commands.interop import Export, Import, progress, total_tokens
from shards.manifest import Manifest

EXIT_WRONG = 1


@dataclass(frozen=True)
class Verify:
    """Check every hash, size, id and index of a dataset; exit code 1 if a shard is wrong."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
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
        others = tokenizer_faults(manifest)
        for fault in others:
            print(f"wrong: {fault}")
        if wrong:
            verb = "are" if shards > 1 else "is"
            print(f"{wrong} of {counted(shards, 'shard')} {verb} wrong; restore, or prepare again")
        if wrong or others:
            return EXIT_WRONG
        which = f"all {shards:,} shards are" if shards > 1 else "the shard is"
        print(f"{which} what the manifest says: {manifest.fingerprint}")
        return 0


Command = Info | Show | Verify | Explain | Import | Export
COMMANDS: dict[str, Callable[..., Command]] = {
    kind.__name__.lower(): kind for kind in get_args(Command)
}


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
