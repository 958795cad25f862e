"""Which objects a caption names: the vocabulary behind CHAIR, without a tagger or a download.

The rules are after those of the CHAIR reference: lower-case, split into words, singularise, join multi-word objects,
then look every word up; a repeated object counts again. ``ObjectWords.from_file`` has exactly the reference's rules.
Where our own words go further: multi-word objects may have any length (the longest one wins) and may be hyphenated, and
"baby", "adult", "mother" and the like belong to any animal word that follows ("baby duck"), "passenger" to any vehicle.
Known limits, shared with the reference: colours ("an orange wall") and verbs ("he bowls") count when they are spelled
like an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import yaml

from vlmattn.errors import InputError
from vlmattn.texts import lines_of, read_text

_COCO_FILE = Path(__file__).with_name("coco_words.yaml")
# Punctuation stays as tokens of its own, so that "It is hot. Dogs run" holds no hot dog.
_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")

_QUALIFIERS = frozenset({"baby", "adult", "male", "female", "mother", "father"})
_ANIMALS = frozenset({"bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"})
_ANIMAL_WORDS = frozenset({"animal", "cub"})
_VEHICLES = frozenset({"airplane", "train", "bus", "car", "truck", "boat"})

_Key = tuple[str, ...]
ENGLISH = yaml.safe_load(Path(__file__).with_name("english.yaml").read_text(encoding="utf-8"))
_IRREGULAR: dict[str, str] = dict(pair.split(":") for pair in ENGLISH["irregular"].split())
_UNCHANGED, _VOWEL_PLURALS, _IE_PLURALS, _OE_PLURALS = (
    frozenset(ENGLISH[name].split()) for name in ("unchanged", "vowel_plurals", "ie_plurals", "oe_plurals")
)
#: Two words that the reference takes for one, and for which: the phrase itself, an animal, a vehicle.
_JOINED: Mapping[_Key, _Key] = {
    **{(one, two): (one, two) for two, firsts in ENGLISH["reference_phrases"].items() for one in firsts.split()},
    **{(age, animal): (animal,) for age in ("baby", "adult") for animal in _ANIMALS | _ANIMAL_WORDS},
    **{("passenger", vehicle): (vehicle,) for vehicle in ("jet", "train")},
    **{("bow", "tie"): ("tie",), ("toilet", "seat"): ("toilet",)},
}
#: Endings of plurals: how many letters go, and what comes in their place.
_ENDINGS: Sequence[tuple[tuple[str, ...], int, str]] = (
    (("men",), 2, "an"),
    (("children",), 3, ""),
    (("people",), 6, "person"),
    (("mice",), 3, "ouse"),  # dormice
)
_ENDINGS_IN_S: Sequence[tuple[tuple[str, ...], int, str]] = (
    (("knives",), 3, "fe"),
    (("scarves", "elves", "wolves", "calves", "halves"), 3, "f"),  # shelves and selves as well
    (("sses", "shes", "ches", "xes", "zzes", "buses"), 2, ""),
)


def _split(text: str) -> list[str]:
    return _TOKEN.findall(text.lower().replace("’", "'"))


# The Penn Treebank's tokens, as NLTK splits them: words keep hyphens, slashes and inner full stops.
_MARK = re.compile(r"\.{2,}|--|[:,](?!\d)|[;@#$%&?!*()\[\]{}<>\"«»“”‘’„`]")
_FULL_STOP = re.compile(r"\.(?='*(?:\s|$))")
_ENDING = re.compile(r"(?:n't|'(?:s|m|d|ll|re|ve)?)(?=\s|$)", re.IGNORECASE)


def penn_words(text: str) -> list[str]:
    """The words of a text as the CHAIR reference splits it; marks and endings ('s) are tokens of their own."""
    for apart in (_MARK, _FULL_STOP, _ENDING):
        text = apart.sub(r" \g<0> ", text)
    return text.split()


@lru_cache(maxsize=65536)
def singular(word: str) -> str:
    """The singular of a lower-case English noun; other words come back unchanged or, at worst, cut by an "s"."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _UNCHANGED:
        return word
    head, hyphen, last = word.rpartition("-")
    if hyphen:
        return f"{head}-{singular(last)}"
    for endings, gone, put in _ENDINGS:
        if word.endswith(endings):
            return word[:-gone] + put
    if len(word) < 3 or not word.endswith("s") or word.endswith("ss"):
        return word
    return _of_s(word)


def _of_s(word: str) -> str:
    """The singular of a word that ends in a single "s"."""
    if word.endswith(("is", "us")):
        return word[:-1] if word in _VOWEL_PLURALS else word
    if word.endswith("ies"):
        return word[:-1] if len(word) <= 4 or word in _IE_PLURALS else word[:-3] + "y"
    for endings, gone, put in _ENDINGS_IN_S:
        if word.endswith(endings):
            return word[:-gone] + put
    if word.endswith("oes") and len(word) > 4 and not word.endswith(tuple(_OE_PLURALS)):
        return word[:-2]
    return word[:-1]


class ObjectWords:
    """Which words name which object.

    Args:
        groups: object -> its words; the name of the object is one of them without being listed. Words may be phrases,
            in singular or plural.
        compounds: phrases that name no object although a word in them does ("hot dog" where only dogs are objects);
            by default the list that ships with the COCO words. A phrase that is in ``groups`` too names that object.

    Raises:
        InputError: a name or word is empty, an object is there twice, or a word names two objects.
    """

    def __init__(self, groups: Mapping[str, Iterable[str]], compounds: Iterable[str] | None = None) -> None:
        self._names: list[str] = []
        self._index: dict[_Key, str | None] = {}
        self._longest: dict[str, int] = {}  # first word -> length of the longest phrase that starts with it
        self._prefixes: set[_Key] = set()
        for name, words in groups.items():
            self._add(name, words)
        for phrase in _coco()[1] if compounds is None else compounds:
            key = self._key(phrase)
            if key not in self._index:
                self._enter(key, None)

    @classmethod
    def coco(cls) -> ObjectWords:
        """The 80 classes of COCO with this project's own words (``coco_words.yaml``)."""
        return cls(*_coco())

    @classmethod
    def from_file(cls, path: str | Path) -> ObjectWords:
        """Read the published ``synonyms.txt`` format: one object a line, words separated by commas, its name first.

        The rules are those of the reference then (``ReferenceWords``), no compounds or hyphens of our own. Words with
        stray blanks or capitals in the file, or in the plural, are found here ("iPhone"); the reference never finds
        them.

        Raises:
            InputError: the file cannot be read or used; the message starts with the file and the line.
        """
        try:
            lines = lines_of(read_text(path))
        except InputError as error:
            raise InputError(f"{error}; leave chair.synonyms out to use the bundled list") from None
        words = ReferenceWords({}, compounds=())
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, *others = (word.strip() for word in line.split(","))
            try:
                words._add(name, filter(None, others))
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from None
        if not words.names:
            raise InputError(f"{path}: no objects in it; it needs one object a line, as in 'dog, puppy, hound'")
        return words

    @property
    def names(self) -> tuple[str, ...]:
        """The objects, in the order they were given."""
        return tuple(self._names)

    def canonical(self, word: str) -> str | None:
        """The object that a word or phrase names as a whole ("bikes" -> "bicycle"), else None."""
        return self._index.get(tuple(self._tokens(word)))

    def mentions(self, caption: str) -> list[str]:
        """The objects a caption names, in order; repetitions count."""
        tokens = self._tokens(caption)
        found: list[tuple[str, str]] = []  # first word as written, object
        start = 0
        while start < len(tokens):
            name, length = self._match(tokens, start)
            if name is not None and not (length == 1 and self._qualifies(tokens, start)):
                found.append((tokens[start], name))
            start += length
        # In "the seat of the toilet" nobody sits on a chair.
        seat_is_chair = all(name != "toilet" for _, name in found)
        return [name for word, name in found if seat_is_chair or word != "seat"]

    def _match(self, tokens: list[str], start: int) -> tuple[str | None, int]:
        """What the longest known phrase at ``start`` names (None: nothing) and its length in words."""
        longest = min(self._longest.get(tokens[start], 1), len(tokens) - start)
        for length in range(longest, 0, -1):
            key = tuple(tokens[start : start + length])
            if key in self._index:
                return self._index[key], length
        return None, 1

    def _qualifies(self, tokens: list[str], start: int) -> bool:
        """Whether a person word only describes the next one: "baby elephant", "passenger train"."""
        word = tokens[start]
        if start + 1 == len(tokens) or not (word in _QUALIFIERS or word == "passenger"):
            return False
        name, _ = self._match(tokens, start + 1)
        if word == "passenger":
            return name in _VEHICLES
        return name in _ANIMALS or (name is None and tokens[start + 1] in _ANIMAL_WORDS)

    def _add(self, name: str, words: Iterable[str]) -> None:
        if name in self._names:
            raise InputError(f"the object '{name}' is there twice; put all its words in one place")
        if isinstance(words, str):  # would be read letter by letter
            raise InputError(f"the words of '{name}' are the text '{words}'; give a list of words")
        for word in (name, *words):
            key = self._key(word)
            other = self._index.get(key)
            if other not in (None, name):
                raise InputError(f"'{word}' names both '{other}' and '{name}'; keep it with one of them")
            self._enter(key, name)
        self._names.append(name)

    def _enter(self, key: _Key, name: str | None) -> None:
        self._index[key] = name
        self._longest[key[0]] = max(self._longest.get(key[0], 1), len(key))
        self._prefixes.update(key[:length] for length in range(2, len(key) + 1))

    def _key(self, word: str) -> _Key:
        key = tuple(singular(token) for token in _split(word))
        if not any(character.isalnum() for token in key for character in token):
            raise InputError(f"'{word}' is not a word; an object needs a name and words made of letters")
        return key

    def _tokens(self, text: str) -> list[str]:
        tokens: list[str] = []
        for token in _split(text):
            if len(token) > 1 and "-" in token:
                tokens.extend(self._hyphenated(token))
            else:
                tokens.append(singular(token))
        return tokens

    def _hyphenated(self, token: str) -> _Key:
        """A hyphenated word as we know it: as it is, as a phrase or in one word ("hot-dog", "sail-boat")."""
        whole = (singular(token),)
        parts = tuple(singular(part) for part in token.split("-"))
        joined = (singular(token.replace("-", "")),)
        if whole not in self._index:
            if parts in self._prefixes:
                return parts
            if joined in self._index:
                return joined
        return whole


class ReferenceWords(ObjectWords):
    """Which words name which object, by the rules of the CHAIR reference alone.

    1. Lower case, the Penn Treebank's tokens ("hot-dog" and "bicycle/bike" are one each), singulars.
    2. From left to right two words become one: a phrase of the file or of the reference's list ("home plate", "train
    track",
       which name nothing), "baby" or "adult" with one of twelve animal words (the animal), "passenger" with jet or
       train (the vehicle). A phrase of three words is never found: "stove top oven" is a stove and an oven.
    3. Where the word "toilet" is left, "seat" is none. Every other word is looked up.
    """

    def _add(self, name: str, words: Iterable[str]) -> None:
        words = list(words)
        super()._add(name, words)
        for word in (name, *words):  # the reference looks up words as they are written: "oxens" is found by "oxen"
            self._index.setdefault(tuple(word.lower().split()), name)

    def mentions(self, caption: str) -> list[str]:
        tokens = [singular(token) for token in penn_words(caption.lower())]
        words: list[_Key] = []
        start = 0
        while start < len(tokens):
            pair = tuple(tokens[start : start + 2])
            two = len(pair) == 2 and (pair in _JOINED or pair in self._index)
            words.append(_JOINED.get(pair, pair) if two else pair[:1])
            start += 2 if two else 1
        if ("toilet",) in words:
            words = [word for word in words if word != ("seat",)]
        return [name for word in words if (name := self._index.get(word)) is not None]


@lru_cache(maxsize=1)
def _coco() -> tuple[dict[str, list[str]], list[str]]:
    """The bundled words of the COCO classes, and the compounds."""
    data = yaml.safe_load(_COCO_FILE.read_text(encoding="utf-8"))
    groups = {
        name: [word.strip() for line in lines for word in str(line).split(",")]
        for name, lines in data["objects"].items()
    }
    return groups, [phrase.strip() for line in data["compounds"] for phrase in line.split(",")]
