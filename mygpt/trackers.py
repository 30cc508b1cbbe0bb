"""The figures of a run for TensorBoard and for Weights & Biases, which are both optional.

python train.py small --data data/web --tensorboard       writes RUN/tensorboard
python train.py small --data data/web --wandb my-project
"""

import importlib.util
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from mygpt import run_config
from mygpt.settings import TrainConfig


class Track(Protocol):
    """What takes the figures of a step, by name."""

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        """Show them."""


def check(config: TrainConfig) -> None:
    """Raise ValueError if what the flags ask for is not installed."""
    asked = {"tensorboard": config.tensorboard, "wandb": bool(config.wandb)}
    for name, is_asked in asked.items():
        if is_asked and importlib.util.find_spec(name) is None:
            raise ValueError(f"--{name} needs {name}: get it with pip install 'mygpt[{name}]'")


@contextmanager
def open_trackers(config: TrainConfig, step: int, enabled: bool) -> Iterator[Track]:
    """What the flags ask for, as one call; nothing of it on a rank where `enabled` is False.

    A run that goes on after `step` steps goes on there too.
    """
    with ExitStack() as stack:
        tracks: list[Track] = []
        if config.tensorboard and enabled:
            tracks.append(stack.enter_context(_tensorboard(config.log_dir, step)))
        if config.wandb and enabled:
            tracks.append(stack.enter_context(_wandb(config)))

        def track(step: int, figures: Mapping[str, float]) -> None:
            for one in tracks:
                one(step, figures)

        yield track


@contextmanager
def _tensorboard(run: Path, step: int) -> Iterator[Track]:
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run has written of later steps is not shown.
    with SummaryWriter(run / "tensorboard", purge_step=step + 1) as writer:

        def track(step: int, figures: Mapping[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

        yield track


@contextmanager
def _wandb(config: TrainConfig) -> Iterator[Track]:
    import wandb

    run = config.log_dir
    own_id = run / "wandb_id"  # so that a run that goes on is one run there as well
    if not own_id.is_file():
        own_id.write_text(secrets.token_hex(4), "utf-8")
    with wandb.init(
        project=config.wandb,
        id=own_id.read_text("utf-8"),
        name=run.name,
        dir=run,
        config=run_config.to_json(config),
        resume="allow",
    ) as session:
        # Steps that are trained again come a second time, which its own counter would refuse.
        session.define_metric("*", step_metric="step")

        def track(step: int, figures: Mapping[str, float]) -> None:
            session.log({"step": step, **figures})

        yield track
