"""Journals: whatever happens to the files, what is whole is kept, and nothing else is believed."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmattn.errors import InputError, StateError
from vlmattn.evals.journal import Batch, Journal
from vlmattn.evals.processes import Processes

SETTINGS = {"model": "m", "versions": {"torch": "1", "python": "3"}, "batch_size": 2}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def batches(draw):
    """Batches of different keys, as a run makes them."""
    keys = draw(
        st.lists(
            st.tuples(st.sampled_from(["pope", "chair"]), TEXTS, st.integers(0, 9)), min_size=1, max_size=8, unique=True
        )
    )
    found = []
    for suite, preset, number in keys:
        answers = draw(st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=3))
        found.append(
            Batch(
                suite=suite,
                preset=preset,
                number=number,
                answers=answers,
                unreadable={},
                sources={key: ["q", "i"] for key in answers},
                seconds=draw(st.floats(0, 1e3)),
                tokens=draw(st.integers(0, 99)),
                peak_bytes=None,
                cut=draw(st.booleans()),
                report={"fired": {"vhr": 3}, "backends": {"prefill": {"eager": 1}}},
            )
        )
    return found


def write(folder, made, cut=None):
    """The journals of a run that was killed, in two processes if ``cut`` is a number; the bytes of their lines."""
    with Journal(folder, SETTINGS, Processes()) as journal:
        for number, batch in enumerate(made):
            journal.add(batch)
            if number == cut:
                (folder / "journal-0.jsonl").rename(folder / "journal-1.jsonl")
                journal._file = None
    return [line for path in sorted(folder.glob("journal-*")) for line in path.read_bytes().splitlines(keepends=True)]


def finished(folder, made):
    """The journal that a resume ends with, and what it asked again."""
    with Journal(folder, SETTINGS, Processes()) as journal:
        asked = [batch for batch in made if not journal.has(batch.key, batch.answers)]
        kept = dict(journal.done)
        for batch in asked:
            journal.add(batch)
        return journal.finish(lambda batch: batch.key), asked, kept, journal.notes


def swapped(data, draw):
    lines = data.splitlines(keepends=True)
    first, second = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


def doubled(data, draw):
    lines = data.splitlines(keepends=True)
    lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(lines)))
    return b"".join(lines)


def flipped(data, draw):
    place, bit = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, 7))
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def truncated(data, draw):
    return data[: draw(st.integers(0, len(data) - 1))]


def with_garbage(data, draw):
    place = draw(st.integers(0, len(data)))
    return data[:place] + draw(st.binary(min_size=1, max_size=30)) + data[place:]


def edited(data, draw):
    lines = data.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    item = json.loads(lines[place])
    field, value = draw(st.sampled_from(list(item))), draw(st.sampled_from([None, [], {}, "yes", 7, True, {"a": 1}]))
    lines[place] = json.dumps(draw(st.sampled_from([{**item, field: value}, {**item, "more": value}]))).encode() + b"\n"
    return b"".join(lines)


DAMAGES = [swapped, doubled, flipped, truncated, with_garbage, edited]


@settings(deadline=None, max_examples=120)
@given(made=batches(), damages=st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=2), data=st.data())
def test_damage_costs_what_it_hits_and_nothing_else(tmp_path_factory, made, damages, data):
    folder = tmp_path_factory.mktemp("run")
    whole = write(folder, made, cut=data.draw(st.sampled_from([None, 0, len(made) // 2])))
    path = data.draw(st.sampled_from(sorted(folder.glob("journal-*.jsonl"))))
    others = [
        line for other in folder.glob("journal-*.jsonl") if other != path for line in other.read_bytes().splitlines()
    ]
    damaged = path.read_bytes()
    for damage in damages:
        damaged = damage(damaged, data.draw) if damaged.strip() and len(damaged.split(b"\n")) > 1 else damaged
        try:
            [json.loads(line) for line in damaged.splitlines()]
        except ValueError:
            break  # what is no JSON any more cannot be edited further
    path.write_bytes(damaged)
    intact = {line.rstrip(b"\n") for line in whole} & {*damaged.split(b"\n"), *others}
    found, asked, kept, _ = finished(folder, made)
    originals = {batch.key: batch for batch in made}
    assert all(originals[key] == batch for key, batch in kept.items()), "nothing that was not written is believed"
    sure = {(item["suite"], item["preset"], item["number"]) for item in map(json.loads, intact)}
    assert sure <= kept.keys(), "what is whole is kept"
    assert {batch.key for batch in asked} == originals.keys() - kept.keys()
    assert found == sorted(made, key=lambda batch: batch.key)
    again, asked, _, notes = finished(folder, made)
    assert (again, asked, notes) == (found, [], [])


def simple(number=0, **fields):
    answers = {"a": "yes", "b": "no"}
    base = Batch("pope", "none", number, answers, {}, {"a": ["1", ""], "b": ["2", ""]}, 0.5, 4, None, False, {})
    return replace(base, **fields)


def test_what_is_damaged_is_named_and_half_a_line_at_the_end_is_no_news(tmp_path):
    made = [simple(0), simple(1), simple(2)]
    lines = write(tmp_path, made)
    (tmp_path / "journal-0.jsonl").write_bytes(lines[0] + lines[1].replace(b"yes", b"yep") + lines[2][:40])
    _, asked, _, notes = finished(tmp_path, made)
    assert [batch.number for batch in asked] == [1, 2]
    assert notes == ["journal-0.jsonl:2: damaged, edited or of another run"]


def test_many_damaged_lines_are_named_in_short(tmp_path):
    write(tmp_path, [simple(0)])
    with (tmp_path / "journal-0.jsonl").open("a") as file:
        file.write("x\n" * 100)
    *_, notes = finished(tmp_path, [simple(0)])
    assert len(notes) == 6
    assert notes[-1] == "and 95 more"


def test_two_answers_to_one_question_are_both_asked_again(tmp_path):
    write(tmp_path, [simple(0), simple(1), simple(0, answers={"a": "no", "b": "no"})])
    _, asked, kept, notes = finished(tmp_path, [simple(0), simple(1)])
    assert [batch.number for batch in asked] == [0]
    assert list(kept) == [simple(1).key]
    assert notes == ["journal-0.jsonl:3: other answers to questions that were answered before"]


def test_of_a_batch_that_was_asked_again_the_one_with_more_answers_counts(tmp_path):
    part = simple(0, answers={"a": "yes"}, unreadable={"b": "image not found"}, sources={"a": ["1", ""]})
    for order in ([part, simple(0)], [simple(0), part]):
        folder = tmp_path / str(order[0] is part)
        write(folder, order)
        found, asked, _, notes = finished(folder, [simple(0)])
        assert (found, asked, notes) == ([simple(0)], [], [])


def test_lines_of_a_run_with_other_settings_are_not_believed(tmp_path):
    write(tmp_path / "a", [simple(0)])
    with Journal(tmp_path / "b", {**SETTINGS, "model": "other"}, Processes()) as journal:
        journal.add(simple(1))
    with (tmp_path / "a" / "journal-0.jsonl").open("ab") as file:
        file.write((tmp_path / "b" / "journal-0.jsonl").read_bytes())
    _, asked, _, notes = finished(tmp_path / "a", [simple(0), simple(1)])
    assert [batch.number for batch in asked] == [1]
    assert "of another run" in notes[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"model": "m", "model": "m"}', None])
def test_damaged_settings_are_written_anew_if_the_answers_fit(tmp_path, content):
    write(tmp_path, [simple(0)])
    path = tmp_path / "settings.json"
    path.unlink() if content is None else path.write_bytes(content)
    whole = (tmp_path / "journal-0.jsonl").read_bytes()
    with pytest.raises(StateError, match=r"none of them was made with these settings; use another --out, or --restart"):
        Journal(tmp_path, {**SETTINGS, "model": "other"}, Processes())
    assert (tmp_path / "journal-0.jsonl").read_bytes() == whole
    found, asked, _, _ = finished(tmp_path, [simple(0)])
    assert (found, asked) == ([simple(0)], [])
    assert json.loads(path.read_text()) == SETTINGS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "n"}, r"\(model\); use"),
        ({"versions": {"torch": "2", "python": "3"}}, r"\(versions\): versions\.torch; use"),
        ({"versions": 3}, r"\(versions\); use"),
        ({"more": None}, r"\(more\); use"),
        ({f"x{n}": 1 for n in range(2)}, r"\(x0, x1\); use"),
    ],
)
def test_edited_settings_are_refused_by_name(tmp_path, change, words):
    write(tmp_path, [simple(0)])
    (tmp_path / "settings.json").write_text(json.dumps({**SETTINGS, **change}))
    with pytest.raises(StateError, match=words):
        Journal(tmp_path, SETTINGS, Processes())


@pytest.mark.parametrize("name", ["settings.json", "journal.jsonl", "journal-0.jsonl", "journal-7.jsonl"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_in_place_of_a_file_is_an_error_of_one_line(tmp_path, name, restart):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError) as error:
        Journal(tmp_path, SETTINGS, Processes(), restart)
    assert "\n" not in str(error.value)
    assert name in str(error.value) or restart
    assert not list(tmp_path.glob("lock-*"))


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(tmp_path):
    made = [simple(number) for number in range(4)]
    with Journal(tmp_path, SETTINGS, Processes()) as journal:
        journal.add(made[0])
        size = (tmp_path / "journal-0.jsonl").stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 2, before[1]))  # room for half a line
        try:
            with pytest.raises(InputError, match=r"cannot write .*journal-0\.jsonl: File too large"):
                journal.add(made[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (tmp_path / "journal-0.jsonl").stat().st_size == size, "no half line is left"
    found, asked, _, notes = finished(tmp_path, made)
    assert (found, [batch.number for batch in asked], notes) == (made, [1, 2, 3], [])


def test_a_process_whose_launcher_was_killed_ends_before_it_writes(tmp_path, monkeypatch):
    processes = Processes()
    with Journal(tmp_path, SETTINGS, processes) as journal:
        journal.add(simple(0))
        monkeypatch.setattr(os, "getppid", lambda: 1)
        journal.add(simple(1))  # one process alone has no launcher
        processes.count = 2
        with pytest.raises(StateError, match="the launcher of this process is gone"):
            journal.add(simple(2))
    assert (tmp_path / "journal-0.jsonl").read_bytes().count(b"\n") == 2
