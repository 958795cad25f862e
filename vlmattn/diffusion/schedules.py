"""How many image tokens a layer sees in a denoising step, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vlmattn.errors import OptionError, quoted
from vlmattn.options import MANY, parse_layers


class Schedule(Protocol):
    """How many image tokens a layer sees in a denoising step. Anything with this method will do."""

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        """Share of the image tokens, 0..1, in step ``step`` of ``steps`` and ``layer`` of ``layers``, both from 0."""
        ...


def _check(**shares: float) -> None:
    for name, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise OptionError(f"{name} must be a share within 0..1, got {quoted(value)}")


def share_of(schedule: Schedule, step: int, steps: int, layer: int, layers: int) -> float:
    """What a schedule says, checked.

    Raises:
        OptionError: it is no share within 0..1.
    """
    share = schedule.keep(step, steps, layer, layers)
    if not 0 <= share <= 1:
        raise OptionError(
            f"{quoted(schedule)} says {quoted(share)} for step {step} and layer {layer}; a share must lie within 0..1"
        )
    return share


def counts_of(share: float, given: Sequence[int]) -> tuple[int, ...]:
    """Image tokens of each sequence that stay of those ``given``: the share, rounded."""
    return tuple(round(share * count) for count in given)


@dataclass(frozen=True)
class Constant:
    """The same share in all steps and in layers from ``layer`` on (LLaDA-FastV, arXiv 2601.20168).

    Raises:
        OptionError: a share out of 0..1, a layer that the model does not have.
    """

    share: float = 0.5
    layer: int = 0

    def __post_init__(self) -> None:
        _check(share=self.share)

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        if not 0 <= self.layer < layers:
            raise OptionError(
                f"Constant.layer must be one of the layers 0..{layers - 1} of this model, got {self.layer}"
            )
        return self.share if layer >= self.layer else 1.0


@dataclass(frozen=True)
class Progressive:
    """Evenly from ``start`` in the first step to ``end`` in the last (arXiv 2511.15098).

    Later steps mend what earlier ones lost.

        keep(s) = start + (end - start) s / (S - 1)

    Raises:
        OptionError: a share out of 0..1.
    """

    start: float = 1.0
    end: float = 0.25

    def __post_init__(self) -> None:
        _check(start=self.start, end=self.end)

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        share = self.start + (self.end - self.start) * (step / max(steps - 1, 1))
        return min(max(share, min(self.start, self.end)), max(self.start, self.end))  # no rounding beyond the ends


@dataclass(frozen=True)
class LateStep:
    """All image tokens in the first ``tau`` S of S steps, then ``share`` (arXiv 2511.15098).

    Raises:
        OptionError: a share out of 0..1.
    """

    tau: float = 0.5
    share: float = 0.25

    def __post_init__(self) -> None:
        _check(tau=self.tau, share=self.share)

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        return self.share if step >= self.tau * steps - 1e-9 else 1.0  # .07 * 100 is a little more than 7


@dataclass(frozen=True)
class LayerSkip:
    """Image tokens pass by the layers ``layers``, but for ``share`` of them (arXiv 2511.15098).

    For models that began autoregressive. ``layers`` are numbers, or a range as methods have it: "1,3", "1/2:".

    Raises:
        OptionError: a share out of 0..1, layers that the model does not have.
    """

    layers: str | tuple[int, ...]
    share: float = 0.0

    def __post_init__(self) -> None:
        _check(share=self.share)
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        self._skipped(MANY)

    def _skipped(self, layers: int) -> tuple[int, ...]:
        spec = self.layers if isinstance(self.layers, str) else ",".join(map(str, self.layers))
        return parse_layers(spec, layers, "LayerSkip.layers")

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        return self.share if layer in self._skipped(layers) else 1.0


@dataclass(frozen=True)
class Least:
    """The smallest share that any of some schedules says.

    Raises:
        OptionError: no schedule.
    """

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        if not self.schedules:
            raise OptionError("Least takes at least one schedule, as in Least((LateStep(), LayerSkip('1/2:')))")

    def keep(self, step: int, steps: int, layer: int, layers: int) -> float:
        return min(schedule.keep(step, steps, layer, layers) for schedule in self.schedules)
