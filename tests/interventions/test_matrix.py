"""Every method in every way of running: families, batches, caches, attention implementations, greedy and beams.

Truth is each prompt alone, greedy, with the growing cache, on sdpa. ``methods.SETTINGS`` has one line per setting.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from choices import Choices
from methods import BETWEEN_IMAGES, IDENTITIES, SETTINGS, STOP, Speech, dialogue, dialogues, fitted, inputs_of
from methods import picture as _picture
from numerics import TINY_MODEL, bound
from pairs import rotated
from stores import kept
from tiny import FAMILIES, build, left_padded
from tiny import generate as unrestricted
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import vlmattn
from vlmattn import Recipe, UnsupportedError, registry
from vlmattn.errors import StateError
from vlmattn.interventions import (
    AVL,
    H2O,
    TOVA,
    DuoAttention,
    FastV,
    Intervention,
    KVPolicy,
    KVRandom,
    LongHeads,
    LookM,
    Pruning,
    PyramidDrop,
    PyramidKV,
    RazorAttention,
    RecycledAttention,
    Rounds,
    SnapKV,
    SparseVLM,
    StreamingLLM,
    VisionZip,
    VLCache,
)
from vlmattn.interventions.pruning import (
    DART,
    EVS,
    CDPruner,
    DivPrune,
    FirstTokens,
    GridTokens,
    HiRED,
    LastTokens,
    PooledTokens,
    PruMerge,
    RandomTokens,
    VidCom2,
    VisPruner,
    VScan,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:vlmattn:UserWarning"),
]
family_matrix = pytest.mark.parametrize("family", FAMILIES)
setting_matrix = pytest.mark.parametrize("name", SETTINGS)


def a_family_each(shift: int) -> pytest.MarkDecorator:
    """Every setting, on one family after another: what is computed is checked on all of them by the greedy logits."""
    return rotated("family", FAMILIES, "name", SETTINGS, shift)


TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.3)  # most logits are smaller
ACTS = 1e-4  # an edit that acts moves some logit by more
NEW = 4
PLACEHOLDERS = [96, 97, 98, 99]
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "recompute": {"use_cache": False},
}


@functools.cache
def model_of(family: str, attn: str = "sdpa") -> PreTrainedModel:
    return build(family, attn)


@contextmanager
def wrapped(
    family: str, setting: str | Intervention | list[Intervention], attn: str = "sdpa"
) -> Iterator[PreTrainedModel]:
    """The one model of a family with a setting on it."""
    methods = [SETTINGS[setting]] if isinstance(setting, str) else setting
    methods = [fitted(method, family) for method in (methods if isinstance(methods, list) else [methods])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with vlmattn.applied(model_of(family, attn), methods, processor=Speech()) as model:
            yield model


def generate(model: PreTrainedModel, inputs: dict, new: int = NEW, **options) -> Tensor:
    return unrestricted(model, inputs, new, **{"suppress_tokens": PLACEHOLDERS, **options})


@functools.cache
def bare(family: str) -> list[Tensor]:
    """Greedy logits ``[new, vocabulary]`` of each prompt without an edit."""
    return [generate(model_of(family), inputs)[0] for inputs in dialogues(family)]


@functools.cache
def truth(family: str, name: str) -> list[Tensor]:
    """Greedy logits of each prompt alone: growing cache, sdpa."""
    with wrapped(family, name) as model:
        return [generate(model, inputs)[0] for inputs in dialogues(family)]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def is_idle(name: str, inputs: dict[str, Tensor]) -> bool:
    """What does nothing to this prompt by its definition.

    With one image there is no edge between images and no second document; without separators there are no documents.
    """
    if name == "isolate_separated" and not (inputs["input_ids"] == STOP).any():
        return True
    images = len(inputs["pixel_values"]) if inputs["pixel_values"].ndim == 4 else len(inputs["image_grid_thw"])
    return name in BETWEEN_IMAGES and images == 1


def test_every_method_has_a_setting():
    elsewhere = (KVPolicy, Pruning)  # tests/interventions/pruning
    methods = {
        cls for cls in registry._METHODS.values() if issubclass(cls, Intervention) and not issubclass(cls, elsewhere)
    }
    missing = methods - {type(method) for method in SETTINGS.values()}
    assert not missing, f"add a line to methods.SETTINGS for {[cls.info.name for cls in missing]}"


@setting_matrix
@family_matrix
def test_a_setting_acts_unless_there_is_nothing_for_it(family, name):
    for inputs, plain, edited in zip(dialogues(family), bare(family), truth(family, name), strict=True):
        if is_idle(name, inputs):
            assert apart(edited, plain) < TOLERANCE
        else:
            assert apart(edited, plain) > ACTS


@setting_matrix
@family_matrix
def test_greedy_logits_do_not_depend_on_how_it_runs(family, name):
    prompts, expected, wrong = dialogues(family), truth(family, name), []
    batch = left_padded(prompts)
    for attn in ("sdpa", "eager"):
        with wrapped(family, name, attn) as model:
            for cache, options in CACHES.items():
                found = {f"row {row}": logits for row, logits in enumerate(generate(model, batch, **options))}
                alone = {f"prompt {i}": generate(model, prompts[i], **options)[0] for i in ((0, 2) if options else ())}
                for what, logits in (found | alone).items():
                    if (off := apart(logits, expected[int(what[-1])])) > TOLERANCE:
                        wrong.append(f"{attn}, {cache}, {what}: {off:.1e}")
    assert not wrong, "\n".join(wrong)


def beams(model: PreTrainedModel, inputs: dict, **options) -> tuple[Tensor, Tensor]:
    """Tokens and summed log-probabilities of the best beams."""
    out = model.generate(
        **inputs, num_beams=3, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True, suppress_tokens=PLACEHOLDERS, **options,
    )  # fmt: skip
    return out.sequences[:, inputs["input_ids"].shape[1] :], out.sequences_scores


def score_of(model: PreTrainedModel, inputs: dict, tokens: Tensor) -> float:
    """Sum of log-probabilities of an answer that is forced on the model, everything recomputed in each step."""
    start = inputs["input_ids"].shape[1]
    force = lambda row, ids: [int(tokens[len(ids) - start])]  # noqa: E731
    logits = generate(model, inputs, use_cache=False, prefix_allowed_tokens_fn=force)[0]
    return float(logits.log_softmax(-1).gather(1, tokens[:, None]).sum())


@a_family_each(0)
def test_beams_are_scored_as_if_recomputed(family, name):
    prompts, wrong = dialogues(family), []
    with wrapped(family, name) as model:
        alone = [beams(model, inputs) for inputs in prompts]
        for row, (inputs, (tokens, score)) in enumerate(zip(prompts, alone, strict=True)):
            forced = score_of(model, inputs, tokens[0])
            if abs(forced - float(score)) > NEW * TOLERANCE:
                wrong.append(f"prompt {row}: beam search says {float(score):.5f}, recomputing {forced:.5f}")
    for attn in ("sdpa", "eager"):
        with wrapped(family, name, attn) as model:
            for cache, options in CACHES.items():
                if attn == "eager" and cache != "dynamic":
                    continue  # greedy has these
                tokens, scores = beams(model, left_padded(prompts), **options)
                for row, (right, score) in enumerate(alone):
                    same = torch.equal(tokens[row], right[0]) and apart(scores[row], score[0]) < NEW * TOLERANCE
                    if not same:
                        wrong.append(
                            f"{attn}, {cache}, row {row}: {tokens[row].tolist()} {scores[row]:.5f} in a batch,"
                            f" {right[0].tolist()} {score[0]:.5f} alone"
                        )
    assert not wrong, "\n".join(wrong)


@a_family_each(1)
def test_drafts_give_the_greedy_tokens(family, name):
    inputs = inputs_of(family, [*dialogue(family, images=2)["input_ids"][0].tolist(), *[35, 36, 37, 38] * 3], seed=2)
    options = dict(max_new_tokens=10, min_new_tokens=10, pad_token_id=0, suppress_tokens=PLACEHOLDERS)
    with wrapped(family, name) as model:
        greedy = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=2), greedy)


@pytest.mark.parametrize("name", IDENTITIES)
@family_matrix
def test_identity_settings_change_nothing(family, name):
    """To the last bit: a neutral setting is an empty edit, and the model's own attention runs."""
    batch = left_padded(dialogues(family))
    for attn in ("sdpa", "eager"):
        plain = {cache: generate(model_of(family, attn), batch, **options) for cache, options in CACHES.items()}
        with wrapped(family, IDENTITIES[name], attn) as model:
            for cache, options in CACHES.items():
                edited = generate(model, batch, **options)
                assert torch.equal(edited, plain[cache])


