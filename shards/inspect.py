"""What people ask of a dataset: what is in it, how it looks, and what a document says."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import tokenizer
from shards.files import atomic_file
from shards.manifest import Manifest
from shards.reader import evenly_spaced, open_tokens, read_index

LARGEST_SOURCES = 5
QUANTILES = (0, 0.1, 0.5, 0.9, 0.99, 1)
# Lengths come from the indexes of at most so many shards a split, evenly spaced: 25 billion tokens.
INDEXES_READ = 256
COLORS = {"train": "#4C78A8", "val": "#E45756"}
NO_MATPLOTLIB = "expected matplotlib for --plot, found none: pip install 'mygpt[plots]'"


@dataclass(frozen=True)
class Document:
    """One document: its tokens, (n,) uint16 with their `<|endoftext|>`, and where they come from.

    `source` and `row` are the input's; `file` and `offset` the shard it begins in and its first
    token there; `shards` how many it lies in.
    """

    ids: np.ndarray
    source: str
    row: int
    file: str
    offset: int
    shards: int

    def text(self) -> str:
        """The document as it was before it was tokenised."""
        gpt2 = tokenizer.load()
        return gpt2.decode(self.ids[self.ids != gpt2.eot])


def find_document(manifest: Manifest, split: str, number: int) -> Document:
    """Document `number` of a split, counted from 0. Raises ValueError where there is none.

    One index is read to find it, further ones only where it goes on in further shards.
    """
    shards = manifest.splits[split].shards
    ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
    total = int(ends[-1]) if shards else 0
    if not 0 <= number < total:
        raise ValueError(
            f"expected --document from 0 to {total - 1} for {split}, found {number}: "
            f"{manifest.location} has {total} {split} documents"
        )
    first = int(np.searchsorted(ends, number, side="right"))
    before = int(ends[first]) - shards[first].documents
    parts: list[np.ndarray] = []
    origin: dict[str, Any] = {}
    for shard in shards[first:]:
        index = read_index(manifest, shard)
        begins = np.flatnonzero(~index["continued"].to_numpy())
        if not parts:
            origin = index.slice(begins[number - before], 1).to_pylist()[0]
            begins = begins[number - before + 1 :]
        start = 0 if parts else origin["offset"]
        end = index["offset"][begins[0]].as_py() if begins.size else shard.tokens
        parts.append(open_tokens(manifest, shard)[start:end])
        if begins.size:
            break
    return Document(
        ids=np.concatenate(parts),
        source=manifest.sources[origin["source"]].name,
        row=origin["row"],
        file=shards[first].file,
        offset=origin["offset"],
        shards=sum(part.size > 0 for part in parts),
    )


def document_lengths(manifest: Manifest, split: str) -> np.ndarray:
    """Tokens of each document of a split, `<|endoftext|>` included, (n,) int64.

    Above `INDEXES_READ` shards a sample of them. A document that goes on counts once.
    """
    shards = manifest.splits[split].shards
    lengths, begins = [np.empty(0, np.int64)], [np.empty(0, np.bool_)]
    for i in evenly_spaced(len(shards), INDEXES_READ):
        index = read_index(manifest, shards[i])
        offsets = index["offset"].to_numpy()
        lengths.append(np.diff(offsets, append=shards[i].tokens))
        begins.append(~index["continued"].to_numpy())
    firsts = np.flatnonzero(np.concatenate(begins))
    return np.add.reduceat(np.concatenate(lengths), firsts) if firsts.size else firsts


def describe(manifest: Manifest) -> dict[str, Any]:
    """What a dataset is, as JSON."""
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
    sizes = [shard.tokens for shard in split.shards]
    return {
        "tokens": split.tokens,
        "documents": split.documents,
        "text_bytes": split.text_bytes,
        "bytes_per_token": split.text_bytes / max(split.tokens, 1),
        "shards": len(sizes),
        "shard_tokens": [min(sizes, default=0), max(sizes, default=0)],
        "indexes_read": min(len(sizes), INDEXES_READ),
        "document_tokens": dict(
            zip(map(str, QUANTILES), map(int, _quantiles(lengths)), strict=True)
        ),
    }


def _quantiles(lengths: np.ndarray) -> np.ndarray:
    """Lengths that occur, at each of `QUANTILES`."""
    return np.quantile(lengths if lengths.size else np.zeros(1), QUANTILES, method="inverted_cdf")


def as_text(facts: dict[str, Any]) -> str:
    """`describe`'s answer for people."""
    vocabulary, rule, sources = facts["tokenizer"], facts["split_rule"], facts["sources"]
    settings = ", ".join(f"{key} {value}" for key, value in rule.items() if key != "rule")
    total = sum(split["tokens"] for split in facts["splits"].values())
    fates = [f"{count:,} {fate}" for fate, count in facts["counts"].items() if fate != "read"]
    lines = [
        f"dataset      {facts['folder']}",
        f"fingerprint  {facts['fingerprint']}, generation {facts['generation']}",
        f"tokenizer    {vocabulary['name']}, {vocabulary['n_vocab']:,} ids, <|endoftext|> "
        f"{vocabulary['eot']}, hash {vocabulary['hash'][:12]}",
        f"split        {rule['rule']}" + (f" ({settings})" if settings else ""),
        f"documents    {facts['counts']['read']:,} read = {' + '.join(fates)}",
    ]
    for name, split in facts["splits"].items():
        lines += _split_lines(name, split, total)
    lines.append(f"sources      {sources['files']:,}, {sources['bytes']:,} bytes; the largest:")
    lines += [f"  {source['bytes']:>15,}  {source['name']}" for source in sources["largest"]]
    return "\n".join(lines)


