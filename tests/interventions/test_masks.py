"""Methods that edit the mask, against the bare model with a 4D mask that loops over tokens from the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from engine import registered, request_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import TINY_MODEL, bound, near
from test_goldens import LAYER, Layer, causal
from tiny import FAMILIES, IMAGE_TOKEN, TOKENS_PER_IMAGE, build, generate
from torch import Tensor

import vlmattn
from vlmattn import MMA, Bidirectional, Isolation, Knockout, OptionError, SoFA
from vlmattn.anatomy import Anatomy
from vlmattn.request import IMAGE, TEXT, Step, number_images

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)  # logits of a random model are smaller
USER_MARK, ANSWER_MARK, SEPARATOR = 90, 91, 92
HIDDEN = torch.finfo(torch.float32).min
family_matrix = pytest.mark.parametrize("family", FAMILIES)
attn_matrix = pytest.mark.parametrize("attn", ["sdpa", "eager"])


class Processor:
    """Templates ``USER: ... ASSISTANT: ...`` and decodes every id to a word."""

    chat_template = "yes"

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        said = [f"{'USER' if m['role'] == 'user' else 'ASSISTANT'}: {m['content'][0]['text']}" for m in chat]
        return "<s> " + " ".join([*said, "ASSISTANT:"])

    def decode(self, ids):
        return " ".join({USER_MARK: "USER:", ANSWER_MARK: "ASSISTANT:"}.get(i, f"w{i}") for i in ids)


@dataclass(frozen=True)
class Token:
    """One token of a prompt, as it was written: which image it is of, in which turn, whether it may be an instruction."""

    id: int
    image: int = -1
    turn: int = -1
    instruction: bool = False
    real: bool = True
    generated: bool = False

    @property
    def is_text(self) -> bool:
        return self.image < 0


PAD = Token(0, real=False)


def write(family: str, *turns: list[int | str], seed: int = 3) -> list[Token]:
    """Tokens of a conversation. A turn lists numbers of words, ``img`` and ``sep``; answers of three words lie between."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int, **facts) -> list[Token]:
        return [Token(int(i), **facts) for i in torch.randint(5, 90, (count,), generator=generator)]

    out, images = [Token(1), *words(2)], 0
    for turn, parts in enumerate(turns):
        out.append(Token(USER_MARK))
        for part in parts:
            facts = dict(turn=turn, instruction=True)
            if part == "img":
                tokens = [Token(IMAGE_TOKEN, image=images, turn=turn)] * TOKENS_PER_IMAGE[family]
                marker_ids = family != "llava"
                out += [*[Token(97, **facts)] * marker_ids, *tokens, *[Token(96, **facts)] * marker_ids]
                images += 1
            elif part == "sep":
                out.append(Token(SEPARATOR, **facts))
            else:
                out += words(part, **facts)
        out.append(Token(ANSWER_MARK, turn=turn, instruction=True))
        if turn < len(turns) - 1:
            out += words(3)
    return out


PROMPTS = {
    "one image": [["img", 4]],
    "two images": [[2, "img", 2, "img", 3]],
    "three images": [["img", 1, "img", 2, "img", 3]],
    "two turns": [["img", 3], [2]],
    "images in both turns": [["img", 3], [1, "img", 2]],
}


def batch_of(prompts: list[list[Token]]) -> list[list[Token]]:
    length = max(map(len, prompts))
    return [[PAD] * (length - len(tokens)) + tokens for tokens in prompts]


