"""What a decoding rule refuses, in one line with a remedy and without a trace on the model; and streamers that always end."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import near
from tiny import FAMILIES, IMAGE_TOKEN, TEXT, build, generate, left_padded, prompt
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import vlmattn
from vlmattn import (
    AGLA,
    RBD,
    VCD,
    Branch,
    Buckets,
    Contrast,
    ContrastiveDecoding,
    InputError,
    Noise,
    OptionError,
    Recipe,
    StateError,
    UnknownNameError,
    UnsupportedError,
    VlmattnError,
)
from vlmattn.decoding import Decoding
from vlmattn.registry import find_method
from vlmattn.wrapping.call import CALL

pytestmark = pytest.mark.usefixtures("no_grad")

BRANCHY = [name for name in vlmattn.presets() if issubclass(find_method(vlmattn.presets()[name].method), Decoding)]
LAYERED = ["dola_low", "dola_high", "deco", "sla"]
TURNED = "icd"  # needs a processor
PIXELS = {"agla": {"augmented": {"pixel_values": torch.zeros(1, 3, 16, 16)}}}


def words(*ids: int) -> dict[str, Tensor]:
    found = torch.tensor([[1, *ids]])
    return dict(input_ids=found, attention_mask=torch.ones_like(found))


def wrapped(recipe: Any = "vcd", family: str = "llava", **options: Any) -> PreTrainedModel:
    return vlmattn.wrap(build(family), recipe, **options)


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def refuses(
    model: PreTrainedModel,
    call: Callable[[], Any],
    error: type[Exception],
    match: str,
    inputs: dict[str, Any] | None = None,
) -> str:
    """The message of an error of exactly this class; nothing of the refused call is left on the model."""
    inputs = prompt(model.config.model_type) if inputs is None else inputs
    given = PIXELS.get(model.vlmattn.recipe.name)
    before, attributes = generate(model, inputs, branch_inputs=given), set(model.__dict__)
    with pytest.raises(error, match=match) as caught:
        call()
    assert caught.type is error
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    assert CALL.get() is None
    assert set(model.__dict__) == attributes
    assert torch.equal(generate(model, inputs, branch_inputs=given), before)
    recipe = model.vlmattn.recipe
    vlmattn.unwrap(model)
    assert torch.equal(generate(model, inputs), generate(build(model.config.model_type), inputs))
    vlmattn.wrap(model, recipe)
    return text


def one(**fields: Any) -> ContrastiveDecoding:
    """A rule of one's own with one branch."""
    return ContrastiveDecoding((Branch(name="b", **fields),), Contrast((1.0,)))


# Ways of generating

WAYS = {
    "use_cache": (False, "a decoding rule needs a cache, where its branches live; leave use_cache at True"),
    "prefill_chunk_size": (4, "must see the whole prompt in one piece; set prefill_chunk_size=None"),
    "guidance_scale": (
        2.0,
        "guidance_scale is a decoding rule of its own and conflicts with the recipe's; use one of them",
    ),
}
PLACES = ["argument", "config", "the model's config", "first config", "behind a config"]


@pytest.mark.parametrize(
    ("place", "way"),
    [
        pytest.param(
            place,
            way,
        )
        for place in PLACES
        for way in WAYS
    ],
)
def test_ways_of_generating(place, way):
    value, match = WAYS[way]
    model, inputs = wrapped(), prompt("llava")

    def call() -> Any:
        config = GenerationConfig(max_new_tokens=2, **({way: value} if place in ("config", "first config") else {}))
        if place in ("the model's config", "behind a config"):
            setattr(model.generation_config, way, value)
        try:
            if place == "argument":
                return model.generate(**inputs, max_new_tokens=2, **{way: value})
            if place == "first config":
                return model.generate(inputs["input_ids"], config, **without(inputs, "input_ids"))
            if place == "the model's config":
                return model.generate(**inputs, max_new_tokens=2)
            return model.generate(**inputs, generation_config=config)
        finally:
            if place in ("the model's config", "behind a config"):
                setattr(model.generation_config, way, None)

    refuses(model, call, UnsupportedError, match if place in PLACES[:3] else match.split(";")[0].split(",")[0])


@pytest.mark.parametrize("recipe", ["pai+vcd", "dola_low", "rbd", "buckets", "agla"])
@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_rule_refuses_them(recipe, way):
    model, (value, match) = wrapped(recipe), WAYS[way]
    given = PIXELS.get(recipe)
    call = lambda: model.generate(**prompt("llava"), max_new_tokens=2, branch_inputs=given, **{way: value})  # noqa: E731
    refuses(model, call, UnsupportedError, match)


@pytest.mark.parametrize("settings", [{"guidance_scale": 1}, {"guidance_scale": 1.0}, {"use_cache": True}])
def test_settings_that_change_nothing_are_fine(settings):
    model, inputs = wrapped(), prompt("llava")
    wanted = generate(model, inputs)
    assert torch.equal(generate(model, inputs, **settings), wanted)


