"""Text, JSON and YAML from files: one reader with one manner for everything that users give."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml

from vlmattn.errors import InputError, one_line, quoted
from vlmattn.files import check_regular, file_errors, path_text

MOST = 2**30  # bytes of a file; every published question file is below
_YAML = 2**16  # letters of YAML, which takes seconds to read beyond
_DEPTH = 100  # lists and objects inside each other
_ENCODINGS = (  # marks at the beginning of a file, the longer before those that they begin with
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_bytes(path: str | os.PathLike[str], most: int = MOST, what: str = "") -> bytes:
    """The bytes of a regular file; a pipe or a device would hang or never end.

    Args:
        most: bytes that are read; a larger file is an error.
        what: the file in words, for errors ("the recipe").

    Raises:
        InputError: there is no such file, it is another kind of file, has more than ``most`` bytes, or cannot be read.
    """
    doing = f"read {what}".strip()
    with file_errors(doing, path):
        # a pipe without a writer would block in open(), so it is opened without waiting
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            about = os.fstat(descriptor)
            check_regular(about, doing, path)
            with open(descriptor, "rb", closefd=False) as file:
                content = b"" if about.st_size > most else file.read()
        finally:
            os.close(descriptor)
    if max(about.st_size, len(content)) > most:  # some files of the system have size 0 and hold something
        raise InputError(f"cannot {doing} {path_text(path)}: it has more than {most} bytes")
    return content


def read_text(path: str | os.PathLike[str], most: int = MOST, what: str = "") -> str:
    """A text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; arguments as of ``read_bytes``.

    Raises:
        InputError: it cannot be read, or is not text.
    """
    content = read_bytes(path, most, what)
    encoding = next((name for mark, name in _ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise InputError(f"{path_text(path)}: not a text file in UTF-8; save it as one") from None
    if "\0" in text:
        raise InputError(f"{path_text(path)}: not a text file (it holds a NUL)")
    return text


def lines_of(text: str) -> list[str]:
    r"""The lines of a text: only ``\n`` and ``\r\n`` end one, never a Unicode separator within a sentence."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(
    text: str, where: str, line: int | None = None, made: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """A JSON value; ``NaN`` and ``Infinity`` are read too, as Python writes them.

    Args:
        where, line: name the text in errors.
        made: what each object becomes, for files of which only a part is needed.

    Raises:
        InputError: not JSON, a key twice in one object, a number or a depth that cannot be read, half of a surrogate
            pair.
    """
    where = one_line(where, 200)
    try:
        return _json(text, where if line is None else f"{where}:{line}", made)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}:{line or error.lineno}: not valid JSON ({error.msg})") from None


def parse_data(text: str, where: str) -> Any:
    """A value in JSON, or in YAML without aliases and tags.

    Raises:
        InputError: neither, or as ``parse_json``.
    """
    where = one_line(where, 200)
    try:
        return _json(text, where)  # not left to YAML, which takes 1e-5 for a word
    except json.JSONDecodeError:
        return _yaml(text, where)


def read_json(path: str | os.PathLike[str], made: Callable[[dict[str, Any]], Any] | None = None, what: str = "") -> Any:
    """The value of a JSON file; ``made`` and errors as of ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path), path_text(path), made=made)


def read_json_lines(path: str | os.PathLike[str]) -> list[tuple[int, Any]]:
    """The values of a file of JSON lines with their line numbers; empty lines are passed over.

    Raises:
        InputError: as ``read_text`` and ``parse_json``, by file and line.
    """
    lines = enumerate(lines_of(read_text(path)), start=1)
    return [(number, parse_json(line, path_text(path), number)) for number, line in lines if line.strip()]


class _TwiceError(ValueError):
    """A key that stands twice in one object."""


def _json(text: str, place: str, made: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    def one(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _TwiceError(_repeated([key for key, _ in pairs]))
        return found if made is None else made(found)

    try:
        value = json.loads(text, object_pairs_hook=one)
    except json.JSONDecodeError:
        raise
    except _TwiceError as error:
        raise InputError(f"{place}: the key {error} stands twice in one object; keep one") from None
    except RecursionError:
        raise InputError(f"{place}: lists and objects are nested too deeply") from None
    except ValueError:  # Python reads no more than 4,300 digits
        raise InputError(f"{place}: a number with too many digits") from None
    if _too_deep(value):
        raise InputError(f"{place}: lists and objects are nested too deeply")
    if re.search(r"\\u[dD][89a-fA-F]", text) or not _is_text(text):
        _check_plain(value, place)
    return value


def _yaml(text: str, place: str) -> Any:
    if len(text) > _YAML:
        raise InputError(f"{place}: YAML of more than {_YAML} letters is not read; write it as JSON")
    if not _is_text(text):
        raise InputError(f"{place}: not valid text (half of a surrogate pair)")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{place}: not valid YAML or JSON: {one_line(str(error), 300)}") from None
    except (ValueError, RecursionError):  # an escape that is no letter; called from deep within something
        raise InputError(f"{place}: not valid YAML or JSON") from None
    _check_plain(value, place)
    return value


def _check_plain(value: Any, place: str) -> None:
    """Raise for what JSON cannot hold, and for text that no file can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: not valid text (half of a surrogate pair)") from None
    except ValueError:
        raise InputError(f"{place}: a number with too many digits") from None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep(value: Any) -> bool:
    inner: Iterable[Any] = (value,)
    for _ in range(_DEPTH + 1):
        level = [item for item in inner if isinstance(item, (list, dict))]
        if not level:
            return False
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
    return True


def _repeated(keys: list[Any]) -> str:
    return quoted(next(key for number, key in enumerate(keys) if key in keys[:number]))


class _Loader(yaml.SafeLoader):
    """YAML of what JSON can hold, bounded in depth, every key once.

    Aliases make a few lines a tree of millions of leaves; tags and dates make objects that no option takes.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class has it as one of the instance)
        letter: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":merge", ":value"))]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _error(f"aliases (*{event.anchor}) are not read; write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _error(f"tags ({event.tag}) are not read", event.start_mark)
        if self._depth >= _DEPTH:
            raise _error("lists and mappings are nested too deeply", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError):  # looks like a number and is none: 0x_, 5,000 digits
            raise _error(f"{quoted(node.value)} is not a number", node.start_mark) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            key = _repeated([self.construct_object(key, deep=True) for key, _ in node.value])
            raise _error(f"the key {key} stands twice in one mapping; keep one", node.start_mark)
        return found


def _error(what: str, mark: Any) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {mark.line + 1}: {what}")