def inputs_of(model, rows: list[list[Token]], positions: bool = True) -> dict[str, Tensor]:
    """What the model is called with; the mask is 2D."""
    generator = torch.Generator().manual_seed(11)
    images = sum(len({t.image for t in row if t.image >= 0}) for row in rows)
    ids = torch.tensor([[t.id for t in row] for row in rows])
    out = dict(input_ids=ids, attention_mask=torch.tensor([[int(t.real) for t in row] for row in rows]))
    if model.config.model_type == "llava":
        out["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
        if positions:
            out["position_ids"] = (out["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return out
    out |= dict(
        mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
        pixel_values=torch.randn(16 * images, 3 * 2 * 4 * 4, generator=generator),
        image_grid_thw=torch.tensor([[1, 4, 4]] * images),
    )
    if positions:
        given = {k: out[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        out["position_ids"] = model.model.get_rope_index(**given)[0]
    return out


Rule = Callable[[list[Token], int, int], float]


def mask_of(rows: list[list[Token]], rule: Rule) -> Tensor:
    """Additive mask ``[batch, 1, query, key]``: the log of how often a key counts for a row, 0 meaning hidden."""
    length = len(rows[0])
    out = torch.full((len(rows), 1, length, length), HIDDEN)
    for b, tokens in enumerate(rows):
        for i in range(length):
            for j in range(length):
                if not tokens[i].real or not tokens[j].real:
                    continue
                weight = rule(tokens, i, j)
                if weight > 0:
                    out[b, 0, i, j] = math.log(weight)
    return out


def plain(tokens: list[Token], i: int, j: int) -> float:
    return float(j <= i)


def bare_logits(model, inputs: dict[str, Tensor], mask: Tensor, layers: tuple[int, ...] | None = None) -> Tensor:
    """Logits of the bare model with a 4D mask in some layers and the plain one in the others."""
    everywhere = mask if layers is None else inputs["plain_mask"]
    inputs = {k: v for k, v in inputs.items() if k != "plain_mask"}
    with ExitStack() as stack:
        for number in layers or ():
            layer = model.model.language_model.layers[number]
            stack.callback(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
                ).remove
            )
        return model(**{**inputs, "attention_mask": everywhere}).logits


def check(family: str, method, rule: Rule, rows: list[list[Token]], attn: str = "sdpa", layers=None) -> None:
    """The wrapped model gives what the bare one gives with the rule's mask, and not what it gives with the plain one."""
    oracle, model = build(family, "eager"), build(family, attn)
    inputs = inputs_of(model, rows)
    unedited = mask_of(rows, plain)
    expected = bare_logits(oracle, {**inputs, "plain_mask": unedited}, mask_of(rows, rule), layers)
    before = bare_logits(oracle, inputs, unedited)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], before[real], rtol=0, atol=TOLERANCE)  # the oracle is fair
    with vlmattn.applied(model, method, processor=Processor()):
        got = model(**inputs).logits
        report = model.vlmattn.report()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=TOLERANCE)
    assert (expected - before)[real].abs().max() > 1e-2, "the test must tell the edit from plain attention"
    edited = {layer for name, found in report["layers"]["prefill"].items() if "base" not in name for layer in found}
    assert edited == set(range(4) if layers is None else layers)
    assert all(report["fired"].values())


# --- The definitions, token by token


def sofa(sigma: float) -> Rule:
    def rule(tokens, i, j):
        later_image = j > i and tokens[i].image >= 0 and tokens[j].image >= 0 and tokens[i].image != tokens[j].image
        return sigma if later_image else plain(tokens, i, j)

    return rule


def bidirectional(span: str, sigma: float) -> Rule:
    def rule(tokens, i, j):
        if j <= i:
            return 1.0
        a, b = tokens[i], tokens[j]
        inside = {
            "image": a.image >= 0 and a.image == b.image,
            "images": a.image >= 0 and b.image >= 0,
            "prompt": not a.generated and not b.generated,
        }[span]
        return sigma if inside else 0.0

    return rule


def mma(sigma: float) -> Rule:
    def rule(tokens, i, j):
        a, b = tokens[i], tokens[j]
        opened = j > i and a.image >= 0 and b.is_text and b.instruction and a.turn == b.turn
        return sigma if opened else plain(tokens, i, j)

    return rule


def knockout(source: str, target: str) -> Rule:
    def rule(tokens, i, j):
        a, b = tokens[i], tokens[j]
        last = max(n for n, t in enumerate(tokens) if not t.generated)
        loses = {"text": a.is_text, "image": not a.is_text, "last": i == last, "generated": a.generated}[target]
        hidden = not b.is_text if source == "image" else b.is_text and not b.generated
        return 0.0 if loses and hidden and i != j else plain(tokens, i, j)

    return rule


def isolation(documents: Callable[[list[Token]], list[int]]) -> Rule:
    """Rows of one document (numbers from 0 on; -1 = none) do not see another."""

    def rule(tokens, i, j):
        number = documents(tokens)
        apart = number[i] >= 0 and number[j] >= 0 and number[i] != number[j]
        return 0.0 if apart else plain(tokens, i, j)

    return rule


def by_image(tokens: list[Token]) -> list[int]:
    """An image and the text that follows it, up to the end of the last image."""
    end = max(n for n, t in enumerate(tokens) if t.image >= 0)
    out, current = [], -1
    for n, token in enumerate(tokens):
        current = max(current, token.image)
        out.append(current if n <= end and token.real else -1)
    return out


def by_separator(tokens: list[Token]) -> list[int]:
    """Stretches that a separator ends; what follows the last is the question."""
    out, current, left = [], 0, sum(t.id == SEPARATOR for t in tokens)
    for token in tokens:
        out.append(current if left and token.real else -1)
        if token.id == SEPARATOR:
            current, left = current + 1, left - 1
    return out


SEVERAL = ["two images", "three images", "images in both turns"]


@pytest.mark.parametrize("text", SEVERAL)
@pytest.mark.parametrize("sigma", [0.5, 1.0])
@family_matrix
def test_sofa_lets_an_image_see_later_images(family, sigma, text):
    check(family, SoFA(sigma=sigma, layers="0:"), sofa(sigma), [write(family, *PROMPTS[text])])


@pytest.mark.parametrize("text", ["one image", "three images"])
@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("span", ["image", "images", "prompt"])
@family_matrix
def test_bidirectional_spans_see_themselves(family, span, sigma, text):
    method = Bidirectional(span=span, sigma=sigma, layers="0:")
    check(family, method, bidirectional(span, sigma), [write(family, *PROMPTS[text])])


@pytest.mark.parametrize("text", PROMPTS)
@family_matrix
def test_mma_lets_images_see_their_instruction(family, text):
    check(family, MMA(layers="0:"), mma(1.0), [write(family, *PROMPTS[text])])


@family_matrix
def test_mma_softly(family):
    check(family, MMA(sigma=0.3, layers="0:"), mma(0.3), [write(family, *PROMPTS["images in both turns"])])


@pytest.mark.parametrize("target", ["text", "image", "last"])
@pytest.mark.parametrize("source", ["image", "text"])
@family_matrix
def test_knockout_hides_keys(family, source, target):
    check(
        family,
        Knockout(source=source, target=target),
        knockout(source, target),
        [write(family, [2, "img", 1, "img", 3])],
    )


@pytest.mark.parametrize("text", SEVERAL)
@family_matrix
def test_isolated_images_do_not_see_each_other(family, text):
    rule = isolation(lambda tokens: [t.image for t in tokens])
    check(family, Isolation(between="images"), rule, [write(family, *PROMPTS[text])])


@pytest.mark.parametrize("text", SEVERAL)
@family_matrix
def test_isolated_documents_begin_with_an_image(family, text):
    check(family, Isolation(between="documents"), isolation(by_image), [write(family, *PROMPTS[text])])


@family_matrix
def test_isolated_documents_end_with_a_separator(family):
    turns = [[2, "sep", 1, "img", 2, "sep", "img", 1, "sep", 3]]
    method = Isolation(between="documents", separator=(SEPARATOR,))
    check(family, method, isolation(by_separator), [write(family, *turns)])


BATCH = {
    "sofa": (SoFA(layers="0:"), sofa(0.5)),
    "image": (Bidirectional(span="image", layers="0:"), bidirectional("image", 1.0)),
    "images": (Bidirectional(span="images", sigma=0.5, layers="0:"), bidirectional("images", 0.5)),
    "prompt": (Bidirectional(span="prompt", layers="0:"), bidirectional("prompt", 1.0)),
    "mma": (MMA(layers="0:"), mma(1.0)),
    "knockout text": (Knockout(), knockout("image", "text")),
    "knockout image": (Knockout(source="text", target="image"), knockout("text", "image")),
    "knockout last": (Knockout(source="text", target="last"), knockout("text", "last")),
    "isolated images": (Isolation(), isolation(lambda tokens: [t.image for t in tokens])),
    "isolated by image": (Isolation(between="documents"), isolation(by_image)),
    "isolated by separator": (Isolation(between="documents", separator=(SEPARATOR,)), isolation(by_separator)),
}


def three(family: str) -> list[list[Token]]:
    """Prompts of different lengths, all with two images or more and separators."""
    return [
        write(family, ["img", 2, "sep", "img", 1, "sep", 2]),
        write(family, ["img", "sep", 3], [1, "img", 2, "sep", 1], seed=5),
        write(family, [1, "img", "sep", "img", 2, "img", "sep", 1], seed=8),
    ]


@pytest.mark.parametrize("name", BATCH)
@attn_matrix
@family_matrix
def test_a_left_padded_batch(family, attn, name):
    check(family, *BATCH[name], batch_of(three(family)), attn)


@pytest.mark.parametrize("layers", [(0,), (1, 3), (2,)])
@pytest.mark.parametrize("name", ["sofa", "prompt", "mma", "knockout text", "isolated images"])
@family_matrix
def test_only_the_layers_asked_for_are_edited(family, name, layers):
    method, rule = BATCH[name]
    method = vlmattn.Recipe.of(method, layers=",".join(map(str, layers)))
    check(family, method, rule, [write(family, *PROMPTS["three images"])], layers=layers)


def test_sofa_takes_every_second_layer_without_the_last():
    model = vlmattn.wrap(build("llava"), "sofa")
    model(**inputs_of(model, [write("llava", *PROMPTS["two images"])]))
    ran = model.vlmattn.report()["layers"]["prefill"]
    assert ran == {"base:sdpa": [1, 3], "eager": [0, 2]}


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["img", "sep", 1, 2]), min_size=2, max_size=6), st.sampled_from(sorted(BATCH)))
def test_any_order_of_parts(parts, name):
    """Prompts where the edit may find nothing to do."""
    method, rule = BATCH[name]
    rows = [write("qwen2_5_vl", ["img", *parts, 1])]
    with torch.no_grad():
        model = build("qwen2_5_vl", "eager")
        inputs = inputs_of(model, rows)
        expected = bare_logits(model, inputs, mask_of(rows, rule))
        with vlmattn.applied(model, method, processor=Processor()):
            got = model(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


# --- MMA and turns


@family_matrix
def test_an_image_of_the_first_turn_feels_neither_the_answer_nor_the_second_turn(family):
    """What the image's rows hold does not change when later words do; it does when its own instruction changes."""
    tokens = write(family, ["img", 3], ["img", 3])
    model = vlmattn.wrap(build(family), MMA(layers="0:"), processor=Processor())
    image = [n for n, t in enumerate(tokens) if t.image == 0]

    def states(changed: list[Token]) -> Tensor:
        out = model(**inputs_of(model, [changed]), output_hidden_states=True)
        return out.hidden_states[-1][0, image]

    def change(where: Callable[[Token], bool]) -> list[Token]:
        changed = list(tokens)
        n = max(n for n, t in enumerate(tokens) if where(t) and t.id < 90)
        changed[n] = Token(tokens[n].id % 80 + 6, turn=tokens[n].turn, instruction=tokens[n].instruction)
        return changed

    before = states(tokens)
    answer = change(lambda t: t.turn < 0)
    assert next(n for n, (a, b) in enumerate(zip(tokens, answer, strict=True)) if a != b) > image[-1]
    assert torch.equal(states(answer), before)
    assert torch.equal(states(change(lambda t: t.turn == 1 and t.is_text)), before)
    assert (states(change(lambda t: t.turn == 0 and t.is_text)) - before).abs().max() > 1e-3


# --- Generation


def teacher_forced(model, rows: list[list[Token]], rule: Rule, tokens: Tensor, inputs: dict) -> Tensor:
    """Logits ``[batch, new, vocabulary]`` of the bare model where it generated ``tokens``, with the rule's mask."""
    new = tokens.shape[1]
    longer = [row + [Token(int(t), generated=True) for t in tokens[b]] for b, row in enumerate(rows)]
    more = {**inputs_of(model, longer), **{k: v for k, v in inputs.items() if "pixel" in k}}
    return bare_logits(model, more, mask_of(longer, rule))[:, -new - 1 : -1]


GENERATED = {
    **BATCH,
    "image generated": (Knockout(source="image", target="generated"), knockout("image", "generated")),
    "text generated": (Knockout(source="text", target="generated"), knockout("text", "generated")),
    "text text": (Knockout(source="text", target="text"), knockout("text", "text")),
}


@pytest.mark.parametrize("name", GENERATED)
@family_matrix
def test_generated_tokens(family, name):
    """Every step of a padded batch, with the dynamic and the static cache and without one, against teacher forcing."""
    method, rule = GENERATED[name]
    rows, oracle, model = batch_of(three(family)[:2]), build(family, "eager"), build(family)
    inputs = inputs_of(model, rows, positions=False)
    unedited = generate(model, inputs, suppress_tokens=[96, 97, 98, 99])
    vlmattn.wrap(model, method, processor=Processor())
    got = generate(model, inputs, suppress_tokens=[96, 97, 98, 99])
    allowed = got.clone()
    allowed[..., [2, 96, 97, 98, 99]] = -torch.inf
    expected = teacher_forced(oracle, rows, rule, allowed.argmax(-1), inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert (got - unedited)[:, 1:].abs().max() > 1e-2
    for options in (dict(cache_implementation="static"), dict(use_cache=False)):
        again = generate(model, inputs, suppress_tokens=[96, 97, 98, 99], **options)
        torch.testing.assert_close(again, got, rtol=0, atol=TOLERANCE)


# --- A second turn on the same cache


def within_pieces(rule: Rule, cut: int) -> Rule:
    """Keys of the second piece were not there yet when the rows of the first were computed."""
    return lambda tokens, i, j: 0.0 if i < cut <= j else rule(tokens, i, j)


@pytest.mark.parametrize("name", ["sofa", "image", "images", "prompt", "mma", "knockout text", "isolated images"])
@family_matrix
def test_a_second_turn_with_an_image_on_the_same_cache(family, name):
    """The first turn, three generated tokens one by one, then a second turn with an image in one piece."""
    method, rule = BATCH[name]
    tokens = write(family, ["img", 2, "img", 3], [1, "img", 2, "img", 1])
    marker_ids = [n for n, t in enumerate(tokens) if t.id == ANSWER_MARK]
    first, cut = marker_ids[0] + 1, marker_ids[0] + 4
    tokens[first:cut] = [Token(t.id, generated=True) for t in tokens[first:cut]]
    oracle, model = build(family, "eager"), build(family)
    inputs = inputs_of(model, [tokens])
    expected = bare_logits(oracle, inputs, mask_of([tokens], within_pieces(rule, cut)))[0]
    before = bare_logits(oracle, inputs, mask_of([tokens], plain))[0]
    vlmattn.wrap(model, method, processor=Processor())
    patches = 1 if family == "llava" else 16
    cache, got = None, []
    for a, b in [(0, first), *((n, n + 1) for n in range(first, cut)), (cut, len(tokens))]:
        piece = dict(
            input_ids=inputs["input_ids"][:, a:b],
            attention_mask=inputs["attention_mask"][:, :b],
            position_ids=inputs["position_ids"][..., a:b],
        )
        if b - a > 1:
            piece["pixel_values"] = (
                inputs["pixel_values"][: 2 * patches] if a == 0 else inputs["pixel_values"][2 * patches :]
            )
            if family != "llava":
                piece["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, a:b]
                piece["image_grid_thw"] = inputs["image_grid_thw"][:2]
        out = model(**piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits[0])
    torch.testing.assert_close(torch.cat(got), expected, rtol=0, atol=TOLERANCE)
    assert (expected - before)[cut:].abs().max() > 1e-2


# --- SoFA: mask and mixture


def mixture(
    query: Tensor, key: Tensor, value: Tensor, images: list[int], sigma: float, pad: int, scale: float
) -> Tensor:
    """Two softmaxes, row by row, in float64."""
    groups = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b in range(query.shape[0]):
        first = pad if b == query.shape[0] - 1 else 0
        for h in range(query.shape[1]):
            q, k, v = query[b, h].double(), key[b, h // groups].double(), value[b, h // groups].double()
            for i in range(first, len(images)):
                seen = list(range(first, i + 1))
                later = [
                    j for j in range(i + 1, len(images)) if images[i] >= 0 and images[j] >= 0 and images[j] != images[i]
                ]
                row = torch.zeros(v.shape[-1], dtype=torch.float64)
                for keys, share in ((seen, 1 - sigma), (seen + later, sigma)):
                    row += share * torch.softmax(k[keys] @ q[i] * scale, 0) @ v[keys]
                out[b, h, i] = row
    return out


@pytest.mark.parametrize("backend", [None, "eager", "reference"])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9, 1.0])
def test_sofa_mixes_two_softmaxes(sigma, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("VLMATTN_BACKEND", backend)
    images = [-1, -1, 0, 0, 0, -1, 1, 1, 1, 2, 2, -1, -1]
    generator = torch.Generator().manual_seed(4)
    query = 2 * torch.randn(2, 4, len(images), 8, generator=generator)
    key, value = (2 * torch.randn(2, 2, len(images), 8, generator=generator) for _ in range(2))
    sizes = Anatomy("llava", LAYER + 2, 4, 2, 8, 32, ("llama", 32, LAYER + 2, 64))
    request = request_of(SoFA(sigma=sigma, mode="mix", layers="0:"), sizes)
    types = torch.tensor([[IMAGE if n >= 0 else TEXT for n in images]] * 2, dtype=torch.uint8)
    mask = torch.ones(2, len(images), dtype=torch.long)
    mask[1, :2] = 0
    numbers = number_images(types, [3, 3, 2] * 2)
    assert numbers[0].tolist() == images
    request.extend(0, types, numbers, mask, None)
    additive = causal(len(images), len(images)).expand(2, -1, -1, -1).masked_fill(mask[:, None, None] == 0, HIDDEN)
    out = registered(Step(request, "sdpa", 0), Layer(2), query, key, value, additive, scaling=0.3, dropout=0.0)
    expected = mixture(query, key, value, images, sigma, 2, 0.3)
    got = out.transpose(1, 2).double()
    for b, first in ((0, 0), (1, 2)):
        near(got[b, :, first:].float(), expected[b, :, first:].float())
    assert (mixture(query, key, value, images, 0.0, 2, 0.3) - expected).abs().max() > 0.05


@pytest.mark.parametrize("mode", ["mask", "mix"])
@attn_matrix
@family_matrix
def test_sofa_at_zero_is_the_bare_model(family, attn, mode):
    model = build(family, attn)
    inputs = inputs_of(model, [write(family, *PROMPTS["three images"])])
    bare = model(**inputs).logits
    with vlmattn.applied(model, SoFA(sigma=0.0, mode=mode, layers="0:")):
        assert torch.equal(model(**inputs).logits, bare)


@family_matrix
def test_the_modes_of_sofa_agree_at_one_and_differ_between(family):
    model = build(family)
    inputs = inputs_of(model, batch_of(three(family)))
    real = inputs["attention_mask"].bool()

    def run(**options) -> Tensor:
        with vlmattn.applied(model, SoFA(layers="0:", **options)):
            return model(**inputs).logits[real]

    bare = model(**inputs).logits[real]
    full = run(sigma=1.0)
    torch.testing.assert_close(run(sigma=1.0, mode="mix"), full, rtol=0, atol=TOLERANCE)
    soft, mixed = run(sigma=0.5), run(sigma=0.5, mode="mix")
    for one, other in ((soft, mixed), (soft, full), (mixed, full), (soft, bare), (mixed, bare)):
        assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("sigma", [0.05, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("mode", ["mask", "mix"])
def test_a_soft_mask_is_no_no_op(mode, sigma):
    """A port that interpolates additive masks with -1e4 changes nothing for any sigma below 1."""
    model = build("llava")
    inputs = inputs_of(model, [write("llava", *PROMPTS["two images"])])
    bare = model(**inputs).logits
    for method in (SoFA(sigma=sigma, mode=mode, layers="0:"), Bidirectional(sigma=sigma), MMA(sigma=sigma)):
        with vlmattn.applied(model, method, processor=Processor()):
            assert (model(**inputs).logits - bare).abs().max() > 1e-3


# --- Options


@pytest.mark.parametrize("separator", [(-1,), ("x",), (1.5,), (True,)])
def test_separators_are_token_ids(separator):
    with pytest.raises(OptionError, match="separator"):
        Isolation(between="documents", separator=separator)
