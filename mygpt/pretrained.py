"""Models that are there already, read as our GPT: runs, checkpoints, Hugging Face's format.

`train.py --init-from` and `eval.py` read models through it. `mygpt.hub` writes such folders.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mygpt import checkpoint
from mygpt.config import GPTConfig, check_shapes
from mygpt.model import GPT
from shards import stored_json
from shards.manifest import TokenizerIdentity
from shards.tokenizer import BPE, GPT2, P50K, Tokenizer, tokenizer_beside
from shards.vocabulary import TOKENIZER_NAME

# Settings that change the function computed, with the values that are ours. The first of them is
# what a config.json without the key means.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
PREFIX = "transformer."  # before every name in a file
# Hugging Face's Conv1D stores these as (in, out).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Not parameters of ours: causal masks, which old files hold, and the head, tied to wte.
LEFT_OUT = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


def from_pretrained(
    name_or_folder: str | Path, block_size: int | None = None, dropout: float = 0.0
) -> GPT:
    """Load a run's newest checkpoint, a checkpoint, or a GPT-2 in Hugging Face's format.

    That is a folder with `config.json` and `model.safetensors` (or several `model-*.safetensors`),
    or a name on the hub ("gpt2"). `block_size` keeps only the first positions. The weights are
    float32, on the CPU. Raises FileNotFoundError or ValueError, in one line, if it is missing,
    damaged or not a GPT-2.
    """
    if checkpoint.is_ours(path := Path(name_or_folder)):
        folder = checkpoint.find(path)
        shape = checkpoint.read_state(folder)["config"]["model"]
        config = stored_json.build(GPTConfig, shape, folder / "state.json")
        tensors = checkpoint.load_weights(folder)
    else:
        folder = _folder(name_or_folder)
        config, tensors = _without_zero_biases(read_config(folder), _read(folder))
    positions = config.block_size
    if block_size is not None and block_size > positions:
        raise ValueError(
            f"expected a block size of at most {positions}, the positions of the model in "
            f"{folder}, found {block_size}: give --block-size {positions}"
        )
    config = replace(config, block_size=block_size or positions, dropout=dropout)
    if "wpe.weight" in tensors:
        tensors["wpe.weight"] = tensors["wpe.weight"][: config.block_size].clone()
    return build(config, tensors, folder)


def _without_zero_biases(
    config: GPTConfig, tensors: dict[str, Tensor]
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Leave out the biases of a model that has none, unless an export was trained on elsewhere."""
    biases = {name for name in tensors if name.endswith("bias")}
    if config.bias or any(tensors[name].any() for name in biases):
        return replace(config, bias=True), tensors
    return config, {name: tensor for name, tensor in tensors.items() if name not in biases}


def read_config(folder: Path) -> GPTConfig:
    """Read the model's shape from `folder/config.json`; ValueError if that is not a GPT-2."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json: name a folder of Hugging Face's format"
        )
    remedy = "fetch or export it again"
    values = stored_json.parse(path.read_bytes(), path, remedy)
    if (model_type := values.get("model_type")) != "gpt2":
        raise ValueError(f"{path}: expected model_type gpt2, found {model_type}: take a GPT-2")
    for key, allowed in SUPPORTED.items():
        if (value := values.get(key, allowed[0])) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"{path}: expected {key} {expected}, found {value}: not supported")
    shape = {
        "block_size": values.get("n_positions", 1024),
        "vocab_size": values.get("vocab_size", 50257),
        "n_layers": values.get("n_layer", 12),
        "n_heads": values.get("n_head", 12),
        "n_embed": values.get("n_embd", 768),
        "n_hidden": 0 if values.get("n_inner") is None else values["n_inner"],
        "bias": values.get("bias", True),  # only exports of myGPT have the key
    }
    return stored_json.build(GPTConfig, shape, path, remedy=remedy)


def read_tokenizer(name_or_folder: str | Path) -> Tokenizer | None:
    """Return the tokenizer of such a model; None if there is no `tokenizer.json` beside it.

    Raises FileNotFoundError as `from_pretrained`, and ValueError for one of another kind.
    """
    folder = _folder(name_or_folder)
    return tokenizer_beside(folder) if (folder / TOKENIZER_NAME).is_file() else None


def other_tokenizer(name_or_folder: str | Path, identity: TokenizerIdentity) -> Tokenizer | None:
    """Return the tokenizer of such a model if it is known to be another than `identity`.

    Without a `tokenizer.json` beside it, a run of ours has GPT-2's or one that is stored nowhere,
    and of any other model it is unknown.
    """
    folder = _folder(name_or_folder)
    is_stored = identity.name.startswith((P50K, BPE))
    if not (folder / TOKENIZER_NAME).is_file() and not (is_stored and checkpoint.is_ours(folder)):
        return None
    found = tokenizer_beside(folder)
    return found if found.identity != identity else None


def check_vocabulary(
    name_or_folder: str | Path, identity: TokenizerIdentity, remedy: str = ""
) -> None:
    """Raise ValueError if such a model is known to have another tokenizer than the dataset's."""
    if other := other_tokenizer(name_or_folder, identity):
        raise ValueError(
            f"expected a dataset in the vocabulary of {name_or_folder}, {other.name}, found "
            f"{identity.name} {identity.hash[:12]}: prepare the text with --tokenizer "
            f"{GPT2 if other.name == GPT2 else name_or_folder}{remedy}"
        )


def _folder(name_or_folder: str | Path) -> Path:
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    from huggingface_hub import snapshot_download  # half a second that a folder does not cost

    try:
        files = ["config.json", "model*.safetensors", TOKENIZER_NAME]
        return Path(snapshot_download(str(name_or_folder), allow_patterns=files))
    except (OSError, ValueError) as error:  # no network, no such model, or not a valid name
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name_or_folder} is no folder here, and could not be fetched from the Hugging Face "
            f"hub ({reason}): name a folder with config.json and model.safetensors"
        ) from error


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors in the folder, under our names and in our layout."""
    files = sorted(file for file in folder.glob("model*.safetensors") if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors: save the model there with save_pretrained"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): fetch or export it again") from None
        tensors |= our_names(stored)
    return {name: t.T if name.endswith(TRANSPOSED) else t for name, t in tensors.items()}


def our_names(stored: Mapping[str, Tensor], wrapper: str = "") -> dict[str, Tensor]:
    """The parameters among stored tensors, without `PREFIX` and a wrapper's prefix before it."""
    tensors = {}
    for name, tensor in stored.items():
        name = name.removeprefix(wrapper).removeprefix(PREFIX)
        if not name.endswith(LEFT_OUT):
            tensors[name] = tensor
    return tensors


def build(config: GPTConfig, tensors: Mapping[str, Tensor], source: Path) -> GPT:
    """The model of `config` with these weights as float32; ValueError if one does not fit it."""
    with torch.device("meta"):  # shapes only: the weights are replaced, not initialised
        model = GPT(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    actual = {name: tensor.shape for name, tensor in tensors.items()}
    remedy = "its configuration describes another model"
    check_shapes(expected, actual, f"{source}: tensor", remedy)
    weights = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    model.load_state_dict({**weights, "lm_head.weight": weights["wte.weight"]}, assign=True)
    model.lm_head.weight = model.wte.weight
    return model