# --- prompts of other kinds


# These act on rows without an image too: on text, on separated documents, on the whole prompt, on every token.
ON_TEXT = {
    "bidirectional_prompt", "bidirectional_prompt_soft", "knockout_text_text", "knockout_text_last",
    "knockout_text_generated", "isolate_separated", "calibration", "calibration_documents", "focus", "heads_block_all",
    "steer", "steer_text", "vti", "nullu",
}  # fmt: skip


@a_family_each(6)
def test_a_row_without_image(family, name):
    """It stays as the bare model has it, except for methods that act on text, and never depends on the cache."""
    inputs = dialogue(family, images=2, seed=8)
    text = inputs_of(family, [1, 16, 10, 30, 31, STOP, 32, 33, STOP, 34, 35, 11], seed=1)
    rows = left_padded([inputs, text])
    plain = generate(model_of(family), rows)[1]
    with wrapped(family, name) as model:
        found = {cache: generate(model, rows, **options)[1] for cache, options in CACHES.items()}
    assert {
        cache: apart(found[cache], found["recompute"])
        for cache in found
        if apart(found[cache], found["recompute"]) > TOLERANCE
    } == {}
    if name in ON_TEXT:
        assert apart(found["recompute"], plain) > ACTS
    else:
        assert apart(found["recompute"], plain) < TOLERANCE
        assert apart(found["dynamic"], plain) < TOLERANCE


