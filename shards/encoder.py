"""gigatoken, which encodes at many times tiktoken's speed: kept small, and kept exact.

Its memory is bounded by renewing it, and long texts are cut where that changes no token. It differs
from tiktoken only on code points that their Unicode tables class differently; these are found by
asking both, once for the installed versions.
"""

import base64
import ctypes
import importlib.metadata
import json
import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from shards.files import write_json

# gigatoken gets about this many bytes at a time, and may make the process grow by this much.
PART_BYTES = 8 << 20
MAX_GROWTH_BYTES = 128 << 20
# A character in contexts where its class (letter or number, white space, other) shows in the
# tokens: before "'s", which is one token after a letter and two after a symbol.
PROBE = "{0}'s {0}"
# Before an ASCII white-space character that follows another character: in GPT-2's pattern no
# pre-token spans the two.
SAFE_CUT = re.compile(r"(?<=\S)(?=[ \t\n\r\f\v])")
# The same on UTF-8 bytes. Before the cut stands a printing ASCII character or the last byte of a
# character that is not Unicode white space.
SAFE_CUT_BYTES = re.compile(
    rb"(?<=[!-~\x80-\xbf])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe1\xa0\x8e)"
    rb"(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?=[ \t\n\r\f\v])"
)


class FastEncoder:
    """gigatoken for the tokens with these ids (in their order), with its memory bounded.

    It caches every pre-token it meets and has no setting for a bound: 1 GB of random words took
    8 GB, and web text does the same more slowly. A new encoder costs 63 ms and gives the same
    tokens, so it is renewed whenever the process has grown by `MAX_GROWTH_BYTES`. A larger bound
    is no faster: the cache is limited by memory latency.
    """

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        # It wants ids without gaps, the bytes first.
        lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(ranks))
        self._lines = b"".join(lines)
        ids = np.array(list(ranks.values()), np.uint32)
        self._ids = None if np.array_equal(ids, np.arange(len(ids))) else ids
        self._renew()

    def _renew(self) -> None:
        """Replace the encoder, returning the memory of the former one to the system."""
        import gigatoken

        self._encoder: Any = None
        _trim_heap()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "bpe.tiktoken")
            path.write_bytes(self._lines)
            self._encoder = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", special_tokens={})
        self._smallest = _private_bytes()

    def encode_batch(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Encode as `Tokenizer.encode_batch`, at most about `PART_BYTES` at a time."""
        offsets, content = string_buffers(texts)
        if offsets[-1] - offsets[0] <= PART_BYTES:
            return self._encode(offsets, content)
        bounds = np.union1d(offsets, list(_cuts(offsets, content)))
        ids, lengths, start = [], [np.zeros(1, np.int64)], 0
        while start < len(bounds) - 1:
            end = np.searchsorted(bounds, bounds[start] + PART_BYTES, "right") - 1
            end = max(int(end), start + 1)
            part, part_offsets = self._encode(bounds[start : end + 1], content)
            ids.append(part)
            lengths.append(np.diff(part_offsets))
            start = end
        counts = np.cumsum(np.concatenate(lengths))
        return np.concatenate(ids), counts[np.searchsorted(bounds, offsets)]

    def _encode(self, offsets: np.ndarray, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode the texts between `offsets` of `content`, without a Python object per text."""
        import awkward as ak

        size = _private_bytes()
        # Of what was there when it was made, part may have been freed since.
        self._smallest = min(self._smallest, size)
        if size - self._smallest > MAX_GROWTH_BYTES:
            self._renew()
        characters = ak.contents.NumpyArray(content, parameters={"__array__": "char"})
        strings = ak.contents.ListOffsetArray(
            ak.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        # On the calling thread: prepare runs one process per core.
        encoded = self._encoder.encode_batch(ak.Array(strings), parallel=False).layout
        ids, offsets = np.asarray(encoded.content.data), np.asarray(encoded.offsets.data)
        return ids if self._ids is None else self._ids[ids], offsets


def _cuts(offsets: np.ndarray, content: np.ndarray) -> Iterator[int]:
    """Yield offsets to cut the texts longer than `PART_BYTES` without changing their tokens."""
    for i in np.flatnonzero(np.diff(offsets) > PART_BYTES).tolist():
        cut, end = int(offsets[i]) + PART_BYTES, int(offsets[i + 1])
        while cut < end and (match := SAFE_CUT_BYTES.search(content.data, cut, end)):
            yield match.start()
            cut = match.start() + PART_BYTES


def cut(text: str, size: int) -> Iterator[str]:
    """Cut `text` into pieces of at least `size` characters without changing its tokens."""
    start = 0
    while start < len(text):
        found = SAFE_CUT.search(text, start + size) if start + size < len(text) else None
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end


def _private_bytes() -> int:
    """Return the resident memory of the process that is no file's; 0 where it can't be known."""
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:  # no Linux
        return 0
    return (resident - shared) * mmap.PAGESIZE


def _trim_heap() -> None:
    """Return freed memory to the system where the C library (glibc) keeps it."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def string_buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return (offsets, bytes) of Arrow text or binary as NumPy views: int64 (n + 1,), and uint8."""
    wide = pa.types.is_large_string(texts.type) or pa.types.is_large_binary(texts.type)
    _, offsets, data = texts.buffers()
    view = np.frombuffer(offsets, np.int64 if wide else np.int32)
    view = view[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return view.astype(np.int64, copy=False), content


def differing_code_points() -> list[tuple[int, int]]:
    """Return ranges (first, last) of the code points on which the two installed encoders differ.

    They depend on the pattern and not on the vocabulary, so one of few tokens finds them. Computed
    once (some seconds) and cached on disk by the versions of both.
    """
    versions = [f"{name}-{importlib.metadata.version(name)}" for name in ("tiktoken", "gigatoken")]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = caches / "mygpt" / f"differing-{'-'.join(versions)}.json"
    try:
        return [(first, last) for first, last in json.loads(path.read_bytes())]
    except (OSError, ValueError):
        ranks = {bytes([i]): i for i in range(256)} | {b"'s": 256}
        reference = tiktoken.Encoding(
            "probe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
        )
        ranges = _compare_all_code_points(reference, FastEncoder(ranks))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, ranges)
    except OSError:
        pass  # with a read-only home they are computed again next time
    return ranges


def _compare_all_code_points(
    reference: tiktoken.Encoding, fast: FastEncoder
) -> list[tuple[int, int]]:
    """Probe blocks of 256 code points, then each code point of the blocks that differ."""

    def differing(blocks: list[range]) -> list[range]:
        texts = ["\n".join(PROBE.format(chr(code)) for code in block) for block in blocks]
        ids, offsets = fast.encode_batch(pa.array(texts, pa.large_string()))
        tokens = zip(texts, np.split(ids, offsets[1:-1]), strict=True)
        same = [reference.encode_ordinary(text) == part.tolist() for text, part in tokens]
        return [block for block, is_same in zip(blocks, same, strict=True) if not is_same]

    starts = [*range(0, 0xD800, 256), *range(0xE000, 0x110000, 256)]  # surrogates are repaired
    blocks = differing([range(start, start + 256) for start in starts])
    ranges: list[tuple[int, int]] = []
    for (code,) in differing([range(code, code + 1) for block in blocks for code in block]):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return ranges


@dataclass(frozen=True)
class CodePoints:
    """A set of code points, given as ranges (first, last), to be found in text."""

    ranges: tuple[tuple[int, int], ...] = ()

    def found_in(self, texts: pa.Array) -> np.ndarray:
        """Return the indices of the texts that hold one of them.

        Three filters, each applied to what passed the one before and a tenth as fast: texts with a
        high byte, then the first two bytes of such characters, then the characters.
        """
        rows = _rows_with_bytes_from(min(self._first_bytes, default=256), texts)
        suspects = texts.take(pa.array(rows))
        if not self._may_be_in(suspects):
            return rows[:0]
        found = pc.match_substring_regex(suspects, self._pattern)
        return rows[found.to_numpy(zero_copy_only=False)]

    def _may_be_in(self, texts: pa.Array) -> bool:
        """Return True if texts hold the first two bytes of one of them."""
        offsets, content = string_buffers(texts)
        content = content[offsets[0] : offsets[-1]]
        for first, seconds in self._first_bytes.items():
            here = content[:-1] == first
            if here.any() and seconds[content[1:][here]].any():
                return True
        return False

    @cached_property
    def _pattern(self) -> str:
        """The characters as a class of RE2."""
        ranges = (rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in self.ranges)
        return f"[{''.join(ranges)}]"

    @cached_property
    def _first_bytes(self) -> dict[int, np.ndarray]:
        """By the first byte of the characters, their second bytes, (256,) bool."""
        found: dict[int, np.ndarray] = {}
        for first, last in self.ranges:
            for code in range(first, last + 1):
                first_byte, second_byte, *_ = chr(code).encode()
                found.setdefault(first_byte, np.zeros(256, np.bool_))[second_byte] = True
        return found


def _rows_with_bytes_from(lowest: int, texts: pa.Array) -> np.ndarray:
    """Return the indices of texts with a byte of at least `lowest`, and of some empty ones."""
    offsets, content = string_buffers(texts)
    if offsets[0] == offsets[-1]:
        return np.empty(0, np.int64)
    # reduceat accepts no start past the last byte, where empty texts at the end start.
    starts = np.minimum(offsets[:-1], offsets[-1] - 1)
    return np.flatnonzero(np.maximum.reduceat(content[: offsets[-1]], starts) >= lowest)