@pytest.mark.parametrize("recipe", ["vcd", "dola_low"])
def test_paged(recipe):
    model = wrapped(recipe)
    call = lambda: model.generate(**prompt("llava"), max_new_tokens=2, cache_implementation="paged")  # noqa: E731
    refuses(model, call, UnsupportedError, "continuous batching .paged. .* without branches; use generate")


@pytest.mark.parametrize("recipe", ["vcd", "dola_low", "pai+vcd"])
def test_continuous_batching(recipe):
    model = wrapped(recipe)
    refuses(
        model,
        lambda: model(**prompt("llava"), cache=object.__new__(PagedAttentionCache)),
        UnsupportedError,
        "continuous batching .* use generate",
    )


def test_a_batch_of_requests_is_refused():
    """Before it starts, and the model answers as before."""
    model = wrapped()
    wanted = generate(model, prompt("llava"))
    config = GenerationConfig(max_new_tokens=2, eos_token_id=2, pad_token_id=0, do_sample=False)
    with pytest.raises(UnsupportedError, match="continuous batching takes no images"):
        model.generate_batch([[1, 5, 6]], generation_config=config)
    assert torch.equal(generate(model, prompt("llava")), wanted)


def test_packed_rows():
    model, inputs = wrapped(), prompt("llava")
    ids = inputs["input_ids"].repeat(1, 2)
    positions = torch.arange(inputs["input_ids"].shape[1]).repeat(2)[None]
    pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
    call = lambda: model(input_ids=ids, position_ids=positions, pixel_values=pixels, use_cache=False)  # noqa: E731
    refuses(model, call, UnsupportedError, "packed sequences")


@pytest.mark.parametrize("also_ids", [False, True])
def test_embeddings_instead_of_ids(also_ids):
    model, inputs = wrapped(), prompt("llava")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = inputs if also_ids else {"attention_mask": inputs["attention_mask"]}
    call = lambda: model.generate(**given, inputs_embeds=embeds, max_new_tokens=2)  # noqa: E731
    refuses(
        model, call, UnsupportedError, "needs input_ids, to make the prompts of its branches; inputs_embeds cannot do"
    )


def test_nothing_to_read():
    model = wrapped()
    refuses(model, lambda: model.generate(max_new_tokens=2), InputError, "a decoding rule needs input_ids")


@pytest.mark.parametrize("as_what", ["dynamic", "static"])
def test_a_filled_cache(as_what):
    model, inputs = wrapped(), prompt("llava")
    with vlmattn.applied(build("llava"), "none") as other:
        cache = (
            DynamicCache()
            if as_what == "dynamic"
            else StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        )
        other.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    call = lambda: model.generate(**inputs, past_key_values=cache, max_new_tokens=2)  # noqa: E731
    refuses(model, call, UnsupportedError, "cannot go on from past_key_values, which hold no branches; give the whole")


def test_an_old_tuple_for_a_cache():
    """The library says what it wants instead; so should a wrapped model."""
    model = wrapped()
    with pytest.raises(VlmattnError, match="past_key_values"):
        model.generate(**prompt("llava"), past_key_values=((torch.zeros(1, 2, 3, 8),) * 2,) * 4, max_new_tokens=2)


@pytest.mark.parametrize("as_what", ["dynamic", "static"])
@pytest.mark.parametrize("recipe", ["vcd", "dola_low", "rbd"])
def test_an_empty_cache_is_welcome(as_what, recipe):
    model, inputs = wrapped(recipe), prompt("llava")
    text = model.config.get_text_config()
    cache = DynamicCache(config=text) if as_what == "dynamic" else StaticCache(config=text, max_cache_len=40)
    torch.testing.assert_close(
        generate(model, inputs, past_key_values=cache), generate(model, inputs), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("as_what", ["dynamic", "static"])
def test_a_cache_that_was_reset_is_empty(as_what):
    """The bare model takes it, and this is a new generate()."""
    model, inputs = wrapped(), prompt("llava")
    text = model.config.get_text_config()
    cache = DynamicCache(config=text) if as_what == "dynamic" else StaticCache(config=text, max_cache_len=40)
    wanted = generate(model, inputs, past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(model, inputs, past_key_values=cache), wanted)


def test_a_static_cache_of_the_bare_model():
    model, inputs = wrapped(), prompt("llava")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=40)
    generate(build("llava"), inputs, past_key_values=cache)
    cache.reset()
    refuses(
        model,
        lambda: generate(model, inputs, past_key_values=cache),
        StateError,
        "static cache was used before.*give a new",
    )


@pytest.mark.parametrize("config", [T5Config, BartConfig])
def test_encoders_with_a_decoder_are_refused_at_wrap(config):
    small = dict(vocab_size=50, d_model=16, decoder_start_token_id=0)
    if config is T5Config:
        model = T5ForConditionalGeneration(T5Config(**small, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    else:
        ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, forced_eos_token_id=2)
        layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
        model = BartForConditionalGeneration(
            BartConfig(**small, **ends, **layers, encoder_ffn_dim=8, decoder_ffn_dim=8)
        )
    before = set(model.__dict__)
    with pytest.raises(
        UnsupportedError, match=r"is not supported: it is an encoder-decoder.*supported: .*llava, .*qwen2_5_vl"
    ):
        vlmattn.wrap(model, "vcd")
    assert set(model.__dict__) == before


# Caches that forget


def other_text(**text: Any) -> PreTrainedModel:
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4, projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config={**TEXT, **text}, vision_config=vision, image_token_index=IMAGE_TOKEN, image_seq_length=16
    )
    return LlavaForConditionalGeneration(config).eval()


