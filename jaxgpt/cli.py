"""Command lines: a parser whose errors are one line, and what runs an entry point. It loads no JAX."""

import argparse
import contextlib
import difflib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from jaxgpt import UserError, console, die_by_interrupt, one_line, user_error


def nearest(word: str, words: Iterable[str]) -> str:
    """What to say of the one of `words` that was probably meant."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")


def integer(text: str) -> int:
    """An int, also written 1e5 or 600_000."""
    value = float(text.replace("_", ""))
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind each help text, but for those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default in ("", [], argparse.SUPPRESS) or action.nargs == 0
        if silent or not action.option_strings:
            return action.help
        shown = str(action.default).replace("%", "%%")
        return f"{action.help} (default: {shown if shown.isprintable() else repr(shown)})"


class Parser(argparse.ArgumentParser):
    """argparse, its errors raised as UserError."""

    unknown_key: Callable[[str, list[str]], str] | None = None  # the message on a `--config.KEY` that is none of those

    def __init__(self, *, formatter_class: Any = _Help, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=formatter_class, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the arguments")

    def too_many(self, word: str) -> str:
        """What to say of a word that is no flag and has no place."""
        how = f"; did you mean --out_dir={word}?" if "--out_dir" in self._option_string_actions else ""
        if self.unknown_key:
            size = "a preset's size follows its name: configs/gpt2.py:gpt2-medium"
            how = f"; {'keys are written --config.KEY=VALUE' if '=' in word else size}"
        return f"{word} is one argument too many{how}"

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses argv whole: an unknown argument is an error that names the nearest known one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                raise UserError(self.too_many(unknown[0]))
            if f"--config.{name.lstrip('-')}" in self._option_string_actions:
                raise UserError(f"unknown argument {name}; keys of the config are written --config.{name.lstrip('-')}")
            near = nearest(name, self._option_string_actions)
            if self.unknown_key and (name.startswith("--config.") or not near):
                known = [x.removeprefix("--config.") for x in self._option_string_actions if x.startswith("--config.")]
                raise UserError(self.unknown_key(name.lstrip("-").removeprefix("config."), known))
            raise UserError(f"unknown argument {name}{near}")
        return args


EXIT_S = 30.0  # how long a program that failed may take to end: a library's thread may wait for what will not come


def run_main(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs an entry point, which gives the exit status; what a user can mend becomes one line, `error: …`.

    This is the one place that does so, but for several processes: see Processes.
    """
    console.prepare()
    if alone := signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by die_by_interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(ValueError, RuntimeError):  # a stderr that is no file; none
        faulthandler.enable()  # SIGBUS, where a file that is read was cut short meanwhile; a crash in a library
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.raiseExceptions = False  # where stderr cannot be written
    try:
        status = main(sys.argv[1:]) or 0
    except KeyboardInterrupt:
        status = 130  # 128 + SIGINT, as shells do
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        status = 1
    except Exception as error:
        if (problem := user_error(error)) is None:
            traceback.print_exc()
        else:
            console.complain(f"error: {one_line(problem)}")
        status = 1 if problem is None else problem.status
    if alone:
        die_by_interrupt()
    console.settle()
    if status:
        threading.Thread(target=_end_in_time, args=(status,), daemon=True).start()
    sys.exit(status)


def _end_in_time(status: int) -> None:
    """Ends the process EXIT_S after its main thread did."""
    threading.main_thread().join()
    time.sleep(EXIT_S)
    os._exit(status)
