"""Every family, built small: identity and unwrapping bit for bit, spans, formulas written out here, caches, padding."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import rotated
from tiny import generate, shifted_queries
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from zoo import IMG, ZOO, padded
from zoo.parts import set_attention

import vlmattn
from vlmattn import PAI, VAR, VCD, VHR, FastV, FocusDirections, Knockout, SoFA, UnsupportedError
from vlmattn.interventions.focus import save_directions
from vlmattn.models import KINDS, find_family, registered
from vlmattn.models.table import markdown
from vlmattn.models.table import rows as table_rows

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]

NEW, CLOSE = 4, 2e-4
BUILT = [name for name, tiny in ZOO.items() if not tiny.unbuildable]
SINKS = VAR(tau=1.5, keep=0.2, dims=(3, 5, 9), max_sink=1.0, min_visual=0.0, layers="0:")
every = pytest.mark.parametrize("name", BUILT)


def refusals(model: PreTrainedModel) -> dict[str, str]:
    """Kinds of methods that a model cannot have, as its family says."""
    try:
        family = find_family(model)
    except UnsupportedError as error:
        return dict.fromkeys((*KINDS, "opening"), str(error))
    refused = dict(family.anatomy(model).refused)
    return {"opening": refused["masks"]} | refused if "masks" in refused else refused


def wrapped(name: str, recipe: Any, kind: str) -> PreTrainedModel:
    """The tiny model under a recipe; a family that refuses the kind must say so, and then there is nothing to test."""
    tiny, processor = ZOO[name], processor_of(name)
    model = tiny.build()
    if (reason := refusals(model).get(kind)) is not None:
        before = footprint(model)
        with pytest.raises(UnsupportedError, match=re.escape(reason)):
            vlmattn.wrap(model, recipe, processor=processor)
        assert footprint(model) == before
        pytest.skip(f"refused: {reason}")
    return vlmattn.wrap(model, recipe, processor=processor)


def processor_of(name: str) -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: ZOO[name].vocabulary))


def prompts(name: str) -> list[Any]:
    """Two prompts of different lengths, one with two images where there may be two."""
    tiny = ZOO[name]
    return [tiny.prompt(1 if tiny.single_image else 2, 5, 1), tiny.prompt(1, 9, 2)]


def answer(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Logits of greedy generation in which no placeholder is written."""
    held = [model.config.image_token_id] if getattr(model.config, "image_token_id", None) is not None else []
    return generate(model, inputs, NEW, **({"suppress_tokens": held} if held else {}), **options)


def footprint(model: PreTrainedModel) -> tuple[Any, ...]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks, sorted(model.__dict__), model.config.get_text_config()._attn_implementation


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE * size(wanted))


def moved(found: Tensor, bare: Tensor) -> bool:
    """Something happened, far above rounding."""
    return bool((found - bare).abs().max() > 10 * CLOSE * size(bare))


def size(values: Tensor) -> float:
    """The largest of the logits, at least 1; tokens that a model never says (Chameleon's images) do not count."""
    return max(1.0, float(values.abs().where(values > torch.finfo(values.dtype).min / 2, 0).max()))


# The bare model and back


@every
def test_identity_and_unwrapping_are_exact(name):
    model, inputs = ZOO[name].build(), ZOO[name].prompt(1, 5, 1).inputs
    bare = [generate(model, inputs, NEW), model(**inputs).logits]
    before = footprint(model)
    if registered()[model.config.model_type].unsupported:
        with pytest.raises(UnsupportedError):
            vlmattn.wrap(model, "none")
    else:
        vlmattn.wrap(model, "none")
        assert all(map(torch.equal, bare, [generate(model, inputs, NEW), model(**inputs).logits]))
        vlmattn.unwrap(model)
    assert all(map(torch.equal, bare, [generate(model, inputs, NEW), model(**inputs).logits]))
    assert footprint(model) == before


