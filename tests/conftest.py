"""For all tests: property tests are judged by what they find, not by how busy the machine is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """One thread and no pictures, for tests that train or evaluate small models."""
    from tests.training import one_thread  # torch: not for other tests

    with one_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset of random tokens."""
    from tests.dataset import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data") / "random").folder


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that nothing interrupted."""
    from tests.training import start

    run = tmp_path_factory.mktemp("straight")
    assert start(data, run) == 0
    return run
