"""Weights in Hugging Face's GPT-2 format, both ways: their names, their layout, their files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mygpt.config import GPTConfig
from mygpt.model import GPT

_PREFIX = "transformer."
# Hugging Face's Conv1D holds these the other way round, (in, out).
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Old files hold the causal mask as well; the head is the embedding.
_LEFT_OUT = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


def load(folder: Path, config: GPTConfig) -> GPT:
    """The model of `config` with the weights in `folder`, float32, on the CPU.

    Of the positions the first `block_size` are taken. Biases that are zero throughout are left out
    of a model without biases; others give it biases. Raises FileNotFoundError without weights and
    ValueError, naming the first tensor, where they are another model's.
    """
    tensors = _read(folder, config)
    if not config.bias:
        biases = [name for name in tensors if name.endswith("bias")]
        if any(tensors[name].any() for name in biases):  # trained on, elsewhere, with biases
            config = replace(config, bias=True)
        else:
            tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
    with torch.device("meta"):  # the shapes alone: no time goes into weights to be replaced
        model = GPT(config)
    _check(folder, model, tensors)
    model.load_state_dict({**tensors, "lm_head.weight": tensors["wte.weight"]}, assign=True)
    model.lm_head.weight = model.wte.weight
    return model


def _read(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """All tensors of the folder under our names, in our layout."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors: save the model there with save_pretrained"
        )
    tensors = {}
    for file in files:
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): fetch or export it again") from None
        for name, tensor in stored.items():
            if not name.endswith(_LEFT_OUT):
                tensor = tensor.T if name.endswith(_TRANSPOSED) else tensor
                tensors[name.removeprefix(_PREFIX)] = tensor.float().contiguous()
    if "wpe.weight" in tensors:
        tensors["wpe.weight"] = tensors["wpe.weight"][: config.block_size].clone()
    return tensors


def _check(folder: Path, model: GPT, tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{folder}: tensor {name}: expected shape {expected.get(name, 'none')}, found "
                f"{found.get(name, 'none')}: its config.json describes another model"
            )


def save(folder: Path, model: GPT, vocab_size: int, eot: int | None) -> None:
    """Write config.json, generation_config.json and model.safetensors into `folder`.

    Of the vocabulary the first `vocab_size` rows are written: what a model has beyond its
    tokenizer is padding. Where the model has no biases zeros are, which is the same function.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if not model.config.bias:
        tensors |= _zero_biases(tensors)
    tensors["wte.weight"] = tensors["wte.weight"][:vocab_size]
    theirs = {
        _PREFIX + name: (tensor.T if name.endswith(_TRANSPOSED) else tensor).contiguous().cpu()
        for name, tensor in tensors.items()
    }
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    config, generation = _configs(replace(model.config, vocab_size=vocab_size), eot)
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    # safetensors lets nobody but the owner read its files.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _zero_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A bias for every weight but the two embeddings': as wide as what the weight gives."""
    return {
        name.removesuffix("weight") + "bias": torch.zeros(len(weight), dtype=weight.dtype)
        for name, weight in tensors.items()
        if not name.startswith(("wte", "wpe"))
    }


def _configs(config: GPTConfig, eot: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json and generation_config.json hold. `bias` is ours, and lost on nobody."""
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
    # Without a length, text that is to be generated would run past the positions there are; without
    # a token for padding, every call of generate would warn and take this one.
    return shape | dropout | ids, ids | {"pad_token_id": eot, "max_length": config.block_size}
