"""A model of ours, or of nanoGPT's, as a folder that Hugging Face's library opens.

    OUT/config.json, generation_config.json, model.safetensors     the model
        tokenizer.json, tokenizer_config.json                      the tokenizer
        README.md                                                  the model card; loss.png

The folder appears only after transformers has opened it and computed the logits that our model
computes; the card states the largest difference.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast
from transformers.utils import logging

from mygpt import checkpoint, pretrained
from mygpt.config import GPTConfig
from mygpt.hub import card
from mygpt.model import GPT
from mygpt.pretrained import PREFIX, TRANSPOSED
from mygpt.report import run_summary
from shards import stored_json
from shards.cli import script
from shards.files import atomic_folder
from shards.tokenizer import Tokenizer, open_tokenizer, tokenizer_beside
from shards.tokenizer import load as load_tokenizer
from shards.vocabulary import merges, spelled

# Text that both libraries read: words, code, numbers, other scripts, unusual white space.
COMPARED_TEXT = """The quick brown fox jumps over the lazy dog. It's 1984, isn't it?
    def answer(x: int) -> int:\n        return x * 42  # naïve, but "true"
Größe, señor, 東京, Привет, مرحبا — ½ € 🙂\t\tand   spaces.\r\n\r\n"""
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order


def export(target: Path, out: Path, best: bool = False, data: Sequence[str] = ()) -> list[str]:
    """Export a run's newest (or best) checkpoint, or a checkpoint, to `out`; returns a summary.

    Raises FileNotFoundError or ValueError, in one line, for what cannot be exported.
    """
    folder = checkpoint.find(target, best)
    about = run_summary.of_checkpoint(folder, data)
    if data and about.dataset is None:
        raise ValueError(f"{about.missing}: give the --data that the model was trained on")
    if about.dataset:
        locations = about.dataset.locations
        tokenizer = open_tokenizer(about.dataset.tokenizer, folder, *locations)
    else:
        tokenizer = tokenizer_beside(folder)
    if about.config.model.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"expected at least the {tokenizer.n_vocab} ids of the tokenizer {tokenizer.name}, "
            f"found {about.config.model.vocab_size} in {folder}: give the dataset that the model "
            "was trained on with --data"
        )
    model = pretrained.from_pretrained(folder, dropout=about.config.model.dropout)

    def write_card(temporary: Path, comparison: str) -> str:
        picture = about.run / "loss.png"
        if picture.is_file():
            shutil.copyfile(picture, temporary / picture.name)
        return card.of_run(out.name, about, comparison)

    return _write(out, model, tokenizer, write_card)


def convert(source: Path, out: Path) -> list[str]:
    """Write nanoGPT's `ckpt.pt` as a folder at `out`; returns a summary. Raises as `export` does.

    nanoGPT doesn't store the tokenizer: a model of fewer ids than GPT-2's is written without one.
    """
    model, step, loss = load_nanogpt(source / "ckpt.pt" if source.is_dir() else source)
    gpt2, config = load_tokenizer("gpt2"), model.config
    known = gpt2 if config.vocab_size >= gpt2.n_vocab else None
    return _write(
        out, model, known, lambda _, text: card.of_nanogpt(out.name, config, step, loss, text)
    )


@dataclass(frozen=True)
class _ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True


@dataclass(frozen=True)
class _Checkpoint:
    """Fields of `ckpt.pt` beside the weights."""

    model_args: _ModelArgs
    iter_num: int | None = None
    best_val_loss: float | None = None


def load_nanogpt(path: Path) -> tuple[GPT, int | None, float | None]:
    """Return the model in `ckpt.pt`, its step and its best validation loss, if it has these.

    Runs no code of the file. Today's nanoGPT computes the exact GELU, GPT-2 and myGPT its tanh
    approximation: they differ by less than 0.0005, and so do the logits a little. Raises
    FileNotFoundError or ValueError, in one line, if it is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected nanoGPT's checkpoint at {path}, found no file")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # Only the reason: torch goes on to advise weights_only=False, which would run code.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"expected tensors and plain values in {path}, found: {reason}") from None
    if not isinstance(raw, dict) or not {"model", "model_args"} <= raw.keys():
        keys = ", ".join(sorted(map(str, raw))[:5]) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"expected nanoGPT's model and model_args in {path}, found {keys}")
    if not isinstance(raw["model"], dict) or not all(map(torch.is_tensor, raw["model"].values())):
        raise ValueError(f"expected a dictionary of tensors as model in {path}, found another one")
    tensors = pretrained.our_names(raw["model"], wrapper="_orig_mod.")
    if torch.is_tensor(loss := raw.get("best_val_loss")) and loss.numel() == 1:
        raw["best_val_loss"] = loss.item()
    about = stored_json.build(_Checkpoint, raw, path, ignore_unknown=True, remedy="save it again")
    args = about.model_args
    config = GPTConfig(
        block_size=args.block_size,
        vocab_size=args.vocab_size,
        n_layers=args.n_layer,
        n_heads=args.n_head,
        n_embed=args.n_embd,
        dropout=args.dropout,
        bias=args.bias,
    )
    model = pretrained.build(config, tensors, path)
    return model.eval(), about.iter_num, about.best_val_loss