def film(seed: int = 2, image: bool = False) -> dict[str, Tensor]:
    """A Qwen prompt with a video of two frame pairs (8 tokens), and an image after it."""
    generator = torch.Generator().manual_seed(seed)
    still = [97, *[99] * 4, 96, 44, STOP] if image else []
    ids = torch.tensor([[1, 16, 10, 40, 41, 97, *[98] * 8, 96, 42, 43, STOP, *still, 45, 46, 11]])
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 99).int() + 2 * (ids == 98).int(),
        pixel_values_videos=torch.randn(32, 96, generator=generator), video_grid_thw=torch.tensor([[2, 4, 4]]),
        second_per_grid_ts=torch.tensor([1.0]),
    )  # fmt: skip
    if image:
        inputs |= dict(pixel_values=torch.randn(16, 96, generator=generator), image_grid_thw=torch.tensor([[1, 4, 4]]))
    return inputs


@rotated("image", [False, True], "name", SETTINGS)
def test_videos_are_edited_like_images(image, name):
    inputs, options = film(image=image), dict(CACHES["recompute"])
    plain = generate(model_of("qwen2_5_vl"), inputs)
    with wrapped("qwen2_5_vl", name) as model:
        edited = generate(model, inputs)
        assert apart(generate(model, inputs, **options), edited) < TOLERANCE
        tokens, score = beams(model, inputs)
        assert abs(score_of(model, inputs, tokens[0]) - float(score)) < NEW * TOLERANCE
    assert apart(edited, plain) > ACTS  # frames are images: what acts between images acts between them


def odd(family: str) -> list[dict[str, Tensor]]:
    """Prompts that begin or end with an image, that stop in the middle of a turn, that are short."""
    image = _picture(family)
    return [
        inputs_of(family, [*image, 10, 30, 31, STOP, 11], 1),
        inputs_of(family, [1, 10, 30, STOP, *image, *image], 2),
        inputs_of(family, [1, 10, *image, 30, STOP, 31, 32], 3),
        inputs_of(family, [10, *image, 11], 4),
    ]


@a_family_each(2)
def test_odd_prompts(family, name):
    prompts = odd(family)
    with wrapped(family, name) as model:
        alone = [generate(model, inputs)[0] for inputs in prompts]
        wrong = [
            f"{cache}, row {row}: {apart(found, right):.1e}"
            for cache, options in CACHES.items()
            for row, (found, right) in enumerate(
                zip(generate(model, left_padded(prompts), **options), alone, strict=True)
            )
            if apart(found, right) > TOLERANCE
        ]
    assert wrong == []


