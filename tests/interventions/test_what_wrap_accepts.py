"""Every family under every preset: ``wrap`` refuses, or ``generate`` runs, in every mode that it does not refuse."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from methods import Speech
from torch import Tensor
from transformers import PreTrainedModel
from zoo import ZOO, Prompt, padded

import vlmattn
from vlmattn import Recipe, VlmattnError
from vlmattn.registry import all_presets, find_method

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
BUILT = [name for name, tiny in ZOO.items() if not tiny.unbuildable]
PRESETS = sorted(vlmattn.presets())
#: What presets leave to the user.
GIVEN: dict[str, dict[str, Any]] = {
    "heads": dict(heads="1.2,2.0"),
    "razor": dict(heads="0.0"),
    "duo": dict(heads="0.0"),
    "vaf": dict(layers="1:"),
}
MODES: dict[str, dict[str, Any]] = {
    "beams": dict(num_beams=2),
    "two answers": dict(do_sample=True, num_return_sequences=2),
    "no cache": dict(use_cache=False),
    "static": dict(cache_implementation="static"),
    "assistant": {},
    "lookup": dict(prompt_lookup_num_tokens=2),
}
EXACT = ("no cache", "static", "assistant", "lookup")  # ways to the very answer of greedy search
NEW = 3


def recipe(preset: str) -> Recipe:
    """A preset, with what it leaves to the user."""
    method = all_presets()[preset].method
    given = GIVEN.get(method, {})
    known = find_method(method).__dataclass_fields__
    return Recipe.of(preset, **{key: value for key, value in given.items() if key in known})


def dialogue(tiny: Any, words: int = 7, seed: int = 3) -> Prompt:
    """A prompt whose words begin with the marker of a user's turn and end with that of an answer."""
    found = tiny.prompt(1, words, seed)
    found.inputs["input_ids"][0, -words], found.inputs["input_ids"][0, -1] = 10, 11
    return found


#: Refusals that are about this prompt, and name the prompt that would do: no matter of a family and a preset.
ABOUT_THE_PROMPT = ("images away that lie before the user's turn", "use shorter prompts")


class Family:
    """A family's tiny model, and another one that drafts for it."""

    def __init__(self, name: str) -> None:
        self.tiny, self.model = ZOO[name], ZOO[name].build()
        self.assistant = ZOO[name].build(seed=1)
        self.processor = Speech()
        self.processor.tokenizer.get_vocab = lambda: self.tiny.vocabulary
        self.inputs = dialogue(self.tiny).inputs

    def answer(self, inputs: dict[str, Tensor], mode: str = "", **more: Any) -> Tensor:
        options = dict(MODES.get(mode, {}), **more)
        if mode == "assistant":
            options["assistant_model"] = self.assistant
        torch.manual_seed(0)
        options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0) | options
        found: Tensor = self.model.generate(**inputs, **options)
        return found

    @functools.cache  # noqa: B019 (families live as long as the tests)
    def can(self, mode: str) -> bool:
        """The bare model can, and answers as ever where the mode promises that."""
        assert not hasattr(self.model, "vlmattn"), "asked of the bare model"
        try:
            found = self.answer(self.inputs, mode)
        except Exception:  # whatever a model of the library may raise
            return False
        if mode in ("no cache", "static") and not torch.allclose(self.first(mode), self.first(""), rtol=0, atol=1e-2):
            return False  # masks of Gemma 4 (unified) are others with a static cache
        return mode not in EXACT or torch.equal(found, self.answer(self.inputs))

    def runs(self, inputs: dict[str, Tensor], mode: str) -> bool:
        """The bare model does, for this prompt: Mllama cannot take some drafts."""
        try:
            self.answer(inputs, mode)
        except Exception:
            return False
        return True

    def first(self, mode: str) -> Tensor:
        """Logits of the first token of the bare model's answer."""
        asked = dict(output_logits=True, return_dict_in_generate=True)
        found: Any = self.answer(self.inputs, mode, **asked)
        return found.logits[0]  # type: ignore[no-any-return]


@functools.cache
def family(name: str) -> Family:
    return Family(name)


