"""Decode steps compile as one graph, with edits and with decoding rules, and a second call compiles nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import build, left_padded, prompt
from transformers import CompileConfig

import vlmattn
from vlmattn import PAI, PAINT, RBD, VAF, VAR, VCD, VHR, FastV, Knockout, PyramidDrop, VisionZip
from vlmattn.interventions import VTI, Directions, Steer
from vlmattn.models import find_family

pytestmark = pytest.mark.slow
SINKS = VAR(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0)
RECIPES = {
    "none": "none",
    "pai": "pai",
    "var": [SINKS],
    "var_extend": [VAR(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0, extend=True)],
    "vhr": [VHR(layers="0:")],
    "vaf": [VAF(enhance=1.5, suppress=0.7, layers="1:")],
    "paint": [PAINT(layers="0:")],
    "knockout": [Knockout(source="image", target="last")],
    "vcd": "vcd",
    "m3id": "m3id",
    "dola_low": "dola_low",
    "rbd": "rbd",
    "pai+vcd": "pai+vcd",
    "var+rbd": [SINKS, RBD()],
    "fastv": [FastV(layer=1)],
    "pyramiddrop": [PyramidDrop(layers="1,2,3")],
    "visionzip": [VisionZip(dominant=0.3, contextual=0.2)],
    "fastv+pai": [FastV(layer=1), PAI(layers="0:")],
}


def run(model, inputs, recipe, compiled: bool, fullgraph: bool = True) -> torch.Tensor:
    """Greedy tokens; on a CPU the library compiles only when it is told to."""
    model._valid_auto_compile_criteria = lambda *_: compiled
    options = {} if recipe is None else {"preset": recipe}
    if compiled:
        config = CompileConfig(backend="eager", fullgraph=fullgraph, mode=None)
        options |= dict(cache_implementation="static", compile_config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


CASES = [*(("llava", name) for name in RECIPES), *(("qwen2_5_vl", name) for name in ("none", "pai", "rbd"))]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_one_graph(family, name):
    model = vlmattn.wrap(build(family), "none")
    inputs = left_padded([prompt(family), prompt(family, words=7, seed=3)])
    plain = run(model, inputs, RECIPES[name], compiled=False)
    assert torch.equal(run(model, inputs, RECIPES[name], compiled=True), plain)
    before = graphs()
    assert before > 0
    assert torch.equal(run(model, inputs, RECIPES[name], compiled=True), plain)
    assert graphs() == before


def test_steering_is_one_graph(tmp_path):
    anatomy = find_family(bare := build("llava")).anatomy(bare)
    drawn = {layer: torch.randn(2, anatomy.hidden_size) for layer in range(anatomy.layers)}
    file = str(Directions(drawn, anatomy.fingerprint).save(tmp_path))
    model, inputs = vlmattn.wrap(build("llava"), "none"), left_padded([prompt("llava"), prompt("llava", words=7)])
    recipe = [Steer(file=file, alpha=0.5), VTI(file=file, alpha=4.0), PAI(layers="0:")]
    plain = run(model, inputs, recipe, compiled=False)
    assert not torch.equal(plain, run(model, inputs, recipe[2:], compiled=False))
    assert torch.equal(run(model, inputs, recipe, compiled=True), plain)
    assert graphs() > 0


def test_other_rotary_bases_break_the_graph_and_stay_right():
    model, inputs = vlmattn.wrap(build("llava"), "none"), prompt("llava")
    plain = run(model, inputs, "buckets", compiled=False)
    assert torch.equal(run(model, inputs, "buckets", compiled=True, fullgraph=False), plain)


def test_the_compiled_rule_is_the_one_of_the_call():
    model, inputs = vlmattn.wrap(build("llava"), "none"), prompt("llava")
    strong, weak = VCD(alpha=8.0, beta=0.0), VCD(alpha=0.5, beta=0.0)
    wanted = [run(model, inputs, rule, compiled=False) for rule in (strong, weak)]
    assert not torch.equal(*wanted)
    assert torch.equal(run(model, inputs, strong, compiled=True), wanted[0])
    assert torch.equal(run(model, inputs, weak, compiled=True), wanted[1])
