"""What may change when a run goes on, and the record that it is held against."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mygpt import runs
from mygpt.config import GPTConfig
from mygpt.settings import PRESETS, TrainConfig


def changed(config: TrainConfig, name: str) -> TrainConfig:
    """`config` with another value of one field, of the model's or of its own."""
    owner = config.model if name in {f.name for f in fields(GPTConfig)} else config
    value = getattr(owner, name)
    if isinstance(value, bool):
        other: object = not value
    elif name in ("optimizer", "schedule", "device"):
        other = {"optimizer": "muon", "schedule": "wsd", "device": "cpu"}[name]
    elif name in ("data", "log_dir"):
        other = Path("elsewhere")
    elif isinstance(value, float):
        other = value * 0.75 + 0.01 * (name == "dropout")
    else:
        other = value * 2
    if owner is config:
        return replace(config, **{name: other})
    return replace(config, model=replace(config.model, **{name: other}))


RUN = TrainConfig(data=Path("data/x")).resolved(1000)
MODEL_FIELDS = [f.name for f in fields(GPTConfig)]
OWN_FIELDS = [f.name for f in fields(TrainConfig) if f.name not in ("model", "time_budget")]


@pytest.mark.parametrize("name", MODEL_FIELDS + OWN_FIELDS)
def test_each_setting_is_either_free_or_fixed(name: str) -> None:
    asked = changed(RUN, name)
    if name in runs.FREE:
        if name != "stop_at":
            assert runs.continued(RUN, asked) == asked
    else:
        with pytest.raises(
            ValueError,
            match=f"holds a run with {name} .* asks for .*: give --(no-)?{name.replace('_', '-')}",
        ):
            runs.continued(RUN, asked)


def test_what_is_left_open_is_as_the_run_has_it() -> None:
    stored = replace(RUN, time_budget=290.0, stop_at=10)
    asked = replace(PRESETS["gpt2"][1], max_steps=0, time_budget=290.0, warmup_steps=0)
    asked = replace(asked, val_interval=0, checkpoint_interval=0)
    assert runs.continued(stored, asked) == replace(stored, stop_at=0)


def test_another_time_budget_is_refused() -> None:
    stored = replace(RUN, time_budget=290.0)
    with pytest.raises(ValueError, match=r"time_budget 290.0, this command asks for 60"):
        runs.continued(stored, replace(RUN, max_steps=0, time_budget=60))


def test_the_record_of_a_run_round_trips_and_knows_its_version(tmp_path: Path) -> None:
    assert runs.read_run(tmp_path) is None
    record = runs.RunRecord(RUN, "f00d", 3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record.to_json()))
    assert runs.read_run(tmp_path) == record
    path.write_text(json.dumps(record.to_json() | {"version": 99}))
    with pytest.raises(ValueError, match="expected format mygpt-run version 1, found mygpt-run 99"):
        runs.read_run(tmp_path)
    path.write_text(json.dumps(record.to_json() | {"config": {"colour": "red"}}))
    with pytest.raises(ValueError, match="unknown setting 'colour'"):
        runs.read_run(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        runs.read_run(tmp_path)
    path.unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"checkpoints but no config\.json"):
        runs.read_run(tmp_path)
