"""`info` and `show`: a dataset described as text, JSON or a picture, and single documents."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from shards.cli import counted, printable, printable_text
from shards.files import atomic_file
from shards.manifest import Manifest
from shards.reader import evenly_spaced, open_tokens, position, read_index
from shards.tokenizer import open_tokenizer

LARGEST_SOURCES = 5
QUANTILES = (0, 0.1, 0.5, 0.9, 0.99, 1)
# Lengths come from the indexes of at most this many shards per split, evenly spaced.
INDEXES_READ = 256
COLORS = {"train": "#4C78A8", "val": "#E45756"}
NO_MATPLOTLIB = "expected matplotlib for --plot, found none: pip install 'mygpt[plots]'"


@dataclass(frozen=True)
class Info:
    """Say what a dataset is: tokenizer, splits, sources, document lengths."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """The dataset's folder or URI."""
    plot: Annotated[Path | None, arg(metavar="PNG")] = None
    """Draw document lengths, tokens per shard and the split into this file."""
    json: bool = False
    """Print one JSON object on one line."""

    def run(self) -> int:
        """Print the description, and draw the picture if requested."""
        manifest = Manifest.load(self.folder)
        description = describe(manifest)
        print(json.dumps(description) if self.json else as_text(description))
        if self.plot:
            draw(manifest, self.plot)
        return 0


@dataclass(frozen=True)
class Show:
    """Print a document of a dataset, decoded, under a line that says where it comes from."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """The dataset's folder or URI."""
    split: Literal["train", "val"] = "val"
    """The split of the document."""
    document: int = 0
    """The number of the document in the split, from 0."""

    def run(self) -> int:
        """Print the document."""
        found = find_document(Manifest.load(self.folder), self.split, self.document)
        onward = f" on over {found.shards} shards" if found.shards > 1 else ""
        print(
            f"=== {self.split} document {self.document}: {printable(found.source)}, "
            f"{position(found.source, found.row)}; {found.file} from token {found.offset}{onward}, "
            f"{counted(len(found.ids), 'token')} ==="
        )
        print(printable_text(found.text()))
        return 0


@dataclass(frozen=True)
class Document:
    """One document: its tokens, (n,) uint16 with their `<|endoftext|>`, and their origin.

    `source` and `row` locate it in the input; `file` and `offset` are the shard in which it starts
    and its first token there; `shards` is the number of shards that it spans.
    """

    manifest: Manifest
    ids: np.ndarray
    source: str
    row: int
    file: str
    offset: int
    shards: int

    def text(self) -> str:
        """Return the decoded document, without its `<|endoftext|>`."""
        tokenizer = open_tokenizer(self.manifest.tokenizer, self.manifest.location)
        return tokenizer.decode(self.ids[self.ids != tokenizer.eot])


def find_document(manifest: Manifest, split: str, number: int) -> Document:
    """Return document `number` of a split, counted from 0. Raises ValueError if there is none.

    Reads one index, and further ones only if the document continues in further shards.
    """
    shards = manifest.splits[split].shards
    ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
    total = int(ends[-1]) if shards else 0
    if not 0 <= number < total:
        raise ValueError(
            f"expected --document from 0 to {total - 1} for {split}, found {number}: "
            f"{manifest.location} has {counted(total, f'{split} document')}"
        )
    first = int(np.searchsorted(ends, number, side="right"))
    before = int(ends[first]) - shards[first].documents
    parts: list[np.ndarray] = []
    origin: dict[str, Any] = {}
    for shard in shards[first:]:
        index = read_index(manifest, shard)
        starts = np.flatnonzero(~index["continued"].to_numpy())
        if not parts:
            origin = index.slice(starts[number - before], 1).to_pylist()[0]
            starts = starts[number - before + 1 :]
        start = 0 if parts else origin["offset"]
        end = index["offset"][starts[0]].as_py() if starts.size else shard.tokens
        parts.append(open_tokens(manifest, shard)[start:end])
        if starts.size:
            break
    return Document(
        manifest=manifest,
        ids=np.concatenate(parts),
        source=manifest.sources[origin["source"]].name,
        row=origin["row"],
        file=shards[first].file,
        offset=origin["offset"],
        shards=sum(part.size > 0 for part in parts),
    )


