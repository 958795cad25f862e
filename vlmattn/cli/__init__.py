"""The command line. Errors are one line with a remedy and exit code 2; ``--debug`` shows the traceback."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

from rich.markup import escape

from vlmattn.cli import benchmark, comparing, evaluation, information, inspection, profiles, tracking  # noqa: F401  (they add their commands)
from vlmattn.cli.common import app, errors
from vlmattn.errors import TORCHVISION_REMEDY, VlmattnError, torchvision_trouble


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


def main() -> None:
    """Entry point: one-line errors and exit code 2, unless ``--debug`` is given."""
    debug = "--debug" in sys.argv
    if not debug:
        warnings.showwarning = _note
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except VlmattnError as error:
        if debug:
            raise
        errors.print(f"error: {escape(str(error))}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (RuntimeError, ImportError) as error:
        if debug or not torchvision_trouble():
            raise
        errors.print(f"error: {TORCHVISION_REMEDY}", style="red", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on from here")
        sys.exit(130)
