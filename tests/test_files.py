"""Errors on one bounded line, files whole or not at all, and what the system says of them as one line."""

from __future__ import annotations

import csv
import errno
import io
import os
import pickle
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmattn.cli.common import app
from vlmattn.cli.figures import write_page
from vlmattn.errors import FileError, InputError, OptionError, UnknownNameError, VlmattnError, one_line, quoted
from vlmattn.files import copy_whole, csv_text, make_folder, write_whole, written_whole

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full and /proc")


# --- messages


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(st.sampled_from("\n\r\t\x1b\u2028\u0085\ud800\u202e a")), st.integers(1, 3000))
def test_every_message_is_one_line_of_bounded_length(text, times):
    long = text * times
    for error in (
        VlmattnError(long),
        InputError(f"before {long} after"),
        OptionError(quoted(long)),
        UnknownNameError("preset", long, ["a"]),
    ):
        assert str(error).isprintable()
        assert len(str(error)) <= 1000
    assert str(InputError(f"before {long} after")).startswith("before")
    assert str(InputError(f"before {long} after")).endswith("after")
    assert len(one_line(long, 20)) <= 20


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=1000))
def test_what_fits_a_line_is_kept(text):
    assert str(VlmattnError(text)) == text


LEAVES = (
    st.integers()
    | st.text()
    | st.floats()
    | st.binary()
    | st.none()
    | st.sampled_from([400, 5000]).map(lambda digits: 10**digits)
)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=20,
    )
)
def test_values_are_quoted_on_a_bounded_line(value):
    assert len(quoted(value)) <= 80
    assert quoted(value).isprintable()


def test_short_values_are_quoted_as_they_print():
    for value in (0.3, "0.2", None, True, (0.1,), [1, 2], {"a": 1}, float("nan")):
        assert quoted(value) == repr(value)
    laughs = ["lol"] * 9
    for _ in range(60):  # 9 ** 61 words
        laughs = [laughs] * 9
    laughs.append(laughs)
    assert len(quoted(laughs)) <= 80


def test_errors_of_files_are_also_those_of_the_system():
    assert issubclass(FileError, (InputError, OSError))
    again = pickle.loads(pickle.dumps(FileError("cannot read x")))
    assert (type(again), str(again)) == (FileError, "cannot read x")


# --- writing


def _fails(target, write, error):
    with written_whole(target) as partial:
        write(partial)
        raise error


def test_a_file_is_whole_or_not_there(tmp_path):
    write_whole(tmp_path / "a", "one")
    with pytest.raises(ZeroDivisionError):
        _fails(tmp_path / "a", lambda partial: partial.write_text("half"), ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt):
        _fails(tmp_path / "folder", lambda partial: make_folder(partial / "inner"), KeyboardInterrupt)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "one"}
    write_whole(tmp_path / "a", "half of a pair: \ud800")
    assert (tmp_path / "a").read_text() == "half of a pair: ?"


@LINUX
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    write_whole(tmp_path / "a", "one")
    (tmp_path / "source").write_text("two")
    for write in (lambda: write_whole(tmp_path / "a", "two"), lambda: copy_whole(tmp_path / "source", tmp_path / "a")):
        (tmp_path / "a.partial").symlink_to("/dev/full")
        with pytest.raises(FileError, match=r"cannot write .*/a: No space left on device; make room"):
            write()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]
        assert (tmp_path / "a").read_text() == "one"


@LINUX
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/proc/x", "cannot"),
        ("/dev/null/x", "Not a directory"),
        ("a" * 256, "give a shorter name"),
        ("nul\0", "no file can have this name"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, monkeypatch, name, why):
    monkeypatch.chdir(tmp_path)
    for write in (lambda: write_whole(name, "x"), lambda: make_folder(name)):
        with pytest.raises(FileError, match=why):
            write()
    assert not list(tmp_path.iterdir())


def test_rows_as_csv():
    rows = [{"a": 1, "b": "x,\ny"}, {"a": 2, "c": 0.5}]
    assert list(csv.DictReader(io.StringIO(csv_text(rows), newline=""))) == [
        {"a": "1", "b": "x,\ny", "c": ""},
        {"a": "2", "b": "", "c": "0.5"},
    ]


# --- the command line


@pytest.fixture
def failing(monkeypatch):
    """A command that the system fails in some way."""

    def add(error):
        monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))

        @app.command("fail")
        def _fail() -> None:
            raise error

    return add


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "error: No space left on device; make room, or give a place on another disk (--debug shows where)"),
        (PermissionError(errno.EACCES, "Permission denied", "some/file"), "error: cannot use some/file: Permission denied; change its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "[red]x\n" + "y" * 500), "error: cannot use [red]x "),
        (OSError("two\nlines"), "error: two lines"),
        (FileError("cannot write a: disk full"), "error: cannot write a: disk full"),
    ],
)  # fmt: skip
def test_the_command_line_says_it_in_a_line(run, failing, error, line):
    failing(error)
    code, out, err = run("fail")
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1
    with pytest.raises(OSError, match=r".") as caught:
        run("fail", "--debug")
    assert caught.value is error


@LINUX
def test_a_page_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "page.html.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"No space left on device; .*; or give another --html"):
        write_page(tmp_path / "page.html", "page")
    assert not list(tmp_path.iterdir())
