"""The laws of the design on tiny models of every family: 1 identity, 3 padding, 4 state, 5 never silent, 6 no S x S."""

from __future__ import annotations

import copy
import json
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import near as close
from tiny import FAMILIES, IMAGE_TOKEN, Largest, build, left_padded, prompt
from tiny import generate as unrestricted
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessorList, StaticCache

import vlmattn
from vlmattn import PAI, VAR, VHR, InputError, OptionError, Recipe, StateError, UnknownNameError, UnsupportedError
from vlmattn.interventions.sinks import sink_values
from vlmattn.request import IMAGE, TEXT, VIDEO, Request, number_images
from vlmattn.wrapping import record_of

no_grad = pytest.mark.usefixtures("no_grad")
family_matrix = pytest.mark.parametrize("family", FAMILIES)
attn_matrix = pytest.mark.parametrize("attn", ["sdpa", "eager"])

RECIPES = {
    "var": VAR(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0),
    "pai": PAI(layers="0:"),
    "vhr": VHR(layers="0:"),
}
RECIPES["all"] = [RECIPES["var"], RECIPES["pai"], RECIPES["vhr"]]
SINGLE = ("var", "pai", "vhr")
recipe_matrix = pytest.mark.parametrize("name", RECIPES)


# Random models also write placeholders of images, which the bare model refuses to read again without a cache.
PLACEHOLDERS = [96, 97, 98, 99]


def generate(model: nn.Module, inputs: dict, new: int = 4, **options) -> Tensor:
    return unrestricted(model, inputs, new, **{"suppress_tokens": PLACEHOLDERS, **options})


def three(family: str) -> list[dict[str, Tensor]]:
    """Prompts of different lengths; the second has two images."""
    return [prompt(family), prompt(family, images=2, words=3, seed=7), prompt(family, words=9, seed=5)]


