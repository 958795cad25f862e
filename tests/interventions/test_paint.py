"""PAINT: what the released code selects and computes, and what a wrapped model does with its own vision tower."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from engine import plan_of, request_of
from numerics import near
from stores import kept
from test_goldens import LAYER, TOLERANCE, attention_map, cases, causal, load, parametrize, run
from tiny import FAMILIES, IMAGE_TOKEN, build, generate, left_padded, prompt
from tiny import TEXT as TEXT_CONFIG
from torch import Tensor
from transformers import LlavaConfig, PreTrainedModel

import vlmattn
from vlmattn import PAI, PAINT, InputError, OptionError, UnsupportedError
from vlmattn.anatomy import Anatomy
from vlmattn.request import IMAGE, TEXT, ImageFeatures, Step, number_images

pytestmark = pytest.mark.usefixtures("no_grad")

SELECTION = cases("paint")[0]
paint_cases = parametrize("paint", lambda case: "Q" in case)


# --- Goldens of the released code


def test_the_released_tokens_are_selected():
    golden = load("paint", SELECTION)
    first, late = (golden[f"vit_cls_row_layer{name}"][:, 1:].sum(0) for name in ("0", "_m2"))
    local, summary = PAINT(local=SELECTION["local_ratio"]).select(first, late)
    assert local.nonzero().flatten().tolist() == SELECTION["local"] == sorted(golden["local_tokens"].tolist())
    assert summary.nonzero().flatten().tolist() == sorted(SELECTION["summary"])
    assert int(summary.sum()) == SELECTION["n_summary"]
    assert not (local & summary).any()
    everything = set(first.topk(9).indices.tolist())
    assert everything - set(SELECTION["local"]) == everything & set(SELECTION["summary"])


def step_of(case: dict) -> Step:
    """The request after the tower was looked at: the sight has the golden's CLS rows."""
    method = PAINT(alpha=case["alpha"], beta=case["beta"])
    sizes = Anatomy("llava", LAYER + 2, 8, 8, 4, 32, ("llama", 32, LAYER + 2, 64), tower_layers=5)
    request = request_of(method, sizes)
    length = case["K"] - 1 if case["Q"] == 1 else case["K"]
    types = torch.full((1, length), TEXT, dtype=torch.uint8)
    types[:, slice(*case["image_span"])] = IMAGE
    images, cut = number_images(types, None), 0 if case["Q"] == 1 else case["K"] - case["Q"]
    golden = load("paint", SELECTION)
    rows = {0: [golden["vit_cls_row_layer0"][:, 1:]], 3: [golden["vit_cls_row_layer_m2"][:, 1:]]}
    for first, last in ((0, cut), (cut, length)):
        if first == last:
            continue
        request.extend(first, types[:, first:last], images[:, first:last], None, None)
        if first <= case["image_span"][0] < last:
            # The golden's several rows begin before the image ends: the sight is told of the whole prompt at once.
            (method,) = plan_of(request).on_image_features
            method.on_image_features(ImageFeatures(request, 0, types, rows))
    return Step(request, "sdpa", None if case["Q"] == 1 else cut)


