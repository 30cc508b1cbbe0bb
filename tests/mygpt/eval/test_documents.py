"""The document of every target, against a walk through the tokens one by one."""

from pathlib import Path

import numpy as np
import pytest

from mygpt.eval.documents import DocumentWindows
from shards.manifest import Manifest
from shards.reader import EvalWindows
from tests.sources import DOCUMENTS, write_sources


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_sources(tmp_path_factory.mktemp("data") / "sources")


def walked() -> list[int]:
    """The document of every target in order: that of the token before it."""
    owners, number = [], -1
    for shard in DOCUMENTS["val"]:
        tokens: list[int] = []
        for _, length, _, continued in shard:
            number += not continued
            tokens += [number] * length
        owners += tokens[:-1]
    return owners


def found(windows: DocumentWindows) -> list[int]:
    return [d for i in range(len(windows)) for d in windows.documents(i).tolist()]


@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 1000])
def test_each_target_belongs_to_the_document_of_the_token_before(
    data: Manifest, block_size: int
) -> None:
    windows = DocumentWindows([data], "val", block_size)
    assert found(windows) == walked()
    for i, window in enumerate(EvalWindows(data, "val", block_size)):
        assert np.array_equal(windows[i], window)
        assert len(windows.documents(i)) == len(window) - 1
    assert len(windows) == i + 1
    assert [w.tolist() for w in windows] == [windows[i].tolist() for i in range(len(windows))]


def test_a_document_in_two_shards_is_one(data: Manifest) -> None:
    windows = DocumentWindows([data], "val", 16)
    assert windows.n_documents == 7 == data.splits["val"].documents
    assert windows.text_bytes.tolist() == [100, 4, 0, 90 + 60, 45, 7, 11]
    assert windows.source.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert windows.text_bytes.sum() == data.splits["val"].text_bytes


def test_several_datasets_one_after_the_other(data: Manifest) -> None:
    windows = DocumentWindows([data, data], "val", 16)
    once = DocumentWindows([data], "val", 16)
    assert len(windows) == 2 * len(once)
    assert found(windows) == found(once) + [7 + document for document in found(once)]
    assert windows.dataset.tolist() == [0] * 7 + [1] * 7
    assert windows.source.tolist() == [*once.source, *(3 + once.source)]
    assert np.array_equal(windows[len(once)], once[0])
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_a_missing_index_is_said(data: Manifest, tmp_path: Path) -> None:
    other = write_sources(tmp_path / "other")
    other.path(other.splits["val"].shards[1].index).unlink()
    with pytest.raises(FileNotFoundError, match=r"val_00001\.docs\.parquet"):
        DocumentWindows([other], "val", 16)