@every
def test_the_images_of_a_prompt_are_found(name):
    """Alone, and in a padded batch; generate() encodes images before, a forward does not."""
    model, given = wrapped(name, PAI(layers="0:"), "edits"), prompts(name)
    for one in given:
        out = model(**one.inputs, use_cache=True)
        cache = out.get("language_model_outputs", out).past_key_values
        if cache is None:  # the bare model forgets to return it
            model(**one.inputs, past_key_values=(cache := DynamicCache(config=model.config)))
        assert torch.equal(numbers(cache, one.images.shape[1]), one.images)
    inputs = padded(ZOO[name], given)
    length = inputs["input_ids"].shape[1]
    wanted = torch.cat([pad(one.images, (length - one.images.shape[1], 0), value=-1) for one in given])
    out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
    assert torch.equal(numbers(out.past_key_values, length), wanted)


def numbers(cache: Any, length: int) -> Tensor:
    """Number of the image of each token, as the request on a cache has it."""
    return cache._vlmattn_request.images(length, torch.device("cpu")).long()


# Formulas written out, on the bare model with an attention function of its own


class Hand:
    """What the attention function does: the method, the number of each token's image, and layer inputs for sinks."""

    method: Any = None
    images: Tensor
    hidden: dict[int, Tensor]
    cross: set[int]


