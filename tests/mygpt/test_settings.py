"""Flags, presets, and the arithmetic of accumulation and time."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt import command_line, run_config, schedule, settings, time_budget
from mygpt.config import GPTConfig
from mygpt.settings import PRESETS, TrainConfig


def parse(*args: str) -> TrainConfig:
    return command_line.parse(args, "Train.")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_to_itself_and_survives_json(name: str) -> None:
    config = parse(name)
    assert config == PRESETS[name][1]
    written = json.loads(json.dumps(run_config.to_dict(config)))
    assert run_config.to_dict(run_config.from_dict(written)) == run_config.to_dict(config)
    assert schedule.grad_accum_steps(config, world_size=1) >= 1


def test_without_a_preset_it_is_gpt2() -> None:
    assert parse() == PRESETS["gpt2"][1]
    assert parse("--seed", "5") == replace(PRESETS["gpt2"][1], seed=5)


def test_a_misspelt_preset_is_refused_with_its_neighbour() -> None:
    with pytest.raises(ValueError, match=r"'smal': did you mean small\?"):
        parse("smal")


def test_flags_are_flat_and_reach_the_model() -> None:
    config = parse("small", "--n-layers", "2", "--dropout", "0.3", "--no-bias", "--max_steps", "7")
    assert (config.model.n_layers, config.model.dropout, config.model.bias) == (2, 0.3, False)
    assert config.max_steps == 7


def test_n_hidden_follows_n_embed_unless_given() -> None:
    assert parse("--n-embed", "384").model.n_hidden == 4 * 384
    assert parse("--n-embed", "384", "--n-hidden", "3072").model.n_hidden == 3072


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("1h30m", 5400), ("2d1s", 172801), ("5m", 300)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert settings.seconds_of(text) == seconds
    assert parse("--max-time", text).max_time == seconds


@pytest.mark.parametrize("text", ["", "h", "1h30", "30m1h", "-5", "1 h", "inf", "1e3"])
def test_what_is_no_time_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--max-time={text}")
    assert "1h30m" in capsys.readouterr().err


def test_data_and_prompts_may_be_repeated() -> None:
    config = parse("--data", "web=0.7:data/web", "--data", "code=0.3:c", "--sample-prompt", "a b")
    assert config.data == ("web=0.7:data/web", "code=0.3:c")
    assert config.sample_prompt == ("a b",)


def test_each_way_to_say_how_long_stands_for_steps() -> None:
    steps = schedule.steps_of
    assert steps(parse("small", "--max-steps", "7"), [1]) == 7
    assert steps(parse("small", "--max-tokens", str(2**14 * 5)), [1]) == 5
    assert steps(parse("small", "--max-tokens", str(2**14 * 5 + 1)), [1]) == 6
    # 64 windows of 256 tokens in a step of 2**14
    assert steps(parse("small", "--epochs", "2.5"), [64 * 4]) == 10
    assert steps(parse("small", "--epochs", "1"), [64 * 4 + 1]) == 5
    assert steps(parse("small", "--epochs", "0.1"), [64 * 30]) == 3
    assert steps(parse("tiny"), [100]) == 0
    with pytest.raises(ValueError, match=r"several datasets: give --max-tokens"):
        steps(parse("small", "--epochs", "1"), [64, 64])


def test_the_length_of_a_run_is_given_once() -> None:
    assert parse("tiny").max_steps == 0
    steps = parse("tiny", "--max-steps", "30")
    assert (steps.max_steps, steps.time_budget) == (30, 0)
    budget = parse("gpt2", "--time-budget", "60")
    assert (budget.max_steps, budget.time_budget, budget.warmup_steps) == (0, 60, 0)
    epochs = parse("tiny", "--epochs", "2")
    assert (epochs.max_steps, epochs.time_budget, epochs.epochs) == (0, 0, 2)
    with pytest.raises(
        ValueError, match="--max-steps or --time-budget each give the length of the run: use"
    ):
        parse("gpt2", "--time-budget", "60", "--max-steps", "5")
    with pytest.raises(ValueError, match="--max-tokens or --epochs each give the length"):
        parse("gpt2", "--epochs", "1", "--max-tokens", "5")


def test_a_flag_counts_though_it_says_what_the_preset_says() -> None:
    config = parse("gpt2", "--max-steps", "5000", "--warmup-steps", "715")
    assert (config.max_steps, config.warmup_steps) == (5000, 715)
    for flags in (["--max-steps", "2000"], ["--max_steps=2000"]):
        with pytest.raises(ValueError, match="each give the length"):
            parse("small", *flags, "--time-budget", "1h")


def test_a_short_run_has_a_warmup_that_fits() -> None:
    assert parse("gpt2", "--max-steps", "40").resolved(40).warmup_steps == 2
    assert parse("gpt2", "--max-steps", "40", "--warmup-steps", "9").warmup_steps == 9


def test_unknown_flags_are_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("tiny", "--max-stepz", "3")
    assert exit_.value.code == 2
    assert "--max-steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n-embed 100", "n_embed must be a multiple of n_heads"),
        ("--micro-batch -1", "--micro-batch must be 0 to 1048576, got -1"),
        ("--max-steps -3", "--max-steps must be 0 to 1000000000, got -3"),
        ("--max-steps 0", "give --max-steps, --max-tokens, --epochs or --time-budget"),
        ("--max-tokens -1", "--max-tokens must be 0 to .*, got -1"),
        ("--keep-every -1", "--keep-every must be 0 to .*, got -1"),
        ("--skip-spikes inf", "--skip-spikes must be 0 to .*, got inf"),
        ("--max-steps 5 --warmup-steps 6", "--warmup-steps must be at most max_steps = 5, got 6"),
        ("--min-lr 1", "--min-lr must be 0 to 0.0006, got 1.0"),
        ("--beta2 1", r"--beta2 must be in \[0, 1\), got 1.0"),
        ("--grad-clip 0", "--grad-clip must be above 0"),
        ("--seed -1", "--seed must be 0 to"),
    ],
)
def test_impossible_values_are_refused_in_one_line(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(*flags.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--n-layers=2", "--n_embed=32", "--no-bias", "--vocab-size=60"])
def test_a_shape_beside_initial_weights_is_refused(flag: str) -> None:
    assert parse("tiny", "--init-from", "gpt2", "--block-size", "32", "--dropout", "0.1").init_from
    with pytest.raises(ValueError, match=r"--init-from and --.* each give the model's shape"):
        parse("tiny", "--init-from", "gpt2", flag)


def test_flags_are_read_without_torch() -> None:
    code = "import sys, mygpt.command_line, mygpt.log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- arithmetic


def test_the_124M_run_has_2_to_the_19_tokens_a_step() -> None:
    """The ancestor had 524277 in place of 2**19, which no batch divides."""
    config = PRESETS["gpt2"][1]
    assert config.total_batch_size == 2**19 == 524288
    assert schedule.grad_accum_steps(config, world_size=4) == 2**19 // (16 * 1024 * 4)
    with pytest.raises(ValueError, match="got 524277: nearest are 507904 or 524288"):
        schedule.grad_accum_steps(replace(config, total_batch_size=524277), world_size=1)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 9), st.integers(1, 10**5))
def test_accumulation_is_exact_or_names_values_that_are(
    micro_batch: int, block_size: int, world_size: int, total: int
) -> None:
    model = GPTConfig(block_size=block_size)
    config = TrainConfig(model, micro_batch=micro_batch, total_batch_size=total)
    piece = micro_batch * block_size * world_size
    try:
        assert schedule.grad_accum_steps(config, world_size) * piece == total
    except ValueError as error:
        assert total % piece
        nearest = str(error).split("nearest are ")[1].split(";")[0]
        for value in map(int, nearest.split(" or ")):
            schedule.grad_accum_steps(replace(config, total_batch_size=value), world_size)
            assert abs(value - total) < piece
        if "--micro-batch " in str(error):
            fits = replace(config, micro_batch=int(str(error).split("--micro-batch ")[1]))
            schedule.grad_accum_steps(fits, world_size)


@given(st.floats(1, 1e5), st.floats(1e-3, 10), st.floats(0, 10), st.integers(0, 500))
def test_steps_that_fit_fit(seconds: float, step: float, round_: float, interval: int) -> None:
    def cost(steps: int) -> float:
        return steps * step + round_ * (steps / interval if interval else settings.VALIDATIONS)

    steps = time_budget.steps_that_fit(seconds, step, round_, interval)
    assert steps == 1 or cost(steps) <= 0.95 * seconds * (1 + 1e-9) + (0 if interval else round_)
    assert steps >= 1
    assert cost(steps + 1) > 0.949 * seconds


@pytest.mark.parametrize("preset", PRESETS)
def test_initial_weights_take_settings_for_fine_tuning(preset: str) -> None:
    config, trained = parse(preset, "--init-from", "gpt2"), PRESETS[preset][1]
    assert (config.max_lr, config.min_lr) == (3e-5, 3e-6)
    assert (config.optimizer, config.schedule, config.warmup_steps) == ("adamw", "cosine", 0)
    assert (config.epochs, config.max_steps, config.time_budget) == (3, 0, 0)
    assert config.total_batch_size == min(trained.total_batch_size, 2**15)
    assert schedule.steps_of(config, [1000]) <= 3 * 1000
    assert schedule.grad_accum_steps(config, world_size=8 if preset.startswith("gpt2") else 1) >= 1
    assert config.log_dir == Path(f"log/{{data}}-{preset}-tuned")


def test_flags_change_the_settings_for_fine_tuning() -> None:
    flags = "--max-lr 1e-6 --optimizer muon --time-budget 60 --total-batch-size 65536 --log-dir x"
    config = parse("gpt2", "--init-from", "gpt2", *flags.split())
    assert (config.max_lr, config.min_lr, config.optimizer) == (1e-6, 1e-7, "muon")
    assert (config.epochs, config.time_budget, config.log_dir) == (0, 60, Path("x"))
    assert (config.total_batch_size, config.micro_batch) == (65536, 16)
    assert parse("gpt2", "--init-from", "gpt2", "--min-lr", "1e-5").min_lr == 1e-5


@pytest.mark.parametrize(
    ("seconds", "each", "expected"),
    [(290, 1.2, 10), (290, 12, 4), (290, 100, 1), (-5, 1, 1), (290, 0, 10)],
)
def test_validations_take_a_fifth_of_the_time_at_most(
    seconds: float, each: float, expected: int
) -> None:
    assert time_budget.validations_that_fit(seconds, each) == expected


def test_the_dataset_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m prepare"):
        settings.only_dataset(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
        if name == "one":
            assert settings.only_dataset(tmp_path) == tmp_path / "one"
    with pytest.raises(ValueError, match=r"2 datasets .*: choose with --data one of .*one, .*two"):
        settings.only_dataset(tmp_path)
