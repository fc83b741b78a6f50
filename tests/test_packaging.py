"""What is installed and how: commands, presets that the wheel carries, scripts/setup."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxgpt import shipped
from jaxgpt.__main__ import COMMANDS
from jaxgpt.cli import Parser

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_command_is_installed_and_there():
    assert set(PROJECT["scripts"]) == {f"jaxgpt-{name}" for name in COMMANDS}
    for name in COMMANDS:
        assert importlib.util.find_spec(f"jaxgpt.{name}"), name


def test_a_command_runs_its_module():
    """`jaxgpt-plot` gets its own arguments; `python -m jaxgpt` lists all."""
    program = "import sys; sys.argv[0] = '/usr/bin/jaxgpt-plot'; from jaxgpt.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", program, "nowhere"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: nowhere holds no metrics.jsonl")
    result = subprocess.run([sys.executable, "-m", "jaxgpt"], capture_output=True, text=True)
    assert [line.split()[2] for line in result.stdout.splitlines()] == [f"jaxgpt.{name}" for name in COMMANDS]


CORPORA = [Path(name).parent.name for name in shipped("data/*/prepare.py")]


@pytest.mark.parametrize("command", [*sorted(COMMANDS.keys() - {"prepare"}), *(f"prepare {name}" for name in CORPORA)])
def test_help_explains_each_argument(command, monkeypatch):
    """And its usage is what the user typed."""
    monkeypatch.setattr("jaxgpt.sharding.configure_jax", lambda: None)
    monkeypatch.setattr(sys, "argv", ["program"])
    parsers = []

    def parse(self, argv):
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(Parser, "parse", parse)
    name, *rest = command.split()
    with pytest.raises(SystemExit):
        importlib.import_module(f"jaxgpt.{name}").main([*rest, "--help"])
    (parser,) = parsers
    assert parser.prog == f"python -m jaxgpt.{command}" and parser.description
    assert [action.dest for action in parser._actions if not action.help] == []


def test_presets_here_come_before_those_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped("configs/*.py")["configs/gpt2.py"] == ROOT / "configs/gpt2.py"
    (tmp_path / "configs").mkdir()
    for name in ("gpt2.py", "mine.py"):
        (tmp_path / "configs" / name).touch()
    found = shipped("configs/*.py")
    assert found["configs/gpt2.py"] == Path("configs/gpt2.py") and found["configs/mine.py"] == Path("configs/mine.py")
    assert found["configs/shakespeare_char.py"] == ROOT / "configs/shakespeare_char.py"


@pytest.mark.parametrize("state", ["nothing", "no pip", "broken for good"])
def test_setup_mends_a_half_made_venv(tmp_path, state):
    """With a python that makes venvs and a pip that only notes what it is asked to install."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").touch()
    whole = f'#!/bin/sh\necho "$@" >> {tmp_path}/pip.log\n'
    python = tmp_path / "python"
    makes = f"cat > .venv/bin/python <<'E'\n{whole}E\nchmod +x .venv/bin/python"
    clears = 'case "$*" in *--clear*) rm -rf .venv;; esac; [ -e .venv/broken ] && exit 1; mkdir -p .venv/bin'
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{clears}\n{makes}\n')
    python.chmod(0o755)
    if state != "nothing":
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    if state == "broken for good":
        (tmp_path / ".venv" / "broken").touch()
    for _ in range(2):  # the second time there is nothing to do
        subprocess.run([tmp_path / "scripts" / "setup", "hf"], env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"},
                       check=True, capture_output=True)  # fmt: skip
    installs = [line for line in (tmp_path / "pip.log").read_text().splitlines() if "install" in line]
    assert len(installs) == 1 and installs[0].endswith("install --editable .[hf]")
