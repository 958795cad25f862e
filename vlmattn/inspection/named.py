"""Tensors whose axes have names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmattn.errors import OptionError


@dataclass(frozen=True, eq=False)
class Named:
    """A tensor and the names of its axes: ``Named(values, ("layer", "head")).mean("head")``.

    Attributes:
        values: the tensor, on the CPU.
        axes: a name for each axis.
    """

    values: Tensor
    axes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.axes) or len(set(self.axes)) != len(self.axes):
            raise OptionError(
                f"a tensor of shape {list(self.values.shape)} needs as many different names, got {self.axes}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each axis by name."""
        return dict(zip(self.axes, self.values.shape, strict=True))

    def mean(self, *axes: str) -> Named:
        """The mean over some axes."""
        return Named(self.values.mean([self._place(axis) for axis in axes]), self._without(axes))

    def sum(self, *axes: str) -> Named:
        """The sum over some axes."""
        return Named(self.values.sum([self._place(axis) for axis in axes]), self._without(axes))

    def pick(self, **places: int) -> Named:
        """One place of some axes, counted from 0 (or from the end below 0), which go: ``pick(layer=3, head=-1)``.

        Raises:
            OptionError: no such axis, or no such place.
        """
        index: list[int | slice] = [slice(None)] * len(self.axes)
        for axis, place in places.items():
            size = self.values.shape[self._place(axis)]
            if not -size <= place < size:
                raise OptionError(f"{axis} {place} is out of range: there are {size} (0 to {size - 1})")
            index[self._place(axis)] = place
        return Named(self.values[tuple(index)], self._without(tuple(places)))

    def _place(self, axis: str) -> int:
        if axis not in self.axes:
            raise OptionError(f"no axis '{axis}'; the axes are {', '.join(self.axes)}")
        return self.axes.index(axis)

    def _without(self, gone: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in self.axes if axis not in gone)

    def __repr__(self) -> str:
        return f"Named({', '.join(f'{axis} {size}' for axis, size in self.sizes.items())})"
