"""Invariants of decoding rules that hold whatever the method: what is drawn, streamed, counted, isolated, refused and left behind."""

from __future__ import annotations

import json
import math
import threading
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from oracle import cut, dropped, noised, reread, three
from tiny import FAMILIES, IMAGE_TOKEN, build, left_padded, prompt
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import vlmattn
from vlmattn import (
    AGLA,
    M3ID,
    PAI,
    RBD,
    VAR,
    VCD,
    AvisC,
    Branch,
    Contrast,
    ContrastiveDecoding,
    InputError,
    Noise,
    OptionError,
    PAIGuidance,
    Recipe,
    UnsupportedError,
)
from vlmattn.decoding import Decoding, Growth, Instead, Mixture, Search, TopAttended
from vlmattn.registry import find_method
from vlmattn.wrapping.call import CALL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_grad")]
every_family = pytest.mark.parametrize("family", FAMILIES)
SINKS = VAR(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0)
PRESETS = [
    name for name in vlmattn.presets() if issubclass(find_method(vlmattn.presets()[name].method), (Decoding, Search))
]


def wrapped(family: str = "llava", recipe: Any = "none", **options: Any) -> Any:
    return vlmattn.wrap(build(family), recipe, **options)


def generate(model: Any, inputs: dict[str, Tensor], recipe: Any = None, new: int = 6, **options: Any) -> Any:
    """New tokens ``[row, token]``, or all outputs if the call asks for them; greedy, and no row ends."""
    settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0) | options
    if recipe is not None:
        settings["preset"] = recipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(**inputs, **settings)
    return out[:, inputs["input_ids"].shape[1] :] if isinstance(out, Tensor) else out


def logits_of(model: Any, inputs: dict[str, Tensor], recipe: Any, **options: Any) -> Tensor:
    out = generate(model, inputs, recipe, return_dict_in_generate=True, output_logits=True, **options)
    return torch.stack(out.logits, 1)


def show(branch: Branch) -> ContrastiveDecoding:
    """What a branch says, and nothing else."""
    return ContrastiveDecoding((branch,), lambda main, others, t: others[0])


def one(branch: Branch, weight: Any = 1.0, beta: float = 0.1) -> ContrastiveDecoding:
    return ContrastiveDecoding((branch,), Contrast((weight,), beta=beta))


def repeating(family: str) -> dict[str, Tensor]:
    """A prompt in which drafts are found."""
    inputs, more = prompt(family, words=2), torch.tensor([[40, 41, 42, 40, 41, 42, 40, 41]])
    values = {"input_ids": more, "attention_mask": torch.ones_like(more), "mm_token_type_ids": torch.zeros_like(more)}
    return {
        name: torch.cat([value, values[name].to(value)], 1) if name in values else value
        for name, value in inputs.items()
    }


# Sampling


@every_family
def test_the_second_token_is_drawn_from_the_rule_too(family):
    """Chi-square of 3000 pairs of tokens against an oracle that reads everything anew: rows of branches follow their draws."""
    model, inputs, draws, beta, marker_ids = wrapped(family), prompt(family), 3000, 0.2, [96, 97, 98, 99]
    bare = build(family)
    for each in (model, bare):
        each.lm_head.weight.data *= 12
    streams = [reread(bare, inputs), reread(bare, noised(inputs))]

    def chances(answer: list[int]) -> Tensor:
        main, other = (stream(answer) for stream in streams)
        return cut(2 * main - other, main, beta).index_fill(0, torch.tensor(marker_ids), -math.inf).softmax(-1)

    first = chances([])
    wanted = {
        (a, b): float(first[a] * p)
        for a in first.nonzero().flatten().tolist()
        for b, p in enumerate(chances([a]).tolist())
        if p > 0
    }
    torch.manual_seed(0)
    drawn = generate(
        model, inputs, VCD(beta=beta), 2, min_new_tokens=0, do_sample=True, top_k=0, num_return_sequences=draws,
        eos_token_id=-1, suppress_tokens=marker_ids,
    )  # fmt: skip
    counts: dict[tuple[int, int], int] = {}
    for pair in map(tuple, drawn.tolist()):
        counts[pair] = counts.get(pair, 0) + 1
    assert set(counts) <= set(wanted), "only what the rule allows"
    common = [pair for pair, chance in wanted.items() if chance * draws >= 5]
    assert len(common) > 8, "several pairs are plausible"
    assert len({pair[0] for pair in common}) > 2
    cells = [(counts.get(pair, 0), wanted[pair] * draws) for pair in common]
    rest = draws - sum(seen for seen, _ in cells), draws - sum(expected for _, expected in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64))) > 1e-4


