"""Prepare a corpus: `python -m jaxgpt.prepare NAME [arguments]` does what data/NAME/prepare.py does, from anywhere.

Without --out_dir the tokens go to data/NAME of the working folder, where `--config.dataset=NAME` finds them.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import UserError, shipped
from jaxgpt.cli import nearest, run_main


def main(argv: Sequence[str]) -> None:
    scripts = {Path(name).parent.name: path for name, path in shipped("data/*/prepare.py").items()}
    if not argv:
        raise UserError(f"name a corpus: python -m jaxgpt.prepare NAME; NAME is one of {', '.join(scripts)}")
    name, *rest = argv
    if name in ("-h", "--help"):
        print(f"{__doc__}\nNAME is one of {', '.join(scripts)}; NAME --help lists its arguments.")
        return
    if name not in scripts:
        others = f"{nearest(name, scripts)}; NAME is one of {', '.join(scripts)}"
        raise UserError(f"there is no corpus {name!r} to prepare{others}")
    script = runpy.run_path(str(scripts[name]))
    sys.argv[0] = f"python -m jaxgpt.prepare {name}"  # what argparse calls the program
    script["main"](rest, Path("data", name))


if __name__ == "__main__":
    run_main(main)
