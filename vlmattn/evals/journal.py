"""The answers of a run on disk: one JSON line per answer, written batch by batch, complete after any kill."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vlmattn.errors import InputError, StateError
from vlmattn.files import write_whole

Key = tuple[str, str, str]  # suite, preset, sample id


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(data, indent=2) + "\n")


class Journal:
    """Answers of earlier and present attempts of one run in ``folder``.

    Args:
        folder: results folder; made if needed.
        settings: everything that decides the answers. A folder that holds a run with other settings is refused.
        restart: throw away what the folder holds.

    Raises:
        StateError: the folder belongs to a run with other settings.
        InputError: a damaged line that is not the last one (file:line).
    """

    def __init__(self, folder: Path, settings: dict[str, Any], restart: bool = False) -> None:
        self._path, self._settings = folder / "answers.jsonl", folder / "settings.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use {folder} for results: {error.strerror}") from None
        if restart:
            for name in ("answers.jsonl", "settings.json", "summary.json", "table.md", "report.html"):
                (folder / name).unlink(missing_ok=True)
        if self._settings.exists():
            before = json.loads(self._settings.read_text())
            if before != json.loads(json.dumps(settings)):
                changed = sorted(
                    k for k in {*before, *settings} if before.get(k) != json.loads(json.dumps(settings.get(k)))
                )
                raise StateError(
                    f"{folder} holds a run with other settings ({', '.join(changed)}); use another --out, or --restart"
                )
        else:
            write_json(self._settings, settings)
        self.answers: dict[Key, str] = {}
        self.resumed = 0
        self._read()
        self._file = self._path.open("a")

    def _read(self) -> None:
        """Read earlier answers; a batch cut off in the middle is dropped, so that it is done again as a whole."""
        if not self._path.exists():
            return
        lines = self._path.read_text().split("\n")
        complete, tail = lines[:-1], lines[-1]  # what follows the last newline was cut off
        batches: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for number, line in enumerate(complete, start=1):
            try:
                item = json.loads(line)
                batches.setdefault((item["suite"], item["preset"], item["batch"]), []).append(item)
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f"{self._path}:{number}: damaged line; delete it or use --restart") from None
        kept = [items for items in batches.values() if len(items) == items[0]["batch_size"]]
        for item in (item for items in kept for item in items):
            self.answers[item["suite"], item["preset"], item["id"]] = item["answer"]
        self.resumed = len(self.answers)
        if tail or sum(map(len, kept)) != len(complete):
            write_whole(self._path, "".join(json.dumps(item) + "\n" for items in kept for item in items))

    def add(self, suite: str, preset: str, batch: int, ids: Sequence[str], answers: Sequence[str]) -> None:
        """Append the answers of one batch and wait until they are on disk."""
        for sample, answer in zip(ids, answers, strict=True):
            self.answers[suite, preset, sample] = answer
            item = {
                "suite": suite,
                "preset": preset,
                "batch": batch,
                "batch_size": len(ids),
                "id": sample,
                "answer": answer,
            }
            self._file.write(json.dumps(item) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
