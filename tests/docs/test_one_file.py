"""The product computes what docs/one_file.py computes: batches, initial weights, losses, samples.

The page shares no code with the product, so each is a check of the other.
"""

import ast
import json
import re
import shlex
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import eval as evaluation
import train
from mygpt.config import GPTConfig
from mygpt.model import GPT
from shards.loader import TokenLoader
from tests.dataset import VOCABULARY, write_dataset
from tests.shards.support import arange_dataset

pytestmark = pytest.mark.usefixtures("quick")

PATH = Path(train.__file__).parent / "docs" / "one_file.py"
ALLOWED = {"numpy", "torch", *sys.stdlib_module_names} - {"importlib", "runpy", "subprocess"}


def load() -> ModuleType:
    spec = spec_from_file_location("one_file", PATH)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = load()


# Shards shorter than a block of 16, of a single token, and of whole blocks are among them.
LENGTHS = {"train": (1500, 9, 1003), "val": (200, 33, 1, 131, 16)}
TARGETS = sum(LENGTHS["val"]) - 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random", LENGTHS).folder


# --- The page itself


def foreign_imports(source: str) -> set[str]:
    """Top-level modules that a source imports anywhere, other than those allowed."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Name) and node.id == "__import__":
            names.add(node.id)
    return {name.partition(".")[0] for name in names} - ALLOWED


def test_the_page_is_short_and_stands_alone() -> None:
    source = PATH.read_text("utf-8")
    assert len(source.splitlines()) <= 300
    assert not foreign_imports(source)


@pytest.mark.parametrize(
    "line",
    [
        "import shards.loader",
        "import numpy, mygpt",
        "from mygpt.model import GPT",
        "def f():\n    from prepare import plan",
        "from . import train",
        "import importlib",
        "__import__('mygpt')",
    ],
)
def test_an_import_of_the_project_would_be_seen(line: str) -> None:
    assert foreign_imports(line)


# --- Batches


def check_batches(folder: Path, c: Any, world_size: int, epochs: float = 2.3) -> None:
    """Every rank's batches over some epochs, from the first one."""
    shards = page.open_dataset(folder)[1]["train"]
    for rank in range(world_size):
        loader = TokenLoader(
            folder, "train", c.micro_batch_size, c.block_size, rank, world_size, c.seed
        )
        windows = epochs * loader.windows_per_epoch
        count = int(windows / (c.micro_batch_size * world_size)) + 1
        expected = page.batches(shards, c, rank, world_size)
        for (x, y), (x_page, y_page) in islice(zip(loader, expected, strict=False), count):
            assert torch.equal(x, x_page)
            assert torch.equal(y, y_page)


