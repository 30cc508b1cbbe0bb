"""GPT-2's published weights, or any GPT-2 saved by Hugging Face's library, as our GPT."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mygpt.config import GPTConfig
from mygpt.model import GPT

# Settings that would change the numbers, with the values under which the model is ours. The first
# is what a config.json that lacks the key means.
_SAME_MODEL: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# Hugging Face's Conv1D holds these the other way round, (in, out).
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Old files hold the causal mask as well; the head is the embedding.
_LEFT_OUT = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


def from_pretrained(
    name_or_folder: str | Path, block_size: int | None = None, dropout: float = 0.0
) -> GPT:
    """The GPT in a folder of Hugging Face's format, or of that name on its hub ("gpt2-medium").

    A folder holds `config.json` and `model.safetensors` (or several `model-*.safetensors`).
    `block_size` keeps only that many positions. The weights are float32, on the CPU. Raises
    FileNotFoundError or ValueError, in one line, for what is not there or no GPT-2.
    """
    folder = _folder(name_or_folder)
    config = read_config(folder, block_size, dropout)
    tensors = _tensors(folder, config)
    with torch.device("meta"):  # the shapes alone: no time goes into weights to be replaced
        model = GPT(config)
    _check(folder, model, tensors)
    model.load_state_dict({**tensors, "lm_head.weight": tensors["wte.weight"]}, assign=True)
    model.lm_head.weight = model.wte.weight
    return model


def read_config(folder: Path, block_size: int | None = None, dropout: float = 0.0) -> GPTConfig:
    """The shape that `folder/config.json` describes. Raises ValueError if that is no GPT-2."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: name a folder of Hugging Face's")
    values = json.loads(path.read_text("utf-8"))
    if (model_type := values.get("model_type")) != "gpt2":
        raise ValueError(f"{path}: expected model_type gpt2, found {model_type}: take a GPT-2")
    for key, allowed in _SAME_MODEL.items():
        if (value := values.get(key, allowed[0])) not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(f"{path}: expected {key} {wanted}, found {value}: myGPT has no other")
    positions = values.get("n_positions", 1024)
    if block_size is not None and block_size > positions:
        raise ValueError(
            f"{path}: block_size {block_size} asked for, the model has {positions} positions: "
            f"ask for at most {positions}"
        )
    return GPTConfig(
        block_size=block_size or positions,
        vocab_size=values.get("vocab_size", 50257),
        n_layers=values.get("n_layer", 12),
        n_heads=values.get("n_head", 12),
        n_embed=values.get("n_embd", 768),
        n_hidden=values.get("n_inner") or 0,
        dropout=dropout,
    )


def _folder(name_or_folder: str | Path) -> Path:
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    from huggingface_hub import snapshot_download  # half a second that a folder does not cost

    try:
        files = ["config.json", "model*.safetensors"]
        return Path(snapshot_download(str(name_or_folder), allow_patterns=files))
    except (OSError, ValueError) as error:  # no network, no such model, not even a name of one
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name_or_folder} is no folder here, and the Hugging Face hub does not give it "
            f"({reason}): name a folder with config.json and model.safetensors"
        ) from error


def _tensors(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """All tensors of the folder under our names, in our layout."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors: save the model there with save_pretrained"
        )
    tensors = {}
    for file in files:
        for name, tensor in load_file(file).items():
            if not name.endswith(_LEFT_OUT):
                tensor = tensor.T if name.endswith(_TRANSPOSED) else tensor
                tensors[name.removeprefix("transformer.")] = tensor.float().contiguous()
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
