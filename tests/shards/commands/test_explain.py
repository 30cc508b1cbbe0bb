"""`python -m shards explain`: rows of a step, checked against what the loader hands out."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import tokenizer
from shards.__main__ import main
from shards.loader import TokenLoader
from shards.manifest import Manifest, Source
from shards.mixture import Mixture
from tests.shards.support import grown, text_dataset, write_manifest, write_shard

gpt2 = tokenizer.load()
BLOCK, ROWS = 8, 6
WEB = [["alpha beta gamma delta " * 3, "short", "x y z " * 9], ["one two three four five six " * 4]]
CODE = [["def f(x):\n    return x + 1\n" * 4, "import os\n" * 7]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("data") / name for name in ("web", "code")}
    text_dataset(made["web"], WEB)
    text_dataset(made["code"], CODE)
    return made


def write_run(run: Path, specs: list[str], **more: Any) -> Path:
    """A run's folder as train.py leaves it."""
    mixture = Mixture.load(specs)
    config = {
        "data": specs, "seed": 7, "total_batch_size": ROWS * BLOCK, "shuffle_shards": 0,
        "model": {"block_size": BLOCK}, "micro_batch": 2, "max_steps": 20,
    }  # fmt: skip
    identity = {"fingerprint": mixture.fingerprint, "generations": mixture.generations}
    run.mkdir(exist_ok=True)
    record = {"format": "mygpt-run", "version": 2, "config": config | more.pop("config", {})}
    (run / "config.json").write_text(json.dumps(record | identity | more), "utf-8")
    return run


def explained(capsys: pytest.CaptureFixture[str], *args: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["explain", "--json", *map(str, args)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], words: str, *args: object) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["explain", *map(str, args)])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and not out and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("groups", [0, 1])
def test_rows_are_those_the_loader_handed_out(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], groups: int
) -> None:
    specs = [f"web=2:{folders['web']}", f"code=1:{folders['code']}"]
    run = write_run(tmp_path / "run", specs, config={"shuffle_shards": groups})
    loader = TokenLoader(specs, "train", ROWS, BLOCK, seed=7, shuffle_shards=groups)
    for step, (x, y) in enumerate(islice(loader, 5), 1):
        rows = explained(capsys, "--run", run, "--step", step)
        assert [row["row"] for row in rows] == list(range(ROWS))
        for row, first, targets in zip(rows, x, y, strict=True):
            ids = [*first.tolist(), int(targets[-1])]
            assert row["text"] == gpt2.decode(ids)
            whole = np.load(folders[row["source"]] / row["shard"])
            assert whole[row["token"] : row["token"] + BLOCK + 1].tolist() == ids
            check_pieces(row, ids)
        assert explained(capsys, "--run", run, "--step", step, "--row", 4) == [rows[4]]


def check_pieces(row: dict[str, Any], ids: list[int]) -> None:
    """That the pieces put together are the row."""
    texts = {"web": WEB, "code": CODE}[row["source"]]
    documents = [text for shard in texts for text in shard]
    rebuilt: list[int] = []
    for piece in row["pieces"]:
        shard = int(row["shard"][6:11])
        assert piece["file"] == f"texts/train_{shard:05d}"
        assert documents[piece["document"]] == texts[shard][piece["row"]]
        whole = [gpt2.eot, *gpt2.encode(documents[piece["document"]])]
        rebuilt += whole[piece["offset"] : piece["offset"] + piece["tokens"]]
    assert rebuilt == ids


