"""What can change a result besides the recipe: weights, versions, machine."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch
import transformers

import vlmattn


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of names, shapes and first values of all weights, so that answers of other weights are not resumed."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.device.type != "meta":
            digest.update(str(weight.detach().flatten()[:8].tolist()).encode())
    return digest.hexdigest()[:16]


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


def hardware() -> dict[str, Any]:
    """Where it ran."""
    cuda = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
