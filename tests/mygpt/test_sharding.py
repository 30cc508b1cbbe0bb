"""Shares of a model over ranks: the same training as plain DDP, and whole tensors in checkpoints.

Two processes take every way of sharing in turn and write down what they found; here it is compared.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from mygpt import checkpoint, log, optim, sharding
from mygpt.config import GPTConfig
from mygpt.distributed import DistributedContext
from mygpt.evaluate import evaluate
from mygpt.model import GPT
from shards.manifest import Manifest
from shards.reader import EvalWindows
from tests.dataset import VOCABULARY, write_dataset
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("quick")

WAYS = ["none adamw", "optimizer adamw", "full adamw", "none muon", "optimizer muon", "zero adamw"]
FLAGS = f"""--vocab-size {VOCABULARY} --block-size 16 --n-layers 2 --n-heads 2 --n-embed 16
    --total-batch-size 128 --micro-batch 2 --device cpu --max-steps 8 --val-interval 4
    --checkpoint-interval 4 --optimizer adamw --schedule cosine --max-lr 3e-3 --min-lr 1e-4
    --val-tokens 160 --dropout 0.2 --keep 9""".split()
# What the two ranks train, one after the other: folder of the run, and flags.
RUNS = [
    ("plain", ""),
    ("optimizer", "--shard optimizer --stop-at 4"),
    ("optimizer", "--shard optimizer"),
    ("full", "--shard full"),
    ("halves", "--shard full --stop-at 4"),
    ("halves", "--shard full --gradient-checkpointing"),
    ("all ways", "--shard optimizer --stop-at 3"),
    ("all ways", "--shard full --stop-at 5"),
]

SCRIPT = """
import json
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
import train
from mygpt import distributed, optim, sharding
from mygpt.config import GPTConfig
from mygpt.distributed import init_distributed
from mygpt.generate import Sampling, generate
from mygpt.model import GPT
from mygpt import autotune

def build(shard, optimizer):
    torch.manual_seed(1)
    shape = {"block_size": 8, "vocab_size": 33, "n_layers": 2, "n_heads": 2, "n_embed": 8}
    model = GPT(GPTConfig(**shape, dropout=0.1))
    if shard == "full":
        sharding.shard_model(model, ranks)
    optimizers = optim.configure_optimizers(model, optimizer=optimizer)
    if shard == "optimizer":
        sharding.shard_optimizers(optimizers, ranks)
    if shard == "zero":
        groups = optimizers[0].param_groups
        make = lambda groups, **_: torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        optimizers = [ZeroRedundancyOptimizer(groups, make, lr=0.0)]
    return model, model if shard == "full" else DistributedDataParallel(model), optimizers

