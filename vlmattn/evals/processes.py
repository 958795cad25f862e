"""The processes of one run: one, or those that ``torchrun`` or ``accelerate launch`` started."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from vlmattn.errors import StateError

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # a process that died ends the others through its launcher, one that is slow must not


class Processes:
    """Rank, number and device of this process, and what the processes tell each other.

    Attributes:
        count: how many there are.
        rank: which one this is, from 0.
        device: where its model belongs: the accelerator that the launcher gave it, else the CPU.
    """

    def __init__(self) -> None:
        cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        timeout = {"timeout": _PATIENCE} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
        self._state = PartialState(cpu=cpu, **timeout)
        self.count, self.rank = int(self._state.num_processes), int(self._state.process_index)
        self.device: torch.device = self._state.device
        self._launcher = os.getppid()
        if self.count > 1:
            atexit.register(self._state.destroy_process_group)  # or torch complains that it was left behind

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all have found."""
        return self.rank == 0

    def check_launcher(self) -> None:
        """End with a launcher that was killed: its processes would hold up the same command started anew.

        Raises:
            StateError: it is gone.
        """
        if self.count > 1 and os.getppid() != self._launcher:
            raise StateError("the launcher of this process is gone; the same command goes on from here")

    def share(self, items: list[_T]) -> list[_T]:
        """Every ``count``-th item, from this process's rank on."""
        return items[self.rank :: self.count]

    def told(self, item: _T) -> _T:
        """The item of the first process; also a point that no process passes before all have come to it."""
        if self.count == 1:
            return item
        found: list[_T] = broadcast_object_list([item])
        return found[0]

    def gathered(self, items: list[_T]) -> list[_T]:
        """The items of all processes, those of the first one first."""
        if self.count == 1:
            return items
        found: list[_T] = gather_object(items)
        return found