def mistral(window: int | None) -> PreTrainedModel:
    return other_text(model_type="mistral", head_dim=8, sliding_window=window)


def qwen2(window: int = 200) -> PreTrainedModel:
    """Sliding in the upper layers only."""
    return other_text(model_type="qwen2", use_sliding_window=True, sliding_window=window, max_window_layers=2)


def recurrent() -> PreTrainedModel:
    """Every second layer has linear attention."""
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    kinds = ["linear_attention", "full_attention"] * 2
    return other_text(model_type="qwen3_next", head_dim=8, layer_types=kinds, **experts, **linear)


def test_a_branch_from_the_middle_of_a_window():
    model, inputs = mistral(24), prompt("llava", words=12)
    before = generate(model, inputs)
    vlmattn.wrap(model, "rbd")
    for _ in range(2):
        with pytest.raises(
            UnsupportedError, match=r"goes on from the main prompt, of which the sliding window of 24 tokens"
        ):
            generate(model, inputs)
    assert torch.equal(generate(model, inputs, preset="none"), before)
    vlmattn.unwrap(model)
    assert torch.equal(generate(model, inputs), before)


@pytest.mark.parametrize("make", [mistral, qwen2])
def test_a_static_cache_with_windows(make):
    model = vlmattn.wrap(make(200), "vcd")
    with pytest.raises(
        UnsupportedError, match=r"cannot share this cache among branches, StaticSlidingWindowLayer; use a dynamic"
    ):
        generate(model, prompt("llava"), cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("recipe", ["vcd", "m3id", "rbd", "dola_low"])
def test_the_same_model_without_a_window(recipe):
    model, inputs = mistral(None), prompt("llava")
    before = generate(model, inputs)
    assert not torch.equal(generate(vlmattn.wrap(model, recipe), inputs), before)


@pytest.mark.parametrize("recipe", ["rbd", "opera", "avisc", "pai+rbd"])
def test_layers_without_keys(recipe):
    """Rules that are not guided by attention run there: tests/models/test_hybrids.py."""
    with pytest.raises(UnsupportedError, match="show no attention and take no token back"):
        vlmattn.wrap(recurrent(), recipe)


# Prompts and images


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [name for name in BRANCHY if name not in (*LAYERED, TURNED, "buckets")])
def test_rules_about_the_image_leave_text_to_the_bare_model(recipe, family):
    model = wrapped(recipe, family)
    given = PIXELS.get(recipe) if family == "llava" else {"augmented": {"pixel_values": torch.zeros(16, 96)}}
    with pytest.warns(UserWarning, match="a prompt without image tokens"):
        found = generate(model, words(5, 6, 7), branch_inputs=given if recipe == "agla" else None)
    assert torch.equal(found, generate(build(family), words(5, 6, 7)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [*LAYERED, "buckets"])
def test_other_rules_take_any_text(recipe, family):
    model, inputs = wrapped(recipe, family), words(5, 6, 7)
    found = generate(model, inputs)
    assert not torch.equal(found, generate(build(family), inputs))
    assert model.vlmattn.report()["fired"][find_method(vlmattn.presets()[recipe].method).info.name] == 4


def test_prompts_of_ones_own_take_any_text():
    model = wrapped("none")
    rule = one(prompt=lambda ids: torch.cat([ids[:1], torch.tensor([50, 51]), ids[1:]]))
    mixed = left_padded([words(5, 6), words(5, 6, 7, 8)])
    found = generate(model, mixed, preset=rule)
    assert not torch.equal(found, generate(model, mixed))
    near(found[:1], generate(model, words(5, 6), preset=rule))


def test_edits_of_images_beside_a_rule_of_layers():
    found = generate(wrapped("pai+dola_low"), words(5, 6, 7))
    assert torch.equal(found, generate(build("llava"), words(5, 6, 7)))


@pytest.mark.parametrize("recipe", ["vcd", "m3id", "rbd", "agla_attention", "dola_low"])
def test_images_that_do_not_fit_the_prompts(recipe):
    """The main prompt fails as on the bare model; nothing is left behind."""
    model, both = wrapped(recipe), left_padded([prompt("llava"), prompt("llava", words=7, seed=2)])
    few = {**both, "pixel_values": both["pixel_values"][:1]}
    many = {**both, "pixel_values": both["pixel_values"].repeat(2, 1, 1, 1)}
    for inputs in (few, many):
        refuses(
            model, lambda inputs=inputs: generate(model, inputs), ValueError, "Image features and image tokens", both
        )


@pytest.mark.parametrize("recipe", ["vcd", "vcd_pope"])
def test_image_tokens_without_images(recipe):
    """The contrast is with the prompt itself: a rule that does nothing must say so."""
    model = wrapped(recipe)
    with pytest.raises(InputError, match="pixel_values"):
        generate(model, without(prompt("llava"), "pixel_values"))


def test_qwen_without_token_types():
    """The bare model takes positions of the text then."""
    inputs = without(prompt("qwen2_5_vl"), "mm_token_type_ids")
    generate(build("qwen2_5_vl"), inputs)
    assert not torch.equal(generate(wrapped("vcd", "qwen2_5_vl"), inputs), generate(build("qwen2_5_vl"), inputs))


# Functions of branches


SAYS = {
    "no image tokens": lambda ids: ids[ids != IMAGE_TOKEN],
    "an image token more": lambda ids: torch.cat([ids, torch.tensor([IMAGE_TOKEN])]),
    "nothing": lambda ids: ids[:0],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", SAYS)
def test_prompts_that_lose_images(what, family):
    model = wrapped("none", family)
    call = lambda: generate(model, prompt(family), preset=one(prompt=SAYS[what]))  # noqa: E731
    refuses(model, call, InputError, "^branch 'b': its prompts must keep the image tokens")


def test_a_prompt_without_anything():
    model = wrapped("none")
    call = lambda: generate(model, words(5, 6), preset=one(prompt=lambda ids: ids[:0]))  # noqa: E731
    refuses(model, call, InputError, "^branch 'b': nothing is left of the prompt")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "function",
    [
        lambda ids: None,
        lambda ids: ids.tolist(),
        lambda ids: ids.float(),
        lambda ids: ids[None],
        lambda ids: torch.where(ids == IMAGE_TOKEN, ids, 5000),
    ],
    ids=["None", "a list", "floats", "two dimensions", "no such token"],
)
def test_prompts_that_are_none(function, family):
    with pytest.raises(VlmattnError, match="branch 'b'"):
        generate(wrapped("none", family), prompt(family), preset=one(prompt=function))


def test_errors_of_functions_come_through():
    """What the caller's own code raises is not dressed up."""
    model = wrapped("none")
    for rule in (one(prompt=lambda ids: 1 / 0), one(image=lambda pixels: 1 / 0)):
        refuses(model, lambda rule=rule: generate(model, prompt("llava"), preset=rule), ZeroDivisionError, "by zero")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "function", [lambda x: x[:0], lambda x: x[..., :8], lambda x: x[None]], ids=["none", "less", "more"]
)
def test_images_of_another_shape(function, family):
    model = wrapped("none", family)
    call = lambda: generate(model, prompt(family, 2), preset=one(image=function))  # noqa: E731
    text = refuses(
        model, call, InputError, "^branch 'b': its function must keep the shape of pixel_values, ", prompt(family, 2)
    )
    assert str(tuple(prompt(family, 2)["pixel_values"].shape)) in text