@pytest.mark.parametrize("backend", [None, "eager", "reference"])
@paint_cases
def test_the_released_head_outputs(case, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("VLMATTN_BACKEND", backend)
    golden = load("paint", case)
    step = step_of(case)
    torch.testing.assert_close(run(golden, 0.5, step), golden["head_out"], rtol=0, atol=TOLERANCE)
    assert {name for _, name, _ in step.request.ledger.read("calls")} == {backend or "eager"}
    assert (run(golden, 0.5, None) - golden["head_out"]).abs().max() > 1e-3, "the golden must tell the edit"


@paint_cases
def test_the_released_rows_and_weights(case):
    golden = load("paint", case)
    got, plain = attention_map(golden, 0.5, step_of(case)), attention_map(golden, 0.5, None)
    torch.testing.assert_close(got, golden["attn_out"], rtol=0, atol=TOLERANCE)
    changed = (got - plain).abs().amax((0, 1, 3)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [case["Q"] - 1]
    if "attn_base" in golden:
        torch.testing.assert_close(plain, golden["attn_base"], rtol=0, atol=TOLERANCE)


@paint_cases
def test_the_released_strengths(case):
    step, golden = step_of(case), load("paint", case)
    lift = kept(step.request, "lift")[None].read(case["K"], torch.device("cpu"))[0]
    expected = torch.zeros(case["K"])
    expected[golden["local_tokens"] + case["image_span"][0]] = case["alpha"]
    expected[golden["summary_tokens"] + case["image_span"][0]] = case["beta"]
    assert torch.equal(lift, expected)


# --- Models with a tower of their own


def llava(kind: str = "clip_vision_model", attn: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Four tower layers and 36 patches, attention far from uniform."""
    vision = dict(
        model_type=kind, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=24,
        patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=dict(model_type="llama", **TEXT_CONFIG), vision_config=vision, image_token_index=IMAGE_TOKEN,
        image_seq_length=36 if kind == "clip_vision_model" else 35,
    )  # fmt: skip
    model = build("llava", seed=seed, config=config)
    torch.manual_seed(seed + 1)
    for parameter in model.model.vision_tower.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    model.model.vision_tower.set_attn_implementation(attn)
    return model


def asked(images: int = 1, words: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Words, images, words, with a blob in each image that catches attention."""
    generator = torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(5, 90, (n,), generator=generator).tolist()  # noqa: E731
    ids = [1, *text(2)]
    for _ in range(images):
        ids += [IMAGE_TOKEN] * 36 + text(1)
    ids = torch.tensor([ids + text(words)])
    pixels = torch.randn(images, 3, 24, 24, generator=generator)
    for image in range(images):
        a, b = torch.randint(0, 5, (2,), generator=generator).tolist()
        pixels[image, :, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4] *= 6
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)


def cls_rows(pixels: Tensor, layer: int, seed: int = 0) -> Tensor:
    """Attention of the CLS token to the patches, summed over heads, from a bare tower that tells its weights."""
    tower = llava(attn="eager", seed=seed).model.vision_tower
    return tower(pixels, output_attentions=True).attentions[layer][:, :, 0, 1:].sum(1)


def lifts_of(pixels: Tensor, method: PAINT, seed: int = 0) -> np.ndarray:
    """Strength on each patch of each image, by numpy."""
    first, late = (cls_rows(pixels, layer, seed).double().numpy() for layer in (0, -2))
    out = np.zeros_like(first)
    for image in range(len(pixels)):
        low, high = np.percentile(late[image], [25, 75])
        summary = {j for j in range(36) if late[image][j] > high + 1.5 * (high - low)}
        local = set(np.argsort(-first[image])[: int(method.local * 36)].tolist()) - summary
        out[image, sorted(local)], out[image, sorted(summary)] = method.alpha, method.beta
        assert summary, "the premise: there are summary tokens"
        assert local
    return out


def expected_lift(inputs: dict[str, Tensor], method: PAINT, seed: int = 0) -> Tensor:
    """Strength on each slot ``[batch, tokens]``."""
    values = torch.from_numpy(lifts_of(inputs["pixel_values"], method, seed)).flatten()
    out = torch.zeros(inputs["input_ids"].shape, dtype=torch.float64)
    out[inputs["input_ids"] == IMAGE_TOKEN] = values
    return out.float()


class Lifted:
    """The bare model with PAINT as patched eager attention of some layers: ``s + lift |s|`` in given rows."""

    def __init__(self, model: PreTrainedModel, lift: Tensor, first: int, layers: range) -> None:
        self.model, self.lift, self.first, self.layers = model, lift, first, layers

    def __call__(self, **inputs) -> Tensor:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        def attend(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            scores = query @ key.transpose(-1, -2) * scaling
            if module.layer_idx in self.layers:
                lift = torch.nn.functional.pad(self.lift, (0, scores.shape[-1] - self.lift.shape[1]))
                scores[:, :, self.first :] += lift[:, None, None] * scores[:, :, self.first :].abs()
            return (((scores + mask).softmax(-1)) @ value).transpose(1, 2).contiguous(), None

        AttentionInterface.register("lifted_for_test", attend)
        AttentionMaskInterface.register("lifted_for_test", eager_mask)
        self.model.set_attn_implementation({"text_config": "lifted_for_test"})
        return self.model(**inputs).logits


METHOD = PAINT(alpha=0.6, beta=0.25, layers="1:")


def lift_found(cache, length: int) -> Tensor:
    return kept(cache, "lift")[None].read(length, torch.device("cpu"))


@pytest.mark.parametrize("images", [1, 3])
def test_strengths_from_the_tower(images):
    model, inputs = vlmattn.wrap(llava(), METHOD), asked(images)
    out = model(**inputs, use_cache=True)
    length = inputs["input_ids"].shape[1]
    expected = expected_lift(inputs, METHOD)
    torch.testing.assert_close(lift_found(out.past_key_values, length), expected)
    assert model.vlmattn.report()["fired"] == {"paint": int((expected > 0).sum())}
    generated = model.generate(
        **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    torch.testing.assert_close(lift_found(generated.past_key_values, length), expected)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [1, 2])
def test_logits_against_attention_by_hand(images, attn):
    model, inputs = llava(), asked(images)
    model.set_attn_implementation({"text_config": attn})
    length = inputs["input_ids"].shape[1]
    oracle = Lifted(llava(), expected_lift(inputs, METHOD), length - 1, range(1, 4))
    bare = model(**inputs).logits
    vlmattn.wrap(model, METHOD)
    got = model(**inputs).logits
    near(got, oracle(**inputs))
    assert torch.equal(got[:, :-1], bare[:, :-1]) or (got - bare)[:, :-1].abs().max() < 1e-5
    assert (got - bare)[:, -1].abs().max() > 1e-2

    steps = generate(model, inputs, 4, suppress_tokens=[IMAGE_TOKEN])
    allowed = steps.clone()
    allowed[..., [2, IMAGE_TOKEN]] = -torch.inf
    ids = torch.cat([inputs["input_ids"], allowed.argmax(-1)[:, :-1]], 1)
    forced = oracle(**dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids)))
    near(steps, forced[:, length - 1 :])
    for options in (dict(use_cache=False), dict(cache_implementation="static")):
        again = generate(model, inputs, 4, suppress_tokens=[IMAGE_TOKEN], **options)
        near(again, steps)


def test_a_padded_batch_with_other_numbers_of_images():
    model, prompts = llava(), [asked(1), asked(2, words=2, seed=4), asked(1, words=7, seed=9)]
    batch = left_padded(prompts)
    bare = generate(model, batch, suppress_tokens=[IMAGE_TOKEN])
    vlmattn.wrap(model, METHOD)
    out = model(**batch, use_cache=True)
    torch.testing.assert_close(
        lift_found(out.past_key_values, batch["input_ids"].shape[1]), expected_lift(batch, METHOD)
    )
    together = generate(model, batch, suppress_tokens=[IMAGE_TOKEN])
    assert (together - bare).abs().amax((1, 2)).min() > 1e-3
    for row, inputs in zip(together, prompts, strict=True):
        near(row, generate(model, inputs, suppress_tokens=[IMAGE_TOKEN])[0])


def test_a_row_without_image_stays_bare():
    words = torch.tensor([[1, 20, 30, 40, 50]])
    model, inputs = llava(), asked()
    text = dict(input_ids=words, attention_mask=torch.ones_like(words), pixel_values=inputs["pixel_values"][:0])
    bare = generate(model, {k: v for k, v in text.items() if k != "pixel_values"}, suppress_tokens=[IMAGE_TOKEN])
    vlmattn.wrap(model, METHOD)
    together = generate(model, left_padded([text, inputs]), suppress_tokens=[IMAGE_TOKEN])
    near(together[0], bare[0])
    vlmattn.unwrap(model)
    assert (generate(model, left_padded([text, inputs]), suppress_tokens=[IMAGE_TOKEN]) - together)[
        1
    ].abs().max() > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_beams_see_the_image_of_their_sample(batch):
    """Beam search repeats every image; the tower has seen each once or each beam's."""
    model = vlmattn.wrap(llava(), METHOD)
    prompts = [asked(2, seed=3), asked(1, words=6, seed=6)][:batch]
    inputs = left_padded(prompts)
    settings = dict(
        max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=3, suppress_tokens=[99]
    )
    settings |= dict(return_dict_in_generate=True, output_scores=True)
    out = model.generate(**inputs, **settings)
    found = lift_found(out.past_key_values, inputs["input_ids"].shape[1])
    torch.testing.assert_close(found, expected_lift(inputs, METHOD).repeat_interleave(3, 0))
    for row, one in enumerate(prompts):
        alone = model.generate(**one, **settings)
        new = slice(one["input_ids"].shape[1], None)
        assert alone.sequences[0, new].tolist() == out.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        near(alone.sequences_scores[0], out.sequences_scores[row])
    again = model.generate(**inputs, **{**settings, "use_cache": False})
    near(again.sequences_scores, out.sequences_scores)
    several = model.generate(**inputs, **settings, num_return_sequences=2)
    near(several.sequences_scores[::2], out.sequences_scores)
    vlmattn.unwrap(model)
    assert (model.generate(**inputs, **settings).sequences_scores - out.sequences_scores).abs().min() > 1e-4


def test_the_same_image_twice_in_a_prompt():
    """Two images of equal content are two images."""
    inputs = asked(2)
    inputs["pixel_values"] = inputs["pixel_values"][:1].repeat(2, 1, 1, 1)
    model = vlmattn.wrap(llava(), METHOD)
    cache = model(**inputs, use_cache=True).past_key_values
    torch.testing.assert_close(lift_found(cache, inputs["input_ids"].shape[1]), expected_lift(inputs, METHOD))


def test_an_image_in_a_second_turn():
    model, first, second = vlmattn.wrap(llava(), METHOD), asked(), asked(1, words=5, seed=8)
    cache = model(**first, use_cache=True).past_key_values
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    out = model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache)
    both = dict(input_ids=ids, pixel_values=torch.cat([first["pixel_values"], second["pixel_values"]]))
    torch.testing.assert_close(lift_found(cache, ids.shape[1]), expected_lift(both, METHOD))
    assert out.logits.isfinite().all()


