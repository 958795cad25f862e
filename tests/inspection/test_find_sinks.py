"""Planted sinks are found: their dimensions, their layers, how long they live."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, IMAGE_TOKEN, build, left_padded, prompt

import vlmattn
from vlmattn import InputError, OptionError, SinkProfile
from vlmattn.inspection import find_sinks, look, sink_levels
from vlmattn.inspection.sinks import _agreed
from vlmattn.interventions import sinks
from vlmattn.models import find_family

LAYERS, DIMS, ENTER, LEAVE, TAU = 8, (3, 17), 2, 7, 8.0
OTHER = 9  # a dimension in which only padding is massive
EARLY = 95  # a token that is massive from layer 1 on


def deep(family):
    """Wide enough for a large dimension to be no accident."""
    config = build(family).config.to_dict()
    config["text_config"].pop("layer_types", None)
    config["text_config"] |= {"num_hidden_layers": LAYERS, "hidden_size": 256, "num_attention_heads": 32, "head_dim": 8}
    if family != "llava":
        config["vision_config"]["out_hidden_size"] = 256
    return build(family, config=type(build(family).config).from_dict(config))


def plant(model, enter=ENTER, leave=LEAVE, brief=ENTER + 2, dims=DIMS, size=1e5, first=True):
    """Token 1 and the third image token are massive from layer ``enter`` to ``leave``, the fourth until ``brief``."""
    seen = {}

    def read(module, args, kwargs):
        ids = kwargs["input_ids"]
        image = ids == IMAGE_TOKEN
        even = torch.arange(ids.shape[1]) % 2 == 0
        seen["long"] = ((ids == 1) & first) | (image & (image.cumsum(1) == 3)) | ((ids == 0) & even)
        seen["early"] = ids == EARLY
        seen["other"] = (ids == 0) & ~even
        seen["brief"] = image & (image.cumsum(1) == 4)

    def change(layer):
        def hook(module, args, out):
            out = out.clone()
            for name, start, stop in (("long", enter, leave), ("brief", enter, brief), ("early", 1, leave)):
                if layer + 1 == start:
                    out[..., dims] += size * seen[name][..., None]
                if layer + 1 == stop:
                    out[..., dims] -= size * seen[name][..., None]
            out[..., OTHER] += 1e5 * seen["other"]
            return out

        return hook

    model.register_forward_pre_hook(read, with_kwargs=True)
    for number, layer in enumerate(find_family(model).layers(model)):
        layer.register_forward_hook(change(number))
    return model


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.fixture(scope="module", params=FAMILIES)
def planted(request):
    return request.param, plant(deep(request.param))


def test_exactly_the_planted_dimensions_layers_and_levels(planted):
    family, model = planted
    found = find_sinks(model, [prompt(family, seed=s) for s in range(3)], tau=TAU, seed=5, prompts=("a", "b"))
    assert found.dims == DIMS
    assert found.layers == (ENTER, LEAVE)
    assert (found.tau, found.seed, found.prompts) == (TAU, 5, ("a", "b"))
    for layer, levels in enumerate(found.levels):
        assert levels == (float(ENTER <= layer < LEAVE), float(ENTER <= layer < ENTER + 2)), layer


def test_one_trace_has_the_levels_that_many_prompts_have(planted):
    family, model = planted
    inputs = prompt(family)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict, decode=lambda ids, **_: ""))
    trace = look(model, processor, inputs, answer=[5, 6, 7])
    found = sink_levels(trace)
    assert found.axes == ("layer", "token")
    ids = inputs["input_ids"][0]
    third, fourth = (ids == IMAGE_TOKEN).nonzero()[2:4, 0].tolist()
    wanted = torch.zeros(LAYERS, len(ids) + 2, dtype=torch.int64)
    wanted[ENTER:LEAVE, third], wanted[ENTER : ENTER + 2, fourth] = 2, 1
    assert torch.equal(found.values, wanted)
    counts = [(float((row == 2).sum()), float((row == 1).sum())) for row in found.values]
    assert find_sinks(model, [inputs], tau=TAU).levels == tuple(counts)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(planted, side):
    family, model = planted
    prompts = [prompt(family, words=3 if s else 9, seed=s) for s in range(6)]
    batch = left_padded(prompts)
    if side == "right":
        order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
        batch = {k: v.gather(1, order) if v.shape == order.shape else v for k, v in batch.items()}
        assert batch["attention_mask"][1, 0] == 1
        assert batch["attention_mask"][1, -1] == 0
    assert find_sinks(model, [batch], tau=TAU) == find_sinks(model, prompts, tau=TAU)


def test_massive_dimensions_must_agree_in_most_layers_and_prompts():
    family = "llava"
    inputs = [prompt(family)]
    assert find_sinks(plant(deep(family), leave=6), inputs, tau=TAU).dims == DIMS  # 4 of the 5 layers of the middle
    with pytest.warns(UserWarning, match=r"no sink dimensions.*tau = 8"):
        found = find_sinks(plant(deep(family), leave=5), inputs, tau=TAU)  # 3 of them
    assert (found.dims, found.layers) == ((), (0, 0))


def test_a_layer_belongs_to_the_sinks_of_half_of_the_prompts():
    model, inputs = plant(deep("llava")), [prompt("llava", seed=s) for s in range(3)]
    inputs[0]["input_ids"][0, 1] = EARLY
    assert find_sinks(model, inputs, tau=TAU).layers == (ENTER, LEAVE)
    inputs[1]["input_ids"][0, 1] = EARLY
    assert find_sinks(model, inputs, tau=TAU).layers == (1, LEAVE)


def test_at_most_four_dimensions_the_largest():
    model = plant(deep("llava"), dims=(1, 2, 3, 4, 5, 6), size=1e4 * torch.tensor([5.0, 9, 8, 2, 7, 6]))
    assert find_sinks(model, [prompt("llava")], tau=4.0).dims == (2, 3, 5, 6)
    votes = {dim: 10.0 + dim for dim in range(6)}  # of different tokens
    assert _agreed([[votes] * LAYERS], LAYERS) == {2, 3, 4, 5}


def test_sinks_other_than_the_first_token_count():
    assert find_sinks(plant(deep("llava"), first=False), [prompt("llava")], tau=TAU).dims == DIMS


def test_a_model_without_sinks_has_none():
    with pytest.warns(UserWarning, match="smaller tau"):
        found = find_sinks(deep("llava"), [prompt("llava", seed=s) for s in range(3)], tau=TAU)
    assert (found.dims, found.layers) == ((), (0, 0))


def test_a_wrapped_model_is_measured_bare(planted):
    family, model = planted
    inputs = [prompt(family, words=6)]
    before, count = find_sinks(model, inputs, tau=TAU), hooks(model)
    for enabled in (True, False):
        with vlmattn.applied(model, "vhr", alpha=10.0), warnings.catch_warnings():
            if not enabled:
                model.vlmattn.disable()
            wrapped, handle = hooks(model), model.vlmattn
            assert find_sinks(model, inputs, tau=TAU) == before
            assert model.vlmattn is handle
            assert handle.enabled is enabled
            assert hooks(model) == wrapped
            assert not handle.report()["backends"]
    assert hooks(model) == count


def test_nothing_is_left_behind_by_an_exception(planted):
    family, model = planted
    count = hooks(model)
    broken = {**prompt(family), "pixel_values": torch.zeros(1, 2)}
    with vlmattn.applied(model, "pai"):
        wrapped = hooks(model)
        with pytest.raises(Exception):  # noqa: B017, PT011 (whatever the model says)
            find_sinks(model, [broken], tau=TAU)
        assert hooks(model) == wrapped
        assert model.vlmattn.enabled
    assert hooks(model) == count


def test_the_profile_is_saved_and_belongs_to_one_model(planted, tmp_path):
    family, model = planted
    found = find_sinks(model, [prompt(family)], tau=TAU)
    assert SinkProfile.load(found.save(tmp_path)) == found
    found.check(find_family(model).anatomy(model), "here")
    other = build(family)
    with pytest.raises(OptionError, match="another language model"):
        found.check(find_family(other).anatomy(other), "here")


def test_var_takes_the_profile(planted, tmp_path):
    family, model = planted
    inputs = prompt(family)
    path = find_sinks(model, [inputs], tau=TAU).save(tmp_path)
    with vlmattn.applied(model, "var", profile=str(path)), torch.no_grad():
        model(**inputs)
        assert model.vlmattn.report()["fired"]["var"] == 2 * (LEAVE - ENTER) + 2  # tokens, summed over layers


@pytest.mark.parametrize(("told", "warned"), [((3, 50), False), ((50,), True), ((), False)])
@pytest.mark.parametrize("table", ["SINK_DIMS", "REPORTED_SINK_DIMS"])
def test_other_dimensions_than_were_told_are_said(monkeypatch, table, told, warned):
    model = plant(deep("llava"))
    backbone = find_family(model).anatomy(model).backbone
    monkeypatch.setitem(getattr(sinks, table), backbone, told)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert find_sinks(model, [prompt("llava")], tau=TAU).dims == DIMS
    said = [str(one.message) for one in caught if "for this language model" in str(one.message)]
    assert len(said) == warned
    assert all("[3, 17]" in words and "[50]" in words for words in said)
    assert all(("reported by others" in words) == (table == "REPORTED_SINK_DIMS") for words in said)


@pytest.mark.parametrize("tau", [0.0, 32**0.5, 20.0])
def test_a_tau_beyond_reach_is_refused(tau):
    with pytest.raises(OptionError, match=r"below 5\.7, the square root of the hidden size 32"):
        find_sinks(build("llava"), [prompt("llava")], tau=tau)


def test_inputs_that_cannot_be_measured():
    model, inputs = build("llava"), prompt("llava")
    with pytest.raises(InputError, match="a list of processor outputs"):
        find_sinks(model, inputs, tau=3.0)
    with pytest.raises(InputError, match="at least one"):
        find_sinks(model, [], tau=3.0)
    with pytest.raises(InputError, match="input_ids"):
        find_sinks(model, [{"attention_mask": inputs["attention_mask"]}], tau=3.0)
