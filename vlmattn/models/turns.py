"""Where the user's turn begins and ends in a prompt: the chat template's markers, found in the tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from vlmattn.errors import InputError
from vlmattn.request import ANSWER, MARKER, SYSTEM, TEXT, USER

_LOOKS_SPECIAL = re.compile(r"<\|[^|<>]+\|>|</?[a-z_]+>|\[/?[A-Z_]+\]")
_SIGNS = ".,;:!?\"'()[]{}<>*/-"
#: English words without content of their own: what a tagger calls determiners, pronouns, prepositions, conjunctions,
#: particles, auxiliaries and interjections.
FUNCTION_WORDS = frozenset(
    """a an the this that these those some any no none each every either neither both all another such what
    which whose i me my mine myself you your yours yourself he him his himself she her hers herself it its
    itself we us our ours they them their theirs themselves who whom one there here's there's that's it's what's
    of in on at by for from to with without within into onto over under above below between among through during
    before after behind beside beyond near off out up down about against along around across toward towards upon
    via per as than like and or nor but so yet if because while whereas although though unless until since
    whether when where why how not n't don't doesn't isn't aren't wasn't weren't can't won't am is are was were
    be been being have has had having do does did doing can could will would shall should may might must yes
    please oh hello hi""".split()  # noqa: SIM905 (a list would be five times as long)
)
_SAID = ("QZFIRSTZQ", "QZSECONDZQ", "QZTHIRDZQ")  # what the speakers of the trial conversation say


@dataclass(frozen=True)
class Turns:
    """The text that opens a user's turn and the text between it and the answer, white space left out.

    Tokens are compared by their decoded text without white space, so that it does not matter how a tokenizer cuts a
    marker beside other text.

    Attributes:
        user: e.g. ``USER:`` (LLaVA-1.5) or ``<|im_start|>user`` (Qwen).
        answer: e.g. ``ASSISTANT:`` or ``<|im_end|><|im_start|>assistant``.
        tokenizer: decodes single ids; processor: has the chat template.
    """

    user: str
    answer: str
    tokenizer: Any = field(repr=False, compare=False)
    processor: Any = field(default=None, repr=False, compare=False)
    _words: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return f"'{self.user}' ... '{self.answer}'"

    @classmethod
    def of(cls, processor: Any) -> Turns:
        """The markers of a processor or tokenizer, read off its chat template.

        Raises:
            InputError: no chat template, or one in which the speakers cannot be told apart.
        """
        if not getattr(processor, "chat_template", None):
            raise InputError(
                f"{type(processor).__name__} has no chat template, so user turns cannot be found in prompts"
            )
        text = _written(processor, list(zip(("user", "assistant", "user"), _SAID, strict=True)))
        places = [text.find(said) for said in _SAID]
        if min(places) < 0 or sorted(places) != places:
            raise InputError("the chat template does not show a user, an answer and a user in turn")
        after = [place + len(said) for place, said in zip(places, _SAID, strict=True)]
        opening, answering, again, closing = (
            _squeeze(text[a:b])
            for a, b in ((0, places[0]), (after[0], places[1]), (after[1], places[2]), (after[2], None))
        )
        tokenizer = getattr(processor, "tokenizer", processor)
        special = [_squeeze(token) for token in getattr(tokenizer, "all_special_tokens", [])]
        begins = _common_start(_units(opening, special)[::-1], _units(again, special)[::-1])[::-1]
        ends = _units(answering, special)
        if closing:
            ends = _common_start(ends, _units(closing, special))
        while len(begins) > 1 and begins[:1] == ends[:1] and len(begins[1]) > 1:
            begins = begins[1:]  # what ends any turn does not belong to the beginning of this one
        user, answer = "".join(begins), "".join(ends)
        if not user or not answer:
            raise InputError("the chat template does not mark where a user's turn begins and ends")
        return cls(user, answer, tokenizer, processor)

    def roles(self, ids: Tensor, types: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Role and turn of every token, on the host.

        Args:
            ids: int ``[batch, tokens]``; types: TEXT, IMAGE, VIDEO; real: False for padding. All on the CPU.

        Returns:
            uint8 ``[batch, tokens]`` of SYSTEM (everything outside turns, headers of speakers too), USER, MARKER (the
            text that ends a user's turn) and ANSWER; int16 ``[batch, tokens]``, the number of the user's turn that a
            USER or MARKER token belongs to, -1 elsewhere.
        """
        roles = torch.full(ids.shape, SYSTEM, dtype=torch.uint8)
        turns = torch.full(ids.shape, -1, dtype=torch.int16)
        for row in range(len(ids)):
            slots = real[row].nonzero().flatten().tolist()
            pieces = [self._word(int(ids[row, s])) if types[row, s] == TEXT else "\ufffc" for s in slots]
            label = [(SYSTEM, -1)] * sum(map(len, pieces))  # of every character
            for first, last, role, turn in self._spans("".join(pieces)):
                label[first:last] = [(role, turn)] * (last - first)
            at = 0
            for slot, piece in zip(slots, pieces, strict=True):
                if at or piece:  # white space goes with the character before it
                    roles[row, slot], turns[row, slot] = label[at if piece else at - 1]
                at += len(piece)
        return roles, turns

    def under(self, system: str, ids: Tensor, types: Tensor) -> Tensor:
        """The prompt of one row under another system message; a template without one gets it before the user's turn.

        Args:
            ids: int ``[tokens]``, without padding; types: TEXT, IMAGE, VIDEO. On the CPU.

        Raises:
            InputError: no user's turn in the prompt, or images before it.
        """
        roles, _ = self.roles(ids[None], types[None], torch.ones_like(ids[None], dtype=torch.bool))
        said = (roles[0] == USER).nonzero().flatten()
        if not len(said):
            raise InputError(f"another system message needs a user's turn in the prompt, and {self} was not found")
        first = int(said[0])
        if bool((types[:first] != TEXT).any()):
            raise InputError("another system message would take images away that lie before the user's turn")
        text = _opening(self.processor, system.strip())
        if self.tokenizer.decode([int(ids[first])])[:1].isspace():
            text = text.rstrip()  # the word brings its blank
        opening = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = getattr(self.tokenizer, "bos_token_id", None)
        if begin is not None and int(ids[0]) == begin and opening[:1] != [begin]:
            opening = [begin, *opening]
        return torch.cat([torch.tensor(opening, dtype=ids.dtype), ids[first:]])

    def content(self, ids: Tensor, roles: Tensor) -> Tensor:
        """Which tokens belong to content words, bool ``[batch, tokens]``: those of the user that are no function words.

        Args:
            ids, roles: ``[batch, tokens]``, on the CPU.
        """
        found = torch.zeros(ids.shape, dtype=torch.bool)
        for row in range(len(ids)):
            for slots, pieces in self._said(ids[row].tolist(), (roles[row] == USER).tolist()):
                word = "".join(pieces).strip(_SIGNS).lower()
                if word and word not in FUNCTION_WORDS:
                    for slot, piece in zip(slots, pieces, strict=True):
                        found[row, slot] = any(letter.isalnum() for letter in piece)
        return found

    def _said(self, ids: list[int], mine: list[bool]) -> Iterator[tuple[list[int], list[str]]]:
        """(slots, pieces of text) of every word: what decodes without white space in between."""
        slots: list[int] = []
        pieces: list[str] = []
        for slot, token in enumerate(ids):
            if not mine[slot] or token < 0:
                continue
            piece = self._added(ids, slots, pieces, slot)
            if piece is None:
                if slots:
                    yield slots, pieces
                slots, pieces, piece = [], [], self.tokenizer.decode([token]).strip()
            if piece:
                slots.append(slot)
                pieces.append(piece)
        if slots:
            yield slots, pieces

    def _added(self, ids: list[int], slots: list[int], pieces: list[str], slot: int) -> str | None:
        """What the token in ``slot`` adds to the word in ``slots``; None if it is not part of it."""
        if not slots or slots[-1] != slot - 1 or not self.tokenizer.decode([ids[slot]]).strip():
            return None
        known = "".join(pieces)
        together = self.tokenizer.decode([ids[s] for s in (*slots, slot)]).strip()
        piece = together[len(known) :]
        return None if not together.startswith(known) or piece[:1].isspace() else str(piece)

    def _spans(self, text: str) -> list[tuple[int, int, int, int]]:
        """(first, last, role, turn) of stretches of characters, in order."""
        spans, turn, at = [], 0, text.find(self.user)
        while at >= 0:
            begin = at + len(self.user)
            end = text.find(self.answer, begin)
            if end < 0:  # the prompt stops within the user's turn
                spans.append((begin, len(text), USER, turn))
                break
            answer = end + len(self.answer)
            following = text.find(self.user, answer)
            spans += [
                (begin, end, USER, turn),
                (end, answer, MARKER, turn),
                (answer, len(text) if following < 0 else following, ANSWER, -1),
            ]
            turn, at = turn + 1, following
        return spans

    def _word(self, token: int) -> str:
        if token < 0:
            return "\ufffd"  # generated in an earlier turn: its id was not kept
        if token not in self._words:
            self._words[token] = _squeeze(self.tokenizer.decode([token]))
        return self._words[token]


