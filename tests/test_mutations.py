"""Damaged records: whatever is done to one, reading it gives the same result or a one-line refusal.

A mutation is seeded, so that a failure names the one to repeat: a key deleted or a value replaced
anywhere in the record, its file cut off, in another encoding, or with a flipped bit. Of records
without a checksum, and of those whose checksum was made to fit, a value of the right type and range
is as good as the one before; then only the refusal is tested.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval as evaluation
from mygpt import checkpoint, pretrained, run_config
from mygpt.distributed import DistributedContext
from mygpt.eval import multiple_choice
from mygpt.hub import export
from mygpt.log import RunLog
from mygpt.report import __main__ as report
from mygpt.report import run_summary
from prepare.options import Options
from prepare.plan import make_plan, read_plan
from shards import stored_json
from shards.commands import explain
from shards.manifest import Manifest, Source
from tests.mygpt.support import STEPS, gpt2_dataset, write_run

SILLY = [
    *(None, True, False, "", "x", "\x00", "é\ud800", [], [1], [[]], {}, {"x": 1}),
    *(0, -1, 1, 1.5, -0.0, 1e30, 1e308, 5e-324, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(float("nan"), float("inf"), -float("inf")),
]
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "cp037")
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """One kind of record: its file, and how it is read."""

    path: Path
    read: Read
    is_sealed: bool = False  # it has a checksum: no edit may go unnoticed
    is_log: bool = False  # damaged lines are passed over


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value, itself included."""
    yield at
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(part, (*at, key))


def edited(record: Any, rng: random.Random) -> Any:
    """Return the record with a key deleted, added, or a value replaced."""
    record = copy.deepcopy(record)
    at = rng.choice(list(paths_of(record)))
    if not at:
        return record | {"unknown": 1} if rng.random() < 0.5 else rng.choice(SILLY)
    *above, key = at
    parent = record
    for step in above:
        parent = parent[step]
    if rng.random() < 0.3:
        del parent[key]
    elif type(parent[key]) in (int, float) and rng.random() < 0.3:
        parent[key] *= rng.choice((-1, 2, 1000))
    else:
        parent[key] = rng.choice(SILLY)
    return record


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes of a file cut off, recoded, or with a flipped bit."""
    kind = rng.randrange(4)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return content.decode().encode(rng.choice(ENCODINGS), "replace")
    at = rng.randrange(len(content))
    flipped = content[at] ^ (1 << rng.randrange(8))
    return content[:at] + bytes([flipped]) + content[at + 1 :]


def mutated(content: bytes, rng: random.Random, is_sealed: bool) -> tuple[bytes, bool]:
    """Return another content of a file of JSON lines, and True if a checksum was made to fit."""
    if rng.random() < 0.4:
        return damaged(content, rng), False
    lines = content.splitlines() if content.count(b"\n{") else [content]
    at = rng.randrange(len(lines))
    record = edited(json.loads(lines[at]), rng)
    is_resealed = is_sealed and isinstance(record, dict) and rng.random() < 0.5
    if is_resealed:
        record = stored_json.with_checksum(record)
    lines[at] = json.dumps(record).encode()
    return b"\n".join(lines), is_resealed


def check(kind: Kind, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Read `count` mutations of the record; nothing but equal results and one-line refusals."""
    content, expected = kind.path.read_bytes(), kind.read(kind.path)
    refused = 0
    for seed in range(count):
        changed, is_resealed = mutated(content, random.Random(seed), kind.is_sealed)
        kind.path.write_bytes(changed)
        capsys.readouterr()
        try:
            found = kind.read(kind.path)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(error).strip(), f"mutation {seed} is refused without a message"
        except SystemExit as exit_:
            refused += 1
            assert exit_.code == 2, f"mutation {seed}"
            told = capsys.readouterr().err
            assert told.startswith("error: ") and told.count("\n") == 1, f"mutation {seed}: {told}"
        except Exception as error:
            raise AssertionError(f"mutation {seed} of {kind.path.name}: {error!r}") from error
        else:
            same = changed == content or np.all(found == expected)
            assert same or is_resealed or not kind.is_sealed, f"mutation {seed} went unnoticed"
    assert (refused == 0) if kind.is_log else (refused > count / 5)
    kind.path.write_bytes(content)


