"""Metrics of a run for TensorBoard and for Weights & Biases, both optional.

python train.py small --data data/web --tensorboard       writes RUN/tensorboard
python train.py small --data data/web --wandb my-project
"""

import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mygpt import run_config
from mygpt.settings import TrainConfig

Track = Callable[[int, Mapping[str, float]], None]  # (step, metrics by name)


def check(config: TrainConfig) -> None:
    """Raise ValueError if a tracker that the flags ask for is not installed."""
    requested = {"tensorboard": config.tensorboard, "wandb": bool(config.wandb)}
    for name, is_requested in requested.items():
        if is_requested and importlib.util.find_spec(name) is None:
            raise ValueError(f"--{name} needs {name}: get it with pip install 'mygpt[{name}]'")


@contextmanager
def open_trackers(config: TrainConfig, step: int, enabled: bool) -> Iterator[Track]:
    """Open the trackers that the flags ask for and yield one function that logs to all of them.

    A run resumed after `step` steps is resumed there too. Not `enabled`, it logs nothing.
    """
    with ExitStack() as stack:
        trackers: list[Track] = []
        if config.tensorboard and enabled:
            trackers.append(stack.enter_context(_tensorboard(config.log_dir, step)))
        if config.wandb and enabled:
            trackers.append(stack.enter_context(_wandb(config)))

        def track(step: int, metrics: Mapping[str, float]) -> None:
            for tracker in trackers:
                tracker(step, metrics)

        yield track


@contextmanager
def _tensorboard(run_dir: Path, step: int) -> Iterator[Track]:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what a killed run wrote of later steps.
    with SummaryWriter(run_dir / "tensorboard", purge_step=step + 1) as writer:

        def track(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        yield track


@contextmanager
def _wandb(config: TrainConfig) -> Iterator[Track]:
    import wandb

    run_dir = config.log_dir
    stored_id = run_dir / "wandb_id"  # so that a resumed run is one run there as well
    if not stored_id.is_file():
        stored_id.write_text(secrets.token_hex(4), "utf-8")
    with wandb.init(
        project=config.wandb,
        id=stored_id.read_text("utf-8"),
        name=run_dir.name,
        dir=run_dir,
        config=run_config.to_dict(config),
        resume="allow",
    ) as session:
        # Its own step counter refuses to go back, as it must for steps trained a second time.
        session.define_metric("*", step_metric="step")

        def track(step: int, metrics: Mapping[str, float]) -> None:
            session.log({"step": step, **metrics})

        yield track
