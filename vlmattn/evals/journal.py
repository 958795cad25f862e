"""The answers of a run on disk: one JSON line per batch, written as it is done, complete after any kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from vlmattn.errors import InputError, StateError, VlmattnError, one_line
from vlmattn.evals.lock import Lock, refuse_if_used
from vlmattn.evals.processes import Processes
from vlmattn.evals.sources import short_hash
from vlmattn.files import file_errors, write_whole
from vlmattn.texts import parse_json, read_bytes, read_json

_WHOLE = "journal.jsonl"  # of all processes
_OF_A_RUN = ("settings.json", "answers.jsonl", "summary.json", "table.md", "report.html", "tune.json", "tuned.yaml")
_SHOWN = 5  # lines about what is asked again
Key = tuple[str, str, int]


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
        sources: of each answer, by id: hashes of its question and of its image files (``sources.py``).
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
    sources: dict[str, list[str]]
    seconds: float
    tokens: int
    peak_bytes: int | None
    cut: bool
    report: dict[str, Any]

    @property
    def key(self) -> Key:
        return self.suite, self.preset, self.number


class Journal:
    """Batches of earlier and present attempts of one run in ``folder``, which all processes of the run share.

    Every process appends to a file of its own. The next attempt, with however many processes, puts them together. Each
    line has a checksum over itself and the settings: one that is damaged, edited or of another run is not believed, and
        its batch
    is asked again.

    Args:
        folder: results folder; made if needed, and locked until the journal is closed.
        settings: everything that decides the answers. A folder that holds a run with other settings is refused.
        processes: those of this attempt.
        restart: throw away what the folder holds.
        unfit: why a batch of an earlier attempt cannot be used, "" if it can: something that it was made from has
            changed.

    Attributes:
        done: the batches that were there at the start, by key.
        notes: what was there and is asked again, in words; of the first process only.

    Raises:
        StateError: another run works in the folder, or it belongs to a run with other settings.
        InputError: the folder or a file in it cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        processes: Processes,
        restart: bool = False,
        unfit: Callable[[Batch], str] = lambda batch: "",
    ) -> None:
        self._folder, self._processes, self._unfit = folder, processes, unfit
        self._seal = short_hash(json.dumps(json.loads(json.dumps(settings)), sort_keys=True))
        self._own = folder / f"journal-{processes.rank}.jsonl"
        self._file: BinaryIO | None = None
        self._lock = Lock(folder, processes.rank)
        self.notes: list[str] = []
        self.added: list[Batch] = []
        try:
            found: list[Batch] | VlmattnError = []
            if processes.first:
                try:
                    found = self._begin(settings, restart)
                except VlmattnError as error:  # all processes end by it, not only this one
                    found = error
            found = processes.told(found)
            if isinstance(found, VlmattnError):
                raise found
            if not processes.first:
                self._lock.take()
        except BaseException:
            self._lock.release()
            raise
        self.done = {batch.key: batch for batch in found}

    def _begin(self, settings: Mapping[str, Any], restart: bool) -> list[Batch]:
        """What the first process does alone: lock, check the settings, read all journals, leave one in good order."""
        with file_errors("use", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            refuse_if_used(self._folder, self._processes.rank)  # a process of an earlier run may outlive its first one
            if restart:
                for path in [*(self._folder / name for name in _OF_A_RUN), *self._journals()]:
                    path.unlink(missing_ok=True)
            known = check_settings(self._folder, settings)
            batches = self._read()
            if not known:
                if self._journals() and not batches and any(path.stat().st_size for path in self._journals()):
                    raise StateError(
                        f"{self._folder} has answers but no settings.json that can be read, and none of them was made"
                        " with these settings; use another --out, or --restart"
                    )
                write_json(self._folder / "settings.json", settings)
            self._write(batches)
        return batches

    def _journals(self) -> list[Path]:
        return sorted(self._folder.glob("journal*.jsonl"))

    def _read(self) -> list[Batch]:
        """What can be believed of all journals; ``notes`` names the rest."""
        found: dict[Key, Batch] = {}
        doubtful: dict[Key, str] = {}
        unfit: list[str] = []
        for path in self._journals():
            # what follows the last line break was cut off by a kill, which is no news
            *lines, last = read_bytes(path, path.stat().st_size).split(b"\n")
            for number, line in enumerate([*lines, last], start=1):
                where = f"{path.name}:{number}"
                batch = self._parsed(line)
                if batch is None:
                    if line.strip() and number <= len(lines):
                        unfit.append(f"{where}: damaged, edited or of another run")
                elif why := self._unfit(batch):
                    unfit.append(f"{where}: {why}")
                elif (before := found.get(batch.key)) is None or before.answers.keys() < batch.answers.keys():
                    found[batch.key] = batch
                elif before.answers != batch.answers and not before.answers.keys() > batch.answers.keys():
                    doubtful[batch.key] = f"{where}: other answers to questions that were answered before"
        for key in doubtful:
            del found[key]
        self.notes = shortened([*unfit, *doubtful.values()])
        return list(found.values())

    def _parsed(self, line: bytes) -> Batch | None:
        """The batch of a line, None if it is not as it was written."""
        try:
            item = parse_json(line.decode(), _WHOLE)
        except (UnicodeDecodeError, InputError):
            return None
        if not isinstance(item, dict) or item.pop("sum", None) != self._sum(json.dumps(item)):
            return None
        return Batch(**item) if item.keys() == {spec.name for spec in fields(Batch)} else None

    def _sum(self, body: str) -> str:
        return short_hash(self._seal + body)

    def _line(self, batch: Batch) -> bytes:
        item = json.loads(json.dumps(asdict(batch)))
        return (json.dumps({**item, "sum": self._sum(json.dumps(item))}) + "\n").encode()

    def _write(self, batches: Iterable[Batch]) -> None:
        """One journal of all batches in place of those of the processes."""
        whole = self._folder / _WHOLE
        write_whole(whole, b"".join(map(self._line, batches)))
        for path in self._journals():
            if path != whole:
                path.unlink()

    def has(self, key: Key, ids: Iterable[str]) -> bool:
        """Whether an earlier attempt answered this batch: these samples, each of them.

        Those whose images could not be read then are asked again, with their batch: somebody may have mended them.
        """
        return key in self.done and self.done[key].answers.keys() == set(ids)

    def add(self, batch: Batch) -> None:
        """Append a batch and wait until it is on disk.

        Raises:
            StateError: the launcher of this process was killed.
            FileError: it cannot be written; what was written before stays whole, so the same run goes on from there.
        """
        self._processes.check_launcher()
        self.added.append(batch)
        line = self._line(batch)
        with file_errors("write", self._own):
            self._file = self._file or self._own.open("ab", buffering=0)
            before = self._file.seek(0, os.SEEK_END)
            try:
                while line:  # a disk that is nearly full takes a part
                    line = line[self._file.write(line) or 0 :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(before)  # no half a line before the next one
                raise

    def finish(self, order: Callable[[Batch], Any]) -> list[Batch]:
        """All batches of all processes, sorted by ``order``; waits for the processes, and leaves one journal.

        Raises:
            FileError: it cannot be written; the journals of the processes stay.
        """
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
        self._lock.release()


def shortened(lines: Sequence[str], shown: int = _SHOWN) -> list[str]:
    """The first lines, each of bounded length, and how many more there are."""
    more = [f"and {len(lines) - shown} more"] if len(lines) > shown else []
    return [*(one_line(line, 300) for line in lines[:shown]), *more]


def check_settings(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Compare with the settings.json that is there; whether there was one that can be read.

    Raises:
        StateError: it says something else.
        InputError: something other than a file has its name.
    """
    path, now = folder / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        return False
    if not path.is_file():
        raise InputError(f"cannot read {path}: not a regular file; move it away")
    try:
        before = read_json(path)
    except InputError:
        return False
    if not isinstance(before, dict):
        return False
    if before != now:
        names = sorted(
            name for name in {*before, *now} if name not in before or name not in now or before[name] != now[name]
        )
        inner = [within for name in names for within in _differing(name, before.get(name), now.get(name))]
        details = f": {', '.join(shortened(inner))}" if inner else ""
        raise StateError(
            f"{folder} holds a run with other settings ({', '.join(names)}){details}; use another --out, or --restart"
        )
    return True


def _differing(name: str, before: Any, now: Any) -> list[str]:
    """Names of what differs within a setting, as ``versions.torch``."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return []
    keys = sorted({*before, *now})
    return [f"{name}.{key}" for key in keys if key not in before or key not in now or before[key] != now[key]]