@pytest.mark.parametrize("function", [lambda x: None, lambda x: x.numpy()], ids=["None", "numpy"])
def test_images_that_are_none(function):
    with pytest.raises(VlmattnError, match="branch 'b'"):
        generate(wrapped("none"), prompt("llava"), preset=one(image=function))


@pytest.mark.parametrize(
    "rule",
    [lambda main, others, t: main[0], lambda main, others, t: main[..., :50], lambda main, others, t: None],
    ids=["a row", "half of the vocabulary", "None"],
)
def test_rules_that_return_something_else(rule):
    """Logits of another shape would be chosen from."""
    contrast = ContrastiveDecoding((Branch(name="b", image=Noise()),), rule)
    with pytest.raises(VlmattnError, match="rule"):
        generate(wrapped("none"), prompt("llava"), preset=contrast)


# Inputs of branches


@pytest.mark.parametrize("given", [None, {}, {"augmented": {}}, {"augmented": {"pixel_values": None}}])
def test_branch_inputs_that_are_missing(given):
    model = wrapped("agla")
    call = lambda: generate(model, prompt("llava"), branch_inputs=given)  # noqa: E731
    text = refuses(model, call, InputError, "^the branch 'augmented' needs pixel_values with every call")
    assert "generate(..., branch_inputs={'augmented': {'pixel_values': ...}})" in text


def test_prompts_that_are_missing():
    for given in ({}, {"b": {"input_ids": words(5)["input_ids"]}}):
        with pytest.raises(InputError, match=r"the branch 'b' needs .*attention_mask with every call: generate"):
            generate(wrapped("none"), words(5, 6), preset=one(prompt="given"), branch_inputs=given)


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ("vcd", "branch_inputs names x, which is no branch of 'vcd'; it has noised"),
        ("rbd", "branch_inputs names x, which is no branch of 'rbd'; it has text, visual"),
        ("dola_low", "no branch of 'dola_low'; it has none"),
        ("pai", "no branch of 'pai'; it has none"),
        ("none", "no branch of 'none'; it has none"),
    ],
)
def test_branch_inputs_of_no_branch(recipe, match):
    model = wrapped(recipe)
    refuses(model, lambda: generate(model, prompt("llava"), branch_inputs={"x": {}}), InputError, match)


