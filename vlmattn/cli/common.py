"""What all commands share: the application, its consoles, and how a model is named and loaded."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from vlmattn.errors import InputError, OptionError, VlmattnError, torchvision_trouble

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Training-free attention interventions for vision-language models.",
)
console = Console(emoji=False)  # ":-1:" is a layer range, not a thumb
errors = Console(stderr=True, emoji=False)

Model = Annotated[str, typer.Option(help="'embedded', a folder, or a hub name such as llava-hf/llava-1.5-7b-hf.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="For accelerate: auto, cuda, cpu. Otherwise the GPU if there is one, one per process."),
]
LoadIn = Annotated[
    str | None, typer.Option(help="8bit or 4bit: quantise the weights while loading (needs bitsandbytes).")
]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    del debug  # read from sys.argv by main(), so that it also covers errors of the parser


def plain(text: str, style: str | None = None) -> None:
    """Text as it is: no markup, and no line breaks that it does not have."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    print(line, flush=True)


def typed() -> str:
    """The command line as it was typed, for the record."""
    return shlex.join(["vlmattn", *sys.argv[1:]])


def check_dtype(dtype: str) -> None:
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise OptionError(f"--dtype must be auto, float32, bfloat16 or float16, got '{dtype}'")


def quantisation(load_in: str | None, dtype: str) -> dict[str, Any]:
    """What ``from_pretrained`` needs to load weights in fewer bits.

    Raises:
        OptionError: not 8bit or 4bit.
        InputError: bitsandbytes is not installed.
    """
    if load_in is None:
        return {}
    if load_in not in ("8bit", "4bit"):
        raise OptionError(f"--load-in must be 8bit or 4bit, got '{load_in}'")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--load-in needs bitsandbytes: pip install bitsandbytes")
    import torch
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config}


def load(name: str, dtype: str, device_map: str | None, load_in: str | None = None) -> tuple[Any, Any]:
    """Model and processor, by bundled name, folder or hub name.

    Without a ``device_map`` the model goes to the accelerator of this process, if there is one.
    """
    check_dtype(dtype)
    options = quantisation(load_in, dtype)
    if trouble := torchvision_trouble():
        raise InputError(trouble)
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    from vlmattn.evals.processes import Processes

    device = Processes().device
    if device_map != "cpu" and (device_map or device.type != "cpu"):
        options["device_map"] = device_map or {"": device}
    if name == "embedded":
        import torch

        import vlmattn

        torch.set_num_threads(
            1
        )  # so small that threads would mostly wait for each other, ten times slower on a busy machine
        return tuple(vlmattn.load("embedded", **({} if dtype == "auto" else {"dtype": dtype}), **options))  # type: ignore[return-value]
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vlmattn.models import find_family, supported_families

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in supported_families():
            raise OptionError(
                f"{name} has model type '{config.model_type}'; supported: {', '.join(supported_families())}"
            )
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **options)
        find_family(model)
        return model.eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, VlmattnError):
            raise
        raise InputError(f"cannot load '{name}': {str(error).strip().splitlines()[0]}") from error
