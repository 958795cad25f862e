"""What all commands share: the application, its consoles, and groups of options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from vlmattn.errors import OptionError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Training-free attention interventions for vision-language models.",
)
console = Console(emoji=False)  # ":-1:" is a layer range, not a thumb
errors = Console(stderr=True, emoji=False)

Model = Annotated[
    str, typer.Option(help="'embedded', 'smol', a folder, or a hub name such as llava-hf/llava-1.5-7b-hf.")
]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: DType = "auto"
    device_map: Annotated[
        str | None,
        typer.Option(help="For accelerate: auto, cuda, cpu. Otherwise the GPU if there is one, one per process."),
    ] = None
    load_in: Annotated[
        str | None, typer.Option(help="8bit or 4bit: quantise the weights while loading (needs bitsandbytes).")
    ] = None

    def load(self, name: str) -> tuple[Any, Any]:
        """Model and processor."""
        from vlmattn.evals.loading import load

        return load(name, self.dtype, self.device_map, self.load_in)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes groups of options: an argument that is a dataclass stands for its fields, each an option."""
    hints: dict[str, Any] = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    found: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not dataclasses.is_dataclass(kind):
            found.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name], types = kind, get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            option = {"default": field.default, "annotation": types[field.name]}
            found.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, **option))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        command(**given)

    run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in found}
    return run


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="A module that registers methods, families, suites, ...; may repeat."
        ),
    ] = None,
) -> None:
    del debug  # read from sys.argv by main(), so that it also covers errors of the parser
    from vlmattn.registry import import_plugin, load_plugins

    load_plugins()
    if modules:
        sys.path.append(os.getcwd())
    for module in modules or ():
        import_plugin(module)


def plain(text: str, style: str | None = None) -> None:
    """Text as it is: no markup, and no line breaks that it does not have."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    print(line, flush=True)


def typed() -> str:
    """The command line as it was typed, for the record."""
    return shlex.join(["vlmattn", *sys.argv[1:]])


def listed(text: str) -> list[str]:
    """The names of a text that lists them with commas; ``fastv@{.5,.25}`` is fastv@.5 and fastv@.25.

    Raises:
        OptionError: a brace that is not closed, or stands in another.
    """
    found: list[str] = []
    for name in re.findall(r"(?:\{[^{}]*\}|[^,])+", text):
        parts = re.split(r"\{([^{}]*)\}", name.strip())  # outside, inside, outside, ...
        if any(brace in part for part in parts for brace in "{}"):
            raise OptionError(f"braces must be closed and not nested, as in fastv@{{.5,.25}}; got '{name.strip()}'")
        ways = [part.split(",") if number % 2 else [part] for number, part in enumerate(parts)]
        found += ["".join(part.strip() for part in way) for way in product(*ways)]
    return [name for name in found if name]
