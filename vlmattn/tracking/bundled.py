"""The bundled multi-view network: loading it, and networks saved like it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlmattn.errors import InputError
from vlmattn.files import make_folder, write_whole, written_whole
from vlmattn.tracking.network import MultiViewNetwork, NetworkConfig

FOLDER = Path(__file__).parent / "tiny-rooms"


def load(folder: str | Path = FOLDER, dtype: torch.dtype = torch.float32) -> MultiViewNetwork:
    """A ``MultiViewNetwork`` from ``config.json`` and ``model.safetensors``; by default the bundled one, offline.

    Args:
        folder: where it was saved.
        dtype: of the weights (the bundled file holds float16).

    Raises:
        InputError: not such a folder.
    """
    place = Path(folder)
    try:
        config = NetworkConfig(**json.loads((place / "config.json").read_text()))
        network = MultiViewNetwork(config)
        network.load_state_dict(load_file(place / "model.safetensors"))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{place} holds no multi-view network of vlmattn: {str(error).splitlines()[0]}") from error
    return network.eval().to(dtype)


def figures() -> dict[str, Any]:
    """What was measured of the bundled network (``figures.json``)."""
    told: dict[str, Any] = json.loads((FOLDER / "figures.json").read_text())
    return told


def save(network: MultiViewNetwork, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    place = Path(folder)
    make_folder(place)
    write_whole(place / "config.json", json.dumps(asdict(network.config), indent=2) + "\n")
    with written_whole(place / "model.safetensors") as partial:
        save_file({name: value.to(dtype).contiguous() for name, value in network.state_dict().items()}, partial)
