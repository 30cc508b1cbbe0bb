"""What may change when a run goes on, and the record that it is held against."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mygpt import run_config, settings
from mygpt.config import GPTConfig
from mygpt.log import RunLog
from mygpt.report import run_summary
from mygpt.settings import PRESETS, TrainConfig


def changed(config: TrainConfig, name: str) -> TrainConfig:
    """`config` with another value of one field, of the model's or of its own."""
    owner = config.model if name in {f.name for f in fields(GPTConfig)} else config
    value = getattr(owner, name)
    if isinstance(value, bool):
        other: object = not value
    elif isinstance(value, str):
        choices = {"optimizer": "muon", "schedule": "wsd", "device": "cpu", "generation": "latest"}
        other = choices.get(name, "other")
    elif isinstance(value, Path):
        other = Path("elsewhere")
    elif isinstance(value, tuple):
        other = ("elsewhere",)
    elif isinstance(value, float):
        other = value * 0.75 + 0.01 * (name == "dropout")
    else:
        other = value * 2 or 7
    if owner is config:
        return replace(config, **{name: other})
    return replace(config, model=replace(config.model, **{name: other}))


RUN = TrainConfig(data=("data/x",)).resolved(1000)
MODEL_FIELDS = [f.name for f in fields(GPTConfig)]
OWN_FIELDS = [f.name for f in fields(TrainConfig) if f.name not in ("model", "init_from")]


@pytest.mark.parametrize("name", MODEL_FIELDS + OWN_FIELDS)
def test_each_setting_is_either_free_or_fixed(name: str) -> None:
    asked = changed(RUN, name)
    if name in run_config.FREE:
        assert run_config.resume(RUN, asked) == asked
    else:
        flag = "max-steps 1000" if name in settings.LENGTHS else name.replace("_", "-")
        with pytest.raises(
            ValueError, match=f"holds a run with {name} .* asks for .*: give --(no-)?{flag}"
        ):
            run_config.resume(RUN, asked)


def test_what_is_left_open_is_as_the_run_has_it() -> None:
    stored = replace(RUN, time_budget=290.0, stop_at=10)
    asked = replace(PRESETS["gpt2"][1], log_dir=RUN.log_dir, max_steps=0, time_budget=290.0)
    asked = replace(asked, warmup_steps=0)
    asked = replace(asked, val_interval=0, checkpoint_interval=0)
    assert run_config.resume(stored, asked) == replace(stored, stop_at=0)


def test_retired_settings_of_a_stored_run_are_dropped() -> None:
    stored = run_config.to_dict(RUN) | {"fp8": True, "attention": "cudnn"}
    assert run_config.from_dict(stored) == RUN


def test_the_shape_of_a_model_that_came_from_elsewhere_is_not_asked_for_again() -> None:
    shape = GPTConfig(block_size=128, n_layers=2, n_heads=2, n_embed=32, dropout=0.1)
    stored = replace(RUN, model=shape, init_from="folder")
    asked = replace(RUN, init_from="folder", model=GPTConfig(dropout=0.1))
    assert run_config.resume(stored, asked) == stored
    with pytest.raises(ValueError, match="block_size 128, this command asks for 64"):
        run_config.resume(stored, replace(asked, model=GPTConfig(block_size=64, dropout=0.1)))
    with pytest.raises(ValueError, match="init_from folder, this command asks for other"):
        run_config.resume(stored, replace(asked, init_from="other"))
    with pytest.raises(ValueError, match="holds a run with"):
        run_config.resume(stored, RUN)


def test_another_time_budget_is_refused() -> None:
    stored = replace(RUN, time_budget=290.0)
    with pytest.raises(ValueError, match=r"time_budget 290.0, this command asks for 60"):
        run_config.resume(stored, replace(RUN, max_steps=0, time_budget=60))


def test_the_record_of_a_run_round_trips_and_knows_its_version(tmp_path: Path) -> None:
    assert run_config.read_run(tmp_path) is None
    earlier = run_config.Earlier(10, "dead", {"x": 2})
    record = run_config.RunRecord(RUN, "f00d", {"x": 3}, (earlier,))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record.to_dict()))
    assert run_config.read_run(tmp_path) == record
    path.write_text(json.dumps(record.to_dict() | {"version": 99}))
    with pytest.raises(ValueError, match=r"format mygpt-run version 2 in .*99"):
        run_config.read_run(tmp_path)
    path.write_text(json.dumps(record.to_dict() | {"config": {"colour": "red"}}))
    with pytest.raises(ValueError, match=r"config\.json was altered: its checksum is another"):
        run_config.read_run(tmp_path)
    unsealed = {k: v for k, v in record.to_dict().items() if k != "checksum"}  # as 0.2 wrote it
    path.write_text(json.dumps(unsealed))
    assert run_config.read_run(tmp_path) == record
    path.write_text(json.dumps(unsealed | {"config": {"colour": "red"}}))
    with pytest.raises(ValueError, match=r"found .*colour"):
        run_config.read_run(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"expected a JSON object in .*config\.json"):
        run_config.read_run(tmp_path)
    path.unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"checkpoints but no config\.json"):
        run_config.read_run(tmp_path)


def test_samples_are_read_back_once_and_torn_lines_not_at_all(tmp_path: Path) -> None:
    assert run_summary.read_samples(tmp_path) == []
    first, again = ({"prompt": "a", "text": f"a {word}"} for word in ("cat", "dog"))
    other = {"prompt": "b", "text": "b\nü"}
    RunLog(tmp_path).write_samples(5, [first, other])
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"step": 10, "prom')  # killed in the middle of a line
    RunLog(tmp_path).write_samples(5, [again])
    RunLog(tmp_path).write_samples(10, [first])
    expected = [{"step": 5, **again}, {"step": 5, **other}, {"step": 10, **first}]
    assert run_summary.read_samples(tmp_path) == expected
