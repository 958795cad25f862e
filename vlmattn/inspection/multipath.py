"""Multi-view, multi-path answers: several captions, several first words, and how sure the model is where it answers.

Written from the formula: the released code (GasolSun36/MVP) does not run to its end, adds paths without an answer to
"yes", and p_first alone where the first token is the answer. It samples captions; ``VIEWS`` are in our words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vlmattn import compat
from vlmattn.errors import OptionError, UnsupportedError, quoted
from vlmattn.inspection.answers import stop_tokens
from vlmattn.inspection.sorting import chat_inputs, user_turn
from vlmattn.models import find_family
from vlmattn.wrapping import record_of

#: Requests for captions from three sides: from the details up, from the whole down, and as usual (in our words).
VIEWS = (
    "Start from the details, their shapes, colors and textures, and work out what objects they make."
    " Describe the image.",
    "Start from the whole, what kind of scene it is and what would go with it. Describe the image.",
    "Describe the image.",
)


@dataclass(frozen=True)
class Path:
    """One way to begin the answer, and where it led.

    Attributes:
        view: number of the caption in the prompt.
        first: the first token, decoded.
        p_first: its probability.
        certainty: p1 - p2 of the token with which the answer word begins; 0 without an answer word.
        answer: the first answer word in the text, None if there is none.
        text: all that was said.
    """

    view: int
    first: str
    p_first: float
    certainty: float
    answer: str | None
    text: str


@dataclass(frozen=True)
class MultiPath:
    """An answer with all that led to it.

    Attributes:
        answer: the one with the highest score; None if no path gave an answer that counts.
        scores: of every answer.
        captions: one for each view.
        paths: of all views, the likeliest first token first.
    """

    answer: str | None
    scores: Mapping[str, float]
    captions: tuple[str, ...]
    paths: tuple[Path, ...]


@torch.no_grad()
def multi_path(
    model: PreTrainedModel,
    processor: Any,
    image: Any,
    question: str,
    *,
    views: Sequence[str] = VIEWS,
    captions: Sequence[str] | None = None,
    weights: Sequence[float] = (0.4, 0.4, 0.2),
    answers: Sequence[str] = ("yes", "no"),
    first_tokens: int = 5,
    min_probability: float = 1e-3,
    temperature: float = 0.7,
    max_new_tokens: int = 50,
    caption_tokens: int = 512,
    seed: int = 0,
) -> MultiPath:
    """Answer a question of few possible answers from several captions of the image and several first tokens each.

        S(a) = sum over views v of w_v  sum over paths with answer a of p_first (p1 - p2)

    A path begins with one of the likeliest first tokens, of probability p_first, and goes on by sampling until it says
    an answer word; p1 and p2 are the two highest probabilities where that word begins. A path without one counts for
    nobody. Views are captions of the image by the model itself, each before the question (MVP, arXiv 2408.17150).

    All probabilities are the model's own; temperature acts on the draw alone. Captions are greedy. All paths of a view
    are rows of one batch after one pass over the prompt. The edits of a wrapped model act throughout.

    Args:
        processor: the model's processor, with a chat template.
        image: one image or a list of images.
        views: what to ask for captions.
        captions: what stands before the question instead; "" for the question alone. Then nothing is asked.
        weights: of each view (or caption).
        answers: words or phrases; whole words count, in upper or lower case.
        first_tokens: paths of each view, at most.
        min_probability: least p_first.
        temperature, seed: of the draw; at temperature 0 the likeliest token is always taken.
        max_new_tokens, caption_tokens: longest path, with its first token, and longest caption.

    Raises:
        OptionError: a value out of range, not as many weights as views, fewer than two answers.
        InputError: a processor without chat template.
        UnsupportedError: a family that is not supported, a model wrapped with a decoding rule.
    """
    _check_model(model)
    _check_words(weights, views if captions is None else captions, answers)
    _check_numbers(min_probability, temperature, (first_tokens, max_new_tokens, caption_tokens))
    ask, generator = partial(_ask, model, processor, image), torch.Generator().manual_seed(seed)
    if captions is None:
        captions = [_caption(model, processor.tokenizer, ask(view), caption_tokens) for view in views]
    read = _Reader(processor.tokenizer, tuple(answers), stop_tokens(model))
    paths: list[Path] = []
    for view, caption in enumerate(captions):
        inputs = ask(f"{caption}\n{question}" if caption else question)
        walks = _Walks(model, inputs, first_tokens, min_probability)
        paths += walks.walk(read, view, max_new_tokens, temperature, generator)
    scores = score(paths, weights, answers)
    best = max(scores, key=scores.__getitem__)
    return MultiPath(best if scores[best] > 0 else None, scores, tuple(captions), tuple(paths))


def _ask(model: PreTrainedModel, processor: Any, image: Any, text: str) -> dict[str, Any]:
    return chat_inputs(model, processor, [user_turn(image, text)])


def score(paths: Iterable[Path], weights: Sequence[float], answers: Sequence[str]) -> dict[str, float]:
    """S(a) of every answer: sum of w_view p_first (p1 - p2) over the paths that gave it."""
    found = dict.fromkeys(answers, 0.0)
    for path in paths:
        if path.answer is not None:
            found[path.answer] += weights[path.view] * path.p_first * path.certainty
    return found


def _check_words(weights: Sequence[float], views: Sequence[str], answers: Sequence[str]) -> None:
    if isinstance(views, str) or not views or len(weights) != len(views):
        raise OptionError(f"each view needs a weight; got {len(weights)} weights and the views {quoted(views)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise OptionError(f"weights must be from 0 on, and not all 0, got {tuple(weights)}")
    words = [] if isinstance(answers, str) else [answer.strip().casefold() for answer in answers]
    if len(set(words)) < max(2, len(words)) or "" in words:
        raise OptionError(f'answers must be at least two different words, as in ("yes", "no"), got {quoted(answers)}')


def _check_numbers(min_probability: float, temperature: float, counts: tuple[int, int, int]) -> None:
    for name, number in zip(("first_tokens", "max_new_tokens", "caption_tokens"), counts, strict=True):
        if type(number) is not int or number < 1:
            raise OptionError(f"{name} must be a whole number from 1 on, got {quoted(number)}")
    if not 0 <= min_probability < 1:
        raise OptionError(f"min_probability must be within 0..1, got {min_probability}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise OptionError(f"temperature must be 0 (greedy) or above, got {temperature}")


def _check_model(model: PreTrainedModel) -> None:
    """Refuse other families, and rules and searches: those act in generate() only, for captions and not for paths."""
    find_family(model)
    record = record_of(model)
    if record is not None and record.now.acting.rule:
        raise UnsupportedError(
            f"multi_path draws its tokens itself, so '{record.now.acting.rule}' of '{record.now.recipe.name}' cannot"
            " act in it; use a recipe of attention methods, or model.vlmattn.disable()"
        )


def _caption(model: PreTrainedModel, tokenizer: Any, inputs: dict[str, Any], tokens: int) -> str:
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


class _Reader:
    """Finds answer words in what a path says."""

    def __init__(self, tokenizer: Any, answers: tuple[str, ...], stops: frozenset[int]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._names = {answer.strip().casefold(): answer for answer in answers}
        longest_first = sorted((answer.strip() for answer in answers), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def is_done(self, tokens: Sequence[int]) -> bool:
        """The path has ended, or an answer word and what shows that it goes no further ("no" is not yet "nothing")."""
        if tokens[-1] in self._stops:
            return True
        text = self.text(tokens)
        match = self._pattern.search(text)
        return match is not None and match.end() < len(text)

    def answer(self, tokens: Sequence[int]) -> tuple[str, int] | None:
        """The first answer in the text, and the number of the token with which it begins."""
        match = self._pattern.search(self.text(tokens))
        if match is None:
            return None
        begins = next(n for n in range(len(tokens)) if len(self.text(tokens[: n + 1])) > match.start())
        return self._names[match[0].casefold()], begins


class _Walks:
    """The paths of one prompt: rows of one batch, each with a first token of its own."""

    def __init__(
        self, model: PreTrainedModel, inputs: dict[str, Any], first_tokens: int, min_probability: float
    ) -> None:
        """Read the prompt once and repeat its keys and values for every first token that is likely enough."""
        self._model, self._mask = model, inputs["attention_mask"]
        positions = find_family(model).positions(model, inputs)  # ours, so that no state of the model counts
        self._cache = DynamicCache(config=model.config.get_text_config())
        logits = model(
            **inputs, position_ids=positions, **{compat.cache_name(): self._cache}, use_cache=True, logits_to_keep=1
        ).logits[0, -1]
        likely = logits.float().softmax(-1)
        best = likely.topk(min(first_tokens, len(likely)))
        kept = best.values >= min_probability
        self.p_first: list[float] = best.values[kept].tolist()
        self.tokens: list[list[int]] = [[token] for token in best.indices[kept].tolist()]
        self.certainty: list[list[float]] = [[_margin(likely)] for _ in self.tokens]
        self._last = positions[..., -1:]
        if self.tokens:
            self._cache.batch_repeat_interleave(len(self.tokens))

    def walk(
        self, read: _Reader, view: int, max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> list[Path]:
        """Go on until every path is done; what each came to."""
        going = [not read.is_done(tokens) for tokens in self.tokens]
        while any(going) and len(self.tokens[going.index(True)]) < max_new_tokens:
            logits = self._step()
            likely = logits.float().softmax(-1)
            if temperature > 0:
                tempered = (logits.float() / temperature).softmax(-1).cpu()
                drawn = torch.multinomial(tempered, 1, generator=generator)[:, 0]
            else:
                drawn = likely.argmax(-1)
            for row, token in enumerate(drawn.tolist()):
                if going[row]:
                    self.tokens[row].append(token)
                    self.certainty[row].append(_margin(likely[row]))
                    going[row] = not read.is_done(self.tokens[row])
        return [self._path(read, view, *of) for of in zip(self.tokens, self.p_first, self.certainty, strict=True)]

    def _step(self) -> Tensor:
        """Logits ``[paths, vocabulary]`` after the newest token of every path; a path that is done repeats its last."""
        rows, length = len(self.tokens), self._cache.get_seq_length() + 1
        device, step = self._mask.device, length - self._mask.shape[1]
        mask = torch.cat([self._mask.expand(rows, -1), self._mask.new_ones(rows, step)], 1)
        newest = torch.tensor([tokens[-1] for tokens in self.tokens], device=device)
        positions = (self._last + step).expand(*self._last.shape[:-2], rows, 1)
        out = self._model(
            input_ids=newest[:, None],
            attention_mask=mask,
            position_ids=positions,
            **{compat.cache_name(): self._cache},
            use_cache=True,
            logits_to_keep=1,
        )
        found: Tensor = out.logits[:, -1]
        return found

    def _path(self, read: _Reader, view: int, tokens: list[int], p_first: float, certainty: list[float]) -> Path:
        answer, begins = read.answer(tokens) or (None, None)
        sure = 0.0 if begins is None else certainty[begins]
        return Path(view, read.text(tokens[:1]), p_first, sure, answer, read.text(tokens))


def _margin(likely: Tensor) -> float:
    """p1 - p2 of a distribution ``[vocabulary]``."""
    first, second = likely.topk(2).values.tolist()
    return float(first - second)
