"""Two threads and one model. Every race is made certain: the other thread stands still in the middle of its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import build, prompt
from transformers import LogitsProcessor, LogitsProcessorList

import vlmattn
from vlmattn import StateError
from vlmattn.costs import cost
from vlmattn.inspection import find_sinks, look
from vlmattn.wrapping import handle_of

pytestmark = pytest.mark.filterwarnings("ignore:va[rf]|vlmattn:UserWarning")

RECIPES = ("pai", "vhr", "var", "vcd", "fastv", "paint")


class Words:
    """A tokenizer that knows numbers."""

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


class Gate(LogitsProcessor):
    """Stands still after the second token until it is told to go on."""

    def __init__(self) -> None:
        self.tokens, self.reached, self.go = 0, threading.Event(), threading.Event()

    def __call__(self, ids, scores):
        self.tokens += 1
        if self.tokens == 2:
            self.reached.set()
            assert self.go.wait(60)
        return scores


def answer(model, inputs=None, **options):
    with torch.no_grad():
        return model.generate(
            **(inputs or prompt("llava")),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


class Answering(threading.Thread):
    """Another thread in the middle of an answer."""

    def __init__(self, model, **options) -> None:
        super().__init__(daemon=True)
        self.gate, self.found, self.error = Gate(), None, None
        self._call = lambda: answer(model, logits_processor=LogitsProcessorList([self.gate]), **options)

    def run(self) -> None:
        try:
            self.found = self._call()
        except BaseException as error:
            self.error = error
            self.gate.reached.set()


@contextmanager
def answering(model, **options):
    thread = Answering(model, **options)
    thread.start()
    assert thread.gate.reached.wait(60)
    try:
        yield thread
    finally:
        thread.gate.go.set()
        thread.join(60)
    assert thread.error is None


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_answers_is_not_unwrapped(name):
    model = vlmattn.wrap(build("llava"), name)
    wanted = answer(model)
    with answering(model) as other:
        with pytest.raises(StateError, match=r"generating in thread '.*'.*when that is done") as caught:
            vlmattn.unwrap(model)
        assert "\n" not in str(caught.value)
        assert torch.equal(answer(model), wanted), "still wrapped, whole"
    assert torch.equal(other.found, wanted)
    vlmattn.unwrap(model)
    assert torch.equal(answer(model), answer(build("llava")))


def test_nor_from_within_its_own_answer():
    model = vlmattn.wrap(build("llava"), "pai")

    class Unwraps(LogitsProcessor):
        def __call__(self, ids, scores):
            vlmattn.unwrap(model)

    with pytest.raises(StateError, match="generating in this call"):
        answer(model, logits_processor=LogitsProcessorList([Unwraps()]))
    vlmattn.unwrap(model)


def test_nor_while_a_forward_of_another_thread_runs():
    model, inputs = vlmattn.wrap(build("llava"), "pai"), prompt("llava")
    with torch.no_grad():
        wanted = model(**inputs).logits
    reached, go, found = threading.Event(), threading.Event(), []

    def stand(*args):
        reached.set()
        assert go.wait(60)

    def work():
        with torch.no_grad():
            found.append(model(**inputs).logits)

    hook = model.model.language_model.layers[1].mlp.register_forward_hook(stand)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert reached.wait(60)
    with pytest.raises(StateError, match="generating in thread"):
        vlmattn.unwrap(model)
    go.set()
    thread.join(60)
    hook.remove()
    assert torch.equal(found[0], wanted)
    vlmattn.unwrap(model)


def test_a_bare_model_that_answers_is_not_wrapped():
    model = build("llava")
    wanted = answer(model)
    with answering(model) as other:
        with pytest.raises(StateError, match=r"is generating.*wrap it when that is done"):
            vlmattn.wrap(model, "pai")
        assert handle_of(model) is None
        edited = vlmattn.wrap(build("llava", seed=3), "pai")  # another model may
        assert not torch.equal(answer(edited), wanted)
    assert torch.equal(other.found, wanted)
    vlmattn.wrap(model, "pai")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "set": lambda model: model.vlmattn.set("sofa"),
    "disable": lambda model: model.vlmattn.disable(),
    "disable, enable": lambda model: (model.vlmattn.disable(), model.vlmattn.enable()),
    "report": lambda model: model.vlmattn.report(),
    "another answer": lambda model: answer(model, preset="sofa"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_set_meanwhile_counts_from_the_next_prompt_on(name, change):
    model = vlmattn.wrap(build("llava"), name)
    wanted = answer(model)
    with answering(model) as other:
        CHANGES[change](model)
    assert torch.equal(other.found, wanted)
    if change == "set":
        assert model.vlmattn.report()["backends"] == {}, "what was read before does not count for the new recipe"
        assert torch.equal(answer(model), answer(vlmattn.wrap(build("llava"), "sofa")))


def looked(model, recipe=None):
    trace = look(model, Words(), prompt("llava"), recipe, max_new_tokens=3)
    return [trace.rows[row] for row in sorted(trace.rows)]


def counted(model):
    return cost(model, prompt("llava"), "fastv", measure=True)


READS: dict[str, Callable[[Any], Any]] = {
    "look": looked,
    "look, another recipe": lambda model: looked(model, "sofa"),
    "cost": counted,
    "sinks": lambda model: find_sinks(model, [prompt("llava")], tau=2.0).dims,
}


def same(one, other):
    if isinstance(one, list):
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", [None, *RECIPES])
def test_reading_along_changes_no_answer(name, read):
    """Nor does it see another thread's state; the report is that of the answers alone."""
    model = build("llava") if name is None else vlmattn.wrap(build("llava"), name)
    alone = READS[read](model)
    if name is not None:
        model.vlmattn.set(name)
    wanted = answer(model)
    report = None if name is None else model.vlmattn.report()
    if name is not None:
        model.vlmattn.set(name)
    with answering(model) as other:
        assert same(READS[read](model), alone)
    assert torch.equal(other.found, wanted)
    assert handle_of(model) is None if name is None else model.vlmattn.report() == report
    assert torch.equal(answer(model), wanted)