def test_two_prompts_in_sequence_find_their_own_tokens():
    model = vlmattn.wrap(llava(), METHOD)
    for seed in (1, 2, 1):
        inputs = asked(seed=seed)
        cache = model(**inputs, use_cache=True).past_key_values
        torch.testing.assert_close(lift_found(cache, inputs["input_ids"].shape[1]), expected_lift(inputs, METHOD))


def test_two_models_do_not_meet():
    """Forwards of one model between those of another, of another recipe and of another family."""
    one, other, inputs = vlmattn.wrap(llava(), METHOD), vlmattn.wrap(llava(seed=5), METHOD), asked()
    for model, seed in ((one, 0), (other, 5), (one, 0)):
        cache = model(**inputs, use_cache=True).past_key_values
        expected = expected_lift(inputs, METHOD, seed)
        torch.testing.assert_close(lift_found(cache, inputs["input_ids"].shape[1]), expected)
    assert not torch.equal(expected_lift(inputs, METHOD, 0), expected_lift(inputs, METHOD, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_another_recipe_runs_after_a_direct_forward(family):
    """A direct forward of a PAINT model must leave nothing that hooks of another wrapped model take for their own."""
    painted, inputs, other = vlmattn.wrap(llava(), METHOD), asked(), build(family, seed=3)
    given = prompt(family)
    expected = [other(**given).logits]
    vlmattn.wrap(other, PAI(alpha=0.0, layers="0:"))
    painted(**inputs)
    near(other(**given).logits, expected[0])
    painted(**inputs)
    other.vlmattn.set(PAI(alpha=0.5, layers="0:"))
    assert (other(**given).logits - expected[0]).abs().max() > 1e-3
    generate(other, given)


def test_the_tower_of_a_wrapped_model_may_run_by_itself():
    """Encoding images alone, before and after forwards, is nobody's sight."""
    model, inputs = vlmattn.wrap(llava(), METHOD), asked()
    model.get_image_features(inputs["pixel_values"])
    cache = model(**inputs, use_cache=True).past_key_values
    model.get_image_features(inputs["pixel_values"])
    length = inputs["input_ids"].shape[1]
    torch.testing.assert_close(lift_found(cache, length), expected_lift(inputs, METHOD))
    again = model(**inputs, use_cache=True).past_key_values
    torch.testing.assert_close(lift_found(again, length), expected_lift(inputs, METHOD))


@pytest.mark.parametrize("options", [{}, dict(use_cache=False), dict(preset=PAINT(alpha=0.2, layers="0:"))])
def test_a_forward_of_another_model_within_generate(options):
    """A logits processor may ask a second PAINT model; the first goes on as if it had not."""
    model, other, inputs = vlmattn.wrap(llava(), METHOD), vlmattn.wrap(llava(seed=5), METHOD), asked()
    model.vlmattn.set(METHOD if "preset" not in options else PAI())
    expected = generate(model, inputs, suppress_tokens=[IMAGE_TOKEN], **options)
    bare = generate(model, inputs, suppress_tokens=[IMAGE_TOKEN], preset="none")
    assert (expected - bare).abs().amax((0, 2)).min() > 1e-4

    def ask(ids, scores):
        other(**asked(2))
        return scores

    got = generate(model, inputs, suppress_tokens=[IMAGE_TOKEN], logits_processor=[ask], **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [PAI(), METHOD], ids=["pai", "paint"])
def test_a_direct_forward_keeps_nothing_alive(method):
    model, inputs = vlmattn.wrap(llava(), method), asked()
    model(**inputs)
    gone = weakref.ref(model)
    vlmattn.unwrap(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_deep_copy_looks_at_its_own_tower():
    model, inputs = vlmattn.wrap(llava(), METHOD), asked()
    model(**inputs)
    other = copy.deepcopy(model)
    other.model.vision_tower.load_state_dict(llava(seed=5).model.vision_tower.state_dict())
    length = inputs["input_ids"].shape[1]
    for one, seed in ((other, 5), (model, 0)):
        cache = one(**inputs, use_cache=True).past_key_values
        torch.testing.assert_close(lift_found(cache, length), expected_lift(inputs, METHOD, seed))


@pytest.mark.parametrize("kind", ["siglip_vision_model", "qwen2_5_vl"])
def test_towers_without_a_cls_token_act_too(kind):
    if kind == "qwen2_5_vl":
        model, inputs = build(kind), prompt(kind)
    else:
        model, inputs = llava(kind), asked()
        keep = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
        keep[3] = False  # LLaVA drops the first of 36 patches
        inputs |= {name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}
    bare = generate(model, inputs, suppress_tokens=[96, 97, 98, 99])
    vlmattn.wrap(model, METHOD)
    got = generate(model, inputs, suppress_tokens=[96, 97, 98, 99])
    assert (got - bare).abs().amax((0, 2)).min() > 1e-4
    assert model.vlmattn.report()["fired"]["paint"] > 0


# --- Refusals


def test_features_that_were_computed_before_are_refused():
    model, inputs = vlmattn.wrap(llava(), METHOD), asked()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InputError, match="pixel_values"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    cache = model(**inputs, use_cache=True).past_key_values
    torch.testing.assert_close(lift_found(cache, inputs["input_ids"].shape[1]), expected_lift(inputs, METHOD))


def test_a_tower_of_one_layer_is_refused():
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=4, projection_dim=32,
    )  # fmt: skip
    text = dict(model_type="llama", **TEXT_CONFIG)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    with pytest.raises(OptionError, match="two layers"):
        vlmattn.wrap(build("llava", config=config), "paint")


def test_merge_is_never_taken(monkeypatch):
    monkeypatch.setenv("VLMATTN_BACKEND", "merge")
    (case,) = [case for case in cases("paint") if case.get("Q") == 24]
    with pytest.raises(UnsupportedError, match="logit"):
        run(load("paint", case) | {"mask": causal(24, 64)}, 0.5, step_of(case))