IGNORED = {
    "a name that no model has": ("agla", {"augmented": {"pixel_values": torch.zeros(1, 3, 16, 16), "pixels": 1}}),
    "a branch that shares the prompt": ("rbd", {"visual": {"pixel_values": torch.zeros(1, 3, 16, 16)}}),
    "a branch without images": ("m3id", {"unseen": {"pixel_values": torch.zeros(1, 3, 16, 16)}}),
}


@pytest.mark.parametrize("what", IGNORED)
def test_branch_inputs_that_nobody_reads(what):
    recipe, given = IGNORED[what]
    with pytest.raises(InputError, match="branch"):
        generate(wrapped(recipe), prompt("llava"), branch_inputs=given)


@pytest.mark.parametrize(
    "given",
    [
        {"augmented": torch.zeros(1, 3, 16, 16)},
        {"augmented": None},
        [("augmented", {})],
        {"augmented": {"pixel_values": [1]}},
    ],
    ids=["a tensor", "None", "a list", "no tensor"],
)
def test_branch_inputs_of_another_form(given):
    with pytest.raises(VlmattnError, match="branch_inputs"):
        generate(wrapped("agla"), prompt("llava"), branch_inputs=given)


@pytest.mark.parametrize("changed", ["rows", "mask", "floats", "no image tokens"])
def test_given_prompts_that_do_not_fit(changed):
    inputs = prompt("llava")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if changed == "rows":
        given = {name: value.repeat(2, 1) for name, value in given.items()}
    elif changed == "mask":
        given["attention_mask"] = given["attention_mask"][:, 1:]
    elif changed == "floats":
        given["input_ids"] = given["input_ids"].float()
    else:
        given = words(5, 6)
    with pytest.raises(VlmattnError, match="branch 'b'"):
        generate(wrapped("none"), inputs, preset=one(prompt="given"), branch_inputs={"b": given})


@pytest.mark.parametrize("rests", ["disabled", "no weight"])
def test_inputs_of_a_branch_that_rests(rests):
    """The same call must run with and without the rule: who compares, or tunes alpha down to 0, changes nothing else."""
    model = wrapped("agla") if rests == "disabled" else wrapped(AGLA(alpha=0, beta=0))
    if rests == "disabled":
        model.vlmattn.disable()
    found = generate(model, prompt("llava"), branch_inputs=PIXELS["agla"])
    assert torch.equal(found, generate(build("llava"), prompt("llava")))


# The cache that generate() returns


@pytest.mark.parametrize("recipe", ["vcd", "rbd", "dola_low"])
def test_a_returned_cache_cannot_go_on(recipe):
    model, inputs = wrapped(recipe), prompt("llava")
    out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    longer, next_word = torch.cat([out.sequences, torch.tensor([[5]])], 1), torch.tensor([[5]])
    go_on = lambda model, **more: model.generate(  # noqa: E731
        input_ids=longer, past_key_values=out.past_key_values, max_new_tokens=2, **more
    )
    refuses(model, lambda: go_on(model), UnsupportedError, "give the whole conversation")
    held = f"this cache was filled by generate.. with the decoding rule of '{recipe}' and holds its branches too"
    direct = lambda: model(input_ids=next_word, past_key_values=out.past_key_values)  # noqa: E731
    refuses(model, direct, StateError, held)
    for preset in ("none", "pai"):
        refuses(model, lambda preset=preset: go_on(model, preset=preset), StateError, held)
    other = wrapped("pai")
    refuses(other, lambda: go_on(other), StateError, held)
    model.vlmattn.disable()
    for call in (lambda: go_on(model), direct):
        with pytest.raises(StateError, match=held):
            call()


# Recipes


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("vcd+m3id", "vcd and m3id"),
        ([VCD(), RBD()], "vcd and rbd"),
        ("vcd+dola_low", "vcd and dola"),
        ("vcd+vcd", "vcd and vcd"),
        ("pai+vcd+icd", "vcd and icd"),
        ("vcd+opera", "vcd and opera"),
        ([VCD(), one(image=Noise())], "vcd and contrast"),
    ],
    ids=str,
)
def test_two_rules(spec, names):
    model = build("llava")
    with pytest.raises(
        OptionError, match=f"^decoding rules {names} conflict: a recipe has at most one; use one of them"
    ):
        vlmattn.wrap(model, spec)
    assert not hasattr(model, "vlmattn")
    model = wrapped("pai")
    refuses(model, lambda: model.generate(**prompt("llava"), preset=spec), OptionError, names)
    refuses(model, lambda: model.vlmattn.set(spec), OptionError, names)


def numbers() -> list[tuple[str, str, float]]:
    """(preset, option, value out of its range), for every number of every rule."""
    found, seen = [], set()
    for preset in BRANCHY:
        method = find_method(vlmattn.presets()[preset].method)
        if method in seen:
            continue
        seen.add(method)
        for spec in dataclasses.fields(method):
            low, high = spec.metadata["low"], spec.metadata["high"]
            if low is not None:
                found += [(preset, spec.name, low - 1), (preset, spec.name, high + max(1, abs(high)))]
    return found


