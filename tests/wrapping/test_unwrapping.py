"""What is left of a wrapped model: nothing, in every family; and nothing of those that are dropped while wrapped."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny import build, prompt
from zoo import ZOO

import vlmattn
from vlmattn import UnsupportedError
from vlmattn.wrapping import record_of
from vlmattn.wrapping.record import WRAPPED

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:va[rf]|vlmattn:UserWarning")]


def everything(model):
    """Hooks, attributes and attention implementations of every module and config."""
    tables = [name for name in model.__dict__ if name.endswith("_hooks") or "_hooks_" in name]
    return {
        "hooks": [(name, table, list(getattr(m, table))) for name, m in model.named_modules() for table in tables],
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "attention": {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")},
        "config": model.config.to_dict(),
    }


def answer(model, inputs):
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("family", [name for name, tiny in ZOO.items() if not tiny.unbuildable])
def test_unwrap_leaves_nothing(family):
    model, inputs = ZOO[family].build(), ZOO[family].prompt().inputs
    bare, before = answer(model, inputs), everything(model)
    wrapped = 0
    for name in ("pai", "vcd"):
        try:
            with vlmattn.applied(model, name):
                answer(model, inputs)
                record = record_of(model)
                assert record in WRAPPED
                wrapped += 1
        except UnsupportedError:  # refused, and named
            pass
        assert everything(model) == before
        assert not wrapped or record not in WRAPPED
    assert torch.equal(answer(model, inputs), bare)
    assert wrapped or family in ("florence2",)


def test_models_that_are_dropped_while_wrapped_are_forgotten():
    gc.collect()  # models of other tests
    before = len(WRAPPED)
    for name in ("pai", "paint", "vcd", "vhr"):
        model = vlmattn.wrap(build("llava"), name)
        answer(model, prompt("llava"))
        assert len(WRAPPED) == before + 1
        del model
        gc.collect()
        assert len(WRAPPED) == before


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["generate", "forward", "before the decoder"])
@pytest.mark.parametrize(
    "name", ["pai", "var", "paint", "vhr", "visionzip", "fastv", "vcd", "buckets", "avisc", "opera"]
)
def test_an_exception_keeps_no_model_alive_and_confuses_nobody(name, where):
    """Not even in the methods that watch the vision tower, which note the call while it runs."""

    def call(model):
        return answer(model, inputs) if where == "generate" else model(**inputs).logits

    inputs, other = prompt("llava"), vlmattn.wrap(build("llava", seed=5), "paint")
    model = vlmattn.wrap(build("llava"), name)
    wanted, others = call(model), other(**inputs).logits
    broken = (
        model.model.language_model.layers[2].mlp if where != "before the decoder" else model.model.multi_modal_projector
    )
    hook = broken.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(Broken):
            call(model)
    assert torch.equal(other(**inputs).logits, others), "another model in the same thread"
    hook.remove()
    assert torch.equal(call(model), wanted)
    hook = broken.register_forward_hook(fail)
    with pytest.raises(Broken):
        call(model)
    gone = weakref.ref(model)
    del model, broken, hook
    gc.collect()
    assert gone() is None


def fail(*args):
    raise Broken


def test_an_exception_does_not_stop_unwrapping():
    model, inputs = vlmattn.wrap(build("llava"), "paint"), prompt("llava")
    for error in (Broken, KeyboardInterrupt):  # an interrupted forward runs no hooks
        hook = model.lm_head.register_forward_hook(lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            model(**inputs)
        with pytest.raises(error):
            answer(model, inputs)
        hook.remove()
    vlmattn.unwrap(model)
    assert torch.equal(answer(model, inputs), answer(build("llava"), inputs))