def take_steps(numbers, model, net, optimizers):
    for number in numbers:
        torch.manual_seed(100 * number + ranks.rank)
        x = torch.randint(0, 33, (2, 9))
        _, loss = net(x[:, :-1], x[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.step()
            optimizer.zero_grad()
        yield sharding.full_tensor(norm).item()

def full(*_):
    raise torch.OutOfMemoryError

def copies(tensors):
    return {name: t.clone() for name, t in sharding.full_tensors(tensors, ranks).items()}

def state(model, optimizers):
    memory = optim.state_tensors(optimizers, model)
    return copies(dict(model.named_parameters())), copies(memory)

def restored(shard, optimizer, weights, memory):
    model, net, optimizers = build(shard, optimizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(sharding.shard_like(weights[name], parameter))
    own = sharding.own_parameters(optimizers, ranks) if shard == "optimizer" else None
    optim.load_state_tensors(optimizers, model, sharding.shard_tensors(memory, model), own)
    return model, net, optimizers

torch.set_num_threads(1)
out, ways, runs, found = Path(sys.argv[1]), *map(json.loads, sys.argv[2:]), {}
with init_distributed("cpu") as ranks:
    for way in ways:
        shard, optimizer = way.split()
        job = build(shard, optimizer)
        norms = list(take_steps(range(3), *job))
        if shard == "zero":
            found[way] = norms, copies(dict(job[0].named_parameters()))
            continue
        own = optim.state_tensors(job[2], job[0]).values()
        kept = sum(getattr(t, "to_local", lambda: t)().numel() for t in own)
        weights, memory = state(job[0], job[2])
        found[way] = norms, weights, memory, kept
        torch.save(found[way][1:3], out / f"at-3-{ranks.rank}.pt")
        ranks.barrier()
        whole = torch.load(out / "at-3-0.pt")
        for shard in ("none", "optimizer", "full")[: 3 if optimizer == "adamw" else 2]:
            again = restored(shard, optimizer, *whole)
            norms = list(take_steps(range(3, 5), *again))
            found[f"{way} > {shard}"] = norms, *state(again[0], again[2])
        with sharding.unsharded(job[0]):
            found[f"{way} text"] = generate(job[0], [[1], [2, 3]], Sampling(9, temperature=0))
        norms = list(take_steps(range(3, 5), *job))
        found[f"{way} straight"] = norms, *state(job[0], job[2])
    model, _, optimizers = build("optimizer", "adamw")
    if not ranks.is_main:
        optim.allocate_state = full
    try:
        autotune.by_trying(model, optimizers, [1, 2], ranks)
    except ValueError as error:
        found["no room"] = str(error)
    torch.save(found, out / f"{ranks.rank}.pt")
    train.init_distributed = lambda *_: nullcontext(ranks)  # one process for all runs
    for flags in runs:
        assert train.main(flags) == 0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("data") / "random")


@pytest.fixture(scope="module")
def folder(data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks left what they found, and their runs."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = [arguments(data, folder / run, flags) for run, flags in RUNS]
    run_ranks(2, SCRIPT, str(folder), json.dumps(WAYS), json.dumps(runs))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """Of each rank: way → norms, weights, optimizer's tensors, ..."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def arguments(data: Manifest, run: Path, flags: str) -> list[str]:
    where = ["--data", str(data.folder), "--log-dir", str(run)]
    return ["tiny", *where, *FLAGS, *flags.split()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[n], other[n], rtol=0, atol=tolerance) for n in one)


@pytest.mark.parametrize("way", ["optimizer adamw", "full adamw", "optimizer muon"])
def test_training_is_that_of_plain_ddp(found: list[dict[str, Any]], way: str) -> None:
    shard, optimizer = way.split()
    # FSDP adds up in another order; moving a share of the weights is the same arithmetic.
    tolerance = 0 if shard == "optimizer" else 1e-5
    norms, weights, memory, _ = found[0][way]
    plain_norms, plain_weights, plain_memory, _ = found[0][f"none {optimizer}"]
    assert norms == pytest.approx(plain_norms, abs=tolerance)
    assert found[1][way][0] == norms
    assert same(weights, plain_weights, tolerance)
    assert same(memory, plain_memory, tolerance)


def test_shares_of_the_optimizer_are_torchs(found: list[dict[str, Any]]) -> None:
    norms, weights = found[0]["zero adamw"]
    assert norms == found[0]["optimizer adamw"][0]
    assert same(weights, found[0]["optimizer adamw"][1], 0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_rank_remembers_its_share(found: list[dict[str, Any]], optimizer: str) -> None:
    whole = found[0][f"none {optimizer}"][3]
    for way in ("optimizer", "full")[: 2 if optimizer == "adamw" else 1]:
        kept = [found[rank][f"{way} {optimizer}"][3] for rank in range(2)]
        assert sum(kept) == pytest.approx(whole, rel=0.02)  # each counts a few steps of its own
        assert max(kept) < 0.55 * whole


def test_no_rank_waits_for_one_whose_memory_is_full(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert found[rank]["no room"].startswith("not even --micro-batch 1 fits")


@pytest.mark.parametrize("way", ["none adamw", "optimizer adamw", "full adamw", "optimizer muon"])
def test_a_run_goes_on_any_way(found: list[dict[str, Any]], way: str) -> None:
    """From whole tensors: bitwise with the same sharding, to float error with another."""
    shard, optimizer = way.split()
    norms, weights, memory = found[0][f"{way} straight"]
    for other in ("none", "optimizer", "full")[: 3 if optimizer == "adamw" else 2]:
        tolerance = 1e-5 if "full" in (shard, other) and shard != other else 0
        again_norms, again_weights, again_memory = found[0][f"{way} > {other}"]
        assert again_norms == pytest.approx(norms, abs=tolerance)
        assert same(again_weights, weights, tolerance)
        assert same(again_memory, memory, tolerance)


def test_a_cut_model_writes_as_a_whole_one(found: list[dict[str, Any]]) -> None:
    """Between two steps, which are none the different for it, as the test above has seen."""
    texts = [found[rank][f"{way} text"] for way in ("none adamw", "full adamw") for rank in (0, 1)]
    assert len(texts[0]) == 2
    assert all(text == texts[0] for text in texts)


def test_checkpoints_hold_plain_whole_tensors(found: list[dict[str, Any]]) -> None:
    """And only the main rank is handed them."""
    config = GPTConfig(block_size=8, vocab_size=33, n_layers=2, n_heads=2, n_embed=8)
    shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    for way in ("none adamw", "optimizer adamw", "full adamw"):
        _, weights, memory, _ = found[0][way]
        assert {name: t.shape for name, t in weights.items()} == shapes
        assert all(type(t) is torch.Tensor for t in (*weights.values(), *memory.values()))
        assert len(memory) == 3 * len(shapes)
        assert found[1][way][1] == found[1][way][2] == {}
    model = GPT(config)
    optim.load_state_tensors(optim.configure_optimizers(model), model, found[0]["full adamw"][2])


# --- through the training loop


def last(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    folder = checkpoint.find(run)
    model = GPT(GPTConfig(**checkpoint.read_state(folder)["config"]["model"]))
    checkpoint.load_model(folder, model)
    return checkpoint.parameters(model) | checkpoint.load_optimizer(folder)


@pytest.mark.parametrize(("run", "tolerance"), [("optimizer", 0), ("full", 1e-5), ("halves", 1e-5)])
def test_a_sharded_run_is_the_plain_run(folder: Path, run: str, tolerance: float) -> None:
    plain, sharded = log.read(folder / "plain"), log.read(folder / run)
    assert sharded.train == pytest.approx(plain.train, abs=tolerance)
    assert sharded.val == pytest.approx(plain.val, abs=tolerance)
    norms = plain.series["norm"]
    assert sharded.series["norm"] == pytest.approx(norms, abs=max(tolerance, 1e-4))
    assert same(last(folder / run), last(folder / "plain"), 10 * tolerance)


def test_resume_of_a_cut_model_is_bitwise(folder: Path) -> None:
    """And computing activations twice changes no bit."""
    assert same(last(folder / "halves"), last(folder / "full"), 0)


def test_a_sharded_run_goes_on_alone(folder: Path, data: Manifest) -> None:
    """Shares of the optimizer, then of all, then one process without any; any model is whole."""
    run = folder / "all ways"
    assert checkpoint.steps(run)[-1] == 5
    assert train.main(arguments(data, run, "--micro-batch 4 --dropout 0.2")) == 0
    plain, moved = log.read(folder / "plain"), log.read(run)
    assert list(moved.train) == list(range(1, 9))
    up_to_5 = {step: loss for step, loss in plain.train.items() if step <= 5}
    assert {step: moved.train[step] for step in up_to_5} == pytest.approx(up_to_5, abs=1e-5)

    halves = checkpoint.folder_of(folder / "halves", 8)
    model = GPT(GPTConfig(**checkpoint.read_state(halves)["config"]["model"]))
    checkpoint.load_model(halves, model)
    windows = EvalWindows(data, "val", 16)
    subset = [windows[i] for i in windows.spread(160)]
    loss = evaluate(model, subset, DistributedContext(0, 0, 1, torch.device("cpu"))).mean
    assert loss == pytest.approx(log.read(folder / "halves").val[8], abs=2e-6)


ALONE = """
import json, sys, torch, train
torch.set_num_threads(1)
assert train.main(json.loads(sys.argv[1])) == 0
"""


@pytest.mark.slow
def test_a_sharded_run_moves_to_twice_the_ranks(data: Manifest, tmp_path: Path) -> None:
    """And its losses stay those of two ranks, to rounding, where no dropout is drawn by rank."""
    dry = "--dropout 0 --micro-batch 1"
    for run, ranks, flags in (
        ("two", 2, "--shard none"),
        ("four", 2, "--shard full --stop-at 4"),
        ("four", 4, "--shard full"),
    ):
        run_ranks(ranks, ALONE, json.dumps(arguments(data, tmp_path / run, f"{dry} {flags}")))
    two, four = log.read(tmp_path / "two"), log.read(tmp_path / "four")
    assert four.train == pytest.approx(two.train, abs=1e-5)
    assert four.val == pytest.approx(two.val, abs=1e-5)
    assert same(last(tmp_path / "four"), last(tmp_path / "two"), 1e-4)


def test_state_of_an_unknown_parameter_is_refused_in_one_line() -> None:
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layers=1, n_heads=1, n_embed=4))
    tensors = {"wte.weights.exp_avg": torch.zeros(8, 4)}
    optimizers = optim.configure_optimizers(model, optimizer="adamw")
    stored = sharding.shard_tensors(tensors, model)
    with pytest.raises(ValueError, match=r"optimizer state .*: expected"):
        optim.load_state_tensors(optimizers, model, stored)
