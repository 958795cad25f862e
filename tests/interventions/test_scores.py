"""Methods that edit scores, VAF and heads-guided attention, against dense attention by hand."""

from __future__ import annotations

import pytest
import torch
from engine import registered, request_of
from numerics import TINY_MODEL, bound, near
from test_goldens import LAYER, Layer
from test_masks import ANSWER_MARK, USER_MARK, Processor, Token, batch_of, inputs_of, write
from tiny import FAMILIES, build, generate
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import vlmattn
from vlmattn import VAF, HeadsGuided, OptionError, embedded
from vlmattn.anatomy import Anatomy
from vlmattn.request import IMAGE, TEXT, LayerContext, Request, Step, number_images

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)  # logits of a random model are smaller
PLACEHOLDERS = [96, 97, 98, 99]
HIDDEN = torch.finfo(torch.float32).min
HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.35
family_matrix = pytest.mark.parametrize("family", FAMILIES)

# --- Through the registered function: layouts of a prompt, "t" for text, digits for images, "p" for padding

LAYOUTS = {
    "one image": ["ttt0000tttt"],
    "two images": ["tt00t111tttt"],
    "padded": ["tt0000ttttttttt", "ppptt00t111tttt"],
}


def layout(rows: list[str]) -> tuple[Tensor, Tensor]:
    types = torch.tensor([[IMAGE if c.isdigit() else TEXT for c in row] for row in rows], dtype=torch.uint8)
    return types, torch.tensor([[int(c != "p") for c in row] for row in rows])


def begun(method, rows: list[str], made: int = 0) -> Request:
    """A request whose prompt was ``rows`` but the last ``made`` tokens, which were generated."""
    sizes = Anatomy("llava", LAYER + 2, HEADS, KV_HEADS, DIM, 32, ("llama", 32, LAYER + 2, 64))
    request = request_of(method, sizes)
    types, real = (part[:, : len(rows[0]) - made] for part in layout(rows))
    request.extend(0, types, number_images(types, None), real, None)
    return request


def tensors(rows: list[str], queries: int, seed: int = 0) -> dict[str, Tensor]:
    """Random queries, keys and values, and the additive mask of the last rows."""
    generator = torch.Generator().manual_seed(seed)
    batch, keys = len(rows), len(rows[0])
    _, real = layout(rows)
    future = torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]
    mask = torch.zeros(batch, 1, queries, keys).masked_fill(future | (real == 0)[:, None, None], HIDDEN)
    return dict(
        q=1.5 * torch.randn(batch, HEADS, queries, DIM, generator=generator),
        k=1.5 * torch.randn(batch, KV_HEADS, keys, DIM, generator=generator),
        v=torch.randn(batch, KV_HEADS, keys, DIM, generator=generator),
        mask=mask,
    )


def head_outputs(given: dict[str, Tensor], request: Request, start: int | None) -> Tensor:
    step, states = Step(request, "sdpa", start), (given[name] for name in ("q", "k", "v", "mask"))
    return registered(step, Layer(2), *states, scaling=SCALE, dropout=0.0).transpose(1, 2)


