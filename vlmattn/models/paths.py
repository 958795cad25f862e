"""Where a family reaches into a model, as text: its methods are asked with something that notes what is asked of it."""

from __future__ import annotations

from typing import Any

from vlmattn.models.base import Family
from vlmattn.request import IMAGE, VIDEO

_KINDS = {IMAGE: "images", VIDEO: "videos, if there is one"}


class _Path:
    """Stands in for a model, a module or a config, and for whatever is reached through it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> _Path:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Path(f"{self._path}.{name}")

    def __getitem__(self, key: object) -> _Path:
        return _Path(f"{self._path}[{key!r}]")

    def __str__(self) -> str:
        return self._path


def hook_points(family: Family) -> dict[str, str]:
    """The decoder, its layers, their attention, and the config's fields for placeholders and the tokens around images.

    A decoder that is elsewhere in some models, by what they are made of, is told as it is in most.
    """
    model: Any = _Path("model")
    layer: Any = _Path("layer")
    attention = (found for found in (family.attention(layer), family.cross_attention(layer)) if found is not None)
    fields = ", ".join(f"model.config.{name}" for name in family.markers)
    around = [*([f"{fields} (what the config has of them)"] if fields else []), *map(repr, family.marker_ids)]
    return {
        "decoder": str(family.decoder(model)),
        "layers": str(family.layers(model)),
        "attention": ", ".join(map(str, attention)),
        "placeholders": _placeholders(family, model),
        "markers": ", ".join(around) or "none that are known by name",
    }


def _placeholders(family: Family, model: Any) -> str:
    if type(family).leading is not Family.leading:
        return "none, the tokens of the image stand before the prompt"
    if type(family).types_of_call is not Family.types_of_call:
        return "none, an input of the call says which tokens are the image"
    found = sorted(family.placeholders(model).items(), key=lambda item: item[1])
    return ", ".join(f"{token} ({_KINDS[kind]})" for token, kind in found)