def longer(family: str, inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The prompt with more text ``[batch, n]`` at its end."""
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    more = dict(inputs, input_ids=ids, attention_mask=mask)
    return more if family == "llava" else dict(more, mm_token_type_ids=(ids == IMAGE_TOKEN).int())


def our_hooks(model: nn.Module) -> list:
    tables = [table for m in model.modules() for table in (m._forward_pre_hooks, m._forward_hooks)]
    hooks = [hook for table in tables for hook in table.values()]
    return [hook for hook in hooks if hook.__module__.startswith("vlmattn")]


def footprint(model: nn.Module) -> dict:
    """Everything that wrapping may touch. Take it after a first forward: transformers hangs hooks of its own on vision towers."""
    tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    config = model.config
    hooks = [(name, table, list(getattr(m, table))) for name, m in model.named_modules() for table in tables]
    return {
        "hooks": [hook for hook in hooks if hook[-1]],
        "attributes": sorted(model.__dict__),
        "attention": [c._attn_implementation for c in (config, config.get_text_config(), config.vision_config)],
        "modules": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "config": config.to_dict(),
        "class": type(model),
    }


# --- Law 1: no edit, no difference


@no_grad
@attn_matrix
@family_matrix
def test_the_identity_recipe_changes_no_bit(family, attn):
    model, inputs = build(family, attn), prompt(family)
    logits, generated = model(**inputs).logits, generate(model, inputs)
    before = footprint(model)
    assert vlmattn.wrap(model, "none") is model
    assert type(model) is before["class"]
    assert model.vlmattn.recipe.interventions == ()
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(generate(model, inputs), generated)
    assert vlmattn.unwrap(model) is model
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(generate(model, inputs), generated)


@no_grad
@recipe_matrix
@attn_matrix
@family_matrix
def test_a_recipe_acts_while_it_is_on_and_leaves_nothing(family, attn, name):
    model, inputs = build(family, attn), prompt(family)
    logits, generated = model(**inputs).logits, generate(model, inputs)
    before = footprint(model)
    vlmattn.wrap(model, RECIPES[name])
    edited = model(**inputs).logits
    assert type(model) is before["class"]
    assert isinstance(model, before["class"])
    assert (edited - logits).abs().max() > 1e-3
    assert (generate(model, inputs) - generated).abs().amax((0, 2)).min() > 1e-3, "every step is edited"
    assert all(model.vlmattn.report()["fired"].values())

    model.vlmattn.disable()
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(generate(model, inputs), generated)
    model.vlmattn.enable()
    assert torch.equal(model(**inputs).logits, edited)

    assert our_hooks(model)
    vlmattn.unwrap(model)
    assert footprint(model) == before
    assert not our_hooks(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(generate(model, inputs), generated)


def use_and_fail(model: nn.Module) -> None:
    assert our_hooks(model)
    generate(model, prompt(model.config.model_type))
    raise ZeroDivisionError


@no_grad
@family_matrix
def test_an_exception_leaves_nothing(family, monkeypatch):
    model, inputs = build(family), prompt(family)
    logits = model(**inputs).logits
    before = footprint(model)
    with pytest.raises(ZeroDivisionError), vlmattn.applied(model, RECIPES["all"]) as same:
        use_and_fail(same)
    assert footprint(model) == before
    monkeypatch.setenv("VLMATTN_BACKEND", "triton")
    with pytest.raises(UnsupportedError), vlmattn.applied(model, RECIPES["var"]):
        generate(model, inputs)  # raises in the middle of a layer
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)


@no_grad
def test_instance_attributes_of_the_user_come_back():
    model = build("llava")
    mine = model.generate
    model.__dict__["generate"] = mine
    vlmattn.wrap(model, "pai")
    assert model.generate is not mine
    vlmattn.unwrap(model)
    assert model.generate is mine


@no_grad
@family_matrix
def test_save_pretrained_writes_the_bare_model_and_the_recipe(family, tmp_path):
    model, inputs = build(family), prompt(family)
    model.save_pretrained(tmp_path / "bare")
    vlmattn.wrap(model, RECIPES["all"])
    model.save_pretrained(tmp_path / "wrapped")
    bare, wrapped = ({p.name: p for p in (tmp_path / folder).iterdir()} for folder in ("bare", "wrapped"))
    assert set(wrapped) - set(bare) == {"vlmattn_config.json"}
    assert all(wrapped[name].read_bytes() == path.read_bytes() for name, path in bare.items())
    assert json.loads(wrapped["vlmattn_config.json"].read_text()) == model.vlmattn.recipe.to_dict()

    again = type(model).from_pretrained(tmp_path / "wrapped").eval()
    assert not our_hooks(again)
    close(again(**inputs).logits, build(family)(**inputs).logits)
    vlmattn.wrap(again)  # finds the recipe beside the weights
    assert again.vlmattn.recipe == model.vlmattn.recipe
    close(again(**inputs).logits, model(**inputs).logits)


# --- Law 3: padding is invisible, cached decoding equals recomputing


@no_grad
@recipe_matrix
@attn_matrix
@family_matrix
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(family, attn, name):
    model, prompts = vlmattn.wrap(build(family, attn), RECIPES[name]), three(family)
    together = generate(model, left_padded(prompts))
    for row, inputs in zip(together, prompts, strict=True):
        close(row, generate(model, inputs)[0])


@no_grad
@recipe_matrix
@attn_matrix
@family_matrix
def test_caches_do_not_matter(family, attn, name):
    """Recomputing everything, and a static cache, give what the growing cache gives."""
    model, inputs = vlmattn.wrap(build(family, attn), RECIPES[name]), left_padded(three(family))
    cached = generate(model, inputs)
    close(generate(model, inputs, use_cache=False), cached)
    close(generate(model, inputs, cache_implementation="static", disable_compile=True), cached)


@no_grad
@recipe_matrix
@pytest.mark.parametrize("words", [0, 1])
@family_matrix
def test_prompts_that_end_with_their_image(family, words, name):
    model = vlmattn.wrap(build(family), RECIPES[name])
    prompts = [
        prompt(family, words=words),
        prompt(family, words=7, seed=3),
        prompt(family, images=2, words=words, seed=4),
    ]
    together = generate(model, left_padded(prompts))
    for row, inputs in zip(together, prompts, strict=True):
        close(row, generate(model, inputs)[0])


@no_grad
@recipe_matrix
@attn_matrix
@family_matrix
def test_beams_do_not_depend_on_the_batch(family, attn, name):
    def beams(inputs):
        out = model.generate(
            **inputs, num_beams=3, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, suppress_tokens=PLACEHOLDERS,
        )  # fmt: skip
        return out.sequences[:, inputs["input_ids"].shape[1] :], out.sequences_scores

    model, prompts = vlmattn.wrap(build(family, attn), RECIPES[name]), three(family)
    tokens, scores = beams(left_padded(prompts))
    for row, inputs in enumerate(prompts):
        alone, score = beams(inputs)
        assert torch.equal(tokens[row], alone[0])
        close(scores[row], score[0])
    vlmattn.unwrap(model)
    assert (beams(left_padded(prompts))[1] - scores).abs().max() > 1e-3


@no_grad
@recipe_matrix
@attn_matrix
@family_matrix
def test_prompt_lookup_gives_the_greedy_tokens(family, attn, name):
    """Assisted decoding reads several drafted tokens at once and crops the cache where they were wrong."""
    model = vlmattn.wrap(build(family, attn), RECIPES[name])
    inputs = longer(family, prompt(family), torch.tensor([[5, 6, 7, 8] * 4]))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0, "suppress_tokens": PLACEHOLDERS}
    greedy = model.generate(**inputs, **options)
    lengths = []
    count = lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1])  # noqa: E731
    model.register_forward_pre_hook(count, with_kwargs=True)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), greedy)
    assert max(lengths[1:]) > 1, "tokens were drafted"
    assert sum(lengths[1:]) > 15, "and some of them were wrong"


@no_grad
@recipe_matrix
@attn_matrix
@family_matrix
def test_right_padding_is_invisible(family, attn, name):
    model, prompts = vlmattn.wrap(build(family, attn), RECIPES[name]), three(family)
    length = max(p["input_ids"].shape[1] for p in prompts)
    batch = left_padded(prompts)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in batch:
            rows = [nn.functional.pad(p[key], (0, length - p[key].shape[1])) for p in prompts]
            batch[key] = torch.cat(rows)
    logits = model(**batch).logits
    for row, inputs in zip(logits, prompts, strict=True):
        alone = model(**inputs).logits[0]
        close(row[: len(alone)], alone)


@no_grad
@pytest.mark.parametrize("name", SINGLE)
@family_matrix
def test_positional_inputs_are_read_like_named_ones(family, name):
    model, inputs = vlmattn.wrap(build(family), RECIPES[name]), left_padded(three(family)[::2])
    named = model(**inputs).logits
    ids, mask, pixels = (inputs.pop(key) for key in ("input_ids", "attention_mask", "pixel_values"))
    if family == "llava":
        positional = model(ids, pixels, mask, **inputs).logits
    else:
        positional = model(ids, mask, pixel_values=pixels, **inputs).logits
    close(positional[:, -1], named[:, -1])


@no_grad
@pytest.mark.parametrize("name", SINGLE)
def test_a_row_without_image_stays_bare(name):
    """In a batch with images, rows without one have nothing to be edited for."""
    model, inputs = build("llava"), prompt("llava")
    text = torch.tensor([[1, 5, 6, 7]])
    other = {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": inputs["pixel_values"][:0]}
    rows = left_padded([inputs, other])
    bare = generate(model, rows)
    vlmattn.wrap(model, RECIPES[name])
    edited = generate(model, rows)
    assert (edited[0] - bare[0]).abs().max() > 1e-3
    close(edited[1], bare[1])


@no_grad
@pytest.mark.parametrize("name", ["var", "pai"])
def test_generated_placeholders_are_text_with_and_without_cache(name):
    """A model may write the video token; recomputing must not take it for a video."""
    model, inputs = vlmattn.wrap(build("qwen2_5_vl"), RECIPES[name]), prompt("qwen2_5_vl")
    force = LogitsProcessorList([lambda ids, scores: torch.where(torch.arange(100) == 98, 0.0, -1e9).expand_as(scores)])
    cached = unrestricted(model, inputs, logits_processor=force)
    close(unrestricted(model, inputs, logits_processor=force, use_cache=False), cached)


# --- turns: a cache goes on


def turn(model: nn.Module, inputs: dict, **options) -> tuple[Tensor, Tensor, DynamicCache]:
    """Logits, sequences and cache of three greedy tokens."""
    out = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True, suppress_tokens=PLACEHOLDERS, **options,
    )  # fmt: skip
    return torch.stack(out.logits, 1), out.sequences, out.past_key_values


def next_turn(family: str, inputs: dict, sequences: Tensor, cache: DynamicCache) -> dict:
    """Inputs that go on after ``sequences`` with three more words; images are in the cache already."""
    told = sequences[:, inputs["input_ids"].shape[1] :]
    words = torch.tensor([[11, 12, 13]]).expand(len(told), 3)
    more = longer(family, inputs, torch.cat([told, words], 1))
    kept = {key: more[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids") if key in more}
    return dict(kept, past_key_values=cache)


@no_grad
@recipe_matrix
@family_matrix
def test_a_second_turn_goes_on_with_the_cache(family, name):
    def two_turns(inputs):
        _, sequences, cache = turn(model, inputs)
        return turn(model, next_turn(family, inputs, sequences, cache))[0]

    model, prompts = vlmattn.wrap(build(family), RECIPES[name]), three(family)
    together = two_turns(left_padded(prompts))
    assert together.isfinite().all()
    for row, inputs in zip(together, prompts, strict=True):
        close(row, two_turns(inputs)[0])
    vlmattn.unwrap(model)
    assert (two_turns(left_padded(prompts)) - together).abs().max() > 1e-3


@no_grad
@family_matrix
def test_a_second_turn_of_var_equals_recomputing(family):
    """Every text row after the image is edited in both; sinks among generated tokens are the one difference, so none here."""
    var = VAR(tau=2.0, dims=(3, 17), layers="0", max_sink=1.0, min_visual=0.0)
    model, inputs = vlmattn.wrap(build(family), var), prompt(family, seed=3)
    _, sequences, cache = turn(model, inputs)
    second = next_turn(family, inputs, sequences, cache)
    logits, _, _ = turn(model, second)
    del second["past_key_values"]
    again, _, _ = turn(model, {**inputs, **second}, use_cache=False)
    (method,) = record_of(model).plan_of(model.vlmattn.recipe).by_layer[0]
    kept = cache._vlmattn_request.store(method, 0).slots["groups"]
    groups = kept.read(second["input_ids"].shape[1], torch.device("cpu"))
    fresh = model.get_input_embeddings()(sequences[:, -3:])
    assert (groups % 2).any(), "the premise: sinks in the prompt"
    assert not (sink_values(fresh, (3, 17)) > 2.0).any(), "the premise: none among what was generated"
    close(logits, again)


@no_grad
def test_caches_from_elsewhere_are_refused():
    model, inputs = build("llava"), prompt("llava")
    _, sequences, cache = turn(model, inputs)
    vlmattn.wrap(model, RECIPES["pai"])
    with pytest.raises(StateError, match=r"filled without vlmattn.*start a new generate"):
        turn(model, next_turn("llava", inputs, sequences, cache))

    _, sequences, cache = turn(model, inputs)
    model.vlmattn.set(RECIPES["vhr"])
    with pytest.raises(StateError, match=r"'pai' and cannot go on with 'vhr'.*start a new generate"):
        turn(model, next_turn("llava", inputs, sequences, cache))
    model.vlmattn.set(RECIPES["pai"])
    model.vlmattn.disable()
    with pytest.raises(StateError, match="start a new generate"):
        turn(model, next_turn("llava", inputs, sequences, cache))
    model.vlmattn.enable()
    turn(model, next_turn("llava", inputs, sequences, cache))


@no_grad
@pytest.mark.parametrize("name", SINGLE)
def test_a_copied_cache_goes_on_like_the_original(name):
    """The usual way to ask several questions about one prefix."""
    model, inputs = vlmattn.wrap(build("llava"), RECIPES[name]), prompt("llava")
    _, sequences, cache = turn(model, inputs)
    copied = copy.deepcopy(cache)
    original = turn(model, next_turn("llava", inputs, sequences, cache))[0]
    close(turn(model, next_turn("llava", inputs, sequences, copied))[0], original)


@no_grad
@pytest.mark.parametrize("words", [[5, 6, 7], [5]], ids=["words", "one word"])
@pytest.mark.parametrize("name", ["var", "pai"])
def test_a_cropped_cache_forgets_what_was_behind_the_cut(name, words):
    """Prefix reuse: cut before the second image, go on with other words; new slots are not the image that was there."""
    model, inputs = vlmattn.wrap(build("llava"), RECIPES[name]), prompt("llava", images=2, words=3, seed=6)
    _, _, cache = turn(model, inputs)
    prefix = 19  # three words and the first image
    cache.crop(prefix - cache.get_seq_length())
    ids = torch.cat([inputs["input_ids"][:, :prefix], torch.tensor([words])], 1)
    other = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fresh = generate(model, dict(other, pixel_values=inputs["pixel_values"][:1]), new=8)
    close(generate(model, other, new=8, past_key_values=cache), fresh)


@no_grad
def test_a_second_turn_counts_for_the_recipe_in_force():
    """Also when another recipe was set in between: the report must not say that nothing fired."""
    model, inputs = vlmattn.wrap(build("llava"), RECIPES["pai"]), prompt("llava")
    _, sequences, cache = turn(model, inputs)
    model.vlmattn.set(RECIPES["vhr"])
    model.vlmattn.set(RECIPES["pai"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        turn(model, next_turn("llava", inputs, sequences, cache))
    assert model.vlmattn.report()["fired"]["pai"] > 0


@no_grad
def test_images_of_a_second_turn_are_numbered_on():
    model, inputs, more = vlmattn.wrap(build("llava"), "pai"), prompt("llava"), prompt("llava", seed=9)
    cache = model(**inputs, use_cache=True).past_key_values
    cache = model(input_ids=more["input_ids"], pixel_values=more["pixel_values"], past_key_values=cache).past_key_values
    images = cache._vlmattn_request.images(cache.get_seq_length(), torch.device("cpu"))[0].tolist()
    once = [-1] * 3 + [0] * 16 + [-1] * 4
    assert images == once + [number + 1 if number >= 0 else -1 for number in once]


# --- Law 4: state belongs to the request


@no_grad
@attn_matrix
@family_matrix
def test_two_models_of_one_config(family, attn):
    first = build(family, attn)
    second, inputs = build(family, attn, seed=1, config=first.config), prompt(family)
    assert first.config is second.config
    bare = [model(**inputs).logits for model in (first, second)]
    before = footprint(first)["attention"]

    vlmattn.wrap(first, RECIPES["pai"])
    assert torch.equal(second(**inputs).logits, bare[1])
    assert not our_hooks(second)
    assert torch.equal(generate(second, inputs), generate(build(family, attn, seed=1), inputs))
    vlmattn.wrap(second, RECIPES["vhr"])
    edited = second(**inputs).logits
    assert (edited - bare[1]).abs().max() > 1e-3
    vlmattn.unwrap(first)
    assert torch.equal(first(**inputs).logits, bare[0])
    assert torch.equal(second(**inputs).logits, edited), "still wrapped, still edited"
    vlmattn.unwrap(second)
    assert torch.equal(second(**inputs).logits, bare[1])
    assert footprint(first)["attention"] == footprint(second)["attention"] == before


def test_threads_do_not_meet():
    """Four threads, one model, different prompts and recipes."""
    model = vlmattn.wrap(build("llava"), RECIPES["all"])
    prompts = [*three("llava"), left_padded(three("llava"))]
    presets = [None, "vhr", None, "pai"]
    serial = [generate(model, p, preset=preset) for p, preset in zip(prompts, presets, strict=True)]
    barrier, results = threading.Barrier(4), [[] for _ in range(4)]

    def work(i: int) -> None:
        for _ in range(6):
            barrier.wait(timeout=600)
            results[i].append(generate(model, prompts[i], preset=presets[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for expected, found in zip(serial, results, strict=True):
        assert len(found) == 6
        for logits in found:
            close(logits, expected)


@no_grad
@recipe_matrix
@family_matrix
def test_a_deep_copy_is_a_model_of_its_own(family, name):
    original, inputs = build(family), prompt(family)
    bare = original(**inputs).logits
    edited = vlmattn.wrap(original, RECIPES[name])(**inputs).logits
    for kept_first in (True, False):
        copied = copy.deepcopy(original)
        assert copied.vlmattn is not original.vlmattn
        assert torch.equal(copied(**inputs).logits, edited)
        assert torch.equal(generate(copied, inputs), generate(original, inputs))
        out, kept = (copied, original) if kept_first else (original, copied)
        vlmattn.unwrap(out)
        assert not our_hooks(out)
        assert torch.equal(out(**inputs).logits, bare)
        assert torch.equal(kept(**inputs).logits, edited)
    vlmattn.unwrap(copied)
    assert torch.equal(copied(**inputs).logits, bare)


@no_grad
def test_deep_copies_that_share_a_config():
    first = build("llava")
    pair = nn.ModuleList([first, build("llava", seed=1, config=first.config)])
    for model in pair:
        vlmattn.wrap(model, RECIPES["pai"])
    a, b = copy.deepcopy(pair)
    inputs = prompt("llava")
    edited = b(**inputs).logits
    vlmattn.unwrap(a)
    assert torch.equal(b(**inputs).logits, edited)


@no_grad
@recipe_matrix
@family_matrix
def test_a_second_prompt_finds_nothing_of_the_first(family, name):
    model, (first, other, _) = vlmattn.wrap(build(family), RECIPES[name]), three(family)
    fresh = generate(model, first), generate(model, other)
    assert torch.equal(generate(vlmattn.wrap(build(family), RECIPES[name]), other), fresh[1])
    assert torch.equal(generate(model, first), fresh[0])


@no_grad
@family_matrix
def test_a_reset_static_cache_is_a_new_request(family):
    model, (first, other, _) = vlmattn.wrap(build(family), RECIPES["all"]), three(family)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    generate(model, first, past_key_values=cache, disable_compile=True)
    cache.reset()
    close(generate(model, other, past_key_values=cache, disable_compile=True), generate(model, other))


@no_grad
@family_matrix
def test_a_preset_for_one_call(family):
    model, inputs = build(family), prompt(family)
    bare = generate(model, inputs)
    with vlmattn.applied(model, "vhr"):
        vhr = generate(model, inputs)
    vlmattn.wrap(model, RECIPES["pai"])
    pai = generate(model, inputs)
    assert torch.equal(generate(model, inputs, preset="vhr"), vhr)
    assert (vhr - pai).abs().max() > 1e-3
    assert torch.equal(generate(model, inputs, preset="none"), bare)
    assert torch.equal(generate(model, inputs, preset=RECIPES["pai"]), pai)
    with pytest.raises(UnknownNameError):
        generate(model, inputs, preset="nope")
    assert torch.equal(generate(model, inputs), pai)
    assert model.vlmattn.recipe.name == "pai"


# --- Law 5: never silent


@pytest.mark.parametrize(
    ("error", "match", "recipe", "options"),
    [
        (UnknownNameError, r"unknown preset 'vaar'; did you mean var", "vaar", {}),
        (UnknownNameError, r"unknown preset 'zzz'; known: agla, .* more", "zzz", {}),
        (UnknownNameError, r"unknown option of 'pai' 'alhpa'; did you mean alpha", "pai", {"alhpa": 1}),
        (OptionError, r"pai\.alpha must be a number within 0\.\.0\.999, got 1\.5", "pai", {"alpha": 1.5}),
        (OptionError, r"var\.keep must be a number within 0\.\.1, got nan", "var", {"keep": float("nan")}),
        (OptionError, r"vhr\.drop_outliers must be of type bool, got 'no'", "vhr", {"drop_outliers": "no"}),
        (OptionError, r"pai\.layers names layer 9, but the decoder has layers 0\.\.3", "pai", {"layers": "9"}),
        (OptionError, r"pai\.layers must look like '2:-1'", "pai", {"layers": "two"}),
        (OptionError, r"var\.dims must lie within 0\.\.31, got \[3, 40\]", "var", {"dims": (3, 40)}),
        (OptionError, r"need a recipe of one method; 'vhr\+pai' has 2", "vhr+pai", {"alpha": 0.1}),
        (OptionError, r"a recipe is a preset name, a file, a method or a list", 3, {}),
        (InputError, r"cannot read the recipe no/such\.yaml", "no/such.yaml", {}),
        (InputError, r"looks for vlmattn_config\.json beside the model.*give a preset", None, {}),
    ],
)
def test_recipes_that_cannot_be_are_refused_with_a_remedy(error, match, recipe, options):
    model = build("llava")
    before = footprint(model)
    with pytest.raises(error, match=match):
        vlmattn.wrap(model, recipe, **options)
    assert footprint(model) == before


@pytest.mark.parametrize("dims", [3, "3", None, (3.5,), ("a",), (True,), [[1]]], ids=str)
def test_dims_that_are_no_indices_are_refused(dims):
    with pytest.raises(OptionError, match=r"var\.dims"):
        vlmattn.wrap(build("llava"), VAR(tau=2.0, dims=dims))


def test_a_recipe_in_the_working_directory_is_not_beside_the_model(tmp_path, monkeypatch):
    Recipe.of("pai").save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="give a preset"):
        vlmattn.wrap(build("llava"))


def test_other_models_are_refused_with_the_supported_ones():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    for model in (llama, nn.Linear(2, 2), build("llava").model):
        with pytest.raises(
            UnsupportedError,
            match=r"is not (supported|a transformers PreTrainedModel).*supported: .*llava, .*qwen2_5_vl",
        ):
            vlmattn.wrap(model, "pai")


def test_other_attention_is_refused():
    model = build("llava")
    model.config.get_text_config()._attn_implementation_internal = "of_nobody"
    with pytest.raises(
        UnsupportedError, match=r"'of_nobody' is not known .*; load the model with attn_implementation='sdpa'"
    ):
        vlmattn.wrap(model, "pai")
    assert not our_hooks(model)
    assert "vlmattn" not in model.__dict__


@no_grad
@family_matrix
def test_wrong_order_and_wrong_inputs_are_refused(family, monkeypatch):
    model, inputs = build(family), prompt(family)
    with pytest.raises(StateError, match="not wrapped"):
        vlmattn.unwrap(model)
    vlmattn.wrap(model, RECIPES["pai"])
    edited = generate(model, inputs)
    with pytest.raises(StateError, match=r"already wrapped with 'pai'.*vlmattn\.unwrap"):
        vlmattn.wrap(model, "vhr")
    with pytest.raises(StateError, match="already wrapped"), vlmattn.applied(model, "vhr"):
        pass
    with pytest.raises(UnsupportedError, match="prefill_chunk_size=None"):
        generate(model, inputs, prefill_chunk_size=2, preset="vhr")
    text = torch.tensor([[1, 5, 6, 7]])
    pictures = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image"))}
    for call in (model, model.generate):
        with pytest.raises(InputError, match=r"no image tokens.*model\.vlmattn\.disable"):
            call(input_ids=text, attention_mask=torch.ones_like(text), **pictures)
    monkeypatch.setenv("VLMATTN_BACKEND", "triton")
    with pytest.raises(UnsupportedError, match="'triton' was forced but cannot run this call"):
        generate(model, inputs)
    monkeypatch.setenv("VLMATTN_BACKEND", "merge")
    with pytest.raises(UnsupportedError, match="'merge' was forced but cannot run this call"):
        generate(model, inputs)
    monkeypatch.delenv("VLMATTN_BACKEND")
    assert torch.equal(generate(model, inputs), edited), "refused calls leave no trace"


@no_grad
def test_attention_that_was_switched_back_is_not_silent():
    """Another implementation set while wrapped would drop every edit."""
    model, inputs = vlmattn.wrap(build("llava"), RECIPES["pai"]), prompt("llava")
    edited = model(**inputs).logits
    model.set_attn_implementation("sdpa")
    with pytest.raises(vlmattn.VlmattnError):
        assert torch.equal(model(**inputs).logits, edited)


@no_grad
def test_an_edit_that_cannot_fire_warns_at_wrap_and_once_after_generate():
    model, inputs = build("llava"), prompt("llava")
    bare = generate(model, inputs)
    with pytest.warns(UserWarning, match=r"no token can reach tau = 20 at hidden size 32 .*give a smaller tau"):
        vlmattn.wrap(model, "var", dims=(3, 17), layers="0:")
    with pytest.warns(UserWarning, match=r"var never fired.*model\.vlmattn\.report"):
        close(generate(model, inputs), bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, inputs)


@no_grad
def test_unknown_sink_dimensions_warn():
    with pytest.warns(UserWarning, match=r"sink dimensions .* not known.*find_sinks.*dims="):
        vlmattn.wrap(build("llava"), VAR(tau=2.0))


@no_grad
@family_matrix
def test_an_edit_that_fires_does_not_warn(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in RECIPES:
            generate(vlmattn.wrap(build(family), RECIPES[name]), prompt(family))


@no_grad
def test_layers_that_select_nothing_are_not_silent():
    """A slice is clipped to the decoder; an empty one would mean that the edit never acts."""
    with pytest.raises(OptionError, match=r"pai.layers '9:' selects none of the layers 0..3"):
        vlmattn.wrap(build("llava"), PAI(layers="9:"))


@no_grad
def test_every_recipe_that_is_set_may_warn():
    model, inputs = vlmattn.wrap(build("llava"), RECIPES["pai"]), prompt("llava")
    generate(model, inputs)
    model.vlmattn.set(VAR(tau=5.6, dims=(3, 17)))
    with pytest.warns(UserWarning, match="var never fired"):
        generate(model, inputs)
    assert model.vlmattn.report()["fired"] == {"var": 0}, "the counts of the recipe in force"


# --- Law 6: no S x S


@no_grad
@recipe_matrix
@family_matrix
def test_prefill_never_holds_query_times_key_weights(family, name, monkeypatch):
    inputs = prompt(family, words=300)
    length, heads = inputs["input_ids"].shape[1], 4
    if (
        name == "all"
    ):  # dense, but in chunks of rows of a fixed size; with the real one the prompt would need 5000 tokens
        monkeypatch.setattr("vlmattn.kernels.dispatch._CHUNK", 2**14)
    run, shares = vlmattn.attention._run, []

    def spy(*args):
        with Largest() as mode:
            out = run(*args)
        shares.append(mode.numel / (args[0].query.shape[0] * heads * length**2))
        return out

    monkeypatch.setattr("vlmattn.attention._run", spy)
    model = vlmattn.wrap(build(family), RECIPES[name])
    model(**inputs)
    assert len(shares) == (8 if name in ("vhr", "all") else 4), "every layer, and once more to choose heads"
    assert 0 < max(shares) <= 1 / heads, "a mask of one head at most, where prompts are padded"
    assert model.vlmattn.report()["backends"]["prefill"] == {
        {"var": "merge", "pai": "eager", "vhr": "base:sdpa+head_gain", "all": "eager"}[name]: 4
    }


# --- gradients


@recipe_matrix
@attn_matrix
@family_matrix
def test_gradients_go_through_an_edited_forward(family, attn, name):
    model, inputs = vlmattn.wrap(build(family, attn), RECIPES[name]), prompt(family)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    layers = model.model.language_model.layers
    for parameter_name, parameter in layers.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert 0 < parameter.grad.abs().max() < float("inf"), parameter_name


@pytest.mark.parametrize("name", SINGLE)
def test_gradients_are_those_of_the_edited_function(name):
    """Along the gradient of the keys' weights, which move the group masses, the loss changes as the gradient says."""
    model, inputs = vlmattn.wrap(build("llava"), RECIPES[name]), prompt("llava")
    weight = model.model.language_model.layers[1].self_attn.k_proj.weight
    loss = lambda: model(**inputs, labels=inputs["input_ids"]).loss  # noqa: E731
    loss().backward()
    slope = weight.grad.norm()
    with torch.no_grad():
        step = 1e-2 * weight.grad / slope
        losses = []
        for sign in (1, -2):
            weight += sign * step
            losses.append(loss())
    assert float((losses[0] - losses[1]) / 2e-2) == pytest.approx(float(slope), rel=5e-3)


# --- the request: images and rows against plain loops


def test_adjacent_llava_images_are_told_apart():
    model, inputs = vlmattn.wrap(build("llava"), "pai"), prompt("llava", images=3)
    with torch.no_grad():
        request = model(**inputs, use_cache=True).past_key_values._vlmattn_request
    images = request.images(inputs["input_ids"].shape[1], torch.device("cpu"))[0].tolist()
    assert images == [-1] * 3 + [0] * 16 + [1] * 16 + [2] * 16 + [-1] * 4


# A row: how many text tokens, then the length of an image, or a pair of both, again and again.
segments = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(st.lists(segments, min_size=1, max_size=3), st.integers(0, 3))
def test_images_are_numbered_by_their_lengths(rows, tail):
    """Adjacent images are told apart when their lengths are known, else they count as one."""
    types, numbers, merged, lengths = [], [], [], []
    for row in rows:
        kinds, known, unknown = [], [], []
        for text, image in row:
            if image:
                before = max(unknown, default=-1)
                joined = not text and unknown and unknown[-1] >= 0
                known += [-1] * text + [max(known, default=-1) + 1] * image
                unknown += [-1] * text + [before if joined else before + 1] * image
                lengths.append(image)
            else:
                known, unknown = known + [-1] * text, unknown + [-1] * text
            kinds += [TEXT] * text + [IMAGE] * image
        types.append(kinds)
        numbers.append(known)
        merged.append(unknown)
    width = max(map(len, types)) + tail + 1

    def left(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([[fill] * (width - len(v)) + v for v in values])

    tokens = left(types, TEXT).to(torch.uint8)
    assert number_images(tokens, lengths).tolist() == left(numbers, -1).tolist()
    assert number_images(tokens, None).tolist() == left(merged, -1).tolist()
    assert number_images(tokens, [*lengths, 1]).tolist() == left(merged, -1).tolist(), "lengths that do not fit"


@st.composite
def layouts(draw):
    """Token types and padding of a prompt that is read in one or two pieces, with some drafted tokens behind it."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    kinds = st.lists(st.sampled_from([TEXT, IMAGE, VIDEO]), min_size=length, max_size=length)
    types = [draw(kinds) for _ in range(batch)]  # padding may be an image that was masked out
    real = []
    for _ in range(batch):
        left = draw(st.integers(0, length - 1))
        right = draw(st.integers(0, length - 1 - left)) if draw(st.booleans()) else 0
        real.append([left <= slot < length - right for slot in range(length)])
    drafted = draw(st.integers(0, 3))
    return types, real, drafted, draw(st.integers(0, length - 1)), draw(st.integers(0, 4))


@settings(max_examples=150)
@given(layouts(), st.data())
def test_rows_and_runs_are_what_loops_find(layout, data):
    types, real, drafted, cut, generated = layout
    batch, length = len(types), len(types[0])
    types = [row + [TEXT] * (drafted + generated) for row in types]
    real = [row + [True] * (drafted + generated) for row in real]
    stop, keys, cpu = length + drafted, length + drafted + generated, torch.device("cpu")
    kinds, mask = torch.tensor(types, dtype=torch.uint8), torch.tensor(real).long()
    request = Request()
    for first, last in ((0, cut), (cut, stop)):
        if first < last:
            tokens = kinds[:, first:last]
            request.extend(first, tokens, number_images(tokens, None), mask[:, :last], length if last == stop else None)

    assert request.prompt_length == length
    assert request.has_images == any(kind != TEXT for row in types for kind in row)
    assert request.types(keys, cpu).tolist() == types
    found = request.real(keys, cpu)
    assert found is None if all(map(all, real)) else found.tolist() == real
    last_rows = [max(i for i in range(length) if row[i]) for row in real]
    assert request.last_prompt_row(cpu).tolist() == last_rows

    start = data.draw(st.integers(0, keys - 1))
    queries = data.draw(st.integers(1, keys - start))
    after = [
        [
            types[b][i] == TEXT and any(types[b][j] != TEXT for j in range(i) if real[b][j])
            for i in range(start, start + queries)
        ]
        for b in range(batch)
    ]
    predict = [[i >= last_rows[b] for i in range(start, start + queries)] for b in range(batch)]
    for rows, expected in (
        (request.rows_after_image(start, queries, cpu), after),
        (request.rows_that_predict(start, queries, cpu), predict),
    ):
        assert rows.mask.tolist() == expected
        assert not rows.mask[:, : rows.first].any(), "no row before first is set"

    slots = []
    for first, last, groups in request.runs((0, 1), (2,)):
        assert first == len(slots)
        assert first < last
        slots += [groups] * (last - first)
    for slot, groups in enumerate(slots):
        column = [row[slot] for row in types]
        expected = ((0, 1) if TEXT in column else ()) + ((2,) if any(kind != TEXT for kind in column) else ())
        assert groups == expected
    assert len(slots) == stop


@pytest.mark.parametrize("recipe", ["pai", "fastv"])
def test_a_cache_that_was_reset_is_new_for_the_bare_model_too(recipe):
    model, inputs = build("llava"), prompt("llava")
    bare = generate(model, inputs)
    vlmattn.wrap(model, recipe)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    generate(model, inputs, past_key_values=cache)
    cache.reset()
    model.vlmattn.disable()
    close(generate(model, inputs, past_key_values=cache), bare)
