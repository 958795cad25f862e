"""Branches inside one forward equal an oracle that reads every view of every row by itself, anew for every token."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from oracle import attention, blank, cut, decode, dropped, noised, reread, three, with_ids
from tiny import FAMILIES, IMAGE_TOKEN, build, left_padded, prompt
from transformers.generation.streamers import BaseStreamer

import vlmattn
from vlmattn import PAI, RBD, VAR, VCD, VHR, Branch, Contrast, ContrastiveDecoding, Noise
from vlmattn.decoding import TopAttended

NEW = 6
SINKS = VAR(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0)
no_grad = torch.no_grad()
family_matrix = pytest.mark.parametrize("family", FAMILIES)


def vcd(views, t):
    return cut(2 * views[0] - views[1], views[0], 0.1)


def guided(views, t):
    main, other = (view.log_softmax(-1) for view in views)
    return cut(other + 1.1 * (main - other), views[0], 0.1)


def m3id(views, t):
    main, other = (view.log_softmax(-1) for view in views)
    gamma = torch.exp(torch.tensor(-0.02 * t))
    return cut(main + (1 - gamma) / gamma * (main - other), views[0], 0.1)


def rbd(views, t):
    main, text, visual = views
    return cut(1.5 * main - text + 0.5 * visual, main, 0.1)


def agla(views, t):
    return cut(views[0] + 2 * views[1], views[0], 0.5)


def longer(ids):
    return torch.cat([ids[:1], torch.tensor([33, 34, 35, 36, 37]), ids[1:]])


def shorter(ids):
    return torch.cat([ids[:1], ids[2:]])


def based(family, factor, inputs):
    model = build(family)
    text = model.config.get_text_config()
    text.rope_parameters["rope_theta"] *= factor
    rotary = type(model.model.language_model.rotary_emb)(text)
    model.model.language_model.rotary_emb = rotary
    return reread(model, inputs)


def without_tokens(family, share, inputs, zeroed):
    """Image tokens below the most attended ``share`` have zero features (from the prompt's beginning)."""
    model = build(family)
    weights = attention(build(family), inputs)[1:3].mean(0)
    where = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten()
    keep = int(torch.tensor(len(where) * share).ceil())
    kept = where[weights[where].sort(descending=True, stable=True).indices[:keep]]
    gone = torch.tensor([slot for slot in where.tolist() if slot not in kept.tolist()])
    if zeroed:

        def blind(module, args, kwargs):
            embeds = kwargs["inputs_embeds"].clone()
            embeds[:, gone] = 0
            later = kwargs.get("deepstack_visual_embeds") or ()  # Qwen3-VL adds features after its first layers too
            later = [features.masked_fill(torch.isin(where, gone)[:, None], 0) for features in later]
            return args, {**kwargs, "inputs_embeds": embeds, **({"deepstack_visual_embeds": later} if later else {})}

        model.model.language_model.register_forward_pre_hook(blind, with_kwargs=True)
        return reread(model, inputs)
    return hiding(model, inputs, gone)


def hiding(model, inputs, gone):
    """Rows from the last prompt token on do not see the slots ``gone``: a dense mask, everything read anew."""
    prompt_length = inputs["input_ids"].shape[1]

    def logits(answer):
        full = dict(inputs, input_ids=torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.int64)], 1))
        length = full["input_ids"].shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen[prompt_length - 1 :, gone] = False
        full["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        if "mm_token_type_ids" in inputs:
            full["mm_token_type_ids"] = (full["input_ids"] == IMAGE_TOKEN).int()
            position = {**full, "attention_mask": torch.ones_like(full["input_ids"])}
            grids = {
                name: position.get(name)
                for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
            }
            space = model.model.get_rope_index(**grids)[0]
            full["position_ids"] = torch.cat([torch.arange(length).expand(1, 1, -1), space])
        return model(**full, use_cache=False).logits[0, -1].float()

    return logits


def early(family, inputs, layers, normed):
    """One stream per layer: the residual stream that enters it, through the head."""
    model = build(family)

    def stream(layer):
        def logits(answer):
            kept = {}
            hook = model.model.language_model.layers[layer].register_forward_pre_hook(
                lambda module, args, kwargs: kept.update(hidden=args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            reread(model, inputs)(answer)
            hook.remove()
            hidden = kept["hidden"][0, -1]
            return model.lm_head(model.model.language_model.norm(hidden) if normed else hidden)

        return logits

    return [stream(layer) for layer in layers]


def dola(views, t):
    last = views[0].log_softmax(-1)

    def far(view):
        other = view.log_softmax(-1)
        middle = ((last.exp() + other.exp()) / 2).log()
        return (middle.exp() * (middle - last)).sum() + (middle.exp() * (middle - other)).sum()

    return cut(last - max(views[1:], key=far).log_softmax(-1), views[0], 0.1)


def edited(family, methods, inputs):
    """A stream under attention edits: a wrapped model with its own cache, token by token."""
    model = vlmattn.wrap(build(family), methods)
    kept = {"cache": None, "read": 0}

    def logits(answer):
        if not answer:
            out = model(**inputs, use_cache=True)
        else:
            out = model(input_ids=torch.tensor([answer[-1:]]), past_key_values=kept["cache"])
        kept["cache"] = out.past_key_values
        return out.logits[0, -1].float()

    return logits


def one(branch, weight=1.0, beta=0.1):
    return ContrastiveDecoding((branch,), Contrast((weight,), beta=beta))


# name -> (recipe, views of a row beside the main one, rule)
CASES = {
    "vcd": ("vcd", lambda f, i: [reread(build(f), noised(i))], vcd),
    "pai_guidance": ("pai_guidance", lambda f, i: [reread(build(f), dropped(i))], guided),
    "m3id": ("m3id", lambda f, i: [reread(build(f), dropped(i))], m3id),
    "blank": (one(Branch(name="x", image="blank")), lambda f, i: [reread(build(f), blank(i))], vcd),
    "darker": (
        one(Branch(name="x", image=lambda pixels: pixels * 0.1)),
        lambda f, i: [reread(build(f), {**i, "pixel_values": i["pixel_values"] * 0.1})],
        vcd,
    ),
    "longer": (one(Branch(name="x", prompt=longer)), lambda f, i: [reread(build(f), with_ids(i, longer))], vcd),
    "shorter": (one(Branch(name="x", prompt=shorter)), lambda f, i: [reread(build(f), with_ids(i, shorter))], vcd),
    "agla_attention": ("agla_attention", lambda f, i: [without_tokens(f, 0.5, i, zeroed=True)], agla),
    "hidden": (
        one(Branch(name="x", tokens=TopAttended(0.5, "1/4:3/4"))),
        lambda f, i: [without_tokens(f, 0.5, i, zeroed=False)],
        vcd,
    ),
    "rbd": ("rbd", lambda f, i: [reread(build(f), noised(i)), without_tokens(f, 0.3, i, zeroed=False)], rbd),
    "rope": (one(Branch(name="x", rope=2.5)), lambda f, i: [based(f, 2.5, i)], vcd),
    "dola": ("dola_low", lambda f, i: early(f, i, [0], normed=False), dola),
    "dola_high": ("dola_high", lambda f, i: early(f, i, [2], normed=False), dola),
    "three": (
        ContrastiveDecoding(
            (Branch(name="a", image=Noise(900, 5)), Branch(name="b", image="drop"), Branch(name="c", prompt=longer)),
            Contrast((0.5, 0.25, -0.5), beta=0.1),
        ),
        lambda f, i: [
            reread(build(f), noised(i, 900, 5)), reread(build(f), dropped(i)), reread(build(f), with_ids(i, longer))
        ],
        lambda v, t: cut(1.25 * v[0] - 0.5 * v[1] - 0.25 * v[2] + 0.5 * v[3], v[0], 0.1),
    ),
}  # fmt: skip
EDITED = {  # name -> (recipe, edits of the main prompt, views beside, rule)
    "pai+vcd": ("pai+vcd", PAI(), lambda f, i: [edited(f, PAI(), noised(i))], vcd),
    "pai+guidance": ("pai+pai_guidance", PAI(), lambda f, i: [reread(build(f), dropped(i))], guided),
    "var+vcd": ([SINKS, VCD()], SINKS, lambda f, i: [edited(f, SINKS, noised(i))], vcd),
    "vhr+vcd": (
        [VHR(layers="0:"), VCD()],
        VHR(layers="0:"),
        lambda f, i: [edited(f, VHR(layers="0:"), noised(i))],
        vcd,
    ),
    "own": (
        [SINKS, one(Branch(name="x", image="blank", edits=(PAI(layers="0:"),)))],
        SINKS,
        lambda f, i: [edited(f, PAI(layers="0:"), blank(i))],
        vcd,
    ),
}


def run(model, inputs, recipe, new=NEW, **options):
    settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **inputs, **{**settings, **options}, preset=recipe, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def same(found, wanted):
    torch.testing.assert_close(found.isinf(), wanted.isinf())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@functools.cache
def truth(family, name):
    """Tokens and scores of the three prompts."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in EDITED:
            _, edits, views, rule = EDITED[name]
            return [decode([edited(family, edits, i), *views(family, i)], rule, NEW) for i in three(family)]
        _, views, rule = CASES[name]
        return [decode([reread(build(family), i), *views(family, i)], rule, NEW) for i in three(family)]


def recipe_of(name):
    return (EDITED.get(name) or CASES[name])[0]


@no_grad
@pytest.mark.parametrize("name", [*CASES, *EDITED])
@family_matrix
def test_equals_the_oracle_in_a_padded_batch(family, name):
    if (family, name) == ("qwen3_vl", "darker"):
        pytest.skip("the oracle, which reads the answer as a prompt, meets an image token that this tiny model writes")
    model = vlmattn.wrap(build(family), "none")
    tokens, logits = run(model, left_padded(three(family)), recipe_of(name))
    for row, (wanted, scores) in enumerate(truth(family, name)):
        assert tokens[row].tolist() == wanted
        same(logits[row], scores)
    plain, _ = run(model, left_padded(three(family)), "none")
    assert not torch.equal(tokens, plain) or name in ("pai_guidance", "m3id"), "the case must do something"


@no_grad
@pytest.mark.parametrize("name", ["vcd", "pai_guidance", "longer", "rbd", "dola", "rope", "pai+vcd", "var+vcd"])
@family_matrix
def test_static_cache_eager_attention_and_batch_of_one(family, name):
    inputs, recipe = left_padded(three(family)), recipe_of(name)
    tokens, logits = run(vlmattn.wrap(build(family), "none"), inputs, recipe)
    still, others = run(
        vlmattn.wrap(build(family), "none"), inputs, recipe, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(still, tokens)
    same(others, logits)
    eager = vlmattn.wrap(build(family, "eager"), "none")
    assert torch.equal(run(eager, inputs, recipe)[0], tokens)
    order = [2, 0, 1]
    turned, _ = run(eager, left_padded([three(family)[row] for row in order]), recipe)
    assert torch.equal(turned, tokens[order])
    for row, alone in enumerate(three(family)):
        assert torch.equal(run(eager, alone, recipe)[0][0], tokens[row])


@no_grad
@pytest.mark.parametrize("name", ["vcd", "pai_guidance", "rbd", "three", "pai+vcd", "dola"])
@family_matrix
def test_beams_equal_a_beam_search_over_the_oracle(family, name):
    """Three beams, four tokens, by hand: all hypotheses have one length, as no end comes."""
    inputs = three(family)[1]
    recipe, beams, new = recipe_of(name), 3, 4
    _, views, rule = CASES[name] if name in CASES else (None, EDITED[name][2], EDITED[name][3])

    def scores(answer):
        main = edited(family, EDITED[name][1], inputs) if name in EDITED else reread(build(family), inputs)
        streams = [main, *views(family, inputs)]
        for t in range(len(answer) + 1):  # edited streams have caches and need every token
            found = rule([stream(answer[:t]) for stream in streams], t + 1)
        found = found.log_softmax(-1)
        found[2] = -torch.inf  # min_new_tokens
        return found

    kept = [((), 0.0)]
    for _ in range(new):
        grown = []
        for answer, total in kept:
            values, tokens = scores(list(answer)).topk(2 * beams)
            grown += [((*answer, int(v)), total + float(p)) for p, v in zip(values, tokens, strict=True)]
        kept = sorted(grown, key=lambda pair: -pair[1])[:beams]
    model = vlmattn.wrap(build(family), "none")
    tokens, _ = run(model, inputs, recipe, new, num_beams=beams)
    assert tokens[0].tolist() == list(kept[0][0])
    batch, _ = run(model, left_padded(three(family)), recipe, new, num_beams=beams, num_return_sequences=2)
    assert batch[2].tolist() == list(kept[0][0])
    assert batch[3].tolist() == list(kept[1][0])


@no_grad
@pytest.mark.parametrize("name", ["vcd", "m3id", "longer", "hidden", "rbd", "pai+vcd", "dola", "rope"])
@family_matrix
def test_prompt_lookup_is_greedy_search_with_fewer_forwards(family, name):
    inputs, recipe = repeating(family), recipe_of(name)
    model = vlmattn.wrap(build(family), "none")
    flat_head(model)
    tokens, _ = run(model, inputs, recipe, 12)
    forwards = count_forwards(model)
    out = model.generate(
        **inputs,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        preset=recipe,
        prompt_lookup_num_tokens=3,
    )
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], tokens)
    assert sum(forwards["tokens"]) > 0
    assert forwards["drafts"], "drafts were read"


def repeating(family):
    inputs = prompt(family, words=2)
    more = torch.tensor([[40, 41, 42, 40, 41, 42, 40, 41]])
    return {
        name: torch.cat(
            [value, more if name == "input_ids" else torch.full_like(more, int(name == "attention_mask"))], 1
        )
        if name in ("input_ids", "attention_mask", "mm_token_type_ids")
        else value
        for name, value in inputs.items()
    }


def flat_head(model):
    """Few words, so that the answer repeats itself."""
    model.lm_head.weight.data[50:] *= 0.01


def count_forwards(model):
    found = {"tokens": [], "drafts": []}

    def count(module, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] < 10:
            found["drafts" if ids.shape[1] > 1 else "tokens"].append(ids.shape[0])

    model.register_forward_pre_hook(count, with_kwargs=True)
    return found


@no_grad
@pytest.mark.parametrize(
    ("recipe", "reads"),
    [
        ("vcd", [(3, 30), (3, 30)]),
        ("pai_guidance", [(3, 30), (3, 10)]),
        ("rbd", [(3, 30), (3, 30), (3, 1)]),
        ("dola_low", [(3, 30)]),
        ("none", [(3, 30)]),
    ],
)
def test_one_forward_for_each_token(recipe, reads):
    model, shapes = vlmattn.wrap(build("llava"), "none"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = [prompt("llava", words=11, seed=seed) for seed in (1, 2, 3)]
    run(model, left_padded(prompts), recipe, 4)
    groups = max(1, len(reads))
    assert [shape[0] for shape in shapes[: len(reads)]] == [read[0] for read in reads]
    assert [shape[1] == 1 for shape in shapes[: len(reads)]] == [read[1] == 1 for read in reads]
    assert shapes[len(reads) :] == [(3 * groups, 1)] * 3


@no_grad
@family_matrix
def test_rows_that_end_early_leave_the_others_alone(family):
    model, inputs = vlmattn.wrap(build(family), "none"), left_padded(three(family))
    tokens, _ = run(model, inputs, "vcd")
    stop = int(tokens[1, 2])
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=stop, preset="vcd")
    for row, wanted in zip(out[:, inputs["input_ids"].shape[1] :].tolist(), tokens.tolist(), strict=True):
        if stop in wanted:
            end = wanted.index(stop) + 1
            wanted = wanted[:end] + [0] * (NEW - end)
        assert row == wanted[: len(row)] + [0] * (len(row) - NEW)


@no_grad
@pytest.mark.parametrize("recipe", [VCD(alpha=0, beta=0), "none", [VCD(alpha=0, beta=0)]])
@family_matrix
def test_an_idle_rule_is_the_bare_model_bit_for_bit(family, recipe):
    inputs = left_padded(three(family))
    bare = build(family)
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    wanted = bare.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    vlmattn.wrap(bare, "none")
    _, logits = run(bare, inputs, recipe)
    assert torch.equal(logits, torch.stack(wanted.logits, 1))
    run(bare, inputs, "vcd")
    vlmattn.unwrap(bare)
    again = bare.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    assert all(map(torch.equal, again.logits, wanted.logits))


@no_grad
def test_a_branch_without_edits_runs_as_if_there_were_none():
    """Hidden states of its rows are those of a forward of as many rows without any edit."""
    inputs = prompt("llava")

    def last_hidden(recipe):
        model, kept = vlmattn.wrap(build("llava"), "none"), []
        model.model.language_model.layers[-1].register_forward_hook(lambda module, args, out: kept.append(out))
        run(model, inputs, recipe, 2)
        return (kept[-1][0] if isinstance(kept[-1], tuple) else kept[-1])[1]

    apart = one(Branch(name="x", image="drop", edits="off"), beta=0.0)
    alone, beside = last_hidden(apart), last_hidden([PAI(layers="0:", alpha=1e-6), apart])
    torch.testing.assert_close(alone, beside, rtol=0, atol=0)


class Noted(BaseStreamer):
    def __init__(self):
        self.tokens, self.ends = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ends += 1


@no_grad
@pytest.mark.parametrize("recipe", ["vcd", "rbd", "opera"])
def test_streamers_see_the_tokens_and_the_end(recipe):
    model, inputs, noted = vlmattn.wrap(build("llava"), "none"), prompt("llava"), Noted()
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, preset=recipe, streamer=noted)
    assert noted.tokens == out[0].tolist()
    assert noted.ends == 1


@no_grad
def test_sampling_follows_the_rule():
    """Chi-square of 4000 first tokens against softmax(rule), and the same draws again from the same seed."""
    model, inputs = vlmattn.wrap(build("llava"), "none"), prompt("llava")
    model.lm_head.weight.data *= 8
    rule = VCD(alpha=1.0, beta=0.05)
    _, logits = run(model, inputs, rule, 1, min_new_tokens=0)
    wanted = logits[0, 0].softmax(-1)

    def draw():
        torch.manual_seed(0)
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=4000, preset=rule, pad_token_id=0
        )
        return out[:, -1]

    drawn = draw()
    assert torch.equal(drawn, draw())
    counts = torch.bincount(drawn, minlength=len(wanted))
    assert int(counts[wanted == 0].sum()) == 0
    common = wanted * 4000 >= 5
    seen = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([wanted[common], wanted[~common].sum()[None]]).double()
    inside = expected > 0
    expected = expected / expected[inside].sum() * seen[inside].sum()
    statistic = ((seen[inside] - expected[inside]).square() / expected[inside]).sum()
    freedom = torch.tensor((int(inside.sum()) - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, statistic / 2)) > 1e-4
    assert int(inside.sum()) > 3, "several tokens are plausible"


@no_grad
def test_sampled_rows_go_on_as_greedy_ones_would():
    """Every sampled sequence is scored again by the oracle: its tokens were possible under the rule."""
    model, inputs = vlmattn.wrap(build("llava"), "none"), prompt("llava")
    torch.manual_seed(1)
    out = model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=True,
        top_k=1,
        num_return_sequences=3,
        preset="vcd",
        pad_token_id=0,
    )
    tokens, _ = run(model, inputs, "vcd", 4)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == [tokens[0].tolist()] * 3


@no_grad
@pytest.mark.parametrize("recipe", [VCD(beta=0.0), RBD(beta=0.0), "dola_low"])
def test_processors_never_meet_nan(recipe):
    model, inputs = vlmattn.wrap(build("llava"), "none"), left_padded(three("llava"))
    out = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=3, do_sample=False, pad_token_id=0, preset=recipe, suppress_tokens=[5, 6, 7],
        repetition_penalty=1.3, bad_words_ids=[[8]], return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert not any(scores.isnan().any() for scores in out.scores)
    assert not torch.isin(out.sequences[:, inputs["input_ids"].shape[1] :], torch.tensor([5, 6, 7, 8])).any()


@no_grad
@family_matrix
def test_extra_outputs_have_the_rows_of_the_call(family):
    model, inputs = vlmattn.wrap(build(family, "eager"), "none"), left_padded(three(family))
    out = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, preset="rbd", return_dict_in_generate=True,
        output_attentions=True, output_hidden_states=True, output_logits=True, output_scores=True,
    )  # fmt: skip
    for step in (*out.attentions, *out.hidden_states):
        assert all(len(layer) == 3 for layer in step)
    assert all(len(found) == 3 for found in (*out.logits, *out.scores))
    longest = inputs["input_ids"].shape[1]
    assert {layer.keys.shape[0] for layer in out.past_key_values.layers} == {9}
    assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {longest + 2}


@no_grad
def test_half_precision_runs():
    model, inputs = vlmattn.wrap(build("llava").to(torch.bfloat16), "none"), left_padded(three("llava"))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    for recipe in ("vcd", "rbd", "dola_low", "pai+pai_guidance", "buckets"):
        _, logits = run(model, inputs, recipe)
        assert logits.dtype == torch.float32
        assert not logits.isnan().any()