@pytest.fixture(scope="module", params=[(101,), (65, 65, 65), (3, 64, 1, 250, 17, 33, 16, 2, 129)])
def numbered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of these shards, in which no token id occurs twice."""
    return arange_dataset(tmp_path_factory.mktemp("numbered"), request.param).folder


@pytest.mark.parametrize("block_size", [1, 8, 13])
@pytest.mark.parametrize("seed", [0, 1337, 2**63 - 1])
@pytest.mark.parametrize("world_size", [1, 2])
def test_same_batches(numbered: Path, block_size: int, seed: int, world_size: int) -> None:
    c = page.Config(block_size=block_size, micro_batch_size=3, seed=seed)
    check_batches(numbered, c, world_size, epochs=3.2)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    block_size=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_same_batches_for_any_shards(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    block_size: int,
    batch_size: int,
    world_size: int,
    seed: int,
) -> None:
    if max(lengths) <= block_size:
        lengths.append(block_size + 1)
    folder = arange_dataset(tmp_path_factory.mktemp("any"), lengths).folder
    c = page.Config(block_size=block_size, micro_batch_size=batch_size, seed=seed)
    check_batches(folder, c, world_size)


@settings(max_examples=40)
@given(position=st.integers(0, 2**62), seed=st.integers(0, 2**63 - 1))
def test_same_window_at_any_position(data: Path, position: int, seed: int) -> None:
    loader = TokenLoader(data, "train", 1, 16, seed=seed)
    loader.load_state_dict(loader.state_dict() | {"position": position})
    x, y = next(loader)
    c = page.Config(block_size=16, seed=seed)
    window = page.window_at(position, page.open_dataset(data)[1]["train"], c)
    assert np.array_equal(torch.cat([x[0], y[0, -1:]]), window)


# --- Training

# The page's own settings on a smaller model; gradients are clipped in every step.
SMALL = {
    "vocab_size": VOCABULARY,
    "block_size": 16,
    "n_layers": 2,
    "n_heads": 2,
    "n_embed": 64,
    "max_steps": 20,
    "total_batch_size": 256,
}
# No setting at its default; gradients are clipped in some of the steps and not in others.
OTHER = SMALL | {
    "n_layers": 3,
    "n_heads": 4,
    "n_embed": 16,
    "seed": 7,
    "micro_batch_size": 2,
    "max_lr": 8e-3,
    "min_lr": 2e-3,
    "warmup_steps": 4,
    "weight_decay": 1.5,
    "betas": (0.8, 0.9),
    "grad_clip": 0.75,
    "val_tokens": 100,
}


def run_product(data: Path, run: Path, options: dict[str, Any]) -> list[str]:
    """Run the page's train.py command with other options; return the lines of the log."""
    command = re.search(r"^    python (train\.py (?:.*\\\n)*.*)$", page.__doc__ or "", re.MULTILINE)
    assert command
    words = shlex.split(command[1].replace("\\\n", " "))[1:]
    words[words.index("--data") + 1] = str(data)
    words[words.index("--log-dir") + 1] = str(run)
    for name, value in options.items():
        if name == "betas":
            words += ["--beta1", str(value[0]), "--beta2", str(value[1])]
        else:
            flag = name.replace("micro_batch_size", "micro_batch").replace("_", "-")
            words += [f"--{flag}", str(value)]
    assert train.main(words) == 0
    return (run / "log.txt").read_text("utf-8").splitlines()


def read_steps(lines: list[str]) -> dict[int, tuple[float, float, str]]:
    """Loss, gradient norm and learning rate of each step."""
    found = (re.match(r"step (\d+)/\d+  loss (\S+)  lr (\S+)  norm (\S+)", line) for line in lines)
    return {int(m[1]): (float(m[2]), float(m[4]), m[3]) for m in found if m}


def read_validations(lines: list[str]) -> dict[int, tuple[float, int]]:
    """Loss and number of targets of each validation."""
    found = (re.match(r"val (\d+)/\d+  loss (\S+)  tokens (\d+)", line) for line in lines)
    return {int(m[1]): (float(m[2]), int(m[3])) for m in found if m}


def check_steps(page_steps: dict[int, Any], log_steps: dict[int, Any]) -> None:
    """The log shows 6 decimals of a loss and 4 of a norm."""
    assert list(page_steps) == list(log_steps) == list(range(1, 21))
    for (loss, norm, lr), (log_loss, log_norm, log_lr) in zip(
        page_steps.values(), log_steps.values(), strict=True
    ):
        assert loss == pytest.approx(log_loss, abs=1e-5)
        assert norm == pytest.approx(log_norm, abs=2e-4)
        assert lr == log_lr


@pytest.fixture(scope="module")
def other_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the product with all of `OTHER`."""
    run = tmp_path_factory.mktemp("other") / "run"
    run_product(data, run, OTHER)
    return run


def trained_model(run: Path) -> Any:
    """The page's model with the weights that the product trained."""
    model = page.GPT(page.Config(**OTHER))
    weights = load_file(run / "checkpoints" / "step_00000020" / "model.safetensors")
    model.load_state_dict(weights | {"lm_head.weight": weights["wte.weight"]})
    return model


def test_the_page_prints_what_its_command_logs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run_product(data, tmp_path / "run", SMALL)
    small = page.Config(**SMALL)
    monkeypatch.setattr(page, "Config", lambda **options: replace(small, **options))
    capsys.readouterr()
    page.main(data)
    *printed, whole, sample = capsys.readouterr().out.splitlines()
    check_steps(read_steps(printed), read_steps(log))
    validations, logged = read_validations(printed), read_validations(log)
    assert list(validations) == [10, 20]
    for step, (loss, targets) in validations.items():
        assert (pytest.approx(loss, abs=1e-5), targets) == logged[step]
    # The split is so small that the subset is all of it.
    assert whole == f"whole validation split  loss {validations[20][0]:.6f}  tokens {TARGETS}"
    tokens = json.loads(sample.removeprefix("sample "))
    assert len(tokens) == 101 and tokens[0] == 0 and max(tokens) < VOCABULARY


