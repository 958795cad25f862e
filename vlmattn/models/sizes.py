"""Sizes of a model that configs tell in several ways."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def vision_of(model: PreTrainedModel) -> Any:
    """The config of the tower."""
    return getattr(model.config, "vision_config", None)


def mlp_width(text: Any) -> int:
    width = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 0
    return int(width if isinstance(width, int) else width[0])


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer that its residual stream meets behind attention."""
    names = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
    found = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    return found if isinstance(found, nn.Module) else None


def sources_of(text: Any) -> tuple[int, ...]:
    """The layer whose keys and values each layer attends with; the last ones may use those of the last layer of their
    kind that has its own. Empty: all have their own."""
    shared = int(getattr(text, "num_kv_shared_layers", None) or 0)
    if not shared:
        return ()
    own, kinds = text.num_hidden_layers - shared, text.layer_types
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    return (*range(own), *(last[kind] for kind in kinds[own:]))


def heads_of(text: Any) -> tuple[tuple[int, int], ...]:
    """KV heads and the size of a head: one pair, or a pair for each layer where layers differ."""
    each = tuple(map(_heads, text.per_layer_config)) if getattr(text, "is_heterogeneous", False) else (_heads(text),)
    return each if len(set(each)) > 1 else each[:1]


def _heads(config: Any) -> tuple[int, int]:
    heads = config.num_attention_heads
    return (
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def window_of(text: Any) -> int:
    """The length of the sliding window that some layer of a language model sees, from its config; 0 = none does."""
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    if kinds is not None and "chunked_attention" in kinds:
        return int(text.attention_chunk_size)
    if kinds is not None:
        return int(window or 0) if "sliding_attention" in kinds else 0
    return int(window) if window and getattr(text, "use_sliding_window", None) is not False else 0