@pytest.mark.parametrize(("preset", "name", "value"), numbers())
def test_numbers_out_of_range(preset, name, value):
    method = vlmattn.presets()[preset].method
    match = rf"{method}\.{name} must be a number within .*\.\..*, got {value}"
    model = build("llava")
    with pytest.raises(OptionError, match=match):
        vlmattn.wrap(model, preset, **{name: value})
    assert not hasattr(model, "vlmattn")
    data = {"schema": 1, "name": "x", "interventions": [], "decoding": {"method": method, name: value}}
    with pytest.raises(OptionError, match=match):
        Recipe.from_dict(data)
    with pytest.raises(OptionError, match=match):
        Recipe.from_text(f"schema: 1\nname: x\ninterventions: []\ndecoding: {{method: {method}, {name}: {value}}}")


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True, [1.0]], ids=repr)
def test_other_things_for_numbers(value):
    for preset, name in (
        ("vcd", "alpha"),
        ("m3id", "rate"),
        ("pai_guidance", "gamma"),
        ("deco", "top_p"),
        ("vcd", "step"),
    ):
        with pytest.raises(OptionError, match=rf"{name} must be a (whole )?number"):
            Recipe.of(preset, **{name: value})


def test_unknown_options():
    model = build("llava")
    with pytest.raises(UnknownNameError, match="unknown option of 'vcd' 'alfa'; did you mean alpha"):
        vlmattn.wrap(model, "vcd", alfa=1)
    with pytest.raises(UnknownNameError, match="unknown option of 'dola' 'layer'; did you mean layers"):
        Recipe.from_dict({"schema": 1, "interventions": [], "decoding": {"method": "dola", "layer": "0:"}})
    with pytest.raises(UnknownNameError, match="unknown preset 'vdc'; did you mean vcd"):
        model.generate if vlmattn.wrap(model, "vdc") else None
    with pytest.raises(OptionError, match=r"need a recipe of one method; 'pai\+vcd' has 2"):
        vlmattn.wrap(model, "pai+vcd", alpha=0.5)
    with pytest.raises(OptionError, match=r"rbd\.edits must be one of both, visual, none; got 'all'"):
        vlmattn.wrap(model, "rbd", edits="all")
    with pytest.raises(OptionError, match=r"icd\.system must be of type str, got 3"):
        vlmattn.wrap(model, "icd", system=3)
    assert not hasattr(model, "vlmattn")


@pytest.mark.parametrize("method", ["dola", "deco"])
@pytest.mark.parametrize(
    ("layers", "match"), [("x", "must look like"), ("9", "names layer 9"), ("3:2", "selects none of")]
)
def test_layers_of_rules(method, layers, match):
    preset = {"dola": "dola_low"}.get(method, method)
    model = build("llava")
    with pytest.raises(OptionError, match=rf"^{method}\.layers .*{match}|^{method}\.layers {match}"):
        vlmattn.wrap(model, preset, layers=layers)
    assert not hasattr(model, "vlmattn")


@pytest.mark.parametrize(
    ("layers", "match"), [("x", "must look like"), ("9", "names layer 9"), ("3:2", "selects none of")]
)
@pytest.mark.parametrize("method", [RBD, lambda layers: AGLA(augment="attention", layers=layers)], ids=["rbd", "agla"])
def test_layers_that_choose_tokens(method, layers, match):
    """None of them: an AssertionError without words in the middle of generate()."""
    with pytest.raises(OptionError, match=rf"(rbd|agla)\.layers.*{match}"):
        generate(wrapped(method(layers=layers)), prompt("llava"))


@pytest.mark.parametrize(
    ("factors", "match"),
    [
        ((0.0,), r"buckets\.factors must be different positive numbers"),
        ((math.inf,), r"buckets\.factors must be different positive numbers"),
        ((math.nan,), r"buckets\.factors must be different positive numbers"),
        ((-1.0,), r"buckets\.factors must be a list of positive numbers"),
        ("2", r"buckets\.factors must be a list of positive numbers"),
        ((2.0, 2.0), r"buckets\.factors must be different positive numbers"),
    ],
)
def test_bases_that_are_none(factors, match):
    with pytest.raises(OptionError, match=match):
        wrapped(Buckets(factors=factors))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rope": 0}, "rope must be a positive factor, got 0"),
        ({"rope": -2.0}, "rope must be a positive factor, got -2.0"),
        ({"image": "noise"}, "image must be one of same, blank, drop, given, a Noise or a function, got 'noise'"),
        ({"image": None}, "image must be one of"),
        ({"prompt": "other"}, r"prompt must be same, given, Instead\(...\) or a function, got 'other'"),
        ({"edits": "on"}, "edits must be inherit, off or a list of methods, got 'on'"),
        ({"edits": [VCD()]}, "edits must be inherit, off or a list of methods"),
    ],
    ids=str,
)
def test_branches_that_are_none(fields, match):
    with pytest.raises(OptionError, match=f"^branch 'b': {match}"):
        one(**fields)


