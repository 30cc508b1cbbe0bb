"""The race is fair: the same weights, batches and validation. It notes what happened."""

from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch

from bench import feeds, train, worker
from bench.gpu import race, stages
from bench.gpu.runner import Setting, read
from bench.plain import PlainGPT
from mygpt.distributed import DistributedContext
from mygpt.settings import PRESETS, TrainConfig
from shards.manifest import Manifest
from shards.reader import EvalWindows
from tests.bench.support import SHAPE, InThisProcess

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A small model, and random text of its vocabulary."""
    monkeypatch.setitem(PRESETS, "tiny", ("small", TrainConfig(SHAPE)))
    monkeypatch.setattr(race, "VAL_TOKENS", 256)
    data = tmp_path / stages.STDLIB
    data.mkdir()
    feeds.build(data, 20_000, 1, SHAPE.vocab_size)
    return Setting("race", "tiny", "cpu", tmp_path, tmp_path, ends=2e9)


def config_of(setting: Setting, steps: int = 50) -> TrainConfig:
    return race.config_of(setting, stages.find_text(setting), steps)


def test_both_begin_with_the_same_weights_and_batches(setting: Setting) -> None:
    config = config_of(setting)
    validate = race.validation(config, ALONE)
    ours, plain = (build(config, ALONE) for build in (race.ours, race.plain))
    assert validate(ours.model) == pytest.approx(validate(plain.model), abs=1e-5)
    assert ours.step() == pytest.approx(plain.step(), abs=1e-5)


def test_validation_is_the_models_own_loss(setting: Setting) -> None:
    model = PlainGPT(SHAPE, SHAPE.vocab_size + 5)  # padded, as on a GPU
    with torch.no_grad():
        model.wte.weight[SHAPE.vocab_size :] = -100.0
    own = PlainGPT(SHAPE, SHAPE.vocab_size)
    own.load_state_dict({name: own_part(tensor) for name, tensor in model.state_dict().items()})
    manifest = Manifest.load(stages.find_text(setting))
    windows = EvalWindows(manifest, "val", SHAPE.block_size)
    batch = torch.from_numpy(np.stack([windows[i] for i in windows.spread(256)])).long()
    assert batch.shape == (32, 9)
    expected = own(batch[:, :-1], batch[:, 1:]).item()
    assert race.validation(config_of(setting), ALONE)(model) == pytest.approx(expected)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[: SHAPE.vocab_size] if tensor.size(0) == SHAPE.vocab_size + 5 else tensor


def test_the_whole_race(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "Worker", InThisProcess)
    monkeypatch.setattr(race, "steps_in", lambda seconds, racer, warm, timed: 6)
    monkeypatch.setattr(race, "VALIDATIONS", 3)
    race.run(setting)
    found = list(read(setting.out))
    assert found[0]["racing_seconds"] == race.MOST["cpu"] and found[0]["data"] == stages.STDLIB
    for name in (race.OURS, race.PLAIN):
        own = [f for f in found if f.get("racer") == name]
        steps, vals = ([f for f in own if key in f] for key in ("loss", "val"))
        assert [f["step"] for f in steps] == [1, 2, 3, 4, 5, 6]
        assert [f["step"] for f in vals] == [2, 4, 6]
        seconds = [f["seconds"] for f in steps]
        assert seconds == sorted(seconds) and seconds[0] > 0
        assert found[-1]["steps"] == 6


def test_ours_has_the_recipe_of_small(setting: Setting) -> None:
    config = config_of(setting, 400)
    small = PRESETS["small"][1]
    assert (config.optimizer, config.schedule) == (small.optimizer, small.schedule)
    assert (config.max_steps, config.warmup_steps) == (400, 20)
    assert config.total_batch_size == 2 * config.micro_batch * SHAPE.block_size


def test_steps_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    taken: list[int] = []

    def step() -> float:
        taken.append(1)
        return 0.0

    assert race.steps_in(30, race.Racer(torch.nn.Module(), step), warm=3, timed=5) == 75
    assert len(taken) == 8


def test_the_largest_dataset_that_is_there(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = replace(setting, preset="gpt2")
    assert stages.find_text(large, patience=0) == setting.work / stages.STDLIB
    (setting.work / stages.PACKAGES_TEXT).mkdir()
    (setting.work / stages.PACKAGES_TEXT / "manifest.json").touch()
    assert stages.find_text(large, patience=0) == setting.work / stages.PACKAGES_TEXT


def test_text_that_was_not_prepared_is(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happened to the stage that should have."""
    commands: list[Any] = []
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command[2:]))
    without = replace(setting, work=setting.work / "none", preset="gpt2")
    assert stages.find_text(without, patience=0) == without.work / stages.STDLIB
    assert commands == [["prepare", "stdlib", "--out", str(without.work / stages.STDLIB)]]


def test_text_is_prepared_the_smaller_first(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Any] = []
    corpus = type("Corpus", (), {"parquet": Path("corpus.parquet")})
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command[2:]))
    monkeypatch.setattr("bench.corpus.build", lambda megabytes: corpus)
    stages.text(setting)
    stages.text(replace(setting, preset="gpt2"))
    out = [str(setting.work / name) for name in (stages.STDLIB, stages.PACKAGES_TEXT)]
    small, large = (
        ["prepare", s, "--out", o] for s, o in zip(["stdlib", "corpus.parquet"], out, strict=True)
    )
    assert commands == [small, small, large]


def test_what_is_compiled_is_warmed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the plain step that is not compiled, and on a CPU nothing."""
    warmed: list[Any] = []
    monkeypatch.setattr(worker, "measure", lambda makers, *_: warmed.append(list(makers)))
    stages.warm(setting)
    stages.warm(replace(setting, device="cuda"))
    compiled = [name + train.COMPILED for name in (train.PLAIN, train.PEER)]
    assert warmed == [[train.PRODUCT, train.OURS, *compiled]]


def test_a_gpu_is_sampled_until_the_end(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(
        ["its clocks", "1980, 2619, 700.0, 61, 100, 99\n", "1755, 2619, 699.5, 62, 90, 98\n"]
    )
    monkeypatch.setattr("bench.table.machine", lambda *_: {})
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(
        "subprocess.run", lambda command, **_: CompletedProcess(command, 0, next(lines))
    )
    with pytest.raises(StopIteration):
        stages.machine(setting)
    found = list(read(setting.out))
    assert [f["nvidia-smi"] for f in found if "nvidia-smi" in f] == ["its clocks"]
    assert [f["sample"]["sm_mhz"] for f in found if "sample" in f] == [1980, 1755]