def document_lengths(manifest: Manifest, split: str) -> np.ndarray:
    """Return the tokens of each document of a split, `<|endoftext|>` included, (n,) int64.

    Above `INDEXES_READ` shards a sample. A document that continues in another shard counts once.
    """
    shards = manifest.splits[split].shards
    lengths, is_start = [np.empty(0, np.int64)], [np.empty(0, np.bool_)]
    for i in evenly_spaced(len(shards), INDEXES_READ):
        index = read_index(manifest, shards[i])
        offsets = index["offset"].to_numpy()
        lengths.append(np.diff(offsets, append=shards[i].tokens))
        is_start.append(~index["continued"].to_numpy())
    firsts = np.flatnonzero(np.concatenate(is_start))
    return np.add.reduceat(np.concatenate(lengths), firsts) if firsts.size else firsts


def describe(manifest: Manifest) -> dict[str, Any]:
    """Return the description of a dataset as JSON."""
    largest = sorted(manifest.sources, key=lambda source: source.bytes, reverse=True)
    return {
        "folder": manifest.location,
        "fingerprint": manifest.fingerprint,
        "generation": manifest.generation,
        "tokenizer": asdict(manifest.tokenizer),
        "split_rule": manifest.split_rule,
        "counts": manifest.counts,
        "splits": {name: _describe_split(manifest, name) for name in manifest.splits},
        "sources": {
            "files": len(manifest.sources),
            "bytes": sum(source.bytes for source in manifest.sources),
            "largest": [
                {"name": source.name, "bytes": source.bytes} for source in largest[:LARGEST_SOURCES]
            ],
        },
    }


def _describe_split(manifest: Manifest, name: str) -> dict[str, Any]:
    split = manifest.splits[name]
    lengths = document_lengths(manifest, name)
    lengths = lengths if lengths.size else np.zeros(1)
    quantiles = np.quantile(lengths, QUANTILES, method="inverted_cdf")  # no interpolation
    sizes = [shard.tokens for shard in split.shards]
    return {
        "tokens": split.tokens,
        "documents": split.documents,
        "text_bytes": split.text_bytes,
        "bytes_per_token": split.text_bytes / max(split.tokens, 1),
        "shards": len(sizes),
        "shard_tokens": [min(sizes, default=0), max(sizes, default=0)],
        "indexes_read": min(len(sizes), INDEXES_READ),
        "document_tokens": dict(zip(map(str, QUANTILES), map(int, quantiles), strict=True)),
    }


def as_text(description: dict[str, Any]) -> str:
    """Return what `describe` returns as lines of text."""
    vocabulary, rule = description["tokenizer"], description["split_rule"]
    counts, sources = description["counts"], description["sources"]
    settings = ", ".join(f"{key} {value}" for key, value in rule.items() if key != "rule")
    total = sum(split["tokens"] for split in description["splits"].values())
    outcomes = [f"{count:,} {name}" for name, count in counts.items() if name != "read"]
    lines = [
        f"dataset      {description['folder']}",
        f"fingerprint  {description['fingerprint']}, generation {description['generation']}",
        f"tokenizer    {vocabulary['name']}, {vocabulary['n_vocab']:,} ids, <|endoftext|> "
        f"{vocabulary['eot']}, hash {vocabulary['hash'][:12]}",
        f"split        {rule['rule']}" + (f" ({settings})" if settings else ""),
        f"documents    {counts.get('read', 0):,} read = {' + '.join(outcomes)}",
    ]
    for name, split in description["splits"].items():
        lines += _split_lines(name, split, total)
    lines.append(f"sources      {sources['files']:,}, {sources['bytes']:,} bytes; the largest:")
    lines += [f"  {source['bytes']:>15,}  {source['name']}" for source in sources["largest"]]
    return "\n".join(map(printable, lines))