def by_hand(module, query, key, value, mask, scaling=None, softcap=None, sliding_window=None, s_aux=None, **_: Any):
    repeat, (rows, keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    score = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    if module.layer_idx is None:  # not of the decoder: the queries of Kosmos read the image with the same class
        return (score.softmax(-1) @ value).transpose(1, 2).contiguous(), None
    seen = torch.ones(rows, keys, dtype=torch.bool).tril()[None, None] if mask is None else mask.expand(1, 1, -1, -1)
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    visual, method = Hand.images[0] >= 0, Hand.method
    words, after = ~visual, ~visual & (visual.cumsum(0) > 0)
    crosses = module.layer_idx in Hand.cross
    if Hand.cross:  # images are keys of cross-attention only, and nothing else is
        visual = torch.full((keys,), crosses)
    if isinstance(method, PAI):
        lifted = score[:, :, -1] + method.alpha * score[:, :, -1].abs() * visual
        score = torch.cat([score[:, :, :-1], lifted[:, :, None]], 2)
    if isinstance(method, SoFA) and module.layer_idx < Hand.last:
        image = Hand.images[0]
        ahead = visual[:, None] & visual & (image[:, None] != image)
        if sliding_window is not None:
            slots = torch.arange(keys)
            ahead = ahead & ((slots - slots[:, None]).abs() < sliding_window)
        opened = ahead & ~seen[0, 0]
        score, seen = torch.where(opened, score + math.log(method.sigma), score), seen | opened
    if isinstance(method, Knockout):
        seen = seen & ~(words[:, None] & visual)
    score = score.masked_fill(~seen, -torch.inf)
    if s_aux is not None:  # one more key, whose value is zero
        score = torch.cat([score, s_aux.view(-1, 1, 1).expand(len(score), -1, rows, 1)], -1)
    weights = score.softmax(-1)[..., :keys].nan_to_num(0.0)
    if isinstance(method, VAR):
        hidden = Hand.hidden[module.layer_idx][0].float()
        peaks = hidden.abs() if crosses else hidden[:, list(method.dims)].abs()
        sink = peaks.amax(-1) / hidden.square().mean(-1).sqrt() > (
            method.tau if crosses or not Hand.cross else torch.inf
        )
        Hand.sinks += int(sink.sum())
        taken = (weights * sink).sum(-1, keepdim=True) * (1 - method.keep)
        room = (weights * (visual & ~sink)).sum(-1, keepdim=True)
        moved = torch.where(sink, method.keep * weights, weights + (visual & ~sink) * weights / room * taken)
        weights = torch.where(after[:, None] & (room > 1e-20), moved, weights)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("by_hand", by_hand)
AttentionMaskInterface.register("by_hand", sdpa_mask)


def worked_out(name: str, method: Any, prompt: Any) -> Tensor:
    """Logits of the bare model with the method's formula in its attention."""
    model = ZOO[name].build()
    family = find_family(model)
    Hand.method, Hand.images, Hand.hidden, Hand.sinks = method, prompt.images, {}, 0
    Hand.last = len(family.layers(model)) - 1
    Hand.cross = {n for n, layer in enumerate(family.layers(model)) if family.cross_attention(layer) is not None}
    for index, layer in enumerate(family.layers(model)):

        def note(module, args, kwargs, index=index):
            hidden = family.residual(args[0] if args else kwargs["hidden_states"])
            Hand.hidden[index] = family.image_states(kwargs, len(hidden)) if index in Hand.cross else hidden

        layer.register_forward_pre_hook(note, with_kwargs=True)
    set_attention(model, "by_hand")
    return model(**prompt.inputs).logits


FORMULAS = {
    "pai": PAI(alpha=0.9, layers="0:"),
    "var": SINKS,
    "sofa": SoFA(sigma=0.3, layers="0:-1"),
    "knockout": Knockout(layers="0:"),
    "bare": PAI(alpha=0.0),
}


CROSSING = ("mllama", "mllama_tiles")
NATIVE = {"molmo2"}  # images see each other both ways already
SOME = ("pai", "sofa"), ("var", "knockout"), ("pai", "knockout"), ("var", "sofa")  # one on scores or masses, one mask


@pytest.mark.parametrize(
    ("name", "which"),
    [(name, which) for number, name in enumerate(BUILT) for which in (*SOME[number % len(SOME)], "bare")],
)
def test_edits_do_what_their_formulas_say(name, which):
    method = FORMULAS[which]
    if which == "var" and name in CROSSING:  # every dimension of their images is tested
        method = replace(method, tau=2.6)
    model, prompt = (
        wrapped(name, method, {"sofa": "opening", "knockout": "masks"}.get(which, "edits")),
        prompts(name)[0],
    )
    wanted = worked_out(name, method, prompt)
    same(model(**prompt.inputs).logits, wanted)
    if which == "bare" or (which == "sofa" and (ZOO[name].single_image or name in NATIVE)):
        return
    assert moved(wanted, ZOO[name].build()(**prompt.inputs).logits), "the formula must do something"
    assert which != "var" or Hand.sinks > 0


@pytest.mark.parametrize("name", ["kimi_k25", "paligemma2", "gemma3_window", "lfm2_vl", "gemma4_shared"])
def test_directions_are_as_long_as_queries(name, tmp_path):
    """Latent attention, soft-capped scores, windows, layers without attention, heads of two sizes."""
    model, prompt = ZOO[name].build(), prompts(name)[0]
    anatomy = find_family(model).anatomy(model)
    layers = anatomy.attending or range(anatomy.layers)
    query = {layer: torch.randn(anatomy.heads, anatomy.query_size(layer)) for layer in layers}
    with shifted_queries(model, query):
        wanted = model(**prompt.inputs).logits
    assert moved(wanted, model(**prompt.inputs).logits)
    path = str(save_directions(query, tmp_path, anatomy))
    same(vlmattn.wrap(model, FocusDirections(alpha=1.0, file=path))(**prompt.inputs).logits, wanted)


# Caches and padding


TOGETHER = [VHR(layers="0:"), SINKS, PAI(alpha=0.9, layers="0:")]


@rotated("recipe", [TOGETHER, SoFA(sigma=0.3, layers="0:-1")], "name", BUILT)
def test_cached_decoding_equals_recomputing_and_padding_is_invisible(name, recipe):
    model, given = wrapped(name, recipe, "opening" if isinstance(recipe, SoFA) else "edits"), prompts(name)
    alone = [answer(model, one.inputs) for one in given]
    bare = ZOO[name].build()
    if isinstance(recipe, list) or not (ZOO[name].single_image or name in NATIVE):
        assert moved(alone[0], answer(bare, given[0].inputs))
    if not ZOO[name].uncached:
        same(answer(model, given[0].inputs, use_cache=False), alone[0])
    if not ZOO[name].padding:
        batch = answer(model, padded(ZOO[name], given))
        for row, one in enumerate(alone):
            same(batch[row], one[0])


@rotated("recipe", [VCD(), [PAI(alpha=0.9, layers="0:"), VCD()]], "name", BUILT)
def test_contrastive_decoding_equals_two_models(name, recipe):
    """Each token from two bare models that read everything so far: one sees noise."""
    edits = recipe[:1] if isinstance(recipe, list) else "none"
    no_edits = edits != "none" and "edits" in refusals(ZOO[name].build())
    model, given = wrapped(name, recipe, "edits" if no_edits else "decoding"), prompts(name)
    alone = [answer(model, one.inputs) for one in given]
    assert moved(alone[0].nan_to_num(neginf=0.0), answer(ZOO[name].build(), given[0].inputs))
    for one, found in zip(given, alone, strict=True):
        plain, noisy = (vlmattn.wrap(ZOO[name].build(), edits, processor=processor_of(name)) for _ in range(2))
        first = [m(**inputs).logits[0, -1].float() for m, inputs in ((plain, one.inputs), (noisy, noised(one.inputs)))]
        wanted = 2 * first[0] - first[1]
        wanted = wanted.masked_fill(first[0] < math.log(0.1) + first[0].max(), -torch.inf)
        assert torch.equal(found[0, 0].isinf(), wanted.isinf())
        same(found[0, 0].nan_to_num(neginf=0.0), wanted.nan_to_num(neginf=0.0))
    if not ZOO[name].padding:
        batch = answer(model, padded(ZOO[name], given))
        for row, one in enumerate(alone):
            same(batch[row].nan_to_num(neginf=0.0), one[0].nan_to_num(neginf=0.0))


def noised(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    left, found = torch.cumprod(1 - beta, 0)[500], dict(inputs)
    for name in ("pixel_values", "pixel_values_images", "high_res_pixel_values", "pixel_values_local"):
        if name in inputs:
            noise = torch.randn(inputs[name].shape, generator=torch.Generator().manual_seed(0))
            found[name] = left.sqrt() * inputs[name] + (1 - left).sqrt() * noise
    return found


@every
def test_dropped_tokens_equal_hidden_ones(name):
    drop, given = wrapped(name, FastV(layer=2, keep_ratio=0.5), "pruning"), prompts(name)
    if find_family(drop).anatomy(drop).attending is not None:
        pytest.skip(
            "layers that keep a state cannot hide tokens: tests/interventions/pruning/test_layers_with_state.py"
        )
    hide = wrapped(name, FastV(layer=2, keep_ratio=0.5, mode="mask"), "pruning")
    alone = [answer(drop, one.inputs) for one in given]
    assert moved(alone[0], answer(ZOO[name].build(), given[0].inputs))
    for one, found in zip(given, alone, strict=True):
        same(found, answer(hide, one.inputs))
    if not ZOO[name].padding:
        batch = answer(drop, padded(ZOO[name], given))
        for row, one in enumerate(alone):
            same(batch[row], one[0])


def test_placeholders_side_by_side_are_images():
    """Llama 3.2 Vision has one for each image, with nothing between them."""
    model = ZOO["mllama"].build()
    ids = torch.tensor([[1, IMG, IMG, 5]])
    types = find_family(model).token_types(model, ids)
    assert find_family(model).image_numbers(model, {"input_ids": ids}, types).tolist() == [[-1, 0, 1, -1]]


# What is promised


def test_every_registered_family_is_built_or_says_why_not():
    tested = {ZOO[name].build().config.model_type for name in BUILT}
    claimed = {kind for row in table_rows() if not row.untested for kind in row.types}
    served = {kind for kind in claimed if not registered()[kind].unsupported and kind in CONFIG_MAPPING_NAMES}
    assert tested & served == served


def test_the_page_shows_the_table():
    page = Path(__file__).parents[2] / "docs" / "families.md"
    assert markdown() in page.read_text()
