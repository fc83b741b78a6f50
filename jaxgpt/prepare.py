"""Prepare a corpus: `python -m jaxgpt.prepare NAME [arguments]` does what data/NAME/prepare.py does, from anywhere.

Without --out_dir the tokens go to data/NAME of the working folder, where `--config.dataset=NAME` finds them.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import UserError, shipped
from jaxgpt.cli import nearest, run_main


def main(argv: Sequence[str]) -> None:
    scripts = {Path(name).parent.name: path for name, path in shipped("data/*/prepare.py").items()}
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nNAME is one of {', '.join(scripts)}; NAME --help lists its arguments.")
        return
    if name not in scripts:
        near = nearest(name, scripts) if name else ""
        raise UserError(f"there is no corpus {name!r} to prepare{near}; NAME is one of {', '.join(scripts)}")
    script = runpy.run_path(str(scripts[name]))
    script["main"](rest, Path("data", name))


if __name__ == "__main__":
    run_main(main)