def _split_lines(name: str, split: dict[str, Any], total: int) -> list[str]:
    low, high = split["shard_tokens"]
    read = split["indexes_read"]
    lengths = [
        f"{int(value):,} {_quantile_name(float(at))}"
        for at, value in split["document_tokens"].items()
    ]
    partly = f" (from {read} shards)" if read < split["shards"] else ""
    return [
        f"{name:12} {split['tokens']:,} tokens ({split['tokens'] / max(total, 1):.1%}), "
        f"{split['documents']:,} documents, {split['text_bytes']:,} bytes of text, "
        f"{split['bytes_per_token']:.2f} bytes a token",
        f"  shards     {split['shards']:,} of {low:,} to {high:,} tokens",
        f"  lengths    {', '.join(lengths)} tokens a document{partly}",
    ]


def _quantile_name(at: float) -> str:
    return {0: "(least)", 0.5: "(median)", 1: "(most)"}.get(at, f"({at:.0%})")


def draw(manifest: Manifest, path: Path) -> None:
    """Draw a dataset into the PNG `path`. Raises ValueError where matplotlib is not installed."""
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
    """A histogram of each split over the same bins, ten a decade, val as a line over train."""
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
    axes.set(xscale="log", xlabel="tokens a document", ylabel="% of documents", ylim=(0, None))
    axes.set_title("document lengths", loc="left")
    axes.legend(frameon=False)


def _draw_shards(axes: Any, manifest: Manifest) -> None:
    """A bar for each shard, in the dataset's order, the splits after each other."""
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
    """How much of the documents, the text and the tokens is on either side."""
    sides = [(s.tokens, s.text_bytes, s.documents) for s in manifest.splits.values()]
    shares = 100 * np.array(sides) / np.maximum(np.sum(sides, 0), 1)
    for name, share, left in zip(manifest.splits, shares, (0, shares[0]), strict=True):
        bars = axes.barh(("tokens", "bytes", "documents"), share, left=left, color=COLORS[name])
        where = {"label_type": "center", "color": "white"} if name == "train" else {"padding": 4}
        axes.bar_label(bars, [f"{name} {value:.1f} %" for value in share], **where)
    axes.set(xlabel="% of the dataset", xlim=(0, 100))
    axes.invert_yaxis()
    axes.set_title("split", loc="left")
