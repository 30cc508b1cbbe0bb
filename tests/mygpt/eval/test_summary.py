"""An evaluation as text: whole tables, nothing that Markdown would take for its own."""

from typing import Any

import pytest

from mygpt.eval import summary

SAMPLE = {
    "prompt": "a|b",
    "text": "a|b\n\nc  \n",
    "step": 5,
    "weights": "int8",
    "seed": 3,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
    "checkpoint": "log/x/step_5",
}


def of_loss(loss: float, error: float | None) -> dict[str, Any]:
    return {
        "loss": loss,
        "loss_se": error,
        "perplexity": 7.4,
        "tokens": 1234,
        "documents": 2,
        "bits_per_byte": loss / 3,
        "bits_per_byte_se": error,
        "text_bytes": 5678,
    }


def answered(accuracy: float) -> dict[str, Any]:
    return {
        "questions": 8,
        "accuracy": accuracy,
        "accuracy_se": 0.1,
        "chance": 0.25,
        "accuracy_norm": accuracy,
        "accuracy_norm_se": None,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    baseline = {"loss": 4.5, "perplexity": 90.0, "bits_per_byte": 3.0}
    sources = [{"name": f"part_{i}<b>.jsonl", **of_loss(2.0, 0.5)} for i in range(14)]
    return {
        "checkpoint": "log/x/step_5",
        "step": 5,
        "max_steps": 9,
        "parameters": 1_000_000,
        "data": "data/some",
        "fingerprint": "0123456789abcdef",
        "block_size": 8,
        "version": "mygpt 1",
        "device": "cpu",
        "precision": "float32",
        **of_loss(2.0, 0.125),
        "baselines": {"unigram": baseline, "uniform": baseline},
        "components": [],
        "sources": sources,
        "positions": {
            "bins": [
                {"from": 1, "to": 1, "loss": 3.0, "tokens": 4},
                {"from": 2, "to": 8, "loss": None, "tokens": 0},
            ]
        },
        "choices": {"hellaswag": answered(0.5)},
        "reference": {
            "checkpoint": "gpt2",
            "trained_on": None,
            "step": None,
            **of_loss(3.0, None),
            "difference": -1.0,
            "difference_se": 0.01,
            "choices": {"hellaswag": answered(0.3)},
        },
        "samples": [SAMPLE],
    }


def test_the_terminal(report: dict[str, Any]) -> None:
    lines = summary.text(report).splitlines()
    assert lines[0] == "checkpoint  log/x/step_5, step 5 of 9, 1,000,000 parameters"
    table = [line.split("  ") for line in lines if line.startswith(("this", "ref", "unigram"))]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in table]
    assert cells[0] == ["this model", "2.0000 ±0.1250", "7.40", "0.6667 ±0.1250"]
    assert cells[1] == ["reference: gpt2", "3.0000", "7.40", "1.0000"]
    assert cells[3] == ["this model minus the reference", "-1.0000 ±0.0100"]
    assert ["this model", "0.5000 ±0.1000", "0.5000", "8"] in cells
    assert "and 2 smaller ones, in eval.json" in lines
    assert all(line == line.rstrip() for line in lines)
    ends = [len(line) for line in lines if "±0.5000" in line]
    assert len(ends) == 12 and len(set(ends)) == 1  # columns are columns


def test_an_error_is_explained_where_there_is_one(report: dict[str, Any]) -> None:
    assert summary.text(report).count("± one standard error") == 2
    report |= {"loss_se": None, "bits_per_byte_se": None, "documents": 1, "sources": []}
    report["choices"]["hellaswag"] |= {"accuracy_se": None}
    del report["reference"]
    assert "±" not in summary.text(report)
    assert "1 document, " in summary.text(report)


def test_a_reference_trained_on_something_else_is_said(report: dict[str, Any]) -> None:
    report["reference"] |= {"trained_on": "fedcba9876543210"}
    assert "\nreference: gpt2, trained on fedcba987654  " in summary.text(report)
    report["reference"] |= {"trained_on": report["fingerprint"]}
    assert "trained on" not in summary.text(report)


def test_markdown(report: dict[str, Any]) -> None:
    text = summary.markdown(report)
    assert "| reference: gpt2 | 3.0000 | 7.40 | 1.0000 |" in text
    assert "| part\\_0\\<b>.jsonl |" in text
    assert "\n    a|b\n\n    c\n" in text
    for table in (part for part in text.split("\n\n") if part.startswith("|")):
        rows = [row.replace("\\|", "") for row in table.splitlines()]
        assert len({row.count("|") for row in rows}) == 1


def test_the_title_of_a_sample() -> None:
    assert summary.title(SAMPLE, 2) == (
        "sample 2, prompt 'a|b', temperature 0.7, top-k 50, top-p 0.9, seed 3, int8 weights, step 5"
    )
    plain = SAMPLE | {"top_k": 0, "top_p": 1.0, "weights": "fp32", "step": None}
    assert summary.title(plain, 1) == "sample 1, prompt 'a|b', temperature 0.7, seed 3"


def test_files_of_one_document_each_are_not_listed(report: dict[str, Any]) -> None:
    for source in report["sources"]:
        source["documents"] = 1
    assert "part_0" not in summary.text(report)


def test_without_losses_only_the_questions(report: dict[str, Any]) -> None:
    del report["loss"], report["reference"]
    text = summary.text(report)
    assert "nats per token" not in text
    assert "hellaswag" in text and "guessing" in text