def dense(given: dict[str, Tensor], rows: list[str], change) -> Tensor:
    """Attention by hand; ``change(scores, b, i)`` gives the scores ``[heads][keys]`` of row i (a slot) of sample b."""
    out = torch.zeros(*given["q"].shape[:3], DIM)
    queries, keys = given["q"].shape[2], given["k"].shape[2]
    for b in range(len(rows)):
        for n in range(queries):
            i = keys - queries + n
            if rows[b][i] == "p":
                continue
            scores = [
                [float(given["q"][b, h, n] @ given["k"][b, h // 2, j]) * SCALE for j in range(keys)]
                for h in range(HEADS)
            ]
            scores = change(scores, b, i)
            seen = [j for j in range(i + 1) if rows[b][j] != "p"]
            for h in range(HEADS):
                weights = torch.softmax(torch.tensor([scores[h][j] for j in seen], dtype=torch.float64), 0).float()
                out[b, h, n] = weights @ given["v"][b, h // 2, seen]
    return out


def unchanged(scores, b, i):
    return scores


def scaled(rows: list[str], method: VAF, heads=None):
    """VAF: image scores times enhance, what comes before the first image times suppress, in text rows after an image."""

    def change(scores, b, i):
        first = min(j for j, c in enumerate(rows[b]) if c.isdigit())
        if rows[b][i] != "t" or i < first:
            return scores
        factor = [
            method.enhance if c.isdigit() else method.suppress if j < first else 1.0 for j, c in enumerate(rows[b])
        ]
        return [
            [s * f for s, f in zip(row, factor, strict=True)] if heads is None or h in heads[b] else row
            for h, row in enumerate(scores)
        ]

    return change


def guided(rows: list[str], alpha: float, first):
    """Heads-guided: image scores plus alpha times the mean of their size over heads, in rows that predict."""

    def change(scores, b, i):
        if i < first[b]:
            return scores
        mean = [sum(abs(row[j]) for row in scores) / HEADS for j in range(len(scores[0]))]
        return [[s + alpha * mean[j] if rows[b][j].isdigit() else s for j, s in enumerate(row)] for row in scores]

    return change


def compare(got: Tensor, given: dict[str, Tensor], rows: list[str], change) -> None:
    real = torch.tensor([[c != "p" for c in row] for row in rows])[:, -got.shape[2] :]
    expected, before = dense(given, rows, change), dense(given, rows, unchanged)
    got, expected, before = (x.transpose(1, 2)[real] for x in (got, expected, before))
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert (expected - before).abs().max() > 1e-2, "the test must tell the edit from plain attention"


every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_backend = pytest.mark.parametrize("backend", [None, "eager", "reference"])


@every_backend
@every_layout
def test_vaf_scales_scores_of_text_rows_after_the_image(name, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("VLMATTN_BACKEND", backend)
    rows, method = LAYOUTS[name], VAF(enhance=1.8, suppress=0.4, layers="0:")
    length = len(rows[0])
    given = tensors(rows, length)
    compare(head_outputs(given, begun(method, rows), 0), given, rows, scaled(rows, method))
    for start in (None, length - 1):  # decoding: the host may not know where
        given = tensors(rows, 1, seed=2)
        compare(head_outputs(given, begun(method, rows, made=1), start), given, rows, scaled(rows, method))
    given = tensors(rows, 3, seed=3)  # drafts
    compare(head_outputs(given, begun(method, rows, made=3), length - 3), given, rows, scaled(rows, method))


def test_vaf_is_linear_and_lowers_negative_scores():
    """Only of the two scaled parts, and by the sign: the opposite of a lift."""
    rows = ["tt00t"]
    given = tensors(rows, 5)
    given["q"][:], given["k"][:] = 1.0, 0.0
    given["k"][0, :, 2], given["k"][0, :, 3] = -1.0, 1.0
    given["v"] = torch.eye(5)[None, None].expand(1, 2, 5, 5)
    weights = head_outputs(given, begun(VAF(enhance=2.0, suppress=1.0, layers="0:"), rows), 0)[0, 0, 4]
    plain = torch.softmax(torch.tensor([0.0, 0, -8 * SCALE, 8 * SCALE, 0]), 0)
    edited = torch.softmax(torch.tensor([0.0, 0, -16 * SCALE, 16 * SCALE, 0]), 0)
    near(weights, edited)
    assert weights[2] < plain[2]
    assert weights[3] > plain[3]


@pytest.mark.parametrize(("share", "count"), [(0.5, 2), (0.25, 1), (0.01, 1), (0.75, 3), (0.99, 4)])
@every_layout
def test_vaf_takes_the_heads_that_look_most(name, share, count):
    """By the mass of the last prompt row on the image, per sample; the same heads while decoding."""
    rows, method = LAYOUTS[name], VAF(enhance=1.8, suppress=0.4, heads=share, layers="0:")
    length = len(rows[0])
    given, request = tensors(rows, length, seed=5), begun(method, rows)
    chosen = []
    for b, row in enumerate(rows):
        mass = []
        for h in range(HEADS):
            seen = [j for j, c in enumerate(row) if c != "p"]
            weights = torch.softmax((given["k"][b, h // 2, seen] @ given["q"][b, h, -1]) * SCALE, 0).tolist()
            mass.append(sum(w for w, j in zip(weights, seen, strict=True) if row[j].isdigit()))
        chosen.append(set(sorted(range(HEADS), key=lambda h: -mass[h])[:count]))
    compare(head_outputs(given, request, 0), given, rows, scaled(rows, method, chosen))
    more = [row + "t" for row in rows]
    given = tensors(more, 1, seed=7)
    compare(head_outputs(given, request, None), given, more, scaled(more, method, chosen))


@every_backend
@every_layout
def test_heads_guided_adds_the_mean_over_heads(name, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("VLMATTN_BACKEND", backend)
    rows, method = LAYOUTS[name], HeadsGuided(alpha=0.8, layers="0:")
    length = len(rows[0])
    given = tensors(rows, length)
    compare(head_outputs(given, begun(method, rows), 0), given, rows, guided(rows, 0.8, [length - 1] * len(rows)))
    given = tensors(rows, 1, seed=2)
    compare(
        head_outputs(given, begun(method, rows, made=1), None), given, rows, guided(rows, 0.8, [length - 2] * len(rows))
    )
    given = tensors(rows, 3, seed=3)
    compare(
        head_outputs(given, begun(method, rows, made=3), length - 3),
        given,
        rows,
        guided(rows, 0.8, [length - 4] * len(rows)),
    )


def test_heads_guided_in_a_right_padded_row_edits_the_last_real_one():
    rows = ["tt000tttt", "tt00tttpp"]
    given, method = tensors(rows, 9), HeadsGuided(alpha=0.8, layers="0:")
    compare(head_outputs(given, begun(method, rows), 0), given, rows, guided(rows, 0.8, [8, 6]))


# --- Whole models


def by_hand(model: PreTrainedModel, inputs: dict, change, layers: range) -> Tensor:
    """Logits of the bare model; ``change(scores)`` edits ``[batch, heads, row, key]`` before the mask."""

    def attend(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * scaling
        if module.layer_idx in layers:
            scores = change(scores)
        return ((scores + mask).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("scores_for_test", attend)
    AttentionMaskInterface.register("scores_for_test", eager_mask)
    model.set_attn_implementation({"text_config": "scores_for_test"})
    return model(**inputs).logits


def check(family: str, method, change_of, layers: range, processor=None) -> None:
    """Greedy steps of a padded batch against teacher forcing."""
    rows = batch_of([write(family, [2, "img", 3]), write(family, [3, "img", 1, "img", 4], seed=6)])
    model = build(family)
    inputs = inputs_of(model, rows, positions=False)
    bare = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    vlmattn.wrap(model, method, processor=processor)
    got = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    allowed = got.clone()
    allowed[..., [2, *PLACEHOLDERS]] = -torch.inf
    said = allowed.argmax(-1)[:, :-1].tolist()
    longer = [row + [Token(t, generated=True) for t in said[b]] for b, row in enumerate(rows)]
    expected = by_hand(build(family), inputs_of(model, longer), change_of(longer), layers)[:, -4:]
    near(got, expected)
    assert (got - bare).abs().amax((0, 2)).min() > 1e-3
    for options in (dict(use_cache=False), dict(cache_implementation="static")):
        again = generate(model, inputs, suppress_tokens=PLACEHOLDERS, **options)
        near(again, got)


def vaf_change(with_processor: bool):
    def of(rows: list[list[Token]]):
        factor = torch.ones(len(rows), len(rows[0]), len(rows[0]))
        for b, row in enumerate(rows):
            first = min(n for n, t in enumerate(row) if t.image >= 0)
            said = min(n for n, t in enumerate(row) if t.id == USER_MARK) + 1
            for i in range(first, len(row)):
                for j in range(len(row)) if row[i].is_text else ():
                    if row[j].image >= 0:
                        factor[b, i, j] = 1.7
                    elif j < (said if with_processor else first):
                        factor[b, i, j] = 0.3
        return lambda scores: scores * factor[:, None]

    return of


@pytest.mark.parametrize("with_processor", [False, True])
@family_matrix
def test_vaf_suppresses_the_system_prompt(family, with_processor):
    """With the processor it ends where the user begins to speak, words before the image are spared; without, at the image."""
    method = VAF(enhance=1.7, suppress=0.3, layers="1:3")
    check(family, method, vaf_change(with_processor), range(1, 3), Processor() if with_processor else None)


@family_matrix
def test_heads_guided_over_whole_models(family):
    def of(rows: list[list[Token]]):
        image = torch.tensor([[float(t.image >= 0) for t in row] for row in rows])
        first = min(n for n, t in enumerate(rows[0]) if t.generated) - 1

        def change(scores):
            raised = scores + 0.9 * scores.abs().mean(1, keepdim=True) * image[:, None, None]
            return torch.cat([scores[:, :, :first], raised[:, :, first:]], 2)

        return change

    check(family, HeadsGuided(alpha=0.9, layers="0:"), of, range(4))


@family_matrix
def test_vaf_heads_over_caches(family):
    """Heads are chosen anew for every prompt, and alike with every cache."""
    rows = batch_of([write(family, [2, "img", 3]), write(family, ["img", 1, "img", 4], seed=6)])
    model = build(family)
    inputs = inputs_of(model, rows, positions=False)
    everywhere = VAF(enhance=1.7, suppress=0.3, layers="1:")
    with vlmattn.applied(model, everywhere):
        all_heads = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    vlmattn.wrap(model, VAF(enhance=1.7, suppress=0.3, heads=0.5, layers="1:"))
    expected = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    assert (expected - all_heads).abs().max() > 1e-3
    for options in (dict(use_cache=False), dict(cache_implementation="static")):
        again = generate(model, inputs, suppress_tokens=PLACEHOLDERS, **options)
        near(again, expected)


def test_the_released_constant_of_35_tokens():
    """What VAF calls the system prompt in LLaVA-1.5's order, header included: everything before the image."""
    tokens = write("llava", ["img", 3])
    before = next(n for n, t in enumerate(tokens) if t.image >= 0)
    model = build("llava")
    vlmattn.wrap(model, VAF(suppress=0.5, layers="0:"), processor=Processor())
    cache = model(**inputs_of(model, [tokens]), use_cache=True).past_key_values
    request = cache._vlmattn_request
    (method,) = cache._vlmattn_plan.by_layer[0]
    context = LayerContext(Step(request, "sdpa", 0), 0, len(tokens), len(tokens), torch.device("cpu"), 4)
    (part,) = method.edit(context).logit
    assert part.scale[0].tolist()[:before] == [0.5] * before
    assert part.scale[0].tolist()[before + 16 :] == [1.0] * (len(tokens) - before - 16)
    assert tokens[before - 1].id == USER_MARK
    assert tokens[-1].id == ANSWER_MARK


def test_the_bundled_model_is_edited():
    model, _ = embedded.load()
    ids = torch.tensor([[1, 5, *[4] * 49, 45, 46, 6]])
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1)))
    bare = model(**inputs).logits[:, -1]
    for preset in ("vaf", "heads_guided"):
        with vlmattn.applied(model, preset):
            assert (model(**inputs).logits[:, -1] - bare).abs().max() > 1e-3


@pytest.mark.parametrize("options", [dict(enhance=0.9), dict(suppress=1.1), dict(heads=0.0), dict(heads=1.5)])
def test_factors_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match="vaf"):
        VAF(**options)
