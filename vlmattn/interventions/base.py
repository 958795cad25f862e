"""The shape of an attention method: a frozen dataclass that declares an AttentionEdit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.kernels import AttentionEdit, LogitPart
from vlmattn.options import MANY, Options, option, parse_layers
from vlmattn.request import ImageFeatures, LayerContext, Prefill, Weights

#: Kinds of edges, named row first: which text rows and image rows see which keys that come later or earlier.
EDGES = ("image-same image", "image-other image", "image-text", "text-image", "text-text", "between documents")

_F = TypeVar("_F", bound=Callable[..., Any])


def optional(hook: _F) -> _F:
    """Mark a hook of a base class that does nothing (``LookingMethod.implements``)."""
    hook.does_nothing = True  # type: ignore[attr-defined]
    return hook


@dataclass(frozen=True, kw_only=True)
class LookingMethod(Options):
    """What attention methods and methods that drop tokens share: where they look.

    Instances are immutable; what a method keeps about a prompt is in a ``Store`` (``context.store(self)`` for one
    layer, ``request.store(self)`` for the prompt).
    """

    @property
    def kind(self) -> str:
        """What families support or refuse (``models.KINDS``)."""
        raise NotImplementedError

    @classmethod
    def implements(cls, hook: str) -> bool:
        """Whether the method has a hook of its own, where that of its base class does nothing."""
        return not getattr(getattr(cls, hook), "does_nothing", False)

    @property
    def follows_attention(self) -> bool:
        """``on_attention`` is also called for generated tokens."""
        return False

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Layers whose attention ``on_attention`` looks at."""
        return ()

    def tower_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Layers of the vision tower that ``on_image_features`` looks at."""
        return ()

    @optional
    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        """While the prompt is read: unedited attention of one of the ``attention_layers``."""

    @optional
    def on_image_features(self, features: ImageFeatures) -> None:
        """Once the images of new prompt tokens are encoded, before the decoder."""


@dataclass(frozen=True, kw_only=True)
class Intervention(LookingMethod):
    """Base of attention methods."""

    place: ClassVar[str] = "interventions"
    #: Whether the method must know the user's turns (``wrap(..., processor=...)``), or uses them where they are known.
    turns: ClassVar[Literal["unused", "used", "needed"]] = "unused"
    #: Where the method acts in models that read images by cross-attention: "image keys" (layers of cross-attention),
    #: "tokens" (of self-attention), "heads" (both), or nowhere, as it is about "image rows", which they do not have.
    acts_on: ClassVar[str] = "image rows"
    #: Without image tokens in the prompt there is nothing for the method to do.
    needs_images: ClassVar[bool] = True
    layers: str = option("0:", about="decoder layers: slices or indices joined by commas; a/b is a share of the depth")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layers(self.layers, MANY, f"{self.info.name}.layers")

    @property
    def kind(self) -> str:
        return "masks" if self.opens() | self.hides() else "edits"

    def bind(self, anatomy: Anatomy) -> Intervention:
        """This method for one model: check what depends on its sizes, look up what depends on its language model."""
        self.active_layers(anatomy)
        return self

    def active_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Indices of the layers the method acts in, which have attention of its kind (``acts_on``); at least one."""
        attending = tuple(range(anatomy.layers)) if anatomy.attending is None else anatomy.attending
        if anatomy.cross and self.acts_on in ("image keys", "heads"):
            attending = anatomy.cross if self.acts_on == "image keys" else tuple(sorted({*attending, *anatomy.cross}))
        named = parse_layers(self.layers, anatomy.layers, f"{self.info.name}.layers")
        found = tuple(layer for layer in named if layer in attending)
        if not found:
            what = "cross-attention to images" if attending == anatomy.cross else "attention"
            which = f"0..{anatomy.layers - 1}" if anatomy.attending is None else f"with {what}, {list(attending)}"
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
    def follows_hidden_states(self) -> bool:
        """``on_hidden_states`` is also called for every generated token."""
        return False

    @optional
    def before_prefill(self, prefill: Prefill) -> None:
        """Before the prompt is read: run the decoder on other inputs, if the method needs to."""

    @optional
    def on_hidden_states(self, context: LayerContext, hidden: Tensor) -> None:
        """While the prompt is read: the residual stream ``[batch, query, hidden]`` that enters an active layer."""

    def edit(self, context: LayerContext) -> AttentionEdit:
        """What to do with the attention of this layer; ``AttentionEdit()`` for nothing."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LogitEdit(Intervention):
    """Base of methods that are one change of the scores before the softmax, the same in all their layers."""

    def logit(self, context: LayerContext) -> LogitPart | None:
        """The change, made once in a forward; None for nothing."""
        raise NotImplementedError

    def edit(self, context: LayerContext) -> AttentionEdit:
        part: LogitPart | None = context.memo(self, lambda: self.logit(context))
        if part is None:
            return AttentionEdit()
        context.count(self.info.name, 1)
        return AttentionEdit(logit=(part,))


def last_row(context: LayerContext, weights: Weights) -> Tensor:
    """Unedited attention of the last row, prompt or not, float32 ``[batch, heads, keys]``."""
    start = context.step.start or 0
    row = context.request.prompt_length - 1 - start if context.step.is_prompt else context.queries - 1
    return weights(row, row + 1)[:, :, 0, : context.keys]


def check_tower(name: str, anatomy: Anatomy) -> None:
    """Raise if method ``name``, which looks at the vision tower's last layer but one, cannot do so in a model."""
    if not anatomy.tower_layers:
        raise UnsupportedError(
            f"'{name}' does not run on {anatomy.family}: the image tokens of its prompts are not those of its vision"
            " tower"
        )
    if anatomy.tower_layers < 2:
        raise OptionError(f"{name} needs a vision tower of at least two layers, got {anatomy.tower_layers}")
