"""Sizes of a model, as far as methods need them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a decoder that methods may need, and which pretrained language model it looks like.

    ``backbone`` is (model type of the language model, hidden size, layers, MLP width): enough to recognise the
    language models of the published sink tables, whatever vision tower is in front of them. ``tower_layers`` counts the
    attention layers of the vision tower, ``source`` is the folder or hub name that the model came from. ``deepstack``
    counts the first decoder layers after which visual features are added to the residual stream, ``window`` is the
    length of the sliding window that some decoder layer sees (0 = none does), ``axes`` counts the position ids of a
    token (3 with M-RoPE). ``attending`` are the layers with self-attention (None = all). ``causal`` False: image tokens
    may see tokens behind them in the bare model. ``leading`` image tokens stand before every prompt (0 = token ids
    tell).
    ``query_dim``: size of each head's query (0 in the constructor = ``head_dim``). ``refused``: kinds of methods
    (``KINDS``) that the family cannot have, and why. ``cross`` are the layers of cross-attention, whose keys are the
    images: ``image_keys`` for each. ``sources``: the layer whose keys each layer attends with (empty = its own).
    ``latent``: the cache holds one tensor for all heads, which layers make keys and values of. ``unlike``: KV heads
    and the size of a head of each layer, where layers differ in them (() = they do not; else ``kv_heads`` and
    ``head_dim`` are the largest).
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    backbone: tuple[str, int, int, int]
    tower_layers: int = 0
    source: str = ""
    deepstack: int = 0
    window: int = 0
    axes: int = 1
    attending: tuple[int, ...] | None = None
    causal: bool = True
    leading: int = 0
    refused: tuple[tuple[str, str], ...] = ()
    query_dim: int = 0
    cross: tuple[int, ...] = ()
    image_keys: int = 0
    sources: tuple[int, ...] = ()
    unlike: tuple[tuple[int, int], ...] = ()
    latent: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_dim", self.query_dim or self.head_dim)

    def attends(self, layer: int) -> bool:
        """Whether a layer has self-attention."""
        return self.attending is None or layer in self.attending

    def attending_before(self, layer: int) -> int:
        """The last layer with self-attention before ``layer``; -1 if there is none."""
        return max((number for number in range(layer) if self.attends(number)), default=-1)

    def heads_of(self, layer: int) -> tuple[int, int]:
        """KV heads of a layer, and the size of each."""
        return self.unlike[layer] if self.unlike else (self.kv_heads, self.head_dim)

    def query_size(self, layer: int) -> int:
        """The size of each head's query in a layer."""
        return self.unlike[layer][1] if self.unlike else self.query_dim

    @property
    def fingerprint(self) -> str:
        """Hash of all sizes: profiles of heads, sinks and directions belong to models that share it."""
        sizes = (self.backbone, self.heads, self.kv_heads, self.head_dim, *self.unlike)
        return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]
