"""The one rule for stored records: what is read, what is defaulted, and what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import stored_json

NAME = "RUN/config.json"


@dataclass(frozen=True)
class Model:
    layers: int
    bias: bool = True

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"expected layers from 1, found {self.layers}")


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 0


@dataclass(frozen=True)
class Settings:
    model: Model
    seed: int = 1
    rate: float = 0.5
    name: Annotated[str, "metadata of the command line"] = ""
    folder: Path = Path("log")
    kind: Literal["a", "b", 1] = "a"
    loss: float | None = None
    texts: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    listed: list[Part] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    anything: Any = None


def build(**values: object) -> Settings:
    return stored_json.build(Settings, {"model": {"layers": 2}, **values}, NAME)


def test_absent_fields_take_their_defaults() -> None:
    assert build() == Settings(Model(2))


FULL = Settings(
    model=Model(3, bias=False),
    seed=2**70,
    rate=2,
    name="ü\n",
    folder=Path("a/b"),
    kind="b",
    loss=1.5,
    texts=("x", "y"),
    parts=(Part("p", 1), Part("q")),
    listed=[Part("r", 2)],
    counts={"n": 1},
    anything=[{"x": None}],
)


def test_what_is_stored_is_built_again() -> None:
    values = json.loads(json.dumps(asdict(FULL) | {"folder": str(FULL.folder)}))
    assert stored_json.build(Settings, values, NAME) == FULL
    assert build(loss=None, rate=3).rate == 3


def test_retired_fields_are_ignored_at_any_depth() -> None:
    values = {"model": {"layers": 2, "fp8": True}, "fp8": 1, "attention": None}
    assert stored_json.build(Settings, values, NAME, retired={"fp8", "attention"}) == build()
    with pytest.raises(ValueError, match=r"found fp8: .*version"):
        stored_json.build(Settings, values, NAME, retired={"attention"})


def test_a_reader_of_few_fields_ignores_the_others() -> None:
    values = {"layers": 2, "other": [], "more": 1}
    assert stored_json.build(Model, values, NAME, ignore_unknown=True) == Model(2)


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"color": 1}, "fields of this version in .*found color"),
    ({"model": {"layers": 2, "x": 1}}, r"fields of this version in .*found model\.x"),
    ({"model": {}}, r"a value for model\.layers"),
    ({"model": {"layers": "2"}}, r"type int for model\.layers .*found '2'"),
    ({"model": {"layers": 0}}, "layers from 1, found 0"),
    ({"model": [2]}, r"an object for model .*found \[2\]"),
    ({"seed": True}, "type int for seed .*found True"),
    ({"seed": 1.0}, "type int for seed .*found 1.0"),
    ({"seed": None}, "type int for seed .*found None"),
    ({"rate": math.nan}, "type float for rate .*found nan"),
    ({"rate": -math.inf}, "type float for rate .*found -inf"),
    ({"rate": False}, "type float for rate .*found False"),
    ({"loss": "x"}, "type float for loss .*found 'x'"),
    ({"name": 1}, "type str for name .*found 1"),
    ({"folder": 1}, "type str for folder .*found 1"),
    ({"kind": "c"}, "'a' or 'b' or 1 for kind .*found 'c'"),
    ({"kind": True}, "'a' or 'b' or 1 for kind .*found True"),
    ({"texts": "x"}, "a list for texts .*found 'x'"),
    ({"texts": ["x", 1]}, r"type str for texts\[1\] .*found 1"),
    ({"parts": [{"name": "p"}, {"size": 1}]}, r"a value for parts\[1\]\.name"),
    ({"parts": [{"name": "p", "size": 1}, {"name": "q", "size": "1"}]}, r"parts\[1\]\.size"),
    ({"counts": [1]}, "an object for counts"),
    ({"counts": {"n": "1"}}, r"type int for counts\.n"),
    ({"name": ["x" * 1000]}, "type str for name .*found .{,80}: restore"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build(**values)
    assert NAME in str(caught.value) and "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(list(asdict(FULL))), value=json_values)
def test_no_value_ends_in_another_error(key: str, value: object) -> None:
    try:
        build(**{key: value})
    except ValueError as error:
        assert NAME in str(error) and "\n" not in str(error)


def test_many_plain_rows_are_checked_as_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, object]] = [{"name": f"p{i}", "size": i} for i in range(100)]
    built = build(parts=rows).parts
    assert built == tuple(Part(f"p{i}", i) for i in range(100))
    changes: list[Callable[[dict[str, object]], object]] = [
        lambda row: row.update(size=True),
        lambda row: row.update(other=1),
        lambda row: row.pop("name"),
    ]
    for change in changes:
        altered = [dict(row) for row in rows]
        change(altered[70])
        with pytest.raises(ValueError, match=r"parts\[70\]"):
            build(parts=altered)
    del rows[70]["size"]
    assert build(parts=rows).parts[70] == Part("p70")


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b'{"a": "\xff"}',
    b"{} {}",
    b'{"a": "\\ud800", "b": NaN}',
]


@pytest.mark.parametrize("content", [*DAMAGED, b"[" * 100_000, b'{"a": NaN, "b": 1' + b"0" * 40])
def test_damaged_json_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"expected a JSON object .*: restore it") as caught:
        stored_json.parse(content, NAME)
    assert NAME in str(caught.value) and "\n" not in str(caught.value)


def test_nan_is_read() -> None:
    assert math.isnan(stored_json.parse(b'{"val_loss": NaN}', NAME)["val_loss"])


@pytest.mark.parametrize(
    ("format_", "version"),
    [
        *(("mygpt-run", version) for version in (1, 4, True, "2", None)),
        *((other, 2) for other in (None, "other", ["mygpt-run"])),
    ],
)
def test_another_format_or_version_is_refused(
    tmp_path: Path, format_: object, version: object
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": format_, "version": version}), "utf-8")
    words = (
        rf"format mygpt-run version 2 or 3 in .*config\.json, found .*{version}.*: "
        "use the version of myGPT that wrote it, or start over"
    )
    with pytest.raises(ValueError, match=words) as caught:
        stored_json.read(path, "mygpt-run", (2, 3), "start over")
    assert "\n" not in str(caught.value)


def test_a_record_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    record = {"format": "mygpt-run", "version": 3, "config": {}}
    path.write_text(json.dumps(record), "utf-8")
    assert stored_json.read(path, "mygpt-run", (2, 3), "start over") == record
    with pytest.raises(FileNotFoundError):
        stored_json.read(tmp_path / "none", "mygpt-run", (2,), "start over")
