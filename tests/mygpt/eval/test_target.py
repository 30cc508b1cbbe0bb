"""Which model a command line names."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mygpt import checkpoint, run_config
from mygpt.config import GPTConfig
from mygpt.eval import target
from mygpt.model import GPT
from mygpt.settings import TrainConfig

CPU = torch.device("cpu")
SHAPE = GPTConfig(block_size=8, vocab_size=19, n_layers=1, n_heads=1, n_embed=8)


def save_steps(run: Path, losses: dict[int, float | None]) -> GPT:
    """A run with a checkpoint of the same model at each step."""
    model = GPT(SHAPE)
    config = run_config.to_dict(TrainConfig(SHAPE, data=("data/some",)))
    for step, loss in losses.items():
        state = {"val_loss": loss, "config": config, "fingerprint": "f", "generations": {}}
        state |= {"loader": {}, "scaler": {}}
        checkpoint.save(run, step, model, {}, state)
    return model


def test_a_run_is_its_newest_or_best_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = save_steps(run, {1: 2.0, 2: 1.0, 3: None})
    newest = target.find(str(run))
    assert (newest.state["step"], newest.run) == (3, run)
    best = target.find(str(run), best=True)
    assert best.name == str(checkpoint.folder_of(run, 2))
    assert target.find(best.name, best=True) == best
    loaded = newest.load(CPU)
    assert not loaded.training
    assert torch.equal(loaded.wte.weight, model.wte.weight)
    facts = newest.identity(loaded)
    assert (facts["step"], facts["parameters"]) == (3, model.num_params())


def test_a_checkpoint_outside_a_run(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", {1: None})
    moved = checkpoint.folder_of(tmp_path / "run", 1).rename(tmp_path / "moved")
    found = target.find(str(moved))
    assert (found.state["step"], found.run) == (1, None)


def test_hugging_faces_format(tmp_path: Path) -> None:
    shape = {"vocab_size": 19, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "model")
    found = target.find(str(tmp_path / "model"))
    assert (found.config, found.run) == (None, None)
    model = found.load(CPU)
    assert model.config == SHAPE and not model.training
    assert found.identity(model)["step"] is None


def test_names_on_the_hub_are_told_from_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").mkdir()
    for name in ("gpt2", "owner/model"):
        assert target.find(name).name == name
    with pytest.raises(FileNotFoundError, match="expected a run with a checkpoint in log, found"):
        target.find("log")
    for path in ("log/typo", "a/b/c", str(tmp_path / "typo"), "../typo"):
        with pytest.raises(FileNotFoundError, match=r"expected a run in .*(typo|c), found no such"):
            target.find(path)
