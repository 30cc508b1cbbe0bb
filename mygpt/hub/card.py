"""Model card of an exported model: README.md, as the Hugging Face hub shows it."""

from collections.abc import Iterator

from mygpt.config import GPTConfig
from mygpt.eval import summary
from mygpt.report.run_summary import RunSummary, first_to_last

MAX_ROWS = 20  # of the table of losses
_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- mygpt
---
"""
_USE = """## Use

    from transformers import pipeline
    print(pipeline("text-generation", "{name}")("Once upon a time")[0]["generated_text"])

In training every document began with `<|endoftext|>`: a prompt that starts a document should too.
The model was not trained to follow instructions, and nothing keeps it from repeating what is in its
training text.
"""


def of_run(name: str, about: RunSummary, comparison: str) -> str:
    """The card of a run's checkpoint."""
    parts = [
        f"{_HEADER}\n# {name}\n\n{_shape(about.config.model)} Trained with myGPT.\n",
        _USE.format(name=name),
        "## Data\n\n" + "\n".join(_data(about)) + "\n",
        "## Training\n\n" + "\n".join(_training(about)) + "\n",
        "## Evaluation\n\n" + _evaluation(about) + "\n",
        _compared(comparison),
    ]
    return "\n".join(parts)


def of_nanogpt(
    name: str, model: GPTConfig, step: int | None, loss: float | None, comparison: str
) -> str:
    """The card of a model imported from nanoGPT."""
    steps = "unknown" if step is None else f"{step:,}"
    told = "unknown" if loss is None else f"{loss:.4f} nats per token"
    parts = [
        f"{_HEADER}\n# {name}\n\n{_shape(model)}\n",
        f"## Training\n\nTrained with nanoGPT. Step: {steps}. Best validation loss recorded in its "
        f"checkpoint: {told}. The checkpoint does not say what it was trained on.\n",
        _compared(comparison),
    ]
    return "\n".join(parts)


def _compared(comparison: str) -> str:
    return f"## Equivalence\n\nLogits of transformers and myGPT compared at export: {comparison}.\n"


def _shape(model: GPTConfig) -> str:
    biases = "" if model.bias else " It has no biases: those in the file are zeros."
    return (
        f"A GPT-2 of {model.n_layers} layers, {model.n_heads} heads, width {model.n_embed} and "
        f"{model.block_size} tokens of context: {model.num_params:,} parameters.{biases}"
    )


def _data(about: RunSummary) -> Iterator[str]:
    """Yield the dataset's identity, and its contents if it can be opened."""
    yield f"- fingerprint: `{about.record.fingerprint}`"
    for former in about.record.earlier:
        yield f"- until step {former.until:,}: `{former.fingerprint}`"
    if about.dataset is None:
        yield "- the dataset was not available at export"
        return
    yield f"- tokenizer: {about.dataset.tokenizer.name}, `{about.dataset.tokenizer.hash}`"
    pairs = zip(about.dataset.components, about.dataset.manifests, strict=True)
    for component, manifest in pairs:
        train, val = manifest.splits["train"], manifest.splits["val"]
        weight = f", weight {component.weight:g}" if len(about.dataset.manifests) > 1 else ""
        yield (
            f"- {component.name} (generation {manifest.generation}{weight}): "
            f"{train.tokens:,} training tokens in {train.documents:,} documents; "
            f"{val.tokens:,} validation tokens in {val.documents:,} documents"
        )


def _training(about: RunSummary) -> Iterator[str]:
    config, history = about.config, about.history
    yield f"- step {about.step:,} of {config.max_steps:,}, {config.total_batch_size:,} tokens each"
    yield (
        f"- {config.optimizer}, {config.schedule} schedule from {config.max_lr:g} to "
        f"{config.min_lr:g}, weight decay {config.weight_decay:g}, dropout "
        f"{config.model.dropout:g}, seed {config.seed}"
    )
    if not history.val:
        return
    if (about.run / "loss.png").is_file():
        yield "\n![loss](loss.png)"
    yield "\n| step | training loss | validation loss, fixed subset |\n|---:|---:|---:|"
    validations = list(history.val.items())
    for step, loss in (validations[i] for i in first_to_last(len(validations), MAX_ROWS)):
        train = f"{history.train[step]:.4f}" if step in history.train else ""
        yield f"| {step:,} | {train} | {loss:.4f} |"


def _evaluation(about: RunSummary) -> str:
    """The tables of eval.md, with a note if they are of another step."""
    found = about.evaluation
    if found is None:
        return "Not evaluated on the whole validation split."
    tables = summary.markdown({**found, "samples": []}).removeprefix("# Evaluation").strip()
    other = f"Of step {found['step']}, not of this one.\n\n" if found["step"] != about.step else ""
    return other + tables
