"""A model of ours, or of nanoGPT's, as a folder that Hugging Face's library opens.

    OUT/config.json, generation_config.json, model.safetensors     the model
        tokenizer.json, tokenizer_config.json                      GPT-2's tokenizer
        README.md                                                  the model card; loss.png

The folder appears under its name only after transformers has opened it and given the logits that
our model gives; the largest difference stands in the card. `python -m mygpt.pretrained` calls this.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mygpt import checkpoint, run_config
from mygpt.hub import card, hf, nanogpt
from mygpt.model import GPT
from mygpt.report import run_summary
from shards import tokenizer
from shards.files import sync_folder
from shards.tokenizer import Tokenizer

# What both libraries read to be compared: words, code, numbers, other scripts, odd white space.
PROOF_TEXT = """The quick brown fox jumps over the lazy dog. It's 1984, isn't it?
    def answer(x: int) -> int:\n        return x * 42  # naïve, but "true"
Größe, señor, 東京, Привет, مرحبا — ½ € 🙂\t\tand   spaces.\r\n\r\n"""
TOLERANCE = 1e-4  # of the largest logit: float32 in another order of sums


@dataclass(frozen=True)
class Proof:
    """The logits of both libraries on the same text, compared."""

    difference: float  # the largest
    largest: float  # logit
    tokens: int

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.1e} among logits of up to {self.largest:.1f}, "
            f"over {self.tokens} tokens"
        )


def export(target: Path, out: Path, best: bool = False, data: Sequence[str] = ()) -> list[str]:
    """Export a run's newest (or best) checkpoint, or a checkpoint, to `out`; lines that tell it.

    Raises FileNotFoundError or ValueError, in one line, for what cannot be exported.
    """
    folder = find_checkpoint(target, best)
    state = checkpoint.read_state(folder)
    run = folder.parents[1]
    about = run_summary.gather(
        run, state["config"], {**state, "earlier": _earlier(run, state)}, data
    )
    if data and about.dataset is None:
        raise ValueError(f"{about.missing}: give the --data that the model was trained on")
    coder = tokenizer.load("gpt2")
    _check_tokenizer(folder, coder, about)
    model = GPT(about.config.model).eval()
    checkpoint.load_model(folder, model)

    def describe(temporary: Path, proof: Proof) -> str:
        picture = about.run / "loss.png"
        if picture.is_file():
            shutil.copyfile(picture, temporary / picture.name)
        return card.of_run(out.name, about, state["step"], model.num_params(), str(proof))

    return _write(out, model, coder, describe)


def find_checkpoint(target: Path, best: bool) -> Path:
    """The checkpoint that is meant: `target` itself, or one of the run `target`."""
    return checkpoint.find(target, best).resolve()


def _earlier(run: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """What the datasets were before the checkpoint's, where the run that knows is still around."""
    record = run_config.read_run(run) if (run / "config.json").is_file() else None
    return [one for one in record.earlier if one["until"] < state["step"]] if record else []


def _check_tokenizer(folder: Path, coder: Tokenizer, about: run_summary.Facts) -> None:
    """Raise ValueError if the model's ids are not those of the tokenizer that goes with it."""
    own = about.dataset.tokenizer if about.dataset else None
    if own and own.hash != coder.hash:
        raise ValueError(
            f"expected a model of the tokenizer {coder.name} {coder.hash[:12]}, found {own.name} "
            f"{own.hash[:12]} in {folder}: only models of GPT-2's tokenizer can be exported"
        )
    if about.config.model.vocab_size < coder.n_vocab:
        raise ValueError(
            f"expected at least GPT-2's {coder.n_vocab} ids, found {about.config.model.vocab_size} "
            f"in {folder}: only models of GPT-2's tokenizer can be exported"
        )


def convert(source: Path, out: Path) -> list[str]:
    """Write nanoGPT's `ckpt.pt` as a folder at `out`; lines that tell it. Raises as `export`.

    A model of fewer ids than GPT-2's gets no tokenizer: nanoGPT does not keep it in the file.
    """
    found = nanogpt.load(source / "ckpt.pt" if source.is_dir() else source)
    coder = tokenizer.load("gpt2")
    is_gpt2 = found.model.config.vocab_size >= coder.n_vocab

    def describe(temporary: Path, proof: Proof) -> str:
        return card.of_nanogpt(out.name, found, str(proof))

    return _write(out, found.model, coder if is_gpt2 else None, describe)


