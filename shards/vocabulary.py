"""Byte-level BPE vocabularies in Hugging Face's format: `tokenizer.json`, read and written.

A token's id is its rank: of two possible merges the one with the lower id comes first. So the bytes
of each id are the whole vocabulary, and the merges, which the format wants too, follow from them.
"""

import base64
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from shards import stored_json

TOKENIZER_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
MAX_IDS = 1 << 16  # an id is stored in 16 bits
OTHERS = "take another tokenizer, or train a vocabulary with --vocab-size"
RESTORE = "restore it"
# The sha256 of the files of OpenAI's vocabularies.
GPT2_HASH = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
P50K_HASH = "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"
# Tokens are split by GPT-2's pattern, with nothing done to the text before.
PRE_TOKENIZER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
# Settings of the model that would change the tokens, with the values that do not.
PLAIN_MODEL: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
}


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of each token id, and the ids of special tokens, which have none.

    `<|endoftext|>` is one of these. Raises ValueError unless the 256 bytes come first and the ids
    fit 16 bits.
    """

    tokens: tuple[bytes, ...]
    specials: Mapping[str, int]

    def __post_init__(self) -> None:
        if not 257 <= len(self.tokens) <= MAX_IDS:
            raise ValueError(f"expected 257 to {MAX_IDS} token ids, found {len(self.tokens)}")
        first = set(itertools.islice(self.ranks, 256))
        if missing := {bytes([byte]) for byte in range(256)} - first:
            raise ValueError(
                f"expected each byte as a token before all others, found none for {min(missing)!r}"
            )

    @property
    def eot(self) -> int:
        """The id of `<|endoftext|>`."""
        return self.specials[END_OF_TEXT]

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """The id of each token that is not special."""
        return {token: rank for rank, token in enumerate(self.tokens) if token}

    @cached_property
    def hash(self) -> str:
        """Hex sha256 of the ranks in tiktoken's format: for OpenAI's that of the published file."""
        pairs = self.ranks.items()
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in pairs)
        return hashlib.sha256(b"".join(lines)).hexdigest()

    def to_json(self) -> bytes:
        """Return the content of `tokenizer.json`: the same vocabulary, the same bytes."""
        names = {rank: spelled(token) for token, rank in self.ranks.items()}
        names |= {i: name for name, i in self.specials.items()}
        special = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        value = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": name, **special}
                for name, i in sorted(self.specials.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": PRE_TOKENIZER,
            "post_processor": None,
            "decoder": PRE_TOKENIZER,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {names[i]: i for i in range(len(self.tokens))},
                "merges": [[spelled(a), spelled(b)] for a, b in merges(self.tokens)],
            },
        }
        return orjson.dumps(value) + b"\n"


def parse(content: bytes, name: str, known: bool = False) -> Vocabulary:
    """Return the vocabulary of a `tokenizer.json`, `name` being its file or folder.

    Raises ValueError, in one line, unless it is a byte-level BPE with GPT-2's pattern whose ids
    follow its merges. Without an `<|endoftext|>` it gets one as its last id. `known`: it was
    checked before, and the hash of the vocabulary will be compared, which saves a second.
    """
    remedy = RESTORE if known else OTHERS
    record = stored_json.parse(content, name, remedy)
    try:
        _check_pipeline(record)
        vocabulary = _vocabulary(record["model"]["vocab"], record.get("added_tokens") or [])
        if not known and vocabulary.hash not in (GPT2_HASH, P50K_HASH):
            _check_merges(record["model"]["merges"], vocabulary)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a tokenizer in {name}, found {error!r}: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}: {remedy}") from None
    return vocabulary


def _check_pipeline(record: Mapping[str, Any]) -> None:
    """Raise ValueError unless a text is encoded as GPT-2 does it: split by its pattern, merged."""
    splitter, model = record.get("pre_tokenizer") or {}, record["model"]
    if record.get("normalizer") is not None:
        raise ValueError(f"expected no normalizer, found {record['normalizer'].get('type')}")
    actual = {**PRE_TOKENIZER, **splitter, "trim_offsets": True}
    if not splitter or actual != PRE_TOKENIZER:
        raise ValueError(
            f"expected the pre-tokenizer ByteLevel with GPT-2's pattern and no prefix space, found "
            f"{splitter.get('type')}"
        )
    for key, allowed in PLAIN_MODEL.items():
        if model.get(key, allowed[0]) not in allowed:
            raise ValueError(f"expected {key} {allowed[0]} of the model, found {model[key]}")


def _check_merges(stored: Sequence[str | Sequence[str]], vocabulary: Vocabulary) -> None:
    """Raise ValueError unless the merges are those that follow from the ids."""
    actual = (merge.split(" ") if isinstance(merge, str) else merge for merge in stored)
    expected = ([spelled(a), spelled(b)] for a, b in merges(vocabulary.tokens))
    for number, (one, other) in enumerate(itertools.zip_longest(actual, expected)):
        if one != other:
            raise ValueError(
                f"expected ids in the order of the merges, found merge {number} of {one} where "
                f"the ids have {other}"
            )


def _vocabulary(names: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> Vocabulary:
    """Return the vocabulary of named ids; added tokens are special, whatever bytes they name."""
    if others := [token["content"] for token in added if not token.get("special")]:
        raise ValueError(f"expected added tokens that are special, found {others[0]!r}")
    specials = {token["content"]: token["id"] for token in added}
    new = max([*names.values(), *specials.values()]) + 1
    specials.setdefault(END_OF_TEXT, names.get(END_OF_TEXT, new))
    tokens = {i: unspelled(name) for name, i in names.items() if name not in specials}
    ids = sorted([*tokens, *specials.values()])
    if ids != list(range(len(ids))):
        raise ValueError("expected each id from 0 once, found gaps or ids of two tokens")
    return Vocabulary(tuple(tokens.get(i, b"") for i in ids), specials)


def merges(tokens: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two tokens that each token but the single bytes is merged from, in order of ids.

    A token's own merge is the last one when its bytes are encoded, so encoding them with the
    tokens before it leaves exactly the two parts. `tokens` are the bytes of each id, empty if it
    is special.
    """
    ranks = {token: rank for rank, token in enumerate(tokens) if token}
    for rank, token in enumerate(tokens):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """Return the character that stands for each byte in GPT-2's files: itself if printable."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in visible else next(others)) for byte in range(256)}


LETTERS = _byte_letters()
BYTES = {ord(letter): byte for byte, letter in LETTERS.items()}


def spelled(token: bytes) -> str:
    """Return a token's bytes as the characters that stand for them in the files."""
    return "".join(map(LETTERS.__getitem__, token))


def unspelled(name: str) -> bytes:
    """Return the bytes that a token's name stands for. Raises ValueError for other characters."""
    try:
        return bytes(BYTES[ord(letter)] for letter in name)
    except KeyError:
        raise ValueError(f"expected tokens of bytes, found {name[:20]!r}") from None


def ranks_of_merges(merges: str) -> dict[bytes, int]:
    """Return the id of each token of GPT-2's `vocab.bpe`: the bytes, then a merge on each line."""
    known = {letter: bytes([byte]) for byte, letter in LETTERS.items()}
    known = dict(sorted(known.items()))  # what is printable comes first
    for line in merges.splitlines()[1:]:
        first, second = line.split(" ")
        known[first + second] = known[first] + known[second]
    return {token: rank for rank, token in enumerate(known.values())}