# Streamers


class Noted(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("recipe", ["vcd", "m3id", "rbd", "dola_low", "buckets"])
def test_streamers_see_sampled_tokens_until_the_row_ends(recipe):
    model, inputs, noted = wrapped(), prompt("llava"), Noted()
    torch.manual_seed(3)
    whole = generate(model, inputs, recipe, 8, do_sample=True, eos_token_id=-1)[0].tolist()
    stop = whole[4]
    torch.manual_seed(3)
    out = generate(
        model, inputs, recipe, 8, min_new_tokens=0, do_sample=True, eos_token_id=stop, streamer=noted,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert noted.tokens == out.sequences[0].tolist()
    assert noted.tokens[inputs["input_ids"].shape[1] :] == whole[: whole.index(stop) + 1]
    assert noted.ends == 1


@pytest.mark.parametrize("recipe", ["vcd", "rbd"])
def test_a_streamer_has_the_tokens_before_an_error(recipe):
    model, inputs, noted, calls = wrapped(), prompt("llava"), Noted(), SimpleNamespace(left=4)
    wanted = generate(model, inputs, recipe)[0].tolist()

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        calls.left -= 1
        if not calls.left:
            raise RuntimeError("boom")
        return scores

    with pytest.raises(RuntimeError, match="boom"):
        generate(model, inputs, recipe, streamer=noted, logits_processor=LogitsProcessorList([fail]))
    assert noted.tokens[inputs["input_ids"].shape[1] :] == wanted[:3]
    assert noted.ends == 1
    assert generate(model, inputs, recipe)[0].tolist() == wanted


# Forwards


@pytest.mark.parametrize(
    "ways",
    [
        {},
        dict(num_beams=3),
        dict(do_sample=True, num_return_sequences=2),
        dict(cache_implementation="static", disable_compile=True),
    ],
    ids=["greedy", "beams", "sampled", "static"],
)
@pytest.mark.parametrize(("recipe", "branches"), [("vcd", 1), ("m3id", 1), ("rbd", 2), ("buckets", 5), ("dola_low", 0)])
@every_family
def test_one_forward_for_each_token(family, recipe, branches, ways):
    """Of the decoder: one for each prompt, then one for each token, whatever the rows; and the tower is not asked again."""
    model, inputs, new = wrapped(family), left_padded(three(family)), 5
    rows = 3 * (ways.get("num_beams") or ways.get("num_return_sequences") or 1)
    shapes: list[tuple[int, ...]] = []
    towers: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    tower = model.model.vision_tower if family == "llava" else model.model.visual
    tower.register_forward_pre_hook(lambda module, args, kwargs: towers.append(1), with_kwargs=True)
    generate(model, inputs, recipe, new, **ways)
    prompts = 1 + branches
    assert shapes[0] == (rows, inputs["input_ids"].shape[1])
    assert shapes[prompts:] == [(rows * prompts, 1)] * (new - 1)
    pictures = {"vcd": 2, "m3id": 1, "rbd": 2, "dola_low": 1, "buckets": 1 if rows == 3 else 6}
    if hasattr(model, "_supports_mm_encoder_outputs"):  # before, every prompt had its images encoded anew
        assert len(towers) == pictures[recipe]


# Noise and rows


@every_family
def test_noise_of_a_row_is_its_own_through_generate(family):
    """What the noised branch says to each row of a batch, in any order and beside text, is what it says to it alone."""
    model, rule = wrapped(family), show(Branch(name="noised", image=Noise(700, 5)))
    alone = [logits_of(model, inputs, rule)[0] for inputs in three(family)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        batch = logits_of(model, left_padded([three(family)[row] for row in order]), rule)
        for place, row in enumerate(order):
            torch.testing.assert_close(batch[place], alone[row], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone[0][0], reread(build(family), noised(three(family)[0], 700, 5))([]))
    other = logits_of(model, three(family)[0], show(Branch(name="noised", image=Noise(700, 6))))[0]
    assert (other[0] - alone[0][0]).abs().max() > 1e-2


@pytest.mark.parametrize("recipe", ["vcd", "pai_guidance", "rbd", "avisc", "agla_attention", "pai+vcd"])
@every_family
def test_a_row_without_an_image_is_answered_by_the_model_itself(family, recipe):
    """In a batch with rows that have one: its views are all the same, or it sees what others do not."""
    image, text = prompt(family), prompt(family, images=0, words=5, seed=9)
    text = {name: value for name, value in text.items() if name not in ("pixel_values", "image_grid_thw")}
    batch = left_padded([image | {name: image[name] for name in text}, image])
    length = image["input_ids"].shape[1]
    for name, value in text.items():
        batch[name][1] = torch.nn.functional.pad(value[0], (length - value.shape[1], 0))
    for name in ("pixel_values", "image_grid_thw"):
        if name in image:
            batch[name] = image[name]
    model = wrapped(family)
    tokens = generate(model, batch, recipe)
    assert torch.equal(tokens[0], generate(model, image, recipe)[0])
    assert torch.equal(tokens[1], generate(build(family), text)[0])


def video(family: str, words: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 90, (words,), generator=generator).tolist()
    film = [97, *[98] * 8, 96] if family == "qwen2_5_vl" else [50, 97, *[98] * 4, 96, 51, 97, *[98] * 4, 96]
    ids = torch.tensor([[1, 7, *film, *text]])
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=2 * (ids == 98).int(),
        pixel_values_videos=torch.randn(32, 96, generator=generator), video_grid_thw=torch.tensor([[2, 4, 4]]),
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["vcd", "rbd", "avisc"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_images_too(family, recipe):
    model, rows = wrapped(family), [video(family, 4, 1), video(family, 7, 2)]
    together = generate(model, left_padded(rows), recipe)
    for row, inputs in enumerate(rows):
        assert torch.equal(together[row], generate(model, inputs, recipe)[0])
    assert not torch.equal(together, generate(model, left_padded(rows)))


# Drafts


@every_family
def test_a_rule_that_depends_on_t_is_greedy_search_under_prompt_lookup(family):
    """The weight grows fast, so that a wrong t would choose other tokens; drafts are read and taken back."""
    model, inputs, fast = wrapped(family), repeating(family), M3ID(rate=0.3, beta=0.0)
    model.lm_head.weight.data[50:] *= 0.01
    lengths: list[int] = []
    numbers: list[list[int]] = []

    def noting(main: Tensor, others: list[Tensor], t: Tensor) -> Tensor:
        numbers.append(t.tolist())
        return fast.contrast(None).rule(main, others, t)

    rule = ContrastiveDecoding((Branch(name="unseen", image="drop"),), noting)
    tokens = generate(model, inputs, fast, 14)
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert torch.equal(generate(model, inputs, rule, 14, prompt_lookup_num_tokens=3), tokens)
    assert max(lengths[2:]) > 1, "drafts are read"
    assert all(t == list(range(t[0], t[0] + len(t))) for t in numbers)
    assert numbers[0][0] == 1
    starts = [t[0] for t in numbers]
    assert starts == sorted(starts)
    assert any(now[0] <= before[-1] for before, now in pairwise(numbers)), "drafts are taken back"
    still = one(Branch(name="unseen", image="drop"), math.expm1(0.3), 0.0)
    assert not torch.equal(generate(model, inputs, still, 14), tokens), "t must matter"


@every_family
def test_t_counts_tokens_from_one_in_static_caches_and_beams(family):
    seen: list[list[int]] = []

    def noting(main: Tensor, others: list[Tensor], t: Tensor) -> Tensor:
        seen.append(t.tolist())
        return main

    longer = Branch(name="x", prompt=lambda ids: torch.cat([ids[:1], torch.arange(30, 37), ids[1:]]))
    rule, model = ContrastiveDecoding((longer,), noting), wrapped(family)
    for ways in ({}, dict(num_beams=2), dict(cache_implementation="static", disable_compile=True)):
        seen.clear()
        generate(model, left_padded(three(family)), rule, 4, **ways)
        assert seen == [[1], [2], [3], [4]]


# Ends


@pytest.mark.parametrize("recipe", ["m3id", "pai_guidance", "rbd", "dola_low", "pai+vcd"])
@every_family
def test_rows_end_at_different_steps(family, recipe):
    """Each row is what it is alone up to its end, then padding; the cache grows by one token a step in every layer."""
    model, inputs, new = wrapped(family), left_padded(three(family)), 8
    tokens = generate(model, inputs, recipe, new).tolist()
    ends = {tokens[0][1], tokens[1][4]}
    out = generate(
        model, inputs, recipe, new, min_new_tokens=0, eos_token_id=sorted(ends), return_dict_in_generate=True
    )
    lengths = []
    for row, inputs_alone in enumerate(three(family)):
        stop = next((at + 1 for at, token in enumerate(tokens[row]) if token in ends), new)
        lengths.append(stop)
        found = out.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        assert found == (tokens[row][:stop] + [0] * new)[: len(found)]
        alone = generate(model, inputs_alone, recipe, new, min_new_tokens=0, eos_token_id=sorted(ends))
        assert alone[0].tolist() == tokens[row][:stop]
    assert len(set(lengths)) > 1
    made = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    assert made == max(lengths)
    wanted = inputs["input_ids"].shape[1] + made - 1
    assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {wanted}


@pytest.mark.parametrize("ways", [{}, dict(num_beams=3)], ids=["greedy", "beams"])
@every_family
def test_long_answers_are_what_reading_them_anew_says(family, ways):
    """Beyond the room that caches are made with: later tokens still see all earlier ones, in the order of their beam."""
    model, inputs, new, marker_ids = (
        wrapped(family),
        prompt(family),
        150,
        [2, 96, 97, 98, 99],
    )  # no images in the answer
    out = generate(
        model, inputs, "vcd", new, suppress_tokens=marker_ids, return_dict_in_generate=True, output_scores=True, **ways
    )
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    mains, others = (
        all_logits(build(family), {**inputs, "pixel_values": view["pixel_values"]}, answer)
        for view in (inputs, noised(inputs))
    )
    scores = torch.stack([cut(2 * main - other, main, 0.1) for main, other in zip(mains, others, strict=True)])
    if ways:
        total = scores.log_softmax(-1).gather(-1, answer[0][:, None]).sum() / new
        torch.testing.assert_close(out.sequences_scores[0], total, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(scores.index_fill(-1, torch.tensor(marker_ids), -math.inf).argmax(-1), answer[0])


def all_logits(model: Any, inputs: dict[str, Tensor], answer: Tensor) -> Tensor:
    """Logits ``[token, vocabulary]`` that predict each token of the answer, from one forward without a cache."""
    full = dict(inputs, input_ids=torch.cat([inputs["input_ids"], answer[:, :-1]], 1))
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    if "mm_token_type_ids" in inputs:
        full["mm_token_type_ids"] = (full["input_ids"] == IMAGE_TOKEN).int()
    return model(**full, use_cache=False).logits[0, inputs["input_ids"].shape[1] - 1 :].float()


# The cut-off, and processors of the library


LINEAR = {
    "vcd": lambda **o: VCD(alpha=5.0, **o),
    "rbd": lambda **o: RBD(text=3.0, visual=2.0, **o),
    "m3id": lambda **o: M3ID(rate=1.0, **o),
    "guidance": lambda **o: PAIGuidance(gamma=6.0, **o),
    "agla": lambda **o: AGLA(augment="attention", alpha=9.0, **o),
    "avisc": lambda **o: AvisC(alpha=5.0, **o),
}


@pytest.mark.parametrize("name", LINEAR)
@every_family
def test_beta_one_is_greedy_search_of_the_main_prompt(family, name):
    model, inputs = wrapped(family), left_padded(three(family))
    plain = generate(build(family), inputs)
    assert torch.equal(generate(model, inputs, LINEAR[name](beta=1.0)), plain)
    torch.manual_seed(0)
    assert torch.equal(generate(model, inputs, LINEAR[name](beta=1.0), do_sample=True, min_new_tokens=0), plain)
    assert not torch.equal(generate(model, inputs, LINEAR[name](beta=0.0)), plain)


@pytest.mark.parametrize(
    "ways",
    [{}, dict(do_sample=True, top_k=20, top_p=0.9, temperature=0.7), dict(num_beams=2)],
    ids=["greedy", "sampled", "beams"],
)
@pytest.mark.parametrize("name", [*LINEAR, "dola", "deco", "buckets"])
def test_penalties_and_suppressed_tokens_without_a_cut_off_give_no_nan(name, ways):
    recipe = LINEAR[name](beta=0.0) if name in LINEAR else {"dola": "dola_low"}.get(name, name)
    model, inputs = wrapped(), left_padded(three("llava"))
    torch.manual_seed(0)
    out = generate(
        model, inputs, recipe, min_new_tokens=4, suppress_tokens=[5, 6, 7], repetition_penalty=1.3, bad_words_ids=[[8]],
        no_repeat_ngram_size=2, return_dict_in_generate=True, output_scores=True, output_logits=True, **ways,
    )  # fmt: skip
    assert not any(found.isnan().any() for found in (*out.scores, *out.logits))
    assert not torch.isin(out.sequences[:, inputs["input_ids"].shape[1] :], torch.tensor([5, 6, 7, 8])).any()


# Edits and branches


@every_family
def test_an_edit_of_the_main_prompt_does_not_reach_a_branch_without_edits(family):
    """However strong it is: what the branch says is what it says without any edit, bit for bit, token after token."""
    inputs, strong = prompt(family), PAI(layers="0:", alpha=0.99)
    for image in ("drop", "blank", "same"):
        off, on = show(Branch(name="x", image=image, edits="off")), show(Branch(name="x", image=image))
        wanted = logits_of(wrapped(family), inputs, off)
        assert torch.equal(logits_of(wrapped(family), inputs, [strong, off]), wanted)
        reached = logits_of(wrapped(family), inputs, [strong, on])
        assert torch.equal(reached, wanted) == (image == "drop"), "without an image there is nothing to edit"
    torch.testing.assert_close(
        logits_of(wrapped(family), inputs, [strong, show(Branch(name="x", image="drop"))])[0, 0],
        reread(build(family), dropped(inputs))([]),
    )


@dataclass(frozen=True)
class EverySecond:
    """Image tokens by number, whatever the attention."""

    blank: ClassVar[bool] = False

    def layers(self, sizes: Any) -> tuple[int, ...]:
        return (1,)

    def choose(self, attention: Tensor, visual: Tensor) -> Tensor:
        return visual & (visual.cumsum(-1) % 2 == 0)


RARE = VAR(
    tau=2.4, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0
)  # the last prompt token, shared, is no sink


@pytest.mark.parametrize("edit", [PAI(layers="0:", alpha=0.9), RARE], ids=["pai", "var"])
@every_family
def test_edits_act_among_the_image_tokens_that_a_branch_sees(family, edit):
    """First token of each row of a padded batch: a forward of the edited model under a dense mask that hides the others."""
    rule = show(Branch(name="x", tokens=EverySecond()))
    found = logits_of(wrapped(family), left_padded(three(family)), [edit, rule], new=1, min_new_tokens=0)
    bare = logits_of(wrapped(family), left_padded(three(family)), rule, new=1, min_new_tokens=0)
    for row, inputs in enumerate(three(family)):
        ids = inputs["input_ids"][0]
        image = ids == IMAGE_TOKEN
        gone = image & (image.cumsum(0) % 2 == 1)
        seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        seen[-1, gone] = False
        dense = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        more = {}
        if family != "llava":
            grids = {name: inputs[name] for name in inputs if name != "pixel_values"}
            space = build(family).model.get_rope_index(**grids)[0]
            more["position_ids"] = torch.cat([torch.arange(len(ids)).expand(1, 1, -1), space])
        model = wrapped(family, edit)
        wanted = model(**{**inputs, "attention_mask": dense}, **more, use_cache=False).logits[0, -1]
        torch.testing.assert_close(found[row, 0], wanted, rtol=1e-4, atol=1e-4)
    assert (bare - found).abs().max() > 1e-3, "the edit must do something"


@pytest.mark.parametrize(
    "ways", [{}, dict(num_beams=3), dict(cache_implementation="static", disable_compile=True)], ids=str
)
@every_family
def test_var_and_rbd(family, ways):
    """End to end: VAR on the main prompt and among the tokens of the visual branch, not on the noised one."""
    model, inputs = wrapped(family), left_padded(three(family))
    both = generate(model, inputs, [SINKS, RBD()], 8, **ways)
    for row, alone in enumerate(three(family)):
        assert torch.equal(generate(model, alone, [SINKS, RBD()], 8, **ways)[0], both[row])
    assert not torch.equal(both, generate(model, inputs, RBD(), 8, **ways))
    assert not torch.equal(both, generate(model, inputs, SINKS, 8, **ways))
    # a visual branch that sees everything is the edited main prompt, and has no say in  (1 + t - v) l - t l_text + v l
    whole = generate(model, inputs, [SINKS, RBD(share=1.0, visual=0.9)], 8, **ways)
    text = generate(model, inputs, [SINKS, one(Branch(name="text", image=Noise(500, 0), edits="off"))], 8, **ways)
    assert torch.equal(whole, text)
    model = wrapped(family, [SINKS, RBD()])
    generate(model, inputs, None, 8, **ways)
    assert all(model.vlmattn.report()["fired"].values())


# What is left


@pytest.mark.parametrize("recipe", ["pai+vcd", "rbd", "buckets", "dola_low", "opera"])
@every_family
def test_unwrap_leaves_a_bare_model(family, recipe, tmp_path):
    def hooks(model: Any) -> dict[str, int]:
        return {
            name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()
        }

    model, untouched, inputs = build(family), build(family), left_padded(three(family))
    generate(model, prompt(family))  # the library puts hooks of its own on modules that it has run
    attributes, before, kind = set(model.__dict__), hooks(model), type(model)
    for turn in range(2):
        vlmattn.wrap(model, recipe)
        assert type(model) is kind
        generate(model, inputs)
        if turn == 0 and recipe != "opera":
            generate(model, inputs, num_beams=2)
        vlmattn.unwrap(model)
    assert set(model.__dict__) == attributes
    assert hooks(model) == before
    assert type(model) is kind
    assert not hasattr(model, "_reorder_cache")
    assert model.generate.__func__ is kind.generate
    assert model.prepare_inputs_for_generation.__func__ is kind.prepare_inputs_for_generation
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    found, wanted = (
        generate(each, inputs, return_dict_in_generate=True, output_logits=True) for each in (model, untouched)
    )
    assert all(map(torch.equal, found.logits, wanted.logits))
    assert {layer.keys.shape[0] for layer in found.past_key_values.layers} == {3}
    if family != "llava":
        assert torch.equal(model.model.rope_deltas, untouched.model.rope_deltas)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [kind.__name__]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@every_family
def test_threads_with_rules_of_their_own(family):
    model, recipes = wrapped(family), ["vcd", "pai+rbd", "buckets", "m3id", "none", "opera"]
    inputs = three(family)
    wanted = [generate(model, inputs[number % 3], recipe, 10) for number, recipe in enumerate(recipes)]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            try:
                found[number] = generate(model, inputs[number % 3], recipes[number], 10)
            except Exception as error:
                found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [isinstance(found[n], Tensor) and torch.equal(found[n], w) for n, w in enumerate(wanted)] == [True] * 6


@every_family
def test_a_call_within_a_call(family):
    """A processor may ask the same model, with its rule or without, and neither call disturbs the other."""
    model, inputs, other = wrapped(family, "pai+rbd"), prompt(family), three(family)[2]
    wanted, inner, bare = generate(model, inputs), generate(model, other), generate(model, other, "none")
    agree: list[bool] = []

    def ask(ids: Tensor, scores: Tensor) -> Tensor:
        agree.append(torch.equal(generate(model, other), inner) and torch.equal(generate(model, other, "none"), bare))
        return scores

    assert torch.equal(generate(model, inputs, logits_processor=LogitsProcessorList([ask])), wanted)
    assert agree == [True] * 6
    assert CALL.get() is None


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_constructible_and_documented(name):
    preset = vlmattn.presets()[name]
    method = find_method(preset.method)
    assert f"`{name}`" in (Path(__file__).parents[2] / "README.md").read_text()
    assert all((preset.about, method.__doc__, method.info.paper, method.info.cost, method.info.faithful))
    recipe = Recipe.of(name)
    assert recipe.decoding is not None
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    if name == "icd":
        with pytest.raises(OptionError, match="give the processor"):
            wrapped(recipe=name)
    else:
        assert wrapped(recipe=name).vlmattn.recipe == recipe


# What is refused


@pytest.mark.parametrize("recipe", ["vcd", "m3id", "rbd", "dola_low", "opera"])
@every_family
def test_positions_of_ones_own_are_refused(family, recipe):
    """Branches and searches would go on from others: silently another answer."""
    model, inputs = wrapped(family, recipe), prompt(family)
    positions = 3 * torch.arange(inputs["input_ids"].shape[1])[None]
    with pytest.raises(UnsupportedError, match="position_ids"):
        generate(model, {**inputs, "position_ids": positions})
    assert CALL.get() is None
    generate(model, {**inputs, "position_ids": None})


@dataclass
class Unhashable:
    weight: float = 1.0
    blank: ClassVar[bool] = False

    def layers(self, sizes: Any) -> tuple[int, ...]:
        return (1,)

    def choose(self, attention: Tensor, visual: Tensor) -> Tensor:
        return visual

    def __call__(self, main: Tensor, *others: Any) -> Tensor:
        return main


BAD = {
    "a rule that cannot be looked up": (lambda: ContrastiveDecoding((), Unhashable()), "hashable.*frozen"),
    "a choice that cannot": (lambda: one(Branch(name="x", tokens=Unhashable())), "hashable.*frozen"),
    "an image function that cannot": (lambda: one(Branch(name="x", image=Unhashable())), "hashable.*frozen"),
    "layers in words": (lambda: ContrastiveDecoding((), lambda m, o, t: m, ("1",)), "layers must be whole numbers"),
    "no choice of tokens": (lambda: Branch(name="x", tokens="attention"), "tokens must be a TokenChoice"),
    "a class for noise": (lambda: Branch(name="x", image=Noise), "image must be one of"),
    "a class for a prompt": (lambda: Branch(name="x", prompt=Instead), "prompt must be same"),
    "no name": (lambda: Branch(name=""), "needs a name"),
    "a number for a name": (lambda: Branch(name=3), "needs a name"),
    "a step of the noise": (lambda: Noise(step=True), "whole number within"),
    "a seed": (lambda: Noise(seed=2**64), "64 bits"),
    "a truth for a seed": (lambda: Noise(seed=True), "64 bits"),
    "a temperature": (lambda: Mixture(temperature="warm"), "temperature above 0"),
    "a rate": (lambda: Growth(math.nan), "rate of a Growth must be a finite number"),
    "a cap": (lambda: Growth(0.1, math.nan), "cap of a Growth must be a finite number"),
    "too large a share": (lambda: TopAttended(1.5, "0:"), r"must be within 0\.\.1"),
    "no share": (lambda: TopAttended(math.nan, "0:"), r"must be within 0\.\.1"),
}


@pytest.mark.parametrize("what", BAD)
def test_rules_made_by_hand_say_what_is_wrong(what):
    make, match = BAD[what]
    with pytest.raises(OptionError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Odd(EverySecond):
    places: Any = (1,)
    answer: Any = None

    def layers(self, sizes: Any) -> Any:
        return self.places

    def choose(self, attention: Tensor, visual: Tensor) -> Any:
        return self.answer(visual) if self.answer else visual


@pytest.mark.parametrize("places", [(), (4,), (-1,)], ids=str)
def test_choices_that_look_at_layers_which_are_not_there(places):
    with pytest.raises(OptionError, match=r"branch 'x': its tokens look at the layers .* 0\.\.3"):
        wrapped(recipe=one(Branch(name="x", tokens=Odd(places=places))))


@pytest.mark.parametrize(
    "answer",
    [lambda v: v.float(), lambda v: v.int(), lambda v: v[:, :3], lambda v: v.tolist()],
    ids=["floats", "integers", "shape", "list"],
)
def test_choices_that_are_none(answer):
    model = wrapped(recipe=one(Branch(name="x", tokens=Odd(answer=answer))))
    with pytest.raises(InputError, match=r"branch 'x': choose\(\) of its tokens must return a bool tensor \[1, 23\]"):
        generate(model, prompt("llava"))
    assert CALL.get() is None
