"""Paired measurements: who runs when, what the figures mean, and files that are whole."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from vlmattn.evals import timing
from vlmattn.evals.timing import paired, peak_bytes, quartiles, rows, write_csv


def test_all_candidates_run_in_every_round_and_the_warm_up_is_not_counted():
    order: list[str] = []
    seconds = paired({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3, warm_up=2)
    assert order == list("abc") * 5
    assert {name: len(of) for name, of in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for of in seconds.values() for value in of)


def test_the_device_is_waited_for_before_and_after_each_candidate(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: order.append("wait"))
    paired({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=1, warm_up=0)
    assert order == ["wait", "a", "wait", "wait", "b", "wait"]


def test_seconds_are_those_of_the_candidate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(seconds: float):
        return lambda: now.__setitem__(0, now[0] + seconds)

    assert paired({"a": takes(2.0), "b": takes(3.0)}, rounds=2) == {"a": [2.0, 2.0], "b": [3.0, 3.0]}


def test_ratios_are_taken_within_rounds():
    """A machine that is ten times slower in one round changes medians, not ratios."""
    base, edit = rows("step", {"none": [1.0, 10.0, 1.0, 2.0], "edit": [1.1, 11.0, 1.2, 2.2]}, "none")
    assert (edit["what"], edit["candidate"], edit["base"], edit["unit"], edit["n"]) == ("step", "edit", "none", "ms", 4)
    assert (edit["ratio_q1"], edit["ratio"], edit["ratio_q3"]) == (1.1, 1.1, 1.125)
    assert edit["median"] == 1700.0
    assert edit["extra"] == 200.0  # of .1, 1, .2 and .2 seconds
    assert (base["ratio_q1"], base["ratio"], base["ratio_q3"], base["extra"]) == (1.0, 1.0, 1.0, 0.0)
    assert {"date", "cpu", "threads", "gpu", "torch", "transformers", "vlmattn", "python"} <= edit.keys()


def test_bytes_are_shown_in_megabytes():
    _, more = rows("peak", {"none": [1e8], "edit": [2e8]}, "none", "mb")
    assert (more["unit"], more["median"], more["extra"], more["ratio"]) == ("mb", 200.0, 100.0, 2.0)


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="zip"):
        rows("step", {"none": [1.0, 2.0], "edit": [1.0]}, "none")


def test_quartiles_stay_within_what_was_measured():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call_alone():
    device = torch.device("cpu")
    kept = torch.ones(64 * 2**20 // 4)
    peak = peak_bytes(lambda: torch.ones(128 * 2**20 // 4).sum(), device)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 0.9 * 128 * 2**20 < peak < 1.3 * 128 * 2**20
    small = peak_bytes(lambda: kept.sum(), device)
    assert small is not None
    assert small < 16 * 2**20


def test_peak_memory_is_none_where_it_cannot_be_told(monkeypatch):
    ran: list[int] = []
    assert peak_bytes(lambda: ran.append(1), torch.device("meta")) is None

    def locked(field: str) -> int:
        raise PermissionError

    monkeypatch.setattr(timing, "_status", locked)
    assert peak_bytes(lambda: ran.append(1), torch.device("cpu")) is None
    assert not ran, "what cannot be measured need not run"


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_csv(path, [{"a": 1, "b": "x, y"}, {"a": 2, "c": 3}])
    with path.open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y", "c": ""}, {"a": "2", "b": "", "c": "3"}]
    before = path.read_text()

    class Broken:
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(path, [{"a": 1}, {"a": Broken()}])
    assert path.read_text() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["table.csv"]
