"""The one reader of text, JSON and YAML: what it takes, and that nothing else than an error of ours ever comes out of it."""

from __future__ import annotations

import json
import os
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlmattn.errors import FileError, InputError
from vlmattn.texts import lines_of, parse_data, parse_json, read_bytes, read_json, read_json_lines, read_text

# what other readers take for the end of a line, and other letters that files are broken at
ODD = ["\u0085", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\t", "\ufeff", "\U0001f600", "ß"]
TEXT = st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("texts") / "some.json"


def deep(count, opening="["):
    return opening * count + "0" + {"[": "]", "{": "}"}[opening[0]] * count


# --- lines


@settings(max_examples=100, deadline=None)
@given(
    st.lists(VALUES, max_size=5),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.booleans(),
)
def test_json_lines_are_what_was_written(file, values, end, encoding, last):
    text = end.join(json.dumps(value, ensure_ascii=False) for value in values) + end * last
    file.write_bytes(text.encode(encoding))
    found = read_json_lines(file)
    assert [value for _, value in found] == values
    assert [number for number, _ in found] == [1 + n * end.count("\n") for n in range(len(values))]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(st.sampled_from(ODD[1:]) | st.characters(exclude_characters="\n"), max_size=8).map(
            lambda text: text.rstrip("\r")
        ),
        min_size=1,
    )
)
def test_only_line_feeds_end_a_line(lines):
    assert lines_of("\n".join(lines)) == lines_of("\r\n".join(lines)) == lines


def test_errors_name_file_and_line(file):
    file.write_text('{"a": 1}\n\n{"a": "\u2028"}\n{"a": }\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"some\.json:4: not valid JSON \(Expecting value\)"):
        read_json_lines(file)
    file.write_text('{\n"a": 1,\n"b"}')
    with pytest.raises(InputError, match=r"some\.json:3: not valid JSON"):
        read_json(file)


# --- values


@settings(max_examples=200, deadline=None)
@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_json_is_read_as_python_reads_it(value, indent, escaped):
    text = json.dumps(value, indent=indent, ensure_ascii=escaped)
    assert parse_json(text, "x") == parse_data(text, "x") == value


HOSTILE = [
    "*a", "&a [*a, *a]", "!!int x", "!!bool x", "!!timestamp x", "!!float x", "!!python/name:os.system", "!!binary x", "!!set {a}",
    "2001-13-45", "9" * 5000, "-" + "9" * 5000, "0x" + "f" * 5000, "0b_", "0x_", "1:1:1", "1e999", ".nan", "NaN", "-Infinity",
    '"\\ud800"', '"\\U00110000"', '"\\u0000"', "\0", "\ud800", "<<: {a: 1}", "{a: 1, a: 2}", '{"a": 1, "a": 2}', "? [1]\n: 2",
    "? {a: 1}\n: 2", "[", "{", "]" * 5, deep(101), deep(101, '{"a":'), "[" * 100_000, "{a: " * 5000, "- " * 3000, "%YAML 9.9\n---\n",
    "---\na\n---\nb", "\t- a", "'", '"', "@", "`", "|", "\u0085", "\u2028", "\ufeff", "key:\n- a\n  b: c",
]  # fmt: skip
PIECES = st.sampled_from(HOSTILE) | st.sampled_from(["a: ", "- ", "[", "]", "{", "}", ", ", "\n", "  ", '"a": ', "1"])


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=6).map("".join))
@example("a: !!int x")
@example("a: " + "1:" * 3000 + "1.5")
def test_whatever_a_text_is_it_is_a_value_or_an_error_of_ours(text):
    for parse in (parse_json, parse_data):
        try:
            json.dumps(parse(text, "some file"), ensure_ascii=False).encode()  # whatever is read can be written
        except InputError as error:
            said = str(error)
            assert said.isprintable() and said.startswith("some file") and len(said) <= 1000  # noqa: PT018


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=40) | st.sampled_from([b"\xff\xfe\x00", b"\xfe\xff\xd8\x00", b"\xef\xbb\xbf\xff", b"a\x00b"]))
def test_whatever_a_file_is_it_is_text_or_an_error_of_ours(file, content):
    file.write_bytes(content)
    try:
        assert "\0" not in read_text(file)
    except InputError as error:
        assert "some.json: not a text file" in str(error)  # noqa: PT017


