"""Which option an answer of free text chooses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJ"
_LETTER = r"(?<![\w+])(?<!\w['’-])(?<![A-Za-z]\.)[A-J](?![\w+])(?!['’-]\w)"
_MARKED = rf"[(\[\"']*{_LETTER}[)\]\"']*"
#: Letters in a row: "A", "(A) or (B)", "A, B and C".
_ROW = re.compile(rf"{_MARKED}(?:(?:\s*[,/&]\s*|\s+)(?:(?:or|and|nor)\s+)?{_MARKED})*")
#: Before one of these "A" and "I" are letters; before any other word an article and a pronoun.
_AFTER = re.compile(r"\s+(?:is|was|are|because|since|as|and|or|but|nor|with|which|has|seems|looks|would)\b", re.I)
_ENDS = re.compile(r"\s*(?:[.:,;!?–—]|\n|$|-\s)|\s+-\s")
_DENIED = re.compile(
    r"(?:\b(?:not|neither|nor|never|except|than)|n't)(?:\s+(?:be|the|answer|option|choice|letter|either|both))*\s*$",
    re.I,
)
_WRONG = re.compile(r"\s+(?:is|are|was|were)(?:n't|(?:\s+(?:both|all))?\s+(?:not|wrong|incorrect|false))\b", re.I)
_ANNOUNCED = re.compile(
    r"(?:\banswer(?:\s+(?:to|for|of)(?:\s+\w+){1,6}?)?|\b(?:correct|right|best)\s+(?:option|choice|letter|one)"
    r"|\b(?:choose|pick|select))(?:\s+(?:is|(?:would|should|must)\s+be))?\s*[:=]?\s*(?:(?:the\s+)?(?:option|choice|letter)\s+)?$",
    re.I,
)
_LEAD = re.compile(r"(?:the )?(?:(?:correct|right|best) )?(?:answer|option|choice)(?: is)? |it is |it's ")


def read_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses, None if it names no option or several. The first of these that applies:

    1. The whole answer (behind "the answer is", "it is") is an option word for word, or a letter and its option.
    2. It announces a letter: "the correct answer is B ...", "answer: B", "I choose B".
    3. It begins with a letter that ends there or before a mark: "B", "(B) ...", "B. ...", "B, since ...".
    4. A letter stands alone in it: "It is C", "both show option C".

    Letters are capitals. "A" and "I" before a word are none ("A dog", "I think") unless it is "is", "because" or the
    like; nor are letters that are denied ("neither A nor B", "not A", "A is wrong").
    """
    answer = re.sub(r"[*`#]", "", answer)  # of markdown
    letters = set(LETTERS[: len(options)])
    rows = [row for row in _rows(answer) if row.letters <= letters]
    by_rule = ([row for row in rows if row.announced], [row for row in rows if row.begins], rows)
    named = _same(answer, options) or next((_letters_of(chosen) for chosen in by_rule if chosen), set())
    return min(named) if len(named) == 1 else None


@dataclass(frozen=True)
class _Row:
    """Letters that an answer names in a row; whether it begins with them or announces them."""

    letters: frozenset[str]
    begins: bool
    announced: bool


def _rows(answer: str) -> Iterator[_Row]:
    """The letters of an answer that are none of its words and that it does not deny."""
    for found in _ROW.finditer(answer):
        before, row, after = answer[: found.start()], found.group(), answer[found.end() :]
        letters = re.findall(_LETTER, row)
        is_word = row[-1] in "AI" and re.match(r"[^\S\n]+\w", after) is not None and _AFTER.match(after) is None
        if is_word:
            letters.pop()
        if letters and not _DENIED.search(before) and (is_word or not _WRONG.match(after)):
            ends = is_word or row[-1] in ")]" or _ENDS.match(after) is not None
            yield _Row(frozenset(letters), ends and not before.strip(), _ANNOUNCED.search(before) is not None)


def _letters_of(rows: Iterable[_Row]) -> set[str]:
    return {letter for row in rows for letter in row.letters}


def _same(answer: str, options: Sequence[str]) -> set[str]:
    """The letters of the options that the whole answer repeats; a letter alone repeats none."""
    said = _bare(answer)
    lead = _LEAD.match(said)
    said = said[lead.end() :] if lead else said
    plain = {letter: _bare(option) for letter, option in zip(LETTERS, options, strict=False)}
    return {
        letter for letter, option in plain.items() if len(said) > 1 and said in (option, f"{letter.lower()} {option}")
    }


def _bare(text: str) -> str:
    """A text in lower case, without marks at the ends of its words."""
    words = (word.strip(".,:;!?()[]\"'") for word in text.lower().split())
    return " ".join(word for word in words if word)