@a_family_each(3)
def test_right_padding_is_invisible(family, name):
    prompts = dialogues(family)
    length = max(inputs["input_ids"].shape[1] for inputs in prompts)
    batch = left_padded(prompts)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in batch:
            rows = [nn.functional.pad(inputs[key], (0, length - inputs[key].shape[1])) for inputs in prompts]
            batch[key] = torch.cat(rows)
    with wrapped(family, name) as model:
        together = model(**batch).logits
        for row, inputs in zip(together, prompts, strict=True):
            alone = model(**inputs).logits[0]
            assert apart(row[: len(alone)], alone) < TOLERANCE


@functools.cache
def half_model(family: str) -> PreTrainedModel:
    return build(family).to(torch.bfloat16)


@a_family_each(4)
def test_half_precision(family, name):
    """Runs in bfloat16, near the truth under the same choices: what methods compute in float32 is brought back."""
    model, inputs, choices = half_model(family), dialogues(family)[2], Choices()
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with wrapped(family, name) as full, choices.noted():
        expected = generate(full, dialogues(family)[2], new=1)
    with vlmattn.applied(model, fitted(SETTINGS[name], family), processor=Speech()):
        with choices.repeated():
            found = generate(model, inputs, new=1)
        assert apart(found, expected) < 0.1
        assert generate(model, inputs).isfinite().all()


# --- what is generated is not prompt


@rotated("token", [STOP, 10, 11], "name", SETTINGS)  # a separator, the user's marker, the answer's
def test_generated_markers_mean_nothing(name, token):
    """A generated separator or marker of turns is text, with and without a cache."""
    inputs = dialogue("llava", images=2, seed=8)
    force = lambda row, ids: [token]  # noqa: E731
    with wrapped("llava", name) as model:
        cached, again = (
            generate(model, inputs, prefix_allowed_tokens_fn=force, **CACHES[cache])
            for cache in ("dynamic", "recompute")
        )
    assert apart(cached, again) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["calibration", "gift", "sofa", "var_either", "paint", "vaf_heads", "knockout_text_text"]
)
def test_a_large_static_cache_is_like_a_small_one(name):
    """Slots that were never written are no prompt."""
    inputs = dialogue("llava", images=2)
    with wrapped("llava", name) as model:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=3000)
        large = generate(model, inputs, past_key_values=cache, disable_compile=True)
        assert apart(large, generate(model, inputs)) < TOLERANCE


# --- two turns on one cache


def told(model: PreTrainedModel, family: str, **options) -> tuple[Tensor, Tensor]:
    """Logits of a second user's turn with an image of its own, on the cache of the first, and of one recompute.

    By hand, without generated tokens in between: all of it is prompt in both.
    """
    first = dialogue(family, images=1, seed=3)
    second = inputs_of(family, [21, 22, *[10, 50, *_picture(family), 51, 52, 53, 11]], seed=9)
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    whole = dict(input_ids=ids, pixel_values=torch.cat([first["pixel_values"], second["pixel_values"]]))
    if family != "llava":
        whole |= dict(
            mm_token_type_ids=(ids == 99).int(),
            image_grid_thw=torch.cat([first["image_grid_thw"], second["image_grid_thw"]]),
        )
        positions, _ = model.model.get_rope_index(
            input_ids=ids, mm_token_type_ids=whole["mm_token_type_ids"], image_grid_thw=whole["image_grid_thw"]
        )
        cut = first["input_ids"].shape[1]
        first, second = dict(first, position_ids=positions[..., :cut]), dict(second, position_ids=positions[..., cut:])
        whole["position_ids"] = positions
    del first["attention_mask"], second["attention_mask"]
    cache = DynamicCache()
    before = model(**first, past_key_values=cache).logits[:, -1:]
    after = model(**second, past_key_values=cache).logits
    assert apart(before, model(**first).logits[:, -1:]) < TOLERANCE
    return after, model(**whole).logits[:, -after.shape[1] :]