@pytest.mark.parametrize("text", [deep(101), deep(101, '{"a":'), deep(900), deep(5_000), "[" * 100_000])
def test_depth_is_bounded(text):
    with pytest.raises(InputError, match="nested too deeply"):
        parse_json(text, "x")
    assert parse_json(deep(100), "x")
    assert parse_json(deep(100, '{"a":'), "x")


def test_depth_of_yaml_is_bounded():
    with pytest.raises(InputError, match="line 1: lists and mappings are nested too deeply"):
        parse_data("- " * 101 + "a", "x")
    assert parse_data("- " * 99 + "a", "x")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdé"), min_size=1, max_size=5), st.booleans())
def test_a_key_stands_once(keys, inner):
    for text in (
        "{" + ", ".join(f'"{key}": {n}' for n, key in enumerate(keys)) + "}",
        "\n" + "".join(f"{'  ' * inner}{key}: {n}\n" for n, key in enumerate(keys)),
    ):
        text = text if not inner else f'[{{"z": {text}}}]' if text[0] == "{" else f"z:{text}"
        if len(set(keys)) == len(keys):
            assert parse_data(text, "x")
        else:
            with pytest.raises(InputError, match=r"the key '[a-e\u00e9]' stands twice in one"):
                parse_data(text, "x")


def test_yaml_that_would_grow_is_refused():
    laughs = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    with pytest.raises(InputError, match=r"line 2: aliases \(\*a0\) are not read; write the value out"):
        parse_data(laughs, "x")
    with pytest.raises(InputError, match="YAML of more than 65536 letters is not read; write it as JSON"):
        parse_data("a: " + "b" * 2**16, "x")
    assert parse_data(json.dumps({"a": "b" * 2**17}), "x")


def test_yaml_has_no_dates():
    assert parse_data("a: 2001-01-01\nb: 2001-13-45\nc: 1\nd: =\n", "x") == {
        "a": "2001-01-01", "b": "2001-13-45", "c": 1, "d": "=",
    }  # fmt: skip


def test_numbers_and_text_that_cannot_be_written_again_are_refused():
    for text in ("9" * 5000, '{"a": [-' + "9" * 5000 + "]}"):
        with pytest.raises(InputError, match="a number with too many digits"):
            parse_json(text, "x")
    for text in ('"\\ud800"', '{"\\udc00": 1}', '"\ud800"'):
        with pytest.raises(InputError, match="half of a surrogate pair"):
            parse_json(text, "x")
    assert parse_json('"\\ud83d\\ude00"', "x") == "\U0001f600"
    assert parse_json("[NaN, Infinity]", "x")[1] == float("inf")  # as Python's json writes them


def test_objects_can_be_made_smaller_while_they_are_read(file):
    file.write_text('{"keep": {"a": 1}, "drop": {"b": [1, 2]}}')
    assert read_json(file, made=lambda found: {"n": len(found)}) == {"n": 2}


# --- files


def test_special_files_are_no_text(tmp_path):
    """A pipe without a writer would hang, a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(InputError, match=rf"cannot read {path}: it is {why}"):
            read_bytes(path)


@pytest.mark.parametrize("name", ["gone", "a" * 300, "a/" * 3000, "nul\0", "half\ud800", "line\nbreak"])
def test_names_that_cannot_be_opened(tmp_path, name):
    with pytest.raises(FileError) as caught:
        read_text(f"{tmp_path}/{name}", what="the recipe")
    assert str(caught.value).startswith("cannot read the recipe ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_sizes_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_text(tmp_path / "a", most=100) == "x" * 100
    with pytest.raises(InputError, match="more than 99 bytes"):
        read_text(tmp_path / "a", most=99)
    if sys.platform == "linux":  # a regular file of size 0 that holds something
        with pytest.raises(InputError, match="more than 9 bytes"):
            read_bytes("/proc/self/status", most=9)
