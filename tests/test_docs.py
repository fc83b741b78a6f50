"""README and docs: every command parses, every link leads somewhere, README's way on a CPU runs."""

import argparse
import importlib
import importlib.machinery
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import xla_flags

from jaxgpt.cli import Parser
from jaxgpt.config import default_config

ROOT = Path(__file__).parents[1]
loader = importlib.machinery.SourceFileLoader("test_docs_script", str(ROOT / "scripts" / "test_docs"))
spec = importlib.util.spec_from_loader(loader.name, loader)
assert spec
script = importlib.util.module_from_spec(spec)
sys.modules[loader.name] = script
loader.exec_module(script)

PAGES = script.pages()
# programs that are not ours; what follows `python -m` or is a file of this checkout is
OTHERS = re.compile(
    "cat|cd|cp|curl|echo|export|git|head|hf|jq|jupyter|kill|kubectl|ls|mkdir|mpirun|pip|printf|pytest|rm|sbatch|source|srun"
    "|tail|tensorboard|torchrun|transformers"
)


def commands(page: Path) -> list[tuple[int, str]]:
    """(line, command) of fenced blocks, and of inline code that names a program of ours in full."""
    found = []
    for block in script.blocks(page):
        text = re.sub(r"\\\n\s*", " ", block.text)
        for line in text.splitlines():
            found += [(block.line, part.strip()) for part in re.split(r"\s(?:&&|\||;)\s", line) if part.strip()]
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found += [(0, code) for code in re.findall(r"`((?:python -m jaxgpt|scripts/|jaxgpt-)[^`]*)`", text)]
    return found


class Understood(BaseException):
    """Raised where a program of ours has parsed its arguments."""


@pytest.fixture
def parse_only(monkeypatch):
    def parse(self, argv=None, *rest):
        args, unknown = original_known(self, argv)
        assert not unknown, f"{self.prog} has no argument {unknown[0]}"
        raise Understood

    original_known = argparse.ArgumentParser.parse_known_args
    original = Parser.parse

    def parse_ours(self, argv):
        original(self, argv)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(Parser, "parse", parse_ours)
    monkeypatch.setattr("jaxgpt.sharding.configure_jax", lambda: None)


def check(words: list[str], monkeypatch) -> None:
    """Raises where a command's program, arguments or preset do not exist."""
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*|time|nice|then|do|!", words[0]):
        words = words[1:]
    words = [re.sub(r"^\.venv/bin/", "", words[0]), *words[1:]] if words else []
    if not words or words[0].startswith("#"):
        return
    if "-m" in words and (module := words[words.index("-m") + 1]).startswith("jaxgpt"):
        return check_module(module, words[words.index("-m") + 2 :])
    program, rest = words[0], words[1:]
    if program.startswith("python") and rest[:1] == ["-c"]:
        return
    if program.startswith("jaxgpt-"):
        return check_module(f"jaxgpt.{program.removeprefix('jaxgpt-')}", rest)
    if program.startswith("python") and rest and (rest[0].endswith(".py") or rest[0].startswith("scripts/")):
        program, rest = rest[0], rest[1:]
    if OTHERS.fullmatch(program):
        for word in rest:
            assert not re.match(r"scripts/|docs/", word) or (ROOT / word).exists(), word
        return
    assert (ROOT / program).is_file(), f"there is no program {program}"
    if program.startswith("scripts/launch_local") and rest[1:2] and rest[1].startswith("jaxgpt"):
        return check_module(rest[1], rest[2:])
    if program.endswith(".py"):
        monkeypatch.setattr(sys, "argv", [program, *rest])
        with pytest.raises(Understood):
            runpy.run_path(str(ROOT / program), run_name="__main__")