# Edits of single rows by what is before them, and masks that only hide earlier keys, do not care when the second turn
# comes. Others cannot agree: opened edges of the first turn would go to the second; documents that go on; the last
# prompt row of the first turn was edited (pai, paint, heads_guided, gift, calibration, knockout of the last row, and what
# chooses heads by it); tokens between were prompt in one and not in the other.
IN_TURNS = [
    "var", "var_extend", "var_either", "vaf", "heads_block", "heads_block_all", "heads_mean", "heads_amplify", "heads_cut",
    "bidirectional_image", "knockout_image_text", "knockout_image_image", "knockout_text_text", "knockout_text_image",
    "isolate_images", "focus",
]  # fmt: skip
# These differ from one recompute by the row that ended the first turn, which was edited when it was the last.
LAST_ROW = ["pai", "paint", "heads_guided"]


@pytest.mark.parametrize("name", IN_TURNS)
@family_matrix
def test_a_second_turn_with_an_image_equals_recomputing(family, name):
    with wrapped(family, name) as model:
        after, again = told(model, family)
    assert apart(after, again) < TOLERANCE
    assert apart(again, told(model_of(family), family)[1]) > ACTS


@pytest.mark.parametrize("name", LAST_ROW)
@family_matrix
def test_a_second_turn_edits_its_own_last_row(family, name):
    """In the last layer, where the row that ended the first turn does not reach the second one."""
    with wrapped(family, replace(SETTINGS[name], layers="-1")) as model:
        after, again = told(model, family)
    assert apart(after, again) < TOLERANCE
    assert apart(after[:, -1], told(model_of(family), family)[1][:, -1]) > ACTS


@a_family_each(5)
def test_a_second_turn_in_a_batch_is_what_it_is_alone(family, name):
    """With generate(), generated tokens between the turns, all methods."""
    if name == "gift_ahead":
        pytest.skip("refused: it needs the whole prompt at once")

    def turns(inputs: dict) -> Tensor:
        options = dict(max_new_tokens=3, min_new_tokens=3, pad_token_id=0, suppress_tokens=[*PLACEHOLDERS, 10, 11])
        out = model.generate(**inputs, **options, do_sample=False, return_dict_in_generate=True)
        more = torch.tensor([[10, 61, 62, 63, 11]]).expand(len(out.sequences), 5)
        ids = torch.cat([out.sequences, more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 8, dtype=torch.long)], 1)
        kept = dict(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
        if family != "llava":
            kept["mm_token_type_ids"] = (ids == 99).int()
        return generate(model, kept)

    prompts = dialogues(family)
    with wrapped(family, name) as model:
        together = turns(left_padded(prompts))
        assert [row for row, inputs in enumerate(prompts) if apart(together[row], turns(inputs)[0]) > TOLERANCE] == []


@pytest.mark.parametrize("name", ["gift", "gift_ahead"])
def test_gift_follows_the_question_of_the_second_turn(name):
    """Not that of the first: another question, another gaze, or a refusal."""
    first, cache = dialogue("llava", seed=3), DynamicCache()

    def gaze() -> Tensor:
        return kept(cache, "weight")[None].read(first["input_ids"].shape[1], torch.device("cpu")).clone()

    with wrapped("llava", name) as model:
        model(**first, past_key_values=cache)
        before = gaze()
        try:
            model(input_ids=torch.tensor([[10, 70, 71, 72, 11]]), past_key_values=cache)
        except UnsupportedError:
            return
    assert apart(before, gaze()) > ACTS


# --- state


def our_hooks(model: PreTrainedModel) -> list:
    tables = [table for m in model.modules() for table in (m._forward_pre_hooks, m._forward_hooks)]
    return [hook for table in tables for hook in table.values() if "vlmattn" in str(hook)]


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llava", name) for name in SETTINGS), *(("qwen2_5_vl", name) for name in ("focus", "paint"))],
)
def test_on_for_one_call_on_a_copy_and_off(family, name):
    """A method for one call is the method put on; a deep copy is a model of its own; unwrapping leaves no bit."""
    model, inputs = build(family), dialogues(family)[2]
    method = fitted(SETTINGS[name], family)
    plain = generate(model, inputs)
    vlmattn.wrap(model, "none", processor=Speech())
    once = generate(model, inputs, preset=Recipe.of(method))
    assert apart(once[0], truth(family, name)[2]) < TOLERANCE
    assert torch.equal(generate(model, inputs), plain)
    model.vlmattn.set(method)
    assert torch.equal(generate(model, inputs), once)
    copied = copy.deepcopy(model)
    vlmattn.unwrap(model)
    assert torch.equal(generate(model, inputs), plain)
    assert torch.equal(generate(copied, inputs), once)
    vlmattn.unwrap(copied)
    assert torch.equal(generate(copied, inputs), plain)
    assert our_hooks(model) == our_hooks(copied) == []


