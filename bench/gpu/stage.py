"""The process of one stage: `python -m bench.gpu.stage MODULE:FUNCTION SETTING`."""

import importlib
import sys

from bench.gpu.setting import Run, Setting


def main() -> None:
    """Call the function of the stage."""
    module, _, function = sys.argv[1].partition(":")
    run: Run = getattr(importlib.import_module(module), function)
    run(Setting.from_json(sys.argv[2]))


if __name__ == "__main__":
    main()