def _write(
    out: Path, model: GPT, tokenizer: Tokenizer | None, write_card: Callable[[Path, str], str]
) -> list[str]:
    """Write the folder `out`, all or nothing; `tokenizer` is the model's, if known.

    `write_card` takes the folder being written and the comparison, and returns the model card.
    """
    vocab_size = tokenizer.n_vocab if tokenizer else model.config.vocab_size
    with atomic_folder(out) as temporary:
        save_model(temporary, model, vocab_size, tokenizer.eot if tokenizer else None)
        if tokenizer:
            save_tokenizer(temporary, tokenizer, model.config.block_size)
        comparison = compare(temporary, model, tokenizer)
        (temporary / "README.md").write_text(write_card(temporary, comparison), "utf-8")
    lines = [f"exported    {out}", f"compared    {comparison}, in transformers and here"]
    if padding := model.config.vocab_size - vocab_size:
        lines.append(f"cut         {padding} ids that the tokenizer does not have")
    if not tokenizer:
        lines.append(f"tokenizer   none: {vocab_size} ids are not GPT-2's, and the file has none")
    return [*lines, f"next        {script('eval.py')} {out}"]


def save_model(folder: Path, model: GPT, vocab_size: int, eot: int | None) -> None:
    """Write config.json, generation_config.json and model.safetensors into `folder`.

    Only the first `vocab_size` rows of the embedding are written: the others are padding. A model
    without biases gets zeros, which compute the same.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if not model.config.bias:
        tensors |= {
            name.removesuffix("weight") + "bias": torch.zeros(len(weight), dtype=weight.dtype)
            for name, weight in tensors.items()
            if not name.startswith(("wte", "wpe"))
        }
    tensors["wte.weight"] = tensors["wte.weight"][:vocab_size]
    stored = {
        PREFIX + name: (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous().cpu()
        for name, tensor in tensors.items()
    }
    try:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {folder}/model.safetensors ({error}): make room") from error
    config, generation = _configs(replace(model.config, vocab_size=vocab_size), eot)
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    # safetensors makes its files readable by the owner only.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _configs(config: GPTConfig, eot: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of config.json and generation_config.json. Only myGPT reads the key `bias`."""
    ids = {"bos_token_id": eot, "eos_token_id": eot}
    shape = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embed,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.n_hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bias": config.bias,
        "dtype": "float32",
    }
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    # Without max_length generated text would run past the last position; without pad_token_id
    # every call of generate would warn and take this id.
    return shape | dropout | ids, ids | {"pad_token_id": eot, "max_length": config.block_size}


def save_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write a byte-level BPE tokenizer in the format of Hugging Face's GPT-2.

    There, as in every GPT-2, `<|endoftext|>` in a text is that token; ours takes it as text.
    """
    tokens = tokenizer.vocabulary()
    vocabulary = {spelled(token): i for i, token in enumerate(tokens) if token}
    pairs = [(spelled(left), spelled(right)) for left, right in merges(tokens)]
    theirs = GPT2TokenizerFast(
        vocab=vocabulary | tokenizer.specials, merges=pairs, model_max_length=block_size
    )
    # By hand first: on a full disk this is an OSError, and the library's a bare Exception.
    text = theirs.backend_tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, "utf-8")
    theirs.save_pretrained(folder)


def compare(folder: Path, model: GPT, tokenizer: Tokenizer | None) -> str:
    """Open the folder with transformers, compare its logits with the model's, and say the result.

    Raises ValueError if tokens or logits differ.
    """
    if tokenizer:
        theirs_tokenizer = AutoTokenizer.from_pretrained(folder)
        # verbose=False: no warning that the text is longer than the context.
        ids = theirs_tokenizer(COMPARED_TEXT, verbose=False)["input_ids"]
        if ids != tokenizer.encode(COMPARED_TEXT):
            raise ValueError("transformers' tokens differ from the tokenizer's: nothing written")
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    if shows_progress:
        logging.enable_progress_bar()
    idx = _compared_tokens(model.config, tokenizer)  # (1, T)
    with torch.no_grad():
        logits, _ = model.eval()(idx)
        expected = logits[..., : theirs.config.vocab_size]  # (1, T, V)
        found = theirs(idx).logits  # (1, T, V)
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    text = (
        f"largest difference {difference:.1e} among logits of up to {largest:.1f}, "
        f"over {idx.size(1)} tokens"
    )
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ValueError(f"transformers' logits differ from ours ({text}): nothing written")
    return text


def _compared_tokens(config: GPTConfig, tokenizer: Tokenizer | None) -> Tensor:
    """Ids (1, T) that fill the context: the text over and over, or all ids in turn."""
    ids = tokenizer.encode(COMPARED_TEXT) if tokenizer else list(range(config.vocab_size))
    return torch.tensor([(ids * (config.block_size // len(ids) + 1))[: config.block_size]])
