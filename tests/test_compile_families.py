"""Every family whose bare decode compiles with a static cache compiles wrapped, into as many graphs."""

from __future__ import annotations

import pytest
import torch
from test_compile import fresh, graphs, run
from zoo import ZOO

import vlmattn
from vlmattn.errors import UnsupportedError

__all__ = ["fresh"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def eager(model, inputs):
    """The same cache without a compiler: some models compute otherwise with a static one."""
    model._valid_auto_compile_criteria = lambda *_: False
    return model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True
    )  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_as_many_graphs_as_bare(name):
    if ZOO[name].unbuildable:
        pytest.skip(ZOO[name].unbuildable)
    model, inputs = ZOO[name].build(), ZOO[name].prompt().inputs
    try:
        run(model, inputs, None, compiled=True)
    except Exception as error:
        pytest.skip(f"the bare model does not: {type(error).__name__}")
    bare = graphs()
    if not bare:
        pytest.skip("the bare model has no step that transformers compiles")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        plain = eager(vlmattn.wrap(model, "pai"), inputs)
    except UnsupportedError as error:
        if "a static cache outgrows the sliding window" in str(error) or "encoder-decoder" in str(error):
            pytest.skip(str(error))
        raise
    torch.manual_seed(0)
    assert torch.equal(run(model, inputs, None, compiled=True), plain)
    assert graphs() == bare
    assert model.vlmattn.report()["fired"]["pai"] > 0