def test_same_losses_with_other_settings(data: Path, other_run: Path) -> None:
    log = (other_run / "log.txt").read_text("utf-8").splitlines()
    c = page.Config(**OTHER)
    splits = page.open_dataset(data)[1]
    torch.manual_seed(c.seed)
    model = page.GPT(c)
    optimizer, batches = page.make_optimizer(model, c), page.batches(splits["train"], c)
    subset = page.eval_windows(splits["val"], c, c.val_tokens)
    steps, validations = {}, {}
    for step in range(20):
        loss, norm, lr = page.train_step(model, optimizer, batches, step, c)
        steps[step + 1] = (loss, norm, f"{lr:.3e}")
        if step % 2:
            validations[step + 1] = page.evaluate(model, subset)
    check_steps(steps, read_steps(log))
    norms = [norm for _, norm, _ in steps.values()]
    assert min(norms) < c.grad_clip < max(norms)
    logged = read_validations(log)
    assert list(validations) == list(logged)
    for step, (loss, targets) in validations.items():
        assert (pytest.approx(loss, abs=1e-5), targets) == logged[step]
    assert 0 < targets < TARGETS, "a part of the split"
    for name, weight in trained_model(other_run).named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], weight, atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", [1337, 2**40])
def test_same_initial_weights(data: Path, tmp_path: Path, seed: int) -> None:
    # One step at a rate that is too small to change any number but 0.
    still = {"seed": seed, "max_steps": 1, "warmup_steps": 1, "max_lr": 1e-30, "min_lr": 0}
    run_product(data, tmp_path, SMALL | still)
    weights = load_file(tmp_path / "checkpoints" / "step_00000001" / "model.safetensors")
    torch.manual_seed(seed)
    initial = dict(page.GPT(page.Config(**SMALL)).named_parameters())
    assert weights.keys() == initial.keys()
    for name, weight in initial.items():
        assert (weight - weights[name]).abs().max() < 1e-29, name


# --- Evaluation and sampling


def test_same_exact_loss(data: Path, other_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert evaluation.main([str(other_run), "--num-samples", "0", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    windows = page.eval_windows(page.open_dataset(data)[1]["val"], page.Config(**OTHER))
    loss, targets = page.evaluate(trained_model(other_run), windows)
    assert targets == report["tokens"] == TARGETS
    assert loss == pytest.approx(report["loss"], rel=1e-6)


def product_model(model: Any) -> GPT:
    """The product's model with the weights of the page's."""
    shape = {name: OTHER[name] for name in ("n_layers", "n_heads", "n_embed", "block_size")}
    product = GPT(GPTConfig(vocab_size=VOCABULARY, **shape))
    product.load_state_dict(model.state_dict())
    return product


@torch.no_grad()
def test_same_logits() -> None:
    torch.manual_seed(0)
    model = page.GPT(page.Config(**OTHER))
    for parameter in model.parameters():
        parameter.normal_(std=0.5)  # far from the start, where every activation is nearly linear
    idx = torch.randint(VOCABULARY, (4, 16))
    logits, _ = product_model(model)(idx)
    torch.testing.assert_close(model(idx), logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_samples_follow_the_product_model(other_run: Path) -> None:
    c, model = page.Config(**OTHER), trained_model(other_run)
    product = product_model(model)
    likeliest = page.generate(model, [0, 5], 40, c, temperature=1e-4)
    for end in range(2, 42):
        logits, _ = product(torch.tensor([likeliest[max(0, end - 16) : end]]))
        # At this temperature a token 5e-3 below the likeliest is drawn once in e^50 times.
        assert logits[0, -1].max() - logits[0, -1, likeliest[end]] < 5e-3
    assert page.generate(model, [0, 5], 40, c, temperature=5.0) != likeliest