def _common_start(one: list[str], other: list[str]) -> list[str]:
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _units(text: str, special: list[str]) -> list[str]:
    """Characters, with special tokens in one piece: '<s>USER:' and '</s>USER:' have 'USER:' in common, not 's>USER:'.

    Tokenizers do not list all of theirs, so what looks like one counts too.
    """
    whole = [re.escape(token) for token in sorted(special, key=len, reverse=True) if token]
    return re.findall("|".join([*whole, _LOOKS_SPECIAL.pattern, "."]), text, re.DOTALL)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _opening(processor: Any, system: str) -> str:
    """What a conversation with this system message begins with, up to what the user says."""
    user = ("user", _SAID[0])
    for speakers in ([("system", system), user], [user]):  # a template may have no system message
        if text := _written(processor, speakers):
            opening = text[: text.index(_SAID[0])]
            return opening if system in text else f"{opening}{system} "
    raise InputError("the chat template does not show where a user's turn begins")


def _written(processor: Any, speakers: Sequence[tuple[str, str]]) -> str:
    """A conversation of (speaker, words) through the chat template, up to the next answer; "" if words are missing."""
    for as_parts in (True, False):  # processors take parts, many tokenizers only text
        content = [[{"type": "text", "text": said}] if as_parts else said for _, said in speakers]
        chat = [{"role": who, "content": what} for (who, _), what in zip(speakers, content, strict=True)]
        try:
            text = str(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        except Exception:  # a template may raise anything; the other form may do
            continue
        if all(said in text for _, said in speakers) and "{'type'" not in text:
            return text
    return ""
