"""The model card of an exported model: README.md, as the Hugging Face hub shows it."""

from collections.abc import Iterator

from mygpt.config import GPTConfig
from mygpt.eval import summary
from mygpt.hub.nanogpt import Found
from mygpt.report import run_summary
from mygpt.report.run_summary import Facts

MOST_ROWS = 20  # of the loss curve in numbers
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

In training every document began with `<|endoftext|>`: a prompt that is to begin a document does
too. Nothing was done to make the model follow instructions, or to keep it from saying anything
that its training text says.
"""


def of_run(name: str, about: Facts, step: int, parameters: int, proof: str) -> str:
    """The card of the checkpoint at `step` of a run."""
    parts = [
        f"{_HEADER}\n# {name}\n\n{_shape(about.config.model, parameters)} Trained by myGPT.\n",
        _USE.format(name=name),
        "## Data\n\n" + "\n".join(_data(about)) + "\n",
        "## Training\n\n" + "\n".join(_training(about, step)) + "\n",
        "## Evaluation\n\n" + _evaluation(about, step) + "\n",
        f"## The same model\n\nLogits of transformers and of myGPT, compared at export: {proof}.\n",
    ]
    return "\n".join(parts)


def of_nanogpt(name: str, found: Found, proof: str) -> str:
    """The card of a model that came from nanoGPT."""
    step = "unknown" if found.step is None else f"{found.step:,}"
    loss = "unknown" if found.val_loss is None else f"{found.val_loss:.4f} nats a token"
    parts = [
        f"{_HEADER}\n# {name}\n\n{_shape(found.model.config, found.model.num_params())}\n",
        f"## Training\n\nTrained by nanoGPT. Step: {step}. Best validation loss as its checkpoint "
        f"has it: {loss}. What it was trained on the checkpoint does not say.\n",
        f"## The same model\n\nLogits of transformers and of myGPT, compared: {proof}.\n",
    ]
    return "\n".join(parts)


def _shape(model: GPTConfig, parameters: int) -> str:
    biases = "" if model.bias else " It has no biases: those in the file are zeros."
    return (
        f"A GPT-2 of {model.n_layers} layers, {model.n_heads} heads, {model.n_embed} wide, "
        f"{model.block_size} tokens of context: {parameters:,} parameters.{biases}"
    )


def _data(about: Facts) -> Iterator[str]:
    """Which dataset, and what is in it where it can be seen."""
    yield f"- fingerprint: `{about.fingerprint}`"
    for before in about.earlier:
        yield f"- until step {before['until']:,}: `{before['fingerprint']}`"
    if about.dataset is None:
        yield "- the dataset itself was out of reach at export"
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


def _training(about: Facts, step: int) -> Iterator[str]:
    config = about.config
    yield f"- step {step:,} of {config.max_steps:,}, {config.total_batch_size:,} tokens each"
    yield (
        f"- {config.optimizer}, {config.schedule} schedule from {config.max_lr:g} to "
        f"{config.min_lr:g}, weight decay {config.weight_decay:g}, dropout "
        f"{config.model.dropout:g}, seed {config.seed}"
    )
    if not about.history.val:
        return
    if (about.run / "loss.png").is_file():
        yield "\n![loss](loss.png)"
    yield "\n| step | training loss | validation loss, fixed subset |\n|---:|---:|---:|"
    validations = list(about.history.val.items())
    for at, loss in (validations[i] for i in run_summary.spread(len(validations), MOST_ROWS)):
        train = about.history.train.get(at)
        yield f"| {at:,} | {'' if train is None else f'{train:.4f}'} | {loss:.4f} |"


def _evaluation(about: Facts, step: int) -> str:
    """The tables of eval.md, said to be of another step where they are."""
    found = about.evaluation
    if found is None:
        return "Not evaluated over the whole validation split."
    other = "" if found["step"] == step else f"\n\nOf step {found['step']}, not of this one."
    return (
        summary.markdown({**found, "samples": []}).replace("# Evaluation", other.strip(), 1).strip()
    )
