"""The paired measurement of presets on tiny models: what is measured, with what, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import FAMILIES, build, left_padded, prompt

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError, UnknownNameError
from vlmattn.evals import bench as module
from vlmattn.evals.bench import FIRST, PEAK, RANDOM_MODELS, STEP, Clock, bench, random_inputs, random_model
from vlmattn.models import find_family

pytestmark = pytest.mark.filterwarnings("ignore:var", "ignore:vlmattn")


def by_what(table):
    found: dict[str, dict[str, dict]] = {}
    for row in table:
        found.setdefault(row["what"], {})[row["candidate"]] = row
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_preset_has_a_row_for_everything_that_is_measured(family, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks) / 1000)  # whatever else the machine does
    model = build(family)
    table = by_what(bench(model, prompt(family), ["var", "vhr", "vcd"], rounds=2, new_tokens=4))
    assert set(table) - {PEAK} == {FIRST, STEP, "4 tokens"}
    for of in table.values():
        assert list(of) == ["none", "var", "vhr", "vcd"]
    step, whole = table[STEP]["var"], table["4 tokens"]["var"]
    assert step["n"] == whole["n"] == 2
    assert step["ratio_q1"] <= step["ratio"] <= step["ratio_q3"]
    assert table[STEP]["none"]["ratio"] == 1.0
    assert table[FIRST]["var"]["median"] + 3 * step["median"] == pytest.approx(whole["median"], rel=0.5)
    assert whole["tokens_per_s"] == pytest.approx(4e3 / whole["median"], rel=0.01)
    assert "tokens_per_s" not in step
    facts = {"dtype": "float32", "device": "cpu", "batch_size": 1, "new_tokens": 4}
    assert facts.items() <= step.items()
    assert step["prompt_tokens"] == prompt(family)["input_ids"].shape[1]
    assert "vlmattn" not in model.__dict__, "the model is bare again"


def test_the_base_is_the_bare_model_and_presets_are_in_force(monkeypatch):
    """Who generates with what, in the order of the rounds; the first two turns warm up and measure memory."""
    model, seen = build("llava"), []
    generate = type(model).generate

    def spy(self, *args, **kwargs):
        handle = self.__dict__.get("vlmattn")
        seen.append((handle.recipe.name if handle else "bare", kwargs["max_new_tokens"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", spy)
    bench(model, prompt("llava"), ["vhr", "none", "pai"], rounds=2, new_tokens=3)
    assert set(seen) == {(name, n) for name in ("bare", "vhr", "pai") for n in (2, 3)}
    assert [name for name, n in seen if n == 3] == ["bare", "vhr", "pai"] * 2


def test_tokens_per_second_count_the_batch():
    batch = left_padded([prompt("llava"), prompt("llava", words=6)])
    whole = by_what(bench(build("llava"), batch, [], rounds=1, new_tokens=3))["3 tokens"]["none"]
    assert whole["batch_size"] == 2
    assert whole["tokens_per_s"] == pytest.approx(6e3 / whole["median"], rel=0.01)


def test_methods_that_choose_whole_answers_have_no_step():
    table = by_what(bench(build("llava"), prompt("llava"), ["opera", "vhr"], rounds=1, new_tokens=3))
    assert list(table[STEP]) == list(table[FIRST]) == ["none", "vhr"]
    assert list(table["3 tokens"]) == ["none", "opera", "vhr"]


def test_other_candidates_run_beside(monkeypatch):
    asked = []

    def own(new_tokens: int) -> Clock:
        asked.append(new_tokens)
        clock = Clock()
        for _ in range(1 + new_tokens):
            clock.put(torch.zeros(1))
        return clock

    table = by_what(bench(build("llava"), prompt("llava"), [], 2, 3, beside={"own": own}))
    assert all(list(of) == ["none", "own"] for of in table.values())
    assert asked[-2:] == [3, 3]


def test_memory_is_left_out_where_it_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(module, "peak_bytes", lambda run, device: None)
    table = by_what(bench(build("llava"), prompt("llava"), ["vhr"], 1, 2))
    assert PEAK not in table


def test_a_clock_tells_first_token_step_and_whole(monkeypatch):
    times = iter([0.0, 0.5, 2.0, 3.0, 7.0, 8.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    clock = Clock()
    for _ in range(5):
        clock.put(torch.zeros(1))
    assert (clock.tokens, clock.first, clock.step, clock.total) == (4, 2.0, 1.0, 8.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(rounds=0), OptionError, "rounds must be at least 1, got 0"),
        (dict(new_tokens=1), OptionError, "at least 2 new tokens"),
        (dict(presets=["vra"]), UnknownNameError, "did you mean .*var"),
        (dict(presets=["var", "vhr", "var"]), OptionError, "'var' is given twice"),
        (dict(presets=["agla"]), OptionError, "'agla' needs pixel_values .* leave it out"),
        (dict(inputs={"input_ids": torch.tensor([[1, 5, 6, 7]])}), InputError, "no image token"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_rounds(change, error, words, monkeypatch):
    monkeypatch.setattr(module, "paired", lambda *_, **__: pytest.fail("it was measured"))
    settings = dict(inputs=prompt("llava"), presets=["var"], rounds=1, new_tokens=2)
    with pytest.raises(error, match=words):
        bench(build("llava"), **{**settings, **change})


def test_a_wrapped_model_is_refused():
    with vlmattn.applied(build("llava"), "vhr") as model, pytest.raises(StateError, match="unwrap"):
        bench(model, prompt("llava"), ["var"])


def test_random_models_have_the_sizes_they_are_named_after():
    llava, qwen = RANDOM_MODELS["random-llava-7b"](), RANDOM_MODELS["random-qwen2.5-vl-7b"]()
    for config, sizes in (
        (llava, dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)),
        (
            qwen,
            dict(
                hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
                vocab_size=152064,
            ),
        ),
    ):  # fmt: skip
        text = config.get_text_config()
        assert {name: getattr(text, name) for name in sizes} == sizes


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_models_read_their_prompts(name, monkeypatch):
    """With two layers and narrow, so that the large ones fit too; prompt, tower and positions are theirs."""
    make = RANDOM_MODELS[name]

    def pruned_inputs():
        config = make()
        text = config.get_text_config()
        text.num_hidden_layers, text.hidden_size, text.intermediate_size = 2, 128, 64
        text.num_attention_heads = text.num_key_value_heads = 1
        if config.model_type == "llava":
            config.vision_config.num_hidden_layers = 2
        else:
            config.vision_config.out_hidden_size = text.hidden_size
        return config

    monkeypatch.setitem(RANDOM_MODELS, name, pruned_inputs)
    model = random_model(name, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    inputs = random_inputs(model, batch_size=2)
    types = find_family(model).token_types(model, inputs["input_ids"])
    count = 1296 if "qwen" in name else 576
    assert types.bool().sum(1).tolist() == [count, count]
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 2)


def test_a_random_model_has_the_type_and_the_prompt_that_were_asked_for():
    model = random_model("random-llava", "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16
    inputs = random_inputs(model, images=7, after=62)
    assert inputs["input_ids"].shape == (1, 4096)
    assert inputs["pixel_values"].shape == (7, 3, 336, 336)
    assert inputs["pixel_values"].dtype == torch.bfloat16


def test_random_models_have_names():
    with pytest.raises(UnknownNameError, match="random-llava"):
        random_model("random-lava")