def check_module(module: str, argv: list[str]) -> None:
    main = importlib.import_module(module).main if module != "jaxgpt" else None
    placeholders = [word for word in argv if "…" in word or re.search("(^|=)[A-Z]+$", word)]
    if main and argv and "--help" not in argv and not placeholders:
        with pytest.raises(Understood):
            main(argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page, parse_only, monkeypatch):
    monkeypatch.chdir(ROOT)
    copies = {}
    for line, command in commands(page):
        for made, original in copies.items():
            command = command.replace(made, original)
        words = shlex.split(re.sub(r"\s\d?>\s*\S+", "", command), comments=True)
        if words[:1] == ["cp"]:  # what follows may name the copy
            copies[words[2]] = words[1]
        try:
            check(words, monkeypatch)
        except BaseException as error:
            raise AssertionError(f"{page.name}:{line or ''}: {command}: {error!r}") from error


def test_a_wrong_command_is_found(parse_only, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in (
        "python -m jaxgpt.train --config configs/gpt5.py",
        "python -m jaxgpt.train configs/gpt2.py --config.batch=3",
        "python -m jaxgpt.sample --strat=x",
        "python data/text/prepare.py x --vall=y",
        "scripts/no",
        "noprogram",
    ):
        with pytest.raises(BaseException) as found:
            check(shlex.split(command), monkeypatch)
        assert not isinstance(found.value, Understood), command


def anchors(page: Path) -> set[str]:
    """As GitHub names the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading.lower())).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {path}"
        assert not anchor or anchor in anchors(file), f"{page.name}: #{anchor} is no heading of {file.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_module_that_is_named_exists(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for code in re.findall(r"`([^`\s]+)`", text):
        if re.fullmatch(r"jaxgpt(\.\w+)+", code):
            module, _, name = code.rpartition(".")
            assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(code), code
        elif re.fullmatch(r"(configs|docs|jaxgpt|ops|run|scripts|tests|tools|weights)/[\w./]{5,}", code):
            assert (ROOT / code).exists() or (ROOT / "jaxgpt" / code).exists(), code


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]:
        assert path.name == "README.md" or f"({path.name})" in index, path.name


# the globals of nanoGPT's train.py at 3adf61e that its configurator lets a user set
NANOGPT = set(
    re.findall(
        r"\w+",
        """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
        wandb_project
        wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias
        learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend
        device dtype compile""",
    )
)


def test_every_key_of_nanogpt_is_answered():
    table = (ROOT / "docs" / "nanogpt.md").read_text().partition("## Keys")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`(\w+)`)? *\|", table, re.M))
    assert set(rows) == NANOGPT
    assert {ours for ours in rows.values() if ours} <= set(default_config())


def test_the_notebook_has_run():
    """It was executed from top to bottom, without an error; scripts/test_docs does it again."""
    for path in (ROOT / "docs").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


SHORT = " --config.max_iters=20 --config.eval_interval=10 --config.eval_iters=2"


def test_readmes_way_on_a_cpu(tmp_path):
    """The first section's commands as written, but for fewer steps and a text that is at hand."""
    text = "ROMEO:\nFirst Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 200
    (tmp_path / "input.txt").write_text(text)
    section = (ROOT / "README.md").read_text().partition("<!-- cpu -->")[2].partition("<!-- end -->")[0]
    lines = re.sub(r"\\\n\s*", " ", "\n".join(re.findall(r"^```bash\n(.*?)^```$", section, re.M | re.S))).splitlines()
    ours = [line for line in lines if line.startswith("python -m jaxgpt.")]
    assert {line.split()[2] for line in ours} >= {f"jaxgpt.{name}" for name in ("prepare", "train", "sample", "plot")}
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}  # one device, as users have
    for line in ours:
        if "jaxgpt.prepare" in line:
            line += f" --input={tmp_path}/input.txt"
        elif "jaxgpt.train" in line:
            line += SHORT
        command = f"{sys.executable} {shlex.join(shlex.split(line, comments=True)[1:])}"
        result = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90)
        assert result.returncode == 0, f"{line}: {result.stdout}{result.stderr}"