@pytest.mark.parametrize("name", ["var_extend", "var_either"])
def test_a_reset_static_cache_follows_the_beams_of_its_new_prompt(name):
    """What is kept about generated tokens is that of the prompt in the cache."""
    first, other = dialogue("llava", seed=3), dialogue("llava", images=2, seed=4)
    with wrapped("llava", name) as model:
        options = dict(num_beams=3, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, disable_compile=True,
            return_dict_in_generate=True, output_scores=True, suppress_tokens=PLACEHOLDERS)  # fmt: skip
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
        model.generate(**first, **options, past_key_values=cache)
        cache.reset()
        reused = model.generate(**other, **options, past_key_values=cache)
        fresh = model.generate(**other, **options)
    assert torch.equal(reused.sequences, fresh.sequences)
    assert apart(reused.sequences_scores, fresh.sequences_scores) < 12 * TOLERANCE


@pytest.mark.parametrize("name", ["var_extend", "var_either"])
def test_a_copied_cache_follows_its_own_beams(name):
    """reorder_cache of a copy must reorder the copy."""
    with wrapped("llava", name) as model:
        cache = DynamicCache()
        one = dialogue("llava", seed=3)
        model(**{key: torch.cat([value] * 3) for key, value in one.items()}, past_key_values=cache)
        copied = copy.deepcopy(cache)
        copied.layers[0].keys[0] = 7.0
        copied.reorder_cache(torch.tensor([1, 0, 0]))
        assert float(copied.layers[0].keys[1].min()) == 7.0, "the copy was not reordered"


def test_a_direct_forward_with_paint_leaves_nothing_for_other_models():
    """PAINT notes the call to see the tower; another model's tower is none of its business."""
    with wrapped("llava", "paint") as model:
        model(**dialogue("llava"))
    inputs = dialogue("qwen2_5_vl")
    with wrapped("qwen2_5_vl", "pai") as model:
        assert model(**inputs).logits.isfinite().all()


def test_vaf_knows_the_system_prompt_when_it_has_a_processor():
    """As the docstring says; MMA with sigma 0 does nothing but ask for the turns."""
    inputs = dialogue("llava", seed=3)
    with wrapped("llava", "vaf") as model:
        alone = model(**inputs).logits
    with wrapped("llava", [SETTINGS["vaf"], IDENTITIES["mma"]]) as model:
        assert apart(alone, model(**inputs).logits) < TOLERANCE


# --- repeat, reorder, crop: what methods keep follows the rows of the cache

HEADS = "0.0,1.1,2.0,3.1"
DROPPING: dict[str, Pruning | KVPolicy] = {
    "fastv": FastV(layer=2),
    "pyramiddrop": PyramidDrop(layers="1,2,3"),
    "sparsevlm": SparseVLM(layers="1,2,3", keep_ratios=(0.6, 0.4, 0.2)),
    "sparsevlm_plus": SparseVLM(version="2", layers="1,2,3", keep_ratios=(0.6, 0.4, 0.2)),
    "visionzip": VisionZip(dominant=0.4, contextual=0.2),
    "random": RandomTokens(),
    "grid": GridTokens(),
    "first": FirstTokens(),
    "last": LastTokens(),
    "pool": PooledTokens(),
    "divprune": DivPrune(keep_ratio=0.4),
    "cdpruner": CDPruner(keep_ratio=0.4),
    "vispruner": VisPruner(keep_ratio=0.4),
    "vscan": VScan(keep_ratio=0.4, middle="2", windows=2),
    "hired": HiRED(keep_ratio=0.4),
    "evs": EVS(),
    "vidcom2": VidCom2(),
    "prumerge": PruMerge(near=3),
    "dart": DART(keep_ratio=0.4, image_pivots=1, text_pivots=1),
    "avl": AVL(text_first=2, text_every=2),
    "avl_images": AVL(text_keep=1.0, refresh=2),
    "recycled": RecycledAttention(keys=6, stride=2),
    "recycled_similar": RecycledAttention(keys=6, trigger="similarity", similar=0.3, check=1),
    "rounds": Rounds(watershed="1", keep_mass=0.3),
    "rounds_read": Rounds(watershed="1", keep_mass=0.3, memory="read"),
    "longheads": LongHeads(tile=2, keep=0.2),
    "snapkv": SnapKV(keep_ratio=0.4, window=3),
    "pyramidkv": PyramidKV(keep_ratio=0.5, window=2, beta=4.0),
    "h2o": H2O(keep_ratio=0.4),
    "tova": TOVA(keep_ratio=0.4),
    "lookm": LookM(keep_ratio=0.4),
    "vlcache": VLCache(keep_ratio=0.4, p=0.3),
    "streaming": StreamingLLM(keep_ratio=0.4, sinks=2),
    "kv_random": KVRandom(keep_ratio=0.4),
    "duo": DuoAttention(sinks=2, recent=4, heads=HEADS),
    "razor": RazorAttention(sinks=2, recent=4, heads=HEADS),
}
CROP_REFUSED = {"avl", "avl_images", "recycled", "recycled_similar", "duo", "razor", "h2o", "tova", "streaming"}


