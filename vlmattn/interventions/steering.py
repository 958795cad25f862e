"""The shape of a method that changes hidden states: which rows, in which layers, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.interventions.base import Intervention, optional
from vlmattn.interventions.directions import FILE_NAME, directions_for, load_directions
from vlmattn.kernels import AttentionEdit, ResidualPart, Rows
from vlmattn.options import option, parse_layers
from vlmattn.request import LayerContext

ROWS = ("all", "generated", "image", "text")
_NONE = object()  # no row


@dataclass(frozen=True, kw_only=True)
class Steering(Intervention):
    """Base of methods that change hidden states: ``parts`` is theirs.

    The states ``[batch, query, hidden]`` are what a decoder layer puts out, or its MLP before the residual sum. Methods
    act in the order of the recipe, each on what those before it left. In one method parts act in their order.

    Attributes:
        site: "layer" or "mlp".
        rows: "all" real tokens; "generated" ones, with the last of the prompt, which predicts the first; "image"
            tokens; "text" of the prompt, and all generated tokens.
    """

    site: ClassVar[Literal["layer", "mlp"]] = "layer"
    acts_on: ClassVar[str] = "tokens"
    needs_images: ClassVar[bool] = False
    rows: str = option("generated", about="rows that change", choices=ROWS)

    def active_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """All layers have a residual stream, also those without attention."""
        found = tuple(parse_layers(self.layers, anatomy.layers, f"{self.info.name}.layers"))
        if not found:
            raise OptionError(
                f"{self.info.name}.layers '{self.layers}' selects none of the layers 0..{anatomy.layers - 1}"
            )
        return found

    @optional
    def edit(self, context: LayerContext) -> AttentionEdit:
        """Attention stays as it is."""
        return AttentionEdit()

    def parts(self, context: LayerContext, rows: Rows | None) -> tuple[ResidualPart, ...]:
        """What becomes of ``rows`` in this layer; () for nothing.

        Args:
            rows: those of the option; None = all.
        """
        raise NotImplementedError

    def residual(self, context: LayerContext) -> tuple[ResidualPart, ...]:
        """The changes of one layer; nothing where none of the rows are."""
        rows = context.memo(("steered rows", self.rows), lambda: self._rows(context))
        found = () if rows is _NONE else self.parts(context, rows)
        if found:
            context.count(self.info.name, 1)
        return found

    def _rows(self, context: LayerContext) -> Any:
        """``Rows``; None = all, _NONE = none."""
        if self.rows == "generated":
            return context.rows_that_predict()
        if context.step.start is None:
            return _NONE if self.rows == "image" else None
        real, visual = context.real, context.visual
        if self.rows == "all":
            return None if real is None else Rows(context.of_rows(real, True))
        chosen: Tensor = visual if self.rows == "image" else ~visual
        return Rows(context.of_rows(chosen if real is None else chosen & real, self.rows == "text"))


def drawn(shape: Sequence[int], seed: int, layer: int) -> Tensor:
    """Random directions of length 1 ``[..., hidden]`` for a layer: what measured ones have to beat."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


@dataclass(frozen=True, kw_only=True)
class FromFile(Steering):
    """Base of methods whose directions ``[k, hidden]`` are in a file, by layer (``Directions``).

    ``draw`` other than 0 puts random directions of equal norm in their place: the control. It names the seed.

    Raises:
        OptionError: no file given and none beside the model; one of another model; none of its layers.
        InputError: a file that holds something else, or numbers that are not finite.
    """

    files: ClassVar[Mapping[str, str]] = {"file": FILE_NAME}
    file: str = option("", about=f"safetensors file of directions; empty: {FILE_NAME} beside the model")
    draw: int = option(0, 0, 2**31 - 1, "seed of random directions in their place; 0 = those of the file")

    def bind(self, anatomy: Anatomy) -> Any:
        path, _ = directions_for(self.info.name, self.file, anatomy)
        bound = replace(self, file=path)
        bound.active_layers(anatomy)
        return bound

    def active_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        found = super().active_layers(anatomy)
        if not self.file:
            return found
        here = tuple(layer for layer in found if layer in load_directions(self.file).by_layer)
        if not here:
            raise OptionError(f"{self.info.name}.layers '{self.layers}' has none of the layers in {self.file}")
        return here

    def directions(self, context: LayerContext) -> Tensor:
        """float32 ``[k, hidden]`` of this layer."""

        def read() -> Tensor:
            found = load_directions(self.file).by_layer[context.layer]
            if self.draw:
                found = drawn(found.shape, self.draw, context.layer) * found.norm(dim=-1, keepdim=True)
            return found.to(context.device)

        kept: Tensor = context.store(self).once("directions", read)
        return kept