ODD = {
    "a rule that is none": lambda: ContrastiveDecoding((Branch(name="b"),), None),
    "no list of branches": lambda: ContrastiveDecoding(Branch(name="b"), Contrast((1.0,))),
    "names of branches": lambda: ContrastiveDecoding(("noised",), Contrast((1.0,))),
    "a text for a factor": lambda: Branch(name="b", rope="2"),
    "a text for a weight": lambda: Contrast(("1",)),
    "one weight": lambda: Contrast(1.0),
    "a seed that is none": lambda: Noise(seed=0.5),
}


@pytest.mark.parametrize("what", ODD)
def test_rules_made_by_hand_check_themselves(what):
    with pytest.raises(OptionError):
        ODD[what]()


@pytest.mark.parametrize(
    "rule",
    [
        lambda: ContrastiveDecoding((), lambda main, others, t: main - others[0], layers=[1]),
        lambda: ContrastiveDecoding((Branch(name="b", image=Noise()),), Contrast([1.0])),
    ],
    ids=["layers", "weights"],
)
def test_lists_are_as_good_as_tuples(rule):
    """As ``branches`` and ``edits`` have it."""
    generate(wrapped("none"), prompt("llava"), preset=rule())


def test_layers_that_the_model_has_not():
    for layer in (-1, 4):
        rule = ContrastiveDecoding((), lambda main, others, t: main, (layer,))
        with pytest.raises(OptionError, match=rf"the decoding rule names layer {layer}, but the decoder has 0\.\.3"):
            wrapped(rule)


# Streamers


class Ends:
    """Counts."""

    def __init__(self) -> None:
        self.puts, self.ends = 0, 0

    def put(self, value: Tensor) -> None:
        self.puts += 1

    def end(self) -> None:
        self.ends += 1


