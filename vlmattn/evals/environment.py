"""What can change a result besides questions and images: weights, configuration, files, versions, machine."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import vlmattn
from vlmattn.evals.sources import LENGTH, file_hash, short_hash
from vlmattn.evals.suites.base import Suite
from vlmattn.recipe import Recipe

_SAMPLED = 4096  # bytes of each tensor that are hashed themselves
_LIBRARIES = ("tokenizers", "numpy", "pillow", "torchvision", "bitsandbytes")
# of generate(): set elsewhere, without effect where nothing is sampled, or not about the answer
_NOT_DECODING = {
    *("do_sample", "max_new_tokens", "max_length", "transformers_version", "trust_remote_code"),
    *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("use_cache", "cache_config", "compile_config", "return_dict_in_generate", "return_legacy_cache"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
}


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of all weights and buffers, so that answers of other weights are not resumed.

    Of each tensor: name, shape, dtype, bytes at even distances, and the sum of all its 64-bit words, which any single
        change
    moves. One pass over memory, about 0.2 s a gigabyte on one core. Offloaded weights (on "meta") count by name and
    shape only.
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            digest.update(_sampled(tensor.detach()))
    return digest.hexdigest()[:LENGTH]


def _sampled(tensor: torch.Tensor) -> bytes:
    """Bytes at even distances, what is left over from 64-bit words, and the sum of those."""
    flat = tensor.contiguous().flatten()
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    data = flat.view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # 64-bit words begin at multiples of 8 only
    whole = data.numel() // 8 * 8
    total = int(data[:whole].view(torch.int64).sum()) if whole else 0
    some = data[:: max(data.numel() // _SAMPLED, 1)]
    return bytes(some.tolist()) + bytes(data[whole:].tolist()) + total.to_bytes(8, "little", signed=True)


def config_hash(model: Any) -> str:
    """Of the model's configuration, but for where it was loaded from."""
    return short_hash(_as_json(_without(model.config.to_dict(), ("_name_or_path", "transformers_version"))))


def processor_hash(processor: Any) -> str:
    """Of how prompts and images become inputs: the processor's configuration, the chat template, the vocabulary."""
    told = _without(processor.to_dict(), ("_name_or_path", "transformers_version"))
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return short_hash(_as_json([told, getattr(processor, "chat_template", None), vocabulary]))


def _without(value: Any, names: Iterable[str]) -> Any:
    """Nested data without some keys."""
    if isinstance(value, Mapping):
        return {str(key): _without(each, names) for key, each in value.items() if key not in names}
    return [_without(each, names) for each in value] if isinstance(value, (list, tuple)) else value


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=lambda odd: type(odd).__qualname__)


def files_of(recipe: Recipe, anatomy: Any) -> dict[str, str]:
    """Hashes by path of the profiles and directions that a recipe names or finds beside the model.

    Args:
        anatomy: of the model, ``wrapping.record_of(model).anatomy``.
    """
    found: dict[str, str] = {}
    for method in recipe.interventions:
        if not method.files:
            continue
        bound = method.bind(anatomy)
        for option, usual in method.files.items():
            if path := getattr(bound, option):
                file = Path(path) / usual if Path(path).is_dir() else Path(path)
                found[str(path)] = file_hash(file)
    return found


def decoding(model: Any, suites: Sequence[Suite]) -> dict[str, Any]:
    """How answers are decoded: never sampled, else as the model's own generation config says."""
    own = model.generation_config.to_diff_dict()
    kept = {name: value for name, value in own.items() if value is not None and name not in _NOT_DECODING}
    lengths = {suite.name: suite.max_new_tokens for suite in suites}
    return {**kept, "do_sample": False, "num_beams": kept.get("num_beams", 1), "max_new_tokens": lengths}


def decoding_in_words(settings: Mapping[str, Any]) -> str:
    """``decoding`` for people: "greedy decoding", or beams, and what the model's generation config adds."""
    beams = settings.get("num_beams", 1)
    words = ["greedy decoding" if beams == 1 else f"beam search with {beams} beams"]
    for name, value in settings.items():
        if name not in ("do_sample", "num_beams", "max_new_tokens") and not name.endswith("token_id"):
            words.append(f"{name} {value}")
    return ", ".join(words)


def quantisation(model: torch.nn.Module) -> dict[str, Any] | None:
    """How the weights were quantised while they were loaded, None if they were not."""
    found: Any = getattr(model.config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    return {
        "vlmattn": vlmattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def libraries() -> dict[str, str]:
    """Versions of what reads prompts and images, where it is installed."""
    found = {}
    for package in _LIBRARIES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Where it ran."""
    cuda = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