def test_the_other_way_round():
    """An answer is given while somebody stands still in the middle of a look, on a model that only the look has wrapped."""
    model = build("llava")
    wanted, alone = answer(model), looked(model, "pai")
    reached, go, found = threading.Event(), threading.Event(), []

    def stand(module, args):
        if threading.current_thread() is thread and not reached.is_set():
            reached.set()
            assert go.wait(60)

    hook = model.lm_head.register_forward_pre_hook(stand)
    thread = threading.Thread(target=lambda: found.append(looked(model, "pai")), daemon=True)
    thread.start()
    assert reached.wait(60)
    assert torch.equal(answer(model), wanted)
    assert same(looked(model, "pai"), alone), "two at once; the first one goes on"
    assert handle_of(model) is not None
    go.set()
    thread.join(60)
    hook.remove()
    assert same(found[0], alone)
    assert handle_of(model) is None


@pytest.mark.parametrize("name", ["buckets", "pai"])
def test_threads_that_begin_at_once(name):
    """Hooks that only some recipes need are put on once, before anybody needs them."""
    model = build("llava")
    vlmattn.wrap(model, name)
    wanted = answer(model)
    hooks = len([hook for module in model.modules() for hook in module._forward_hooks.values()])
    vlmattn.unwrap(model)
    for _ in range(2):
        vlmattn.wrap(model, name)
        barrier, found = threading.Barrier(4), []

        def work(barrier=barrier, found=found):
            barrier.wait(60)
            found.append(answer(model))

        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 4
        assert all(torch.equal(one, wanted) for one in found)
        assert hooks == len([hook for module in model.modules() for hook in module._forward_hooks.values()])
        vlmattn.unwrap(model)
