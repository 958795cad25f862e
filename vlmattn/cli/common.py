"""What all commands share: the application, its consoles, and the options that name a model."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Annotated

import typer
from rich.console import Console

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
DeviceMap = Annotated[
    str | None,
    typer.Option(help="For accelerate: auto, cuda, cpu. Otherwise the GPU if there is one, one per process."),
]
LoadIn = Annotated[
    str | None, typer.Option(help="8bit or 4bit: quantise the weights while loading (needs bitsandbytes).")
]


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