# --- the records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a finished and evaluated run with samples, an export, and a plan."""
    folder = tmp_path_factory.mktemp("mutations")
    data = replace(gpt2_dataset(folder / "data"), sources=(Source("a.txt", 1),))
    data.save(folder / "data")
    write_run(folder / "run", data, block_size=24)
    samples = [{"prompt": "a", "text": f"a{n}"} for n in range(3)]
    RunLog(folder / "run").write_samples(7, samples)
    record = run_config.read_run(folder / "run")
    assert record
    former = run_config.Earlier(7, data.fingerprint, {"data": 0})
    grown = replace(record, earlier=(former,))
    (folder / "run/config.json").write_text(json.dumps(grown.to_dict()))
    questions = [{"ctx": f"a {n}", "endings": ["b", "c"], "label": n % 2} for n in range(4)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    flags = ["--device", "cpu", "--choices", str(folder / "quiz.jsonl"), "--max-new-tokens", "2"]
    flags += ["--reference", str(folder / "run/checkpoints" / f"step_{STEPS // 2:08d}")]
    assert evaluation.main([str(folder / "run"), *flags]) == 0
    (folder / "gpt2").mkdir()
    (folder / "gpt2/config.json").write_text(json.dumps(export._configs(record.config.model, 1)[0]))
    (folder / "text.txt").write_text("some text\n" * 99)
    plan = make_plan(Options((str(folder / "text.txt"),), out=""))
    (folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    return folder


def manifest(folder: Path) -> Kind:
    return Kind(folder / "data/manifest.json", lambda path: Manifest.load(path.parent), True)


def plan(folder: Path) -> Kind:
    def read(path: Path) -> object:
        return read_plan(stored_json.parse(path.read_bytes(), path), str(path))

    return Kind(folder / "plan.json", read)


def config(folder: Path) -> Kind:
    return Kind(folder / "run/config.json", lambda path: run_config.read_run(path.parent), True)


def config_of_explain(folder: Path) -> Kind:
    def read(path: Path) -> object:
        return list(explain.rows_of(path.parent, 7, 0, [str(folder / "data")]))

    return Kind(folder / "run/config.json", read, True)


def config_of_report(folder: Path) -> Kind:
    """With the dataset elsewhere: that one can't be opened is told in the page."""
    return Kind(folder / "run/config.json", lambda path: page(path, folder / "data"), True)


def state(folder: Path) -> Kind:
    def read(path: Path) -> object:
        found = checkpoint.read_state(path.parent)
        run_config.from_dict(found["config"], path)
        assert checkpoint.best_of(path.parents[2])
        return found

    newest = checkpoint.folder_of(folder / "run", STEPS)
    return Kind(newest / "state.json", read, True)


def page(path: Path, *data: Path) -> object:
    run = path.parent
    assert report.main([str(run), *(f"--data={folder}" for folder in data)]) == 0
    return (run / "report.html").read_bytes()


def eval_json(folder: Path) -> Kind:
    return Kind(folder / "run/eval.json", page)


def samples(folder: Path) -> Kind:
    def read(path: Path) -> object:
        return [
            (s["step"] + 1, s["prompt"] + s["text"]) for s in run_summary.read_samples(path.parent)
        ]

    return Kind(folder / "run/samples.jsonl", read, is_log=True)


def questions(folder: Path) -> Kind:
    return Kind(folder / "quiz.jsonl", lambda path: multiple_choice.read(path, hellaswag=True))


def items(folder: Path) -> Kind:
    one = DistributedContext(0, 0, 1, torch.device("cpu"))
    spans = [slice(2 * n, 2 * n + 2) for n in range(4)]
    path = next((folder / "run").glob("eval.quiz.*.jsonl"))
    return Kind(path, lambda path: multiple_choice._stored(path, spans, one), is_log=True)


def hugging_face(folder: Path) -> Kind:
    return Kind(folder / "gpt2/config.json", lambda path: pretrained.read_config(path.parent))


KINDS = [
    *(manifest, plan, config, config_of_explain, config_of_report, state, eval_json, hugging_face),
    *(questions, items, samples),
]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_record_is_refused_in_one_line(
    kind: Callable[[Path], Kind], count: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(kind(folder), count, capsys)