def extras(preset: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What a call has to bring along for a preset."""
    pixels = {key: value for key, value in inputs.items() if key.startswith(("pixel_values", "high_res"))}
    return {"branch_inputs": {"augmented": pixels}} if preset == "agla" else {}


def wrapped(one: Family, preset: str) -> PreTrainedModel | None:
    """The model under a preset; None = refused."""
    try:
        return vlmattn.wrap(one.model, recipe(preset), processor=one.processor)
    except VlmattnError:
        return None


@functools.cache
def kinds() -> tuple[tuple[str, ...], ...]:
    """Presets that differ in numbers only, together."""
    found: dict[Any, list[str]] = {}
    for preset in PRESETS:
        info = all_presets()[preset]
        words = {key: value for key, value in info.options.items() if isinstance(value, str)}
        found.setdefault((info.method, *sorted(words.items())), []).append(preset)
    return tuple(map(tuple, found.values()))


def tried(number: int) -> list[tuple[str, list[str]]]:
    """Presets for a family, and modes of each: of a kind one in turn, with greedy search; each other mode meets every family and
    every kind in turn."""
    found = []
    for kind, presets in enumerate(kinds()):
        turn = (number + kind) % (3 * len(MODES))
        found.append((presets[number % len(presets)], ["", *list(MODES)[turn : turn + 1]]))
    return found


@pytest.mark.parametrize("name", BUILT)
def test_wrap_refuses_or_generate_runs(name):
    one, number = family(name), BUILT.index(name)
    died, differ = [], []
    for preset, modes in tried(number):
        able = [mode for mode in modes if one.can(mode)]
        if wrapped(one, preset) is None:
            continue
        more = extras(preset, one.inputs)
        greedy = None
        for mode in able:
            try:
                found = one.answer(one.inputs, mode, **more)
            except VlmattnError as error:
                plain = not mode and not any(reason in str(error) for reason in ABOUT_THE_PROMPT)
                if plain or "\n" in str(error):  # plain greedy search is refused at wrap
                    died.append((preset, mode, str(error)))
                continue
            except Exception as error:
                if "do not match" not in str(error):  # an answer of a random model may hold the image token
                    died.append((preset, mode, repr(error)))
                continue
            greedy = found if not mode else greedy
            if mode in EXACT and greedy is not None and not torch.equal(found, greedy):
                differ.append((preset, mode))
        vlmattn.unwrap(one.model)
    assert died == []
    assert differ == []


@functools.cache
def accepted(name: str) -> list[str]:
    """Presets that ``wrap`` takes on a family."""
    one, found = family(name), []
    for preset in PRESETS:
        if wrapped(one, preset) is not None:
            found.append(preset)
            vlmattn.unwrap(one.model)
    return found


@given(st.data())
@settings(max_examples=25)
def test_a_mode_or_a_batch_never_changes_the_answer(data):
    """Whatever pair is accepted: all exact ways lead to one answer, and a padded batch gives each row what it gets alone."""
    name = data.draw(st.sampled_from([name for name in BUILT if not ZOO[name].padding]), label="family")
    preset = data.draw(st.sampled_from(accepted(name) or ["none"]), label="preset")
    mode = data.draw(st.sampled_from(["", *EXACT]), label="mode")
    words = data.draw(st.tuples(st.integers(3, 8), st.integers(3, 8)), label="words")
    one = family(name)
    prompts = [dialogue(one.tiny, count, seed) for seed, count in enumerate(words)]
    assume(one.can("") and one.can(mode) and one.runs(prompts[0].inputs, mode) and wrapped(one, preset) is not None)
    try:
        alone = [one.answer(each.inputs, **extras(preset, each.inputs))[0, -NEW:] for each in prompts]
        batch = padded(one.tiny, prompts)
        together = one.answer(batch, **extras(preset, batch))[:, -NEW:]
        first = prompts[0].inputs
        try:
            same = one.answer(first, mode, **extras(preset, first))[0, -NEW:]
        except VlmattnError:  # refused by name
            same = alone[0]
    except VlmattnError as error:
        if any(reason in str(error) for reason in ABOUT_THE_PROMPT):
            reject()
        raise
    finally:
        vlmattn.unwrap(one.model)
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(same, alone[0])
