import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from mygpt import checkpoint
from mygpt.config import GPT2_SHAPES
from mygpt.pretrained import from_pretrained, read_config
from tests.mygpt.support import STEPS, gpt2_dataset, write_run

TINY = {"vocab_size": 97, "n_positions": 20, "n_embd": 24, "n_layer": 2, "n_head": 3}


def save(folder: Path, **options) -> GPT2LMHeadModel:
    """A random GPT-2 of Hugging Face, saved; its weights are large enough for errors to show."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**TINY, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def assert_same_logits(ours, theirs, vocab: int = 97, tokens: int = 20) -> None:
    idx = torch.randint(0, vocab, (3, tokens))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"vocab_size": 101, "n_positions": 20, "n_embd": 35, "n_layer": 3, "n_head": 5},
        {"n_inner": 17, "activation_function": "gelu_pytorch_tanh", "n_head": 1},
        {"reorder_and_upcast_attn": True},  # the same numbers in float32
    ],
)
def test_logits_equal_hugging_faces(tmp_path, odd):
    theirs = save(tmp_path, **odd)
    ours = from_pretrained(str(tmp_path))
    assert ours.lm_head.weight is ours.wte.weight
    assert all(p.requires_grad and p.is_contiguous() for p in ours.parameters())
    assert_same_logits(ours, theirs, vocab=theirs.config.vocab_size)


def test_the_loss_equals_hugging_faces(tmp_path):
    theirs = save(tmp_path)
    idx = torch.randint(0, 97, (3, 20))
    _, loss = from_pretrained(tmp_path)(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss)


def test_a_run_and_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    model = write_run(run, gpt2_dataset(tmp_path / "data"), dropout=0.2, bias=False)
    half = from_pretrained(checkpoint.folder_of(run, STEPS // 2))
    idx = torch.randint(0, 50257, (2, 24))
    for found in (from_pretrained(run), from_pretrained(str(checkpoint.folder_of(run, STEPS)))):
        assert found.config == replace(model.config, dropout=0.0)
        assert found.lm_head.weight is found.wte.weight
        torch.testing.assert_close(found(idx)[0], model(idx)[0], rtol=0, atol=0)
    assert not half(idx)[0].equal(model(idx)[0])
    short = from_pretrained(run, block_size=8, dropout=0.1).eval()
    assert (short.config.block_size, short.config.dropout) == (8, 0.1)
    torch.testing.assert_close(short(idx[:, :8])[0], model(idx)[0][:, :8], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give --block-size 24"):
        from_pretrained(run, block_size=25)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="let train"):
        from_pretrained(tmp_path / "new")


def test_fewer_positions(tmp_path):
    theirs = save(tmp_path)
    ours = from_pretrained(tmp_path, block_size=8, dropout=0.1).eval()
    assert (ours.config.block_size, ours.config.dropout) == (8, 0.1)
    assert_same_logits(ours, theirs, tokens=8)
    with pytest.raises(ValueError, match=r"at most 20, .* found 21"):
        from_pretrained(tmp_path, block_size=21)


def test_a_model_in_several_files(tmp_path):
    theirs = save(tmp_path)
    theirs.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert_same_logits(from_pretrained(tmp_path / "split"), theirs)


def test_an_old_file(tmp_path):
    """As OpenAI's own on the hub: no prefix, the mask stored, the head not."""
    theirs = save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 20, 20)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    assert_same_logits(from_pretrained(tmp_path), theirs)


def test_half_precision_files_become_float32(tmp_path):
    save(tmp_path).half().save_pretrained(tmp_path)
    assert {p.dtype for p in from_pretrained(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", GPT2_SHAPES)
def test_the_published_sizes(tmp_path, name):
    """config.json as the hub has it: keys that say nothing of the shape, `n_ctx`, no n_inner."""
    shape = GPT2_SHAPES[name]
    published = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": shape.n_embed,
        "n_head": shape.n_heads,
        "n_layer": shape.n_layers,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_config(tmp_path) == shape


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "expected model_type gpt2, found llama"),
        ("activation_function", "relu", "expected activation_function gelu_new or gelu_py"),
        ("layer_norm_epsilon", 1e-6, "expected layer_norm_epsilon 1e-05, found 1e-06"),
        ("scale_attn_weights", False, "expected scale_attn_weights True, found False"),
        ("scale_attn_by_inverse_layer_idx", True, "expected scale_attn_by_inverse_layer_idx False"),
        ("tie_word_embeddings", False, "expected tie_word_embeddings True, found False"),
        ("n_layer", 3, "tensor h.2.attn.c_attn.bias: expected shape (72,), found none"),
        ("n_layer", 1, "tensor h.1.attn.c_attn.bias: expected shape none, found (72,)"),
        ("vocab_size", 98, "tensor wte.weight: expected shape (98, 24), found (97, 24)"),
    ],
)
def test_what_is_not_this_model_is_refused_in_one_line(tmp_path, key, value, message):
    save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError) as error:
        from_pretrained(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        from_pretrained(tmp_path)
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model-1.safetensors").mkdir()  # as little a file as a named pipe, which would hang
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        from_pretrained(tmp_path)


def test_a_damaged_file(tmp_path):
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .* fetch or export it"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gpt2-medium", "no/such/folder"])
def test_a_name_without_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        from_pretrained(name)
    assert f"{name} is no folder here" in str(error.value) and "\n" not in str(error.value)