def test_for_people(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [str(folders["code"])])
    assert main(["explain", "--run", str(run), "--step", "2", "--row", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("=== row 3: code, train_00000.npy from token ")
    assert "tokens of document" in out and ": texts/train_00000, byte" in out
    (row,) = explained(capsys, "--run", run, "--step", 2, "--row", 3)
    assert row["text"] in out
    assert main(["explain", "--run", str(run), "--step", "2"]) == 0
    assert capsys.readouterr().out.count("=== row ") == ROWS


def test_a_document_that_goes_on_over_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    first, second = gpt2.encode("a b c d e f g h i j"), gpt2.encode(" k l m n o p q r s t u v w")
    shards = [
        write_shard(folder, "train_00000", [gpt2.eot, *first], [(0, 0, 0, 19, False)]),
        write_shard(folder, "train_00001", second, [(0, 0, 19, 10, True), (5, 0, 29, 16, True)]),
    ]
    val = [write_shard(folder, "val_00000", [gpt2.eot, 1], [(0, 0, 0, 1, False)])]
    identity = gpt2.identity
    write_manifest(folder, {"train": shards, "val": val}, identity, [Source("long.txt", 45)])
    run = write_run(tmp_path / "run", [str(folder)])
    rows = explained(capsys, "--run", run, "--step", 1)
    for row in rows:
        assert {piece["document"] for piece in row["pieces"]} == {0}
        begin = row["token"]
        assert row["pieces"][0]["offset"] == begin, "counted in the shard"
        assert sum(piece["tokens"] for piece in row["pieces"]) == BLOCK + 1
    assert {row["shard"] for row in rows} == {"train_00000.npy", "train_00001.npy"}


def test_a_run_of_version_1_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [str(folders["web"])], version=1)
    refused(capsys, "use the version of myGPT that wrote it", "--run", run, "--step", 1)


def test_a_run_that_moved_on_to_a_later_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "web"
    text_dataset(folder, WEB)
    grown(Manifest.load(folder), (0, 1))
    before, after = Mixture.load([str(folder)], {"web": 0}), Mixture.load([str(folder)])
    old = {"until": 3, "fingerprint": before.fingerprint, "generations": before.generations}
    run = write_run(tmp_path / "run", [str(folder)], earlier=[old])
    assert after.fingerprint != before.fingerprint
    for step, generation in ((1, 0), (3, 0), (4, 1), (5, 1)):
        mixture = Mixture.load([str(folder)], {"web": generation})
        loader = TokenLoader(mixture, "train", ROWS, BLOCK, seed=7)
        loader.load_state_dict(loader.state_dict() | {"position": (step - 1) * ROWS})
        rows = explained(capsys, "--run", run, "--step", step)
        x, _ = next(loader)
        starts = [np.load(folder / r["shard"])[r["token"]] for r in rows]
        assert x[:, 0].tolist() == starts


def test_what_can_not_be_explained(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [str(folders["web"])])
    refused(capsys, "expected --step from 1 to 20, the last", "--run", run, "--step", 0)
    refused(capsys, "expected --step from 1 to 20, the last", "--run", run, "--step", 21)
    assert explained(capsys, "--run", run, "--step", 20)
    refused(capsys, "expected --row from 0 to 5, found 6", "--run", run, "--step", 1, "--row", 6)
    log = "step 8/20  loss 3.0\nskip step 9/20  loss nan\nval 10/20  loss 2.0\nstep 1"
    (run / "log.txt").write_text(log)
    assert explained(capsys, "--run", run, "--step", 9)
    refused(capsys, "from 1 to 9, the last step of", "--run", run, "--step", 10)
    (run / "log.txt").unlink()
    refused(capsys, "config.json", "--run", tmp_path / "none", "--step", 1)
    other = ("--data", str(folders["code"]))
    refused(capsys, "expected the dataset with fingerprint", "--run", run, "--step", 1, *other)
    assert explained(capsys, "--run", run, "--step", 1, "--data", folders["web"])
    (run / "config.json").write_text('{"config": {"seed": 1}}', "utf-8")
    refused(capsys, "expected format mygpt-run version 2", "--run", run, "--step", 1)
    (run / "config.json").write_text("{", "utf-8")
    refused(capsys, "expected a JSON object", "--run", run, "--step", 1)
    write_run(run, [str(folders["web"])], config={"seed": "7"})
    refused(capsys, "type int for config.seed", "--run", run, "--step", 1)


def test_control_characters_are_escaped_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "web"
    made = text_dataset(folder, [["\x1b]0;owned\x07 \x1b[2J\tand é\nanother line " * 4]])
    source = replace(made.sources[0], name="a\x1b[31m\n.txt")
    replace(made, sources=(source, *made.sources[1:])).save(folder)
    run = write_run(tmp_path / "run", [str(folder)])
    for command in (
        ["explain", "--run", run, "--step", 1],
        ["explain", "--run", run, "--step", 1, "--row", 0],
        ["show", folder, "--split", "train"],
        ["info", folder],
    ):
        capsys.readouterr()
        assert main(list(map(str, command))) == 0
        out = capsys.readouterr().out
        assert not set(out) & set(map(chr, (*range(9), *range(11, 32), 127)))
        assert "a\\x1b[31m\\n.txt" in out
    assert "\\x1b]0;owned\\x07 \\x1b[2J\tand é\nanother line" in show(folder, capsys)
    row = explained(capsys, "--run", run, "--step", 1)[0]
    assert "\x1b" in row["pieces"][0]["file"], "--json is for programs"


def show(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["show", str(folder), "--split", "train"]) == 0
    return capsys.readouterr().out


def test_an_error_names_a_file_without_its_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, "no\\x1b[2Jrun", "--run", tmp_path / "no\x1b[2Jrun", "--step", 1)
