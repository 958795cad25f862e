"""The shape of an attention method: a frozen dataclass that declares an AttentionEdit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.interventions.registry import MANY, Options, Sizes, option, parse_layers
from vlmattn.kernels import AttentionEdit
from vlmattn.request import Preparation, Scope, Sight, Weights

#: Kinds of edges, named row first: which text rows and image rows see which keys that come later or earlier.
EDGES = ("image-same image", "image-other image", "image-text", "text-image", "text-text", "between documents")


@dataclass(frozen=True, kw_only=True)
class Intervention(Options):
    """Base of all methods. Instances are immutable; what a request needs to remember is kept on the request."""

    #: Whether the method must know the user's turns (``wrap(..., processor=...)``), or uses them where they are known.
    turns: ClassVar[Literal["unused", "used", "needed"]] = "unused"
    #: Without image tokens in the prompt there is nothing for the method to do.
    needs_images: ClassVar[bool] = True
    layers: str = option("0:", about="decoder layers: slices or indices joined by commas; a/b is a share of the depth")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layers(self.layers, MANY, f"{self.info.name}.layers")

    def bind(self, sizes: Sizes) -> Intervention:
        """This method for one model: check what depends on its sizes, look up what depends on its language model."""
        self.active_layers(sizes)
        return self

    def active_layers(self, sizes: Sizes) -> tuple[int, ...]:
        """Indices of the layers the method acts in, which have self-attention; at least one."""
        attending = range(sizes.layers) if sizes.attending is None else sizes.attending
        found = tuple(n for n in parse_layers(self.layers, sizes.layers, f"{self.info.name}.layers") if n in attending)
        if not found:
            which = f"0..{sizes.layers - 1}" if sizes.attending is None else f"with attention, {list(attending)}"
            raise OptionError(f"{self.info.name}.layers '{self.layers}' selects none of the layers {which}")
        return found

    def opens(self) -> frozenset[str]:
        """Kinds of edges that the method makes visible (``EDGES``)."""
        return frozenset()

    @property
    def edits_text(self) -> bool:
        """Text that no image precedes is not read as the bare model reads it."""
        return not self.needs_images or self.opens_text

    @property
    def opens_text(self) -> bool:
        """Text sees what comes later."""
        return any(edge.startswith("text-") for edge in self.opens())

    def hides(self) -> frozenset[str]:
        """Kinds of edges that the method takes away (``EDGES``)."""
        return frozenset()

    @property
    def observes_generated(self) -> bool:
        """``observe`` is also called for every generated token."""
        return False

    @property
    def measures_generated(self) -> bool:
        """``measure`` is also called for generated tokens."""
        return False

    def measured_layers(self, sizes: Sizes) -> tuple[int, ...]:
        """Layers whose attention ``measure`` looks at."""
        return ()

    def tower_layers(self, sizes: Sizes) -> tuple[int, ...]:
        """Layers of the vision tower that ``encoded`` looks at."""
        return ()

    def prepare(self, preparation: Preparation) -> None:
        """Before the prompt is read: run the decoder on other inputs, if the method needs to."""

    def encoded(self, sight: Sight) -> None:
        """Once the images of new prompt tokens are encoded, before the decoder."""

    def observe(self, scope: Scope, hidden: Tensor) -> None:
        """While the prompt is read: the residual stream ``[batch, query, hidden]`` that enters an active layer."""

    def measure(self, scope: Scope, weights: Weights) -> None:
        """While the prompt is read: unedited attention of a measured layer."""

    def edit(self, scope: Scope) -> AttentionEdit:
        """What to do with the attention of this layer; ``AttentionEdit()`` for nothing."""
        raise NotImplementedError


def check_tower(name: str, sizes: Sizes) -> None:
    """Raise if method ``name``, which looks at the vision tower's last layer but one, cannot do so in a model."""
    if not sizes.tower_layers:
        raise UnsupportedError(
            f"'{name}' does not run on {sizes.family}: the image tokens of its prompts are not those of its vision tower"
        )
    if sizes.tower_layers < 2:
        raise OptionError(f"{name} needs a vision tower of at least two layers, got {sizes.tower_layers}")
