"""What `make readme` takes of the demo's output."""

import pytest

from tests.docs import readme

OUTPUT = """python -m prepare stdlib --out data/stdlib
documents  734 read = 731 written + 3 empty + 0 quarantined
text       12.1 MB in 1.8 s, 6.6 MB/s
The dataset is in data/stdlib: python -m shards info data/stdlib
measuring how many steps fit
start 0/20
step 10/20  loss 3.1
val 10/20  loss 3.0  tokens 8192
checkpoint 10/20  best so far
step 20/20  loss 2.1
val 20/20  loss 2.0  tokens 8192
finished step 20 of 20
checkpoint  log/demo/checkpoints/step_00000020
this model    2.8

--- sample 1, prompt 'class'
class text
text of the sample
--- sample 2, prompt 'def'
def f():
    return 1

picture     log/demo/loss.png
"""


def test_the_lines_that_say_what_came_out() -> None:
    assert (
        "\n".join(readme.shown(OUTPUT))
        == """documents  734 read = 731 written + 3 empty + 0 quarantined
text       12.1 MB in 1.8 s, 6.6 MB/s
...
start 0/20
...
step 20/20  loss 2.1
val 20/20  loss 2.0  tokens 8192
finished step 20 of 20
checkpoint  log/demo/checkpoints/step_00000020
this model    2.8
...
--- sample 2, prompt 'def'
def f():
    return 1
"""
    )


def test_the_block_is_replaced() -> None:
    text = f"a\n{readme.BEGIN}\n\n    old\n\n{readme.END}\nb\n"
    assert readme.updated(text, ["x", "", "  y"]) == text.replace("old", "x\n\n      y")
    assert readme.updated(readme.README.read_text("utf-8"), []).count(readme.BEGIN) == 1
    with pytest.raises(ValueError, match="in the README"):
        readme.updated("a", [])
