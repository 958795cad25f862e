"""The shape of a method that drops image tokens: it chooses which rows of a prompt reach a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.interventions.base import LookingMethod, optional
from vlmattn.options import MANY, option, parse_layers
from vlmattn.request import KeptTokens, LayerContext, PruningStage

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Pruning(LookingMethod):
    """Base of methods that drop tokens: a score for each image token, and how many stay (for more: ``choose_tokens``).

    ``mode`` "drop" takes the rows out: later layers compute and cache the others only. "mask" leaves them in and hides
    them, which costs more than no pruning: the same choice, to compare with.
    """

    place: ClassVar[str] = "pruning"
    earliest: ClassVar[int] = 1  # the cache of layer 0 stays whole, but for methods that see to that
    looks_ahead: ClassVar[bool] = False  # asks for ``PruningStage.weights``: the layer's projections once more
    mode: str = option("drop", about="drop the tokens, or only hide them (to compare)", choices=("drop", "mask"))

    #: How positions are kept, for methods that may count them anew.
    keeping: ClassVar[str] = "use positions='original'"

    @property
    def kind(self) -> str:
        return "pruning"

    @property
    def drops(self) -> bool:
        return self.mode == "drop"

    @property
    def compact(self) -> bool:
        """Position ids are counted anew."""
        return False

    def looks_ahead_at(self, layer: int) -> bool:
        """Whether the stage before ``layer`` asks for its weights."""
        return self.looks_ahead

    def sees(self, anatomy: Anatomy, layer: int, before: int) -> bool:
        """Whether the method has attention to choose by: of ``layer`` itself, or since the stage ``before``."""
        if self.looks_ahead:
            return anatomy.attends(layer)
        return not self.implements("on_attention") or anatomy.attending_before(layer) >= before

    def bind(self, anatomy: Anatomy) -> Pruning:
        """This method for one model.

        Raises:
            OptionError: layers that the model does not have, or in which image features still come in; positions
                counted anew where a token has several; tokens only hidden from layers that keep a state.
        """
        if anatomy.attending is not None and not self.drops:
            raise OptionError(
                f"{self.info.name}.mode 'mask' only hides tokens, which stay in what layers without attention keep of"
                " all tokens; use mode='drop'"
            )
        if self.compact and anatomy.axes > 1:
            raise OptionError(
                f"{self.info.name} counts positions anew, and tokens of this model have {anatomy.axes} positions each;"
                f" {self.keeping}"
            )
        for layer in self.stages(anatomy):
            if not self.earliest <= layer < anatomy.layers:
                raise OptionError(
                    f"{self.info.name}: tokens can be dropped before the layers {self.earliest}..{anatomy.layers - 1}"
                    f" of this model, got {layer}"
                )
            if layer < anatomy.deepstack:
                raise OptionError(
                    f"{self.info.name}: this model adds image features after its first {anatomy.deepstack} layers; drop"
                    f" tokens before layer {anatomy.deepstack} or later, got {layer}"
                )
        return self

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Layers that only the chosen rows reach, ascending."""
        raise NotImplementedError

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        """Image tokens of a sequence that go on at the stage before ``layer``.

        Args:
            given: tokens of each image in its prompt; left: image tokens that reach the stage.
        """
        raise NotImplementedError

    def comparing(self, layer: int, given: Sequence[int], width: int) -> int:
        """Operations of comparing image tokens with each other before ``layer``, for ``vlmattn.cost``.

        Args:
            given: tokens of each image of a sequence; width: of what is compared, about.
        """
        return 0

    def key_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Layers whose queries and keys ``on_queries_keys`` looks at."""
        return ()

    @optional
    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None:
        """Queries and keys of one of the ``key_layers``, ``[batch, heads, rows, dim]``; in steps too."""

    @optional
    def on_embeddings(self, stage: PruningStage) -> None:
        """Before the first layer: the rows of a part of the prompt that has images."""

    def counts(self, stage: PruningStage) -> tuple[int, ...]:
        """Image tokens of each sequence that go on: never more than there are."""
        pairs = zip(stage.given, stage.counts, strict=True)
        return tuple(min(self.kept(stage.layer, given, left), left) for given, left in pairs)

    def score(self, stage: PruningStage) -> Tensor:
        """How much each token matters, ``[batch, rows]``; of the image tokens those with the highest scores stay."""
        raise NotImplementedError

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        """Which rows go on."""
        counts = self.counts(stage)
        return KeptTokens(stage.top(self.score(stage), counts), counts)


@dataclass(frozen=True, kw_only=True)
class ScorerPruning(Pruning):
    """Base of methods that drop tokens once: only ``score`` is theirs."""

    layer: int = option(2, 0, 10**4, "first layer that only kept tokens reach")
    keep_ratio: float = option(0.5, 0, 1, "share of the image tokens that stays")
    keep_tokens: int = option(0, 0, 10**6, "image tokens of a sequence that stay; 0: by keep_ratio")

    def at(self, share: float) -> Self:
        return replace(self, keep_ratio=share, keep_tokens=0)

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        return (self.layer,)

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        return self.keep_tokens or round(self.keep_ratio * sum(given))


@dataclass(frozen=True, kw_only=True)
class Staged(Pruning):
    """Base of methods that keep fewer tokens from stage to stage: one layer and one share for each."""

    layers: str = ""
    keep_ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        name, ratios, parts = self.info.name, self.keep_ratios, self.layers.split(",")
        if not all(0 <= ratio <= 1 for ratio in ratios) or any(a < b for a, b in pairwise(ratios)):
            raise OptionError(f"{name}.keep_ratios must fall and lie within 0..1, got {list(ratios)}")
        if any(len(parse_layers(part, MANY, f"{name}.layers")) != 1 for part in parts):
            raise OptionError(f"{name}.layers must name one layer for each stage, got '{self.layers}'")
        if len(parts) != len(ratios):
            raise OptionError(
                f"{name}.keep_ratios must have one ratio for each of the {len(parts)} layers in {name}.layers, got"
                f" {len(ratios)}"
            )

    def at(self, share: float) -> Self:
        return replace(self, keep_ratios=tuple(share * ratio / self.keep_ratios[0] for ratio in self.keep_ratios))

    def bind(self, anatomy: Anatomy) -> Staged:
        bound = replace(self, layers=",".join(map(str, self.stages(anatomy))))
        Pruning.bind(bound, anatomy)
        return bound

    def stages(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Shares of the depth move up in a model of few layers, so that each stage has a layer of its own, and where
        some layers have no attention, to the next layer that has what the method looks at."""
        found: list[int] = []
        for part in self.layers.split(","):
            (layer,) = parse_layers(part, anatomy.layers, f"{self.info.name}.layers")
            if "/" in part:
                layer = max(layer, found[-1] + 1 if found else 1)
                while layer < anatomy.layers and not self.sees(anatomy, layer, found[-1] if found else 0):
                    layer += 1
            found.append(layer)
        if any(a >= b for a, b in pairwise(found)):
            raise OptionError(f"{self.info.name}.layers must ascend, got {found} in {anatomy.layers} layers")
        return tuple(found)

    def ratio(self, layer: int) -> float:
        """Share that stays before a stage's layer (once bound)."""
        return self.keep_ratios[[int(at) for at in self.layers.split(",")].index(layer)]
