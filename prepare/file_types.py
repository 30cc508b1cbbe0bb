"""File types: which reader a file's name or content calls for, and what to do about the others."""

import codecs
import importlib
import posixpath
import shlex
from collections.abc import Mapping
from typing import Any

TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
CSV, ARROW, HTML = "csv", "arrow", "html"  # read by prepare/formats/
ZIP = "zip"  # a folder in one file; of its members a compression

# Imported when a file of that kind is met. Each file is one slice, read from its start.
FORMATS = {
    CSV: "prepare.formats.delimited",
    ARROW: "prepare.formats.arrow",
    HTML: "prepare.formats.web",
}

# The types that myGPT 0.2 read: from folders of its datasets nothing else is taken.
FIRST_KINDS = {".txt": TEXT, ".md": TEXT, ".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET}
KINDS = FIRST_KINDS | {
    ".csv": CSV,
    ".tsv": CSV,
    ".arrow": ARROW,
    ".html": HTML,
    ".htm": HTML,
    ".zip": ZIP,
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
# Read from their end, which a compressed stream reaches last; they compress inside.
SEEKING = {PARQUET, ZIP}
# The beginning of a file that tells if it is text.
HEAD_BYTES = 1 << 13

# Types of files left out that are named on the terminal.
NAMED = 20

PANDOC, OFFICE = "pandoc -t plain {} -o {}.txt", "libreoffice --headless --convert-to {} {{}}"
# Commands that make text of what is no text, or not one document.
CONVERTERS = {
    ".pdf": "pdftotext {}",
    **dict.fromkeys((".docx", ".odt", ".rtf", ".epub"), PANDOC),
    **dict.fromkeys((".doc", ".ppt", ".pptx"), OFFICE.format("txt")),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), OFFICE.format("csv")),
    ".json": "jq -c 'if type == \"array\" then .[] else . end' {} > {}l",
    **dict.fromkeys((".tar", ".tgz", ".txz"), "tar -xf {}"),
    ".7z": "7z x {}",
    ".rar": "unrar x {}",
}


def by_name(path: str) -> tuple[str | None, str | None, str]:
    """Return (kind, compression, suffix) by a file's name; kind is None if that does not tell."""
    stem, suffix = posixpath.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = posixpath.splitext(stem)[1]
    kind = KINDS.get(suffix)
    return (None if compression and kind in SEEKING else kind), compression, suffix


def is_of_first_kinds(path: str) -> bool:
    """True for a file of a type that myGPT 0.2 read."""
    kind, _, suffix = by_name(path)
    return kind is not None and suffix in FIRST_KINDS


def is_stream_by_name(name: str) -> bool:
    """True if the name of a file says that it can be read from its start, as in an archive."""
    kind, compression, _ = by_name(name)
    return kind is not None and kind not in SEEKING and compression is None


def unreadable(path: str) -> str:
    """Return what to do about a file whose name says that it is no text; "" for any other."""
    kind, compression, suffix = by_name(path)
    name = shlex.quote(path)
    if suffix in CONVERTERS:
        return f"a {suffix} file: convert it first ({CONVERTERS[suffix].replace('{}', name)})"
    if kind is None and compression and suffix in KINDS:
        return f"a {suffix} file that was compressed once more: uncompress it first"
    return ""


def not_text(path: str, head: bytes) -> str:
    """Return why a file that begins with `head` is no UTF-8 text and what to do; "" if it is."""
    if utf16(head):
        return encoding_remedy(path, head)
    if b"\0" in head:
        return "a binary file: convert it to text first"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD_BYTES)
    except UnicodeDecodeError:
        return encoding_remedy(path, head)
    return ""


def utf16(head: bytes) -> str:
    """Return the variant of UTF-16 of a text, by its mark or by the NULs of ASCII; "" if none."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    pairs = len(head) // 2
    nuls = [head[start : 2 * pairs : 2].count(0) for start in (0, 1)]
    if pairs < 2 or min(nuls) or max(nuls) < 0.9 * pairs:
        return ""
    return "UTF-16LE" if nuls[1] else "UTF-16BE"


def encoding_remedy(path: str, head: bytes) -> str:
    """Return the encoding of a text that is not UTF-8, as far as one can tell, and iconv's line."""
    name, encoding = shlex.quote(path), utf16(head)
    said = encoding or "Latin-1, it seems"
    return (
        f"text in {said}, not UTF-8: convert it first "
        f"(iconv -f {encoding or 'LATIN1'} -t UTF-8 {name} > {name}.txt)"
    )


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Return counts of files by type as a phrase: `3 .png, 1 .pdf`."""
    by_count = sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    named = [f"{number:,} {suffix}" for suffix, number in by_count[:NAMED]]
    more = len(by_count) - NAMED
    return ", ".join([*named, f"{more:,} more types"] if more > 0 else named)


def format_module(kind: str) -> Any:
    """Return the module that reads a kind of file: `read`, and `columns` for planning.

    Raises ValueError if a package that it needs is missing.
    """
    try:
        return importlib.import_module(FORMATS[kind])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"expected the package {error.name} to read .{kind} files, found none: "
            f"pip install {error.name}, or leave these files out"
        ) from None
