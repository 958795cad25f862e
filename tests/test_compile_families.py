"""Every family whose bare decode compiles with a static cache compiles wrapped, into as many graphs."""

from __future__ import annotations

import pytest
import torch
from test_compile import fresh, graphs, run
from zoo import ZOO

import vlmattn

__all__ = ["fresh"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


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
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = run(vlmattn.wrap(model, "pai"), inputs, None, compiled=False)
    torch.manual_seed(0)
    assert torch.equal(run(model, inputs, None, compiled=True), plain)
    assert graphs() == bare > 0
    assert model.vlmattn.report()["fired"]["pai"] > 0