def boom(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("boom")


BEFORE = {
    "unknown preset": (dict(preset="vdc"), UnknownNameError),
    "two rules": (dict(preset="vcd+m3id"), OptionError),
    "needs a processor": (dict(preset="icd"), OptionError),
    "branch_inputs missing": (dict(preset="agla"), InputError),
    "branch_inputs unknown": (dict(branch_inputs={"x": {}}), InputError),
    "no cache": (dict(use_cache=False), UnsupportedError),
    "chunks": (dict(preset="vcd", prefill_chunk_size=4), UnsupportedError),
    "guidance": (dict(guidance_scale=2.0), UnsupportedError),
    "paged": (dict(cache_implementation="paged"), UnsupportedError),
    "embeddings": (dict(inputs_embeds=torch.zeros(1, 3, 32)), UnsupportedError),
    "beams, which the library refuses": (dict(num_beams=2), ValueError),
    "an argument that the library does not know": (dict(no_such_argument=1), ValueError),
    "a rule of one's own": (dict(preset=one(prompt=boom)), RuntimeError),
}


@pytest.mark.parametrize("recipe", ["vcd", "pai"])
@pytest.mark.parametrize("what", BEFORE)
def test_a_streamer_ends_once_when_generate_refuses(what, recipe):
    more, error = BEFORE[what]
    if recipe == "pai" and what in ("no cache", "guidance", "paged", "embeddings"):
        pytest.skip("edits do not refuse it")
    streamer, model = Ends(), wrapped(recipe)
    with pytest.raises(error):
        model.generate(**prompt("llava"), max_new_tokens=3, streamer=streamer, **more)
    assert streamer.ends == 1
    assert CALL.get() is None


def test_a_streamer_that_is_the_eighth_argument():
    streamer, inputs = Ends(), prompt("llava")
    with pytest.raises(UnsupportedError):
        wrapped().generate(inputs["input_ids"], *[None] * 6, streamer, use_cache=False, **without(inputs, "input_ids"))
    assert streamer.ends == 1


@pytest.mark.parametrize("recipe", ["none", "pai", "vcd", "rbd", "dola_low", "opera"])
def test_a_streamer_ends_once_when_all_is_well(recipe):
    streamer, model = Ends(), wrapped(recipe)
    tokens = model.generate(**prompt("llava"), max_new_tokens=3, min_new_tokens=3, streamer=streamer, do_sample=False)
    assert streamer.ends == 1
    assert streamer.puts == (2 if recipe == "opera" else 4)
    assert tokens.shape[1] == prompt("llava")["input_ids"].shape[1] + 3


@pytest.mark.parametrize("recipe", ["vcd", "dola_low", "none", "opera"])
@pytest.mark.parametrize("forward", [1, 2, 4])
def test_a_streamer_ends_once_when_a_forward_fails(recipe, forward):
    """The main prompt, the branch, a token."""
    model, count = wrapped(recipe), SimpleNamespace(left=forward)

    def fail(*args: Any) -> None:
        count.left -= 1
        if not count.left:
            raise RuntimeError("boom")

    hook = model.model.language_model.register_forward_pre_hook(fail)
    streamer = Ends()
    with pytest.raises(RuntimeError, match="boom"):
        model.generate(**prompt("llava"), max_new_tokens=6, min_new_tokens=6, streamer=streamer, do_sample=False)
    hook.remove()
    assert streamer.ends == 1
    assert CALL.get() is None
    assert torch.equal(
        model.generate(**prompt("llava"), max_new_tokens=3),
        wrapped(recipe).generate(**prompt("llava"), max_new_tokens=3),
    )


@pytest.mark.parametrize("what", ["logits_processor", "stopping_criteria", "streamer"])
def test_a_streamer_ends_once_when_the_callers_code_fails(what):
    model, streamer = wrapped(), Ends()
    more: dict[str, Any] = dict(
        logits_processor=LogitsProcessorList([boom]), stopping_criteria=StoppingCriteriaList([boom])
    )
    if what == "streamer":

        def put(value: Tensor) -> None:
            streamer.puts += 1
            if streamer.puts == 3:
                raise RuntimeError("boom")

        streamer.put = put
    with pytest.raises(RuntimeError, match="boom"):
        model.generate(**prompt("llava"), max_new_tokens=6, **{"streamer": streamer, what: more.get(what, streamer)})
    assert streamer.ends == 1
    assert CALL.get() is None


def test_a_streamer_that_cannot_end_is_not_asked_twice():
    class Broken(Ends):
        def end(self) -> None:
            super().end()
            raise RuntimeError("boom")

    streamer = Broken()
    with pytest.raises(RuntimeError, match="boom"):
        wrapped().generate(**prompt("llava"), max_new_tokens=2, streamer=streamer)
    assert streamer.ends == 1


LETTERS = SimpleNamespace(decode=lambda ids, **options: "".join(chr(32 + int(i)) for i in ids))


@pytest.mark.parametrize(
    "fault",
    [None, dict(use_cache=False), dict(preset="vdc"), dict(logits_processor=LogitsProcessorList([boom]))],
    ids=["none", "use_cache", "preset", "logits_processor"],
)
@pytest.mark.parametrize("recipe", ["vcd", "opera"])
def test_a_reader_in_another_thread_never_hangs(fault, recipe):
    if recipe == "opera" and fault == dict(use_cache=False):
        pytest.skip("a search has a cache of its own")
    model, failed = wrapped(recipe), queue.Queue()
    streamer = TextIteratorStreamer(LETTERS, skip_prompt=True, timeout=600)

    def write() -> None:
        with torch.no_grad():
            try:
                model.generate(
                    **prompt("llava"),
                    max_new_tokens=4,
                    min_new_tokens=4,
                    do_sample=False,
                    streamer=streamer,
                    **(fault or {}),
                )
            except Exception as error:
                failed.put(error)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    text = "".join(streamer)  # queue.Empty after the timeout
    writer.join(20)
    assert not writer.is_alive()
    assert failed.empty() == (fault is None)
    if fault is None:
        tokens = model.generate(**prompt("llava"), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert text == LETTERS.decode(tokens[0, prompt("llava")["input_ids"].shape[1] :])


# Searches


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (dict(num_beams=2), "leave num_beams at 1"),
        (dict(num_return_sequences=2), "leave num_return_sequences at 1"),
        (dict(prompt_lookup_num_tokens=2), "leave prompt_lookup_num_tokens at None"),
        (dict(do_sample=True), "cannot have do_sample; leave it out"),
        (dict(stop_strings=["a"]), "leave stop_strings at None"),
        (dict(max_time=1.0), "leave max_time at None"),
        (dict(stopping_criteria=StoppingCriteriaList([boom])), "cannot have stopping_criteria"),
        (dict(custom_generate=boom), "cannot have custom_generate"),
        (dict(past_key_values=DynamicCache()), "without past_key_values or inputs_embeds"),
        (dict(inputs_embeds=torch.zeros(1, 3, 32)), "without past_key_values or inputs_embeds"),
        (dict(prefill_chunk_size=4), "prefill_chunk_size=None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_search_refuses_other_ways_to_choose(more, match):
    model, inputs = wrapped("opera"), prompt("llava")
    wanted = model.generate(**inputs, max_new_tokens=3)
    with pytest.raises(UnsupportedError, match=match) as caught:
        model.generate(**inputs, max_new_tokens=3, **more)
    assert "\n" not in str(caught.value)
    assert CALL.get() is None
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), wanted)


def test_a_search_needs_full_attention():
    for make in (lambda: mistral(28), qwen2):
        with pytest.raises(UnsupportedError, match=r"^a search needs full attention in every layer"):
            vlmattn.wrap(make(), "opera").generate(**prompt("llava"), max_new_tokens=2)


@pytest.mark.parametrize(
    ("more", "as_config"),
    [(dict(guidance_scale=2.0), None), (dict(max_time=1e-9), "config"), (dict(num_beams=2), "first config")],
    ids=["guidance", "time in a config", "beams in a positional config"],
)
def test_a_search_refuses_them_wherever_they_stand(more, as_config):
    """A limit in time is passed over; the others end in errors about something else."""
    model, inputs = wrapped("opera"), prompt("llava")
    rest, config = without(inputs, "input_ids"), GenerationConfig(max_new_tokens=3, **more)
    calls = {
        None: lambda: model.generate(**inputs, max_new_tokens=3, **more),
        "config": lambda: model.generate(**inputs, generation_config=config),
        "first config": lambda: model.generate(inputs["input_ids"], config, **rest),
    }
    with pytest.raises(UnsupportedError, match=next(iter(more))):
        calls[as_config]()
