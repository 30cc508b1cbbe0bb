"""HellaSwag as lm-evaluation-harness scores it, on the exported model, item by item."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eval as script
import train
from mygpt.hub import __main__ as hub
from shards import tokenizer
from shards.manifest import TokenizerIdentity
from tests.dataset import write_dataset

ROOT = Path(script.__file__).parent
MODEL = "--block-size 48 --n-layers 2 --n-heads 2 --n-embed 16 --vocab-size 50304"
BATCH = "--total-batch-size 96 --micro-batch 2 --device cpu --max-steps 4 --max-lr 0.3"
# The public file's columns. Marks in brackets, two spaces, a capital inside, a text too long.
ROWS = [
    ("Baking", "A woman [step] mixes flour.", "then she", "[title] bakes it [substeps]. She eats."),
    ("Running", "The man runs [title] fast", "He", "jumps  over it.|stops.|flies away, far|sings"),
    ("Chess", "Two people sit down", "the Boy", "moves a pawn|resigns at once|smiles|leaves"),
    ("Talking", "He says: " + "and so on " * 30, "They", "listen|do not listen at all|go|sleep"),
    ("日本", "東京 tower, it's 1984", "", "stands|does not stand|is very high indeed|is low"),
]
TASK = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function lm_eval.tasks.hellaswag.utils.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write_questions(path: Path) -> None:
    lines = []
    for number in range(4 * len(ROWS)):
        activity, ctx_a, ctx_b, endings = ROWS[number % len(ROWS)]
        row = {"ind": number, "activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b}
        row |= {"ctx": f"{ctx_a} {ctx_b}", "label": number // len(ROWS)}
        row["endings"] = (endings.split("|") * 4)[:4]
        row["endings"] = [f"{ending}{' or so' * i}" for i, ending in enumerate(row["endings"])]
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_every_item_has_the_harness_scores(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    gpt2, run, file = tokenizer.load("gpt2"), tmp_path / "run", tmp_path / "hellaswag.jsonl"
    identity = TokenizerIdentity(gpt2.name, gpt2.n_vocab, gpt2.eot, gpt2.hash)
    data = write_dataset(tmp_path / "data", tokenizer=identity).folder
    flags = ["tiny", "--data", str(data), "--log-dir", str(run), *MODEL.split(), *BATCH.split()]
    assert train.main(flags) == 0
    exported = tmp_path / "exported"
    assert hub.main(["export", str(run), str(exported)]) == 0
    write_questions(file)
    ask = ["--hellaswag", str(file), "--num-samples", "0", "--device", "cpu", "--json"]
    assert script.main([str(run), *ask]) == 0
    found = json.loads((run / "eval.json").read_text())["choices"]["hellaswag"]
    (items,) = run.glob("eval.hellaswag.*.jsonl")
    scores = {}
    for line in items.read_text().splitlines():
        record = json.loads(line)
        scores[record["item"]] = record["log_probabilities"]
    theirs = harness(exported, file, tmp_path)
    assert sorted(scores) == [sample["doc_id"] for sample in theirs["samples"]]
    for sample in theirs["samples"]:
        expected = [float(answer[0][0]) for answer in sample["resps"]]
        assert scores[sample["doc_id"]] == pytest.approx(expected, abs=1e-3)
    assert found["accuracy"] == pytest.approx(theirs["results"]["acc,none"])
    assert found["accuracy_norm"] == pytest.approx(theirs["results"]["acc_norm,none"])
    assert found["accuracy_se"] == pytest.approx(theirs["results"]["acc_stderr,none"])
    assert 0 < found["accuracy"] < 1


def harness(exported: Path, file: Path, folder: Path) -> dict:
    """lm_eval's results and samples, sorted, from its own command."""
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local.yaml").write_text(TASK.format(file=file))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += [f"pretrained={exported},dtype=float32", "--tasks", "local_hellaswag"]
    command += ["--include_path", str(folder / "tasks"), "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(folder / "out"), "--batch_size", "3"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=280, cwd=folder)
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return {
        "results": json.loads(results.read_text())["results"]["local_hellaswag"],
        "samples": sorted(lines, key=lambda sample: sample["doc_id"]),
    }
