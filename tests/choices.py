"""Methods that choose abruptly, such as the heads above a median, choose others when rounding tips the scale.

Two runs that round differently are compared under the same choices: ``Choices`` notes those of one run and has the other
one choose alike. Or on a case where no choice is near to another one, which the test asserts: ``steady``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vlmattn import VHR
from vlmattn.interventions.sinks import SinkTest
from vlmattn.request import PruningStage

RANKING = ("vlmattn.interventions.", "vlmattn.kernels.plans")
POINTS = ((VHR, "gains"), (SinkTest, "is_sink"), (PruningStage, "top"))


def steady(choose: Callable[..., Tensor], *given: Tensor, by: float = 1e-5) -> bool:
    """Whether ``choose`` chooses alike when every value moves by ``by`` of its size at most: a hundred times what float32 rounds a value by."""
    generator = torch.Generator().manual_seed(0)
    wanted = choose(*given)

    def moved(values: Tensor) -> Tensor:
        return values * (1 + by * (2 * torch.rand(values.shape, generator=generator) - 1))

    return all(torch.equal(choose(*map(moved, given)), wanted) for _ in range(8))


class Choices:
    """What methods choose: heads that gain, sinks, image tokens that stay."""

    def __init__(self, ranking: tuple[str, ...] = RANKING) -> None:
        self.ranking = ranking
        self.made: list[tuple[str, Tensor]] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Methods choose as ever."""
        self.made = []

        def note(name: str, choose: Callable[..., Tensor], *given: Any) -> Tensor:
            found = choose(*given)
            self.made.append((name, found))
            return found

        with self._instead(note):
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Methods choose what was noted, in the same order; all of it."""
        left = list(self.made)

        def repeat(name: str, choose: Callable[..., Tensor], *given: Any) -> Tensor:
            own = choose(*given)
            assert left, "the second run chooses more often"
            told, noted = left.pop(0)
            assert (told, noted.shape, noted.dtype) == (name, own.shape, own.dtype), "the runs ask for other choices"
            return noted

        with self._instead(repeat):
            yield
        assert left == [], "the second run chose less often"

    @contextmanager
    def _instead(self, way: Callable[..., Tensor]) -> Iterator[None]:
        def of_library(name: str) -> Callable[..., Any]:
            """``Tensor.topk`` or ``Tensor.sort``, whose order is a choice where methods and plans rank heads or tokens."""
            rank, place = getattr(Tensor, name), {"topk": 1, "sort": 0}[name]

            def ranked(values: Tensor, *given: Any, **options: Any) -> Any:
                found = rank(values, *given, **options)
                if (
                    not sys._getframe(1).f_globals["__name__"].startswith(self.ranking)
                    or not values.is_floating_point()
                ):
                    return found
                index = way(name, lambda _: found.indices, values)
                dim = options.get("dim", given[place] if len(given) > place else -1)
                return type(found)((values.gather(dim, index), index))

            return ranked

        with ExitStack() as stack:
            for owner, name in POINTS:
                choose = getattr(owner, name)

                def instead(*given: Any, name: str = name, choose: Callable[..., Tensor] = choose) -> Tensor:
                    if name != "top":
                        return way(name, choose, *given)
                    among = given[0].visual  # whatever other rows there are
                    kept = torch.zeros_like(among)
                    kept[among] = way(name, lambda *given: choose(*given)[among], *given)
                    return kept

                stack.enter_context(mock.patch.object(owner, name, instead))
            for name in ("topk", "sort"):
                stack.enter_context(mock.patch.object(Tensor, name, of_library(name)))
            yield
