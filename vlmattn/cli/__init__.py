"""The command line. Errors are one line with a remedy and exit code 2; ``--debug`` shows the traceback."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import NoReturn, TextIO

from rich.markup import escape

from vlmattn.cli import benchmark, comparing, evaluation, fitting, information, inspection, profiles, tracking, tuning  # noqa: F401  (they add their commands)
from vlmattn.cli.common import app, errors
from vlmattn.errors import TORCHVISION_REMEDY, VlmattnError, one_line, torchvision_trouble
from vlmattn.files import path_text, reason


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings as a line of text, without the place in the code."""
    errors.print(f"note: {escape(str(message))}", style="yellow", highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    errors.print(f"error: {escape(one_line(message))}", style="red", highlight=False, soft_wrap=True)
    sys.exit(2)


def main() -> None:
    """Entry point: one-line errors and exit code 2, unless ``--debug`` is given."""
    debug = "--debug" in sys.argv
    if not debug:
        warnings.showwarning = _note
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names of files that are no text, terminals that lack a letter
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except VlmattnError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:  # a disk that is full, a place that cannot be written: of the user's machine, not of ours
        if debug:
            raise
        named = isinstance(error.filename, (str, bytes, os.PathLike))
        where = f"cannot use {path_text(os.fsdecode(error.filename))}: " if named else ""
        _fail(f"{where}{reason(error)} (--debug shows where)")
    except (RuntimeError, ImportError):
        if debug or not torchvision_trouble():
            raise
        _fail(TORCHVISION_REMEDY)
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on from here")
        sys.exit(130)
