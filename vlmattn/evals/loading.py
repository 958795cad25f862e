"""How a model is named and loaded: by bundled name, folder or hub name."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from vlmattn import embedded
from vlmattn.errors import InputError, OptionError, VlmattnError, torchvision_trouble


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

        # So small that threads would mostly wait for each other, ten times slower on a busy machine.
        torch.set_num_threads(1)
    if name in embedded.BUNDLED:
        return embedded.load(name, **({} if dtype == "auto" else {"dtype": dtype}), **options)
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
