"""What a tracker must know of a multi-view network: an adapter, one small file per kind of network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.registry import load_plugins, look_up


@dataclass(frozen=True)
class Views:
    """What a network says about frames, in one convention.

    Attributes:
        poses: camera to world, OpenCV axes (right, down, forward), ``[batch, frames, 4, 4]``; the world is this pass's
            own, or that of the map whose keys and values were read.
        local_points: in the camera, ``[batch, frames, height, width, 3]``, in the unit of the poses; None if it has
            none.
        confidence: per pixel, larger is surer, positive, ``[batch, frames, height, width]``; None if it has none.
    """

    poses: Tensor
    local_points: Tensor | None
    confidence: Tensor | None


class Adapter(ABC):
    """How to run one kind of network.

    A subclass says which modules attend across frames and turns the output into ``Views``. Those modules must call
    ``F.scaled_dot_product_attention`` once, with queries and keys as they are after normalisation and rotation.
    Anything else in which frames meet (tokens of the first frame, say) is for ``forward`` to put right when
    ``reading``.
    """

    name: ClassVar[str]
    multiple: int  # pixels: sides of a frame are whole multiples of this (the patch size)
    lead: int  # tokens of a frame before those of its patches

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether this adapter knows the network, by its structure."""

    @abstractmethod
    def attentions(self) -> Sequence[nn.Module]:
        """Modules that attend across frames, blocks and heads alike."""

    @abstractmethod
    def forward(self, images: Tensor, reading: bool) -> Views:
        """Run ``[batch, frames, 3, height, width]`` in [0, 1]; ``reading``: one frame per row, against a map."""


_ADAPTERS: dict[str, type[Adapter]] = {}


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Let ``Tracker(model, adapter="auto")`` find an adapter; one registered later is asked first. For use as a
    decorator."""
    _ADAPTERS[adapter.name] = adapter
    return adapter


def find_adapter(model: nn.Module, adapter: str | Adapter = "auto") -> Adapter:
    """The adapter of a model.

    Raises:
        UnknownNameError: no adapter of this name.
        OptionError: neither a name nor an adapter.
        UnsupportedError: "auto", and none fits.
    """
    if isinstance(adapter, Adapter):
        return adapter
    if not isinstance(adapter, str):
        raise OptionError(f"adapter must be 'auto', a name, or an Adapter made with the model, got {adapter!r}")
    if adapter != "auto":
        return look_up("adapter", adapter, _ADAPTERS)(model)
    found = _fitting(model)
    if found is None:
        load_plugins()
        found = _fitting(model)
    if found is None:
        raise UnsupportedError(
            f"no adapter fits {type(model).__name__}; known: {', '.join(sorted(_ADAPTERS))}; write one: subclass"
            " vlmattn.tracking.Adapter (it names the modules that attend across frames) and pass adapter=Mine(model)"
        )
    return found(model)


def _fitting(model: nn.Module) -> type[Adapter] | None:
    return next((adapter for adapter in reversed(_ADAPTERS.values()) if adapter.fits(model)), None)