def _split_lines(name: str, split: dict[str, Any], total: int) -> list[str]:
    low, high = split["shard_tokens"]
    read = split["indexes_read"]
    lengths = [
        f"{int(value):,} {_quantile_name(float(at))}"
        for at, value in split["document_tokens"].items()
    ]
    partly = f" (from {counted(read, 'shard')})" if read < split["shards"] else ""
    return [
        f"{name:12} {split['tokens']:,} tokens ({split['tokens'] / max(total, 1):.1%}), "
        f"{counted(split['documents'], 'document')}, {split['text_bytes']:,} bytes of text, "
        f"{split['bytes_per_token']:.2f} bytes per token",
        f"  shards     {split['shards']:,} of {low:,} to {high:,} tokens",
        f"  lengths    {', '.join(lengths)} tokens per document{partly}",
    ]


def _quantile_name(at: float) -> str:
    return {0: "(least)", 0.5: "(median)", 1: "(most)"}.get(at, f"({at:.0%})")


def draw(manifest: Manifest, path: Path) -> None:
    """Draw a dataset into the PNG `path`. Raises ValueError if matplotlib is not installed."""
    try:
        # The object interface: pyplot would look for a display and hold state between calls.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(NO_MATPLOTLIB) from None
    figure: Any = Figure(figsize=(9, 6.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    total = sum(split.tokens for split in manifest.splits.values())
    figure.suptitle(f"{manifest.folder.absolute().name}: {total:,} tokens")
    above, below = figure.subfigures(2, 1)
    _draw_lengths(above.subplots(), manifest)
    left, right = below.subplots(1, 2, width_ratios=(3, 2))
    _draw_shards(left, manifest)
    _draw_split(right, manifest)
    for axes in figure.get_axes():
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def _draw_lengths(axes: Any, manifest: Manifest) -> None:
    """Draw a histogram of each split over the same bins, ten per decade, val as a line on top."""
    lengths = {name: document_lengths(manifest, name) for name in manifest.splits}
    every = np.concatenate(list(lengths.values()))
    most = every.max(initial=1)
    low, high = np.log10([every.min(initial=most), most + 1])
    edges = 10 ** (np.arange(np.floor(10 * low), np.ceil(10 * high) + 1) / 10)
    for name, values in lengths.items():
        counts, _ = np.histogram(values, edges)
        share = 100 * counts / max(values.size, 1)
        style = {"fill": True, "alpha": 0.6} if name == "train" else {"linewidth": 1.5}
        axes.stairs(share, edges, color=COLORS[name], label=name, **style)
    axes.set(xscale="log", xlabel="tokens per document", ylabel="% of documents", ylim=(0, None))
    axes.set_title("document lengths", loc="left")
    axes.legend(frameon=False)


def _draw_shards(axes: Any, manifest: Manifest) -> None:
    """Draw a bar for each shard, in the dataset's order, train before val."""
    start = 0
    for name, split in manifest.splits.items():
        sizes = np.array([shard.tokens for shard in split.shards]) / 1e6
        bars = np.stack([sizes, np.zeros(len(sizes))], 1).ravel()[:-1]
        edges = start + np.add.outer(np.arange(len(sizes)), [0.1, 0.9]).ravel()
        if bars.size:
            axes.stairs(bars, edges, fill=True, color=COLORS[name], label=name)
        start += len(sizes)
    axes.set(xlabel="shard", ylabel="million tokens", xlim=(0, start), ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("tokens per shard", loc="left")


def _draw_split(axes: Any, manifest: Manifest) -> None:
    """Draw the percentage of documents, text and tokens in each split."""
    sizes = [(s.tokens, s.text_bytes, s.documents) for s in manifest.splits.values()]
    shares = 100 * np.array(sizes) / np.maximum(np.sum(sizes, 0), 1)
    for name, share, left in zip(manifest.splits, shares, (0, shares[0]), strict=True):
        bars = axes.barh(("tokens", "bytes", "documents"), share, left=left, color=COLORS[name])
        where = {"label_type": "center", "color": "white"} if name == "train" else {"padding": 4}
        axes.bar_label(bars, [f"{name} {value:.1f} %" for value in share], **where)
    axes.set(xlabel="% of the dataset", xlim=(0, 100))
    axes.invert_yaxis()
    axes.set_title("split", loc="left")
