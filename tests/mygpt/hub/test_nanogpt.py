"""nanoGPT's ckpt.pt becomes the same model; nothing in it is run."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mygpt.config import GPTConfig
from mygpt.hub import __main__ as hub
from mygpt.hub.export import load_nanogpt
from mygpt.model import GPT
from mygpt.pretrained import from_pretrained

ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 20, "bias": False}


def checkpoint(vocab_size: int, prefix: str = "", **args: Any) -> tuple[dict[str, Any], GPT]:
    """As nanoGPT's train.py writes it, and the model that it is."""
    model_args = {**ARGS, "vocab_size": vocab_size, "dropout": 0.0, **args}
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=20, vocab_size=vocab_size, n_layers=2, n_heads=3, n_embed=24, bias=False
    )
    model = GPT(config).eval()
    tensors = {f"{prefix}transformer.{n}": p.detach() for n, p in model.named_parameters()}
    tensors[f"{prefix}lm_head.weight"] = model.wte.weight.detach()
    tensors[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 20, 20)
    raw = {
        "model": tensors,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": model_args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.25),
        "config": {"out_dir": "out", "learning_rate": 1e-3},
    }
    return raw, model


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_character_model(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, model = checkpoint(65, prefix)
    torch.save(raw, tmp_path / "ckpt.pt")
    assert hub.main(["import", str(tmp_path), str(tmp_path / "out")]) == 0
    assert "tokenizer   none" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    back = dict(from_pretrained(tmp_path / "out").named_parameters())
    assert back.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.named_parameters())
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Step: 2,000. Best validation loss recorded in its checkpoint: 3.2500" in card


def test_a_padded_gpt2_vocabulary_is_cut(tmp_path: Path) -> None:
    raw, model = checkpoint(50304)
    torch.save(raw, tmp_path / "ckpt.pt")
    assert hub.main(["import", str(tmp_path / "ckpt.pt"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    back = from_pretrained(tmp_path / "out")
    assert torch.equal(back.wte.weight, model.wte.weight[:50257])


class Evil:
    """What a checkpoint must not be able to do."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("was_here",)


def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**checkpoint(65)[0], "config": Evil()}, "ckpt.pt")
    with pytest.raises(ValueError) as error:
        load_nanogpt(Path("ckpt.pt"))
    assert "expected tensors and plain values in ckpt.pt, found" in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("was_here").exists()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    with pytest.raises(FileNotFoundError, match="expected nanoGPT's checkpoint at"):
        load_nanogpt(path)
    for content in (b"", b"not a pickle", b"PK\x03\x04 half an archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected tensors and plain values in"):
            load_nanogpt(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"expected nanoGPT's model and model_args .* weights"):
        load_nanogpt(path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    raw, _ = checkpoint(65, n_layer=3)
    torch.save(raw, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"tensor h\.2\.attn\.c_attn\.weight: expected shape"):
        load_nanogpt(tmp_path / "ckpt.pt")
    del raw["model_args"]["n_head"]
    torch.save(raw, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"expected a value for model_args\.n_head"):
        load_nanogpt(tmp_path / "ckpt.pt")
