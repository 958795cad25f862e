"""What methods keep about a prompt, for tests that look into it."""

from __future__ import annotations

from typing import Any


def kept(cache: Any, name: str) -> dict[int | None, Any]:
    """What lies under ``name`` on a cache (or request), by layer; None: about the whole prompt."""
    request = getattr(cache, "_vlmattn_request", cache)
    found = {layer: {**store.rows, **store.slots, **store.shared} for (_, layer), store in request._stores.items()}
    return {layer: values[name] for layer, values in found.items() if name in values}