def read_together(model: PreTrainedModel, prompts: list[dict]) -> tuple[Tensor, Tensor, DynamicCache]:
    """Mask and last positions of a padded batch that was read, and its cache."""
    batch, cache = left_padded(prompts), DynamicCache()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    model(**batch, position_ids=positions, past_key_values=cache, use_cache=True)
    return batch["attention_mask"], positions[:, -1:], cache


def spoken(model: PreTrainedModel, mask: Tensor, last: Tensor, cache: DynamicCache, words: Tensor) -> Tensor:
    """Logits ``[batch, words, vocabulary]`` of words that follow, one after another."""
    found = []
    for n in range(words.shape[1]):
        seen = torch.cat([mask, mask.new_ones(len(mask), n + 1)], 1)
        step = dict(input_ids=words[:, n : n + 1], attention_mask=seen, position_ids=last + n + 1)
        found.append(model(**step, past_key_values=cache).logits[:, -1])
    return torch.stack(found, 1)


def alone(model: PreTrainedModel, inputs: dict, words: Tensor) -> Tensor:
    """The same for one prompt with a cache of its own."""
    return spoken(model, *read_together(model, [inputs]), words[None])[0]


BRANCHES = torch.arange(40, 56).view(4, 4)  # what is said in each of four rows


@pytest.mark.parametrize("name", [*SETTINGS, *DROPPING])
def test_repeat_reorder_crop(name):
    """Two prompts, each in two rows that say different things, change places, and take two words back."""
    prompts, method = dialogues("llava")[:2], SETTINGS.get(name) or DROPPING[name]
    order = torch.tensor([1, 0, 3, 3])
    with wrapped("llava", method) as model:
        mask, last, cache = read_together(model, prompts)
        cache.batch_repeat_interleave(2)
        mask, last = mask.repeat_interleave(2, 0), last.repeat_interleave(2, 0)
        said, found = BRANCHES[:, :2], []
        spoken(model, mask, last, cache, said)
        cache.reorder_cache(order)
        mask, last, said = torch.cat([mask, torch.ones_like(said)], 1), last + 2, said[order]
        words = BRANCHES[:, 2:]
        found = spoken(model, mask, last, cache, words)
        wrong = {}
        for row, logits in enumerate(found):
            right = alone(model, prompts[row // 2], torch.cat([said[row], words[row]]))[2:]
            wrong |= {row: off} if (off := apart(logits, right)) > TOLERANCE else {}
        assert not wrong
        refusal = pytest.raises((StateError, UnsupportedError), match=r"start a new generate|take tokens back")
        with refusal if name in CROP_REFUSED else contextlib.nullcontext():
            cache.crop(-2)
            for row, logits in enumerate(spoken(model, mask, last, cache, words.flip(1))):
                right = alone(model, prompts[row // 2], torch.cat([said[row], words[row].flip(0)]))[2:]
                assert apart(logits, right) < TOLERANCE


def test_every_method_that_drops_is_among_them():
    found = {cls for cls in registry._METHODS.values() if issubclass(cls, (Pruning, KVPolicy))}
    assert found == {type(method) for method in DROPPING.values()}