def _write(
    out: Path, model: GPT, coder: Tokenizer | None, describe: Callable[[Path, Proof], str]
) -> list[str]:
    """The folder at `out`, all or nothing; `describe` gives the card."""
    vocab_size = coder.n_vocab if coder else model.config.vocab_size
    with _new_folder(out) as temporary:
        hf.save(temporary, model, vocab_size, coder.eot if coder else None)
        if coder:
            save_tokenizer(temporary, coder, model.config.block_size)
        proof = prove(temporary, model, coder)
        (temporary / "README.md").write_text(describe(temporary, proof), "utf-8")
    lines = [f"exported    {out}", f"the same    {proof}, in transformers and here"]
    if padding := model.config.vocab_size - vocab_size:
        lines.append(f"cut         {padding} ids that the tokenizer does not have")
    if not coder:
        lines.append(f"tokenizer   none: {vocab_size} ids are not GPT-2's, the file has no other")
    return [*lines, f"next        python eval.py {out}"]


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that is renamed to `out`, whole and on the disk, at the end of the block."""
    if out.exists():
        raise ValueError(f"{out} is there already: name a new folder, or remove it")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out.parent)


def save_tokenizer(folder: Path, coder: Tokenizer, block_size: int) -> None:
    """Write GPT-2's tokenizer in Hugging Face's format.

    `<|endoftext|>` in a text is that token there, as with every GPT-2; ours takes it as text.
    """
    from transformers import GPT2TokenizerFast

    letters = _byte_letters()
    names = ["".join(letters[byte] for byte in token) for token in coder.vocabulary()]
    vocabulary = {name: i for i, name in enumerate(names)} | {tokenizer.END_OF_TEXT: coder.eot}
    pairs = [
        ("".join(letters[b] for b in left), "".join(letters[b] for b in right))
        for left, right in merges(coder.vocabulary())
    ]
    theirs = GPT2TokenizerFast(vocab=vocabulary, merges=pairs, model_max_length=block_size)
    if len(theirs) != coder.n_vocab:  # its older keywords are swallowed and give one token
        raise ValueError(
            f"expected a tokenizer of {coder.n_vocab} ids of transformers, found {len(theirs)}: "
            "install the version that constraints.txt names"
        )
    theirs.save_pretrained(folder)


def merges(vocabulary: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that each token but the single bytes is merged from, in the order of ids.

    A token's own merge is the last one when its bytes are encoded, so encoding them with the
    tokens that came before leaves just the two parts.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    for rank, token in enumerate(vocabulary):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's files: itself if it can be seen."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def prove(folder: Path, model: GPT, coder: Tokenizer | None) -> Proof:
    """Open the folder as anybody would and compare its logits with the model's.

    Raises ValueError if tokens or logits differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    idx = _proof_tokens(model, coder)  # (1, T)
    if coder:
        theirs_ids = AutoTokenizer.from_pretrained(folder)(PROOF_TEXT)["input_ids"]
        if theirs_ids != coder.encode(PROOF_TEXT):
            raise ValueError(f"transformers tokenises otherwise: nothing was written to {folder}")
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    if shows_progress:
        logging.enable_progress_bar()
    with torch.no_grad():
        expected = _logits(model, idx)[..., : theirs.config.vocab_size]  # (1, T, V)
        found = theirs(idx).logits  # (1, T, V)
    difference = (found - expected).abs().max().item()
    proof = Proof(difference, expected.abs().max().item(), idx.size(1))
    if not difference <= TOLERANCE * max(1.0, proof.largest):
        raise ValueError(f"transformers computes something else ({proof}): nothing was written")
    return proof


def _proof_tokens(model: GPT, coder: Tokenizer | None) -> Tensor:
    """Ids (1, T): the text over and over until the context is full, or all ids in turn."""
    length = model.config.block_size
    ids = coder.encode(PROOF_TEXT) if coder else list(range(model.config.vocab_size))
    return torch.tensor([(ids * (length // len(ids) + 1))[:length]])


def _logits(model: GPT, idx: Tensor) -> Tensor:
    model.eval()
    logits, _ = model(idx)
    assert logits is not None  # there are no targets
    return logits
