"""The answers of a run on disk: one JSON line per batch, written as it is done, complete after any kill of any process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from vlmattn.errors import InputError, StateError
from vlmattn.evals.processes import Processes
from vlmattn.files import write_whole

_WHOLE = "journal.jsonl"  # of all processes
_OF_A_RUN = ("settings.json", "answers.jsonl", "summary.json", "table.md", "report.html")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(data, indent=2) + "\n")


@dataclass(frozen=True)
class Batch:
    """What one batch of questions came to.

    Attributes:
        suite, preset, number: which batch; the numbers of a suite's batches follow from the settings of the run.
        answers: by id of the sample.
        unreadable: why samples have no answer, by id: an image is missing or damaged.
        seconds: of generation.
        tokens: in the answers.
        peak_bytes: memory that it took on top, None where it cannot be measured.
        cut: whether memory was short, so that it was answered in parts.
        report: ``fired``, ``backends`` and maybe ``image_tokens`` of ``model.vlmattn.report()``.
    """

    suite: str
    preset: str
    number: int
    answers: dict[str, str]
    unreadable: dict[str, str]
    seconds: float
    tokens: int
    peak_bytes: int | None
    cut: bool
    report: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.suite, self.preset, self.number


class Journal:
    """Batches of earlier and present attempts of one run in ``folder``, which all processes of the run share.

    Every process appends to a file of its own. The next attempt, with however many processes, puts them together.

    Args:
        folder: results folder; made if needed.
        settings: everything that decides the answers. A folder that holds a run with other settings is refused.
        processes: those of this attempt.
        restart: throw away what the folder holds.

    Attributes:
        done: the batches that were there at the start, by key.

    Raises:
        StateError: the folder belongs to a run with other settings.
        InputError: a damaged line that is not the last one of its file (file:line).
    """

    def __init__(self, folder: Path, settings: dict[str, Any], processes: Processes, restart: bool = False) -> None:
        self._folder, self._processes = folder, processes
        found: list[Batch] | Exception = []
        if processes.first:
            try:
                found = self._begin(settings, restart)
            except (InputError, StateError) as error:  # all processes end by it, not only this one
                found = error
        found = processes.told(found)
        if isinstance(found, Exception):
            raise found
        self.done = {batch.key: batch for batch in found}
        self.added: list[Batch] = []
        self._own = folder / f"journal-{processes.rank}.jsonl"
        self._file: TextIO | None = None

    def _begin(self, settings: dict[str, Any], restart: bool) -> list[Batch]:
        """What the first process does alone: check the settings, read all journals, leave one in good order."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use {self._folder} for results: {error.strerror}") from None
        if restart:
            for path in [*(self._folder / name for name in _OF_A_RUN), *self._journals()]:
                path.unlink(missing_ok=True)
        check_settings(self._folder, settings)
        batches: dict[tuple[str, str, int], Batch] = {}
        for path in sorted(self._journals(), key=lambda path: path.name != _WHOLE):  # what was asked again comes later
            batches |= {batch.key: batch for batch in _read(path)}
        self._write(batches.values())
        return list(batches.values())

    def _journals(self) -> list[Path]:
        return sorted(self._folder.glob("journal*.jsonl"))

    def _write(self, batches: Iterable[Batch]) -> None:
        """One journal of all batches in place of those of the processes."""
        whole = self._folder / _WHOLE
        write_whole(whole, "".join(json.dumps(asdict(batch)) + "\n" for batch in batches))
        for path in self._journals():
            if path != whole:
                path.unlink()

    def has(self, key: tuple[str, str, int], ids: Iterable[str]) -> bool:
        """Whether an earlier attempt answered this batch: these samples, each of them.

        Those whose images could not be read then are asked again, with their batch: somebody may have mended them.
        """
        return key in self.done and self.done[key].answers.keys() == set(ids)

    def add(self, batch: Batch) -> None:
        """Append a batch and wait until it is on disk."""
        self.added.append(batch)
        self._file = self._file or self._own.open("a")
        self._file.write(json.dumps(asdict(batch)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, order: Callable[[Batch], Any]) -> list[Batch]:
        """All batches of all processes, sorted by ``order``; waits for the processes, and leaves one journal."""
        again = {batch.key: batch for batch in self._processes.gathered(self.added)}
        found = sorted({**self.done, **again}.values(), key=order)
        if self._processes.first:
            self._write(found)
        return found

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write settings.json, or compare with the one that is there.

    Raises:
        StateError: it says something else.
    """
    path, now = folder / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, settings)
        return
    before = json.loads(path.read_text())
    if before != now:
        changed = sorted({*before, *now} - {key for key in before if key in now and before[key] == now[key]})
        raise StateError(
            f"{folder} holds a run with other settings ({', '.join(changed)}); use another --out, or --restart"
        )


def _read(path: Path) -> list[Batch]:
    """The batches of one journal; what follows the last line break was cut off, and is done again."""
    found = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            found.append(Batch(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            raise InputError(f"{path}:{number}: damaged line; delete it or use --restart") from None
    return found
