"""Options of VAR: profiles, sinks by direction, sinks among generated tokens; against the definition in plain loops."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import TINY_MODEL, bound
from stores import kept
from test_masks import Token, batch_of, inputs_of, write
from tiny import FAMILIES, build, generate, prompt
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import vlmattn
from vlmattn import VAR, InputError, OptionError, Recipe, SinkProfile
from vlmattn.interventions import var
from vlmattn.interventions.sinks import SinkTest
from vlmattn.models import find_family

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)  # logits of a random model are smaller
PLACEHOLDERS = [96, 97, 98, 99]
MASSIVE, LIKE, OPPOSITE = 42, 43, 44  # planted: massive in a sink dimension, parallel and opposite to the first token
DIMS, TAU = (3, 17), 2.5
OPTIONS = dict(dims=DIMS, tau=TAU, max_sink=0.9, min_visual=0.01, keep=0.3)
family_matrix = pytest.mark.parametrize("family", FAMILIES)


def planted(family: str, attn: str = "sdpa", **kwargs) -> PreTrainedModel:
    """A tiny model in which some words are sinks wherever they stand."""
    model = build(family, attn, **kwargs)
    table = model.get_input_embeddings().weight.data
    generator = torch.Generator().manual_seed(1)
    first = 60 * torch.randn(32, generator=generator)
    first[list(DIMS)] = 0.1
    table[1], table[LIKE], table[OPPOSITE] = first, 0.7 * first, -1.2 * first
    table[MASSIVE] = torch.randn(32, generator=generator)
    table[MASSIVE, 17] = -40.0
    table[20, list(DIMS)] = 0.0  # a word that is no sink where it enters
    return model


def sinks_by_hand(states: Tensor, tokens: list[Token], kind: str, extend: bool, tau: float = TAU) -> set[int]:
    """Slots of the sinks of one sample from the residual stream ``[tokens, hidden]``."""
    real = [n for n, t in enumerate(tokens) if t.real]
    first = states[real[0]].double()
    out = set()
    for n in real:
        x = states[n].double()
        phi = max(abs(float(x[d])) for d in DIMS) / (sum(float(v) ** 2 for v in x) / len(x) + 1e-6) ** 0.5
        cos = abs(float(x @ first)) / float(x.norm() * first.norm())
        assert abs(phi - tau) > 1e-4, "the premise: nothing lies on the threshold"
        assert abs(cos - 0.9) > 1e-4
        by_phi, by_cos = phi > tau and kind != "cos", cos > 0.9 and kind != "phi"
        if (by_phi or by_cos) and (extend or not tokens[n].generated):
            out.add(n)
    return out


Change = Callable[[Tensor, set[int], set[int], Any], Tensor]
"""``change(row, sinks, image, method)``: one head's row of attention after the edit."""


def redistributed(row: Tensor, sinks: set[int], image: set[int], method: VAR) -> Tensor:
    """One head's row of attention after the edit."""
    a = row.double().tolist()
    visual, wasted = sum(a[j] for j in image), sum(a[j] for j in image & sinks)
    room = visual - wasted
    if visual < method.min_visual or wasted > method.max_sink * visual or room <= 0:
        return row
    moved = (1 - method.keep) * sum(a[j] for j in sinks)
    for j in sinks:
        a[j] *= method.keep
    for j in image - sinks:
        a[j] *= 1 + moved / room
    return torch.tensor(a, dtype=row.dtype)


def naive(
    model: PreTrainedModel, rows: list[list[Token]], inputs: dict, method: SinkTest, layer: int, change: Change
) -> tuple[Tensor, list]:
    """Logits of the bare model with the edit in one layer, which does not change the residual stream that enters it."""
    model.set_attn_implementation({"text_config": "eager"})
    states = model(**inputs, output_hidden_states=True).hidden_states[layer]
    extend = getattr(method, "extend", False)
    sinks = [sinks_by_hand(states[b], row, method.sinks, extend, method.tau) for b, row in enumerate(rows)]
    image = [{n for n, t in enumerate(row) if t.image >= 0} for row in rows]

    def attend(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights = (query @ key.transpose(-1, -2) * scaling + mask).softmax(-1)
        if module.layer_idx == layer:
            for b, row in enumerate(rows):
                for i in range(min(image[b]), len(row)):
                    if row[i].is_text:
                        for h in range(weights.shape[1]):
                            weights[b, h, i] = change(weights[b, h, i], sinks[b], image[b], method)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("var_for_test", attend)
    AttentionMaskInterface.register("var_for_test", eager_mask)
    model.set_attn_implementation({"text_config": "var_for_test"})
    return model(**inputs).logits, sinks


def talk(family: str, *parts, seed: int = 3, plant: dict[int, int] | None = None) -> list[Token]:
    """A prompt whose words at the given places from the end are planted ones."""
    tokens = write(family, *parts, seed=seed)
    for place, word in (plant or {}).items():
        tokens[-place] = Token(word, turn=tokens[-place].turn, instruction=True)
    return tokens


class Say:
    """A logits processor that makes every sample say given words."""

    def __init__(self, words: list[int], prompt: int) -> None:
        self.words, self.prompt = words, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        at = min(ids.shape[1] - self.prompt, len(self.words) - 1)
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([self.words[at]]), 0.0)


SAID = [20, MASSIVE, LIKE, 30, MASSIVE, OPPOSITE, 31]


def check(
    family: str,
    rows: list[list[Token]],
    method: SinkTest,
    layer: int,
    attn: str = "sdpa",
    change: Change = redistributed,
) -> Tensor:
    """Logits of forced words against the naive model, with every kind of cache; returns those logits."""
    model = planted(family, attn)
    inputs = inputs_of(model, rows, positions=False)
    say = [Say(SAID, len(rows[0]))]
    bare = generate(model, inputs, len(SAID), logits_processor=say)
    vlmattn.wrap(model, method)
    got = generate(model, inputs, len(SAID), logits_processor=say)
    longer = [row + [Token(word, generated=True) for word in SAID[:-1]] for row in rows]
    expected, _ = naive(planted(family), longer, inputs_of(model, longer), method, layer, change)
    torch.testing.assert_close(got, expected[:, -len(SAID) :], rtol=0, atol=TOLERANCE)
    assert (got - bare).abs().max() > 1e-3
    for options in (dict(use_cache=False), dict(cache_implementation="static")):
        again = generate(model, inputs, len(SAID), logits_processor=say, **options)
        torch.testing.assert_close(again, got, rtol=0, atol=TOLERANCE)
    return got


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("sinks", ["phi", "cos", "either"])
@pytest.mark.parametrize("layer", [0, 2])
@family_matrix
def test_sinks_of_every_kind(family, layer, sinks, extend):
    tokens = talk(family, [1, "img", 6], plant={3: MASSIVE, 5: LIKE})
    check(family, [tokens], VAR(**OPTIONS, layers=str(layer), sinks=sinks, extend=extend), layer)


@pytest.mark.parametrize("sinks", ["phi", "either"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@family_matrix
def test_sinks_in_a_padded_batch(family, attn, sinks):
    """The first real token of every sample is its own; planted words stand at different places."""
    rows = [
        talk(family, [1, "img", 6], plant={3: MASSIVE, 5: LIKE}),
        talk(family, ["img", 1, "img", 3], seed=5, plant={2: OPPOSITE}),
        talk(family, ["img", 2], [3], seed=8, plant={4: LIKE}),
    ]
    layer = 3 if family == "qwen3_vl" else 1  # what enters 1 and 2 gets image features that no output shows (DeepStack)
    check(family, batch_of(rows), VAR(**OPTIONS, layers=str(layer), sinks=sinks, extend=True), layer, attn)


@pytest.mark.parametrize("sinks", ["phi", "cos", "either"])
def test_the_kinds_of_sinks_differ(sinks):
    """Without this the tests above could not tell them apart."""
    tokens = talk("llava", [1, "img", 6], plant={3: MASSIVE, 5: LIKE, 6: OPPOSITE})
    model = planted("llava")
    inputs = inputs_of(model, [tokens])
    out = model(**inputs, output_hidden_states=True)
    states, bare = out.hidden_states[2][0], out.logits
    found = sinks_by_hand(states, tokens, sinks, extend=False)
    massive, like, opposite, first = (len(tokens) - 3, len(tokens) - 5, len(tokens) - 6, 0)
    assert (massive in found) == (sinks != "cos")
    assert {like, opposite, first} <= found if sinks != "phi" else not {like, opposite} & found
    vlmattn.wrap(model, VAR(**OPTIONS, layers="2", sinks=sinks))
    cache = model(**inputs, use_cache=True).past_key_values
    flags = kept(cache, "groups")[2].read(len(tokens), torch.device("cpu"))[0] % 2 == 1
    assert set(flags.nonzero().flatten().tolist()) == found
    assert model.vlmattn.report()["fired"] == {"var": len(found)}
    assert not torch.equal(model(**inputs).logits, bare)


@family_matrix
def test_generated_sinks_are_only_found_when_asked(family):
    """Plain VAR leaves what is generated alone: the two differ from the first planted word on, not before."""
    tokens = talk(family, [1, "img", 4])
    model = planted(family)
    inputs, say = inputs_of(model, [tokens], positions=False), [Say(SAID, len(tokens))]
    found = {}
    for extend in (False, True):
        with vlmattn.applied(model, VAR(**OPTIONS, layers="0", extend=extend)):
            found[extend] = generate(model, inputs, len(SAID), logits_processor=say)
    difference = (found[True] - found[False]).abs().amax((0, 2))
    assert difference[:2].max() < TOLERANCE  # the prompt and the word 20 say the same
    assert difference[2:].min() > 1e-4


# --- extend: beams, drafts, turns


STRONG = dict(dims=DIMS, tau=TAU, max_sink=1.0, min_visual=0.0, keep=0.0)
EXTENDED = VAR(**STRONG, layers="0:", extend=True)


class Prefer:
    """A logits processor under which beams part: planted words and a few others are likely."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, [MASSIVE, LIKE, 20, 30]] += 2.0
        return scores.index_fill(1, torch.tensor(PLACEHOLDERS), -1e4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@family_matrix
def test_beams_carry_their_own_sinks(family, cache):
    rows = batch_of([talk(family, [1, "img", 4]), talk(family, ["img", 2, "img", 3], seed=6)])
    model = planted(family)
    inputs = inputs_of(model, rows, positions=False)
    settings = dict(
        num_beams=4, num_return_sequences=4, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    settings |= dict(return_dict_in_generate=True, output_scores=True, logits_processor=[Prefer()])

    def beams(method: VAR, **options):
        with vlmattn.applied(model, method):
            return model.generate(**inputs, **settings, **options)

    expected = beams(EXTENDED, use_cache=False)
    got = beams(EXTENDED, **({} if cache == "dynamic" else dict(cache_implementation="static")))
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, rtol=0, atol=TOLERANCE)
    assert torch.equal(got.sequences, expected.sequences)
    new = expected.sequences[:, len(rows[0]) :]
    massive = (new[:, :-1] == MASSIVE).int().argmax(1) + 10 * (new == MASSIVE).any(1)
    assert len(set(massive.tolist())) > 1, "the premise: beams differ in where their sinks are"
    plain = beams(VAR(**STRONG, layers="0:"), use_cache=False)
    assert (plain.sequences_scores - expected.sequences_scores).abs().max() > 3e-4


@family_matrix
def test_drafted_tokens_are_tested_too(family):
    """Prompt lookup reads several drafts at once; wrong ones leave the cache again, and their flags too."""
    words = [20, MASSIVE, 30, LIKE, 20, MASSIVE, 31, 20, MASSIVE, 30, LIKE, 50, MASSIVE, 30, LIKE, 20]
    tokens = talk(family, [1, "img", 9], plant={9: 20, 8: MASSIVE, 7: 30, 6: LIKE, 5: 20, 4: MASSIVE, 3: 30})
    model = vlmattn.wrap(planted(family), EXTENDED)
    inputs, say = inputs_of(model, [tokens], positions=False), [Say(words, len(tokens))]
    expected = generate(model, inputs, len(words), logits_processor=say)
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    settings = dict(
        do_sample=False, max_new_tokens=len(words), min_new_tokens=len(words), pad_token_id=0, logits_processor=say
    )
    settings |= dict(return_dict_in_generate=True, output_logits=True, prompt_lookup_num_tokens=3)
    out = model.generate(**inputs, **settings)
    hook.remove()
    assert out.sequences[0, len(tokens) :].tolist() == words
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=0, atol=TOLERANCE)
    assert max(lengths[1:]) > 1, "tokens were drafted"
    assert sum(lengths[1:]) > len(words), "and some were wrong"
    recomputed = generate(model, inputs, len(words), logits_processor=say, use_cache=False)
    torch.testing.assert_close(recomputed, expected, rtol=0, atol=TOLERANCE)
    model.vlmattn.set(VAR(**STRONG, layers="0:"))
    assert (generate(model, inputs, len(words), logits_processor=say) - expected).abs().max() > 1e-3


@family_matrix
def test_a_second_turn_keeps_the_sinks_that_were_generated(family):
    """Turns on one cache equal the whole in one piece."""
    tokens = talk(family, [1, "img", 4])
    model = vlmattn.wrap(planted(family), EXTENDED)
    inputs, say = inputs_of(model, [tokens], positions=False), [Say(SAID, len(tokens))]
    settings = dict(max_new_tokens=len(SAID), min_new_tokens=len(SAID), do_sample=False, pad_token_id=0)
    out = model.generate(**inputs, **settings, logits_processor=say, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.tensor([[50, MASSIVE, 51]])], 1)
    whole = [*tokens, *[Token(i) for i in ids[0, len(tokens) :].tolist()]]
    second = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if family != "llava":
        second["mm_token_type_ids"] = (ids == 99).int()
    again = [Say(SAID, len(whole))]
    got = generate(model, second, 4, past_key_values=out.past_key_values, logits_processor=again)
    expected = generate(model, inputs_of(model, [whole], positions=False), 4, logits_processor=again)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    vlmattn.unwrap(model)
    bare = generate(model, inputs_of(model, [whole], positions=False), 4, logits_processor=again)
    assert (bare - expected).abs().max() > 1e-3


# --- Sinks belong to the request


def test_prompts_in_sequence_and_in_threads_have_their_own_sinks():
    model = vlmattn.wrap(planted("llava"), VAR(**OPTIONS, layers="0:", sinks="either", extend=True))
    prompts = [
        [talk("llava", [1, "img", 6], plant={3: MASSIVE})],
        [talk("llava", [1, "img", 6], seed=5, plant={5: LIKE})],
        batch_of([talk("llava", ["img", 3], seed=6), talk("llava", ["img", "img", 6], seed=7, plant={2: MASSIVE})]),
    ]
    inputs = [inputs_of(model, rows, positions=False) for rows in prompts]
    fresh = []
    for one in inputs:
        other = vlmattn.wrap(planted("llava"), model.vlmattn.recipe)
        fresh.append(generate(other, one, suppress_tokens=PLACEHOLDERS))
    bare = generate(planted("llava"), inputs[0], suppress_tokens=PLACEHOLDERS)
    assert (fresh[0] - bare).abs().max() > 1e-3
    for one, expected in [*zip(inputs, fresh, strict=True), (inputs[0], fresh[0])]:
        assert torch.equal(generate(model, one, suppress_tokens=PLACEHOLDERS), expected)
    results: list[list[Tensor]] = [[] for _ in inputs]
    barrier = threading.Barrier(len(inputs))

    def work(n: int) -> None:
        with torch.no_grad():
            for _ in range(4):
                barrier.wait(timeout=600)
                results[n].append(generate(model, inputs[n], suppress_tokens=PLACEHOLDERS))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for found, expected in zip(results, fresh, strict=True):
        assert len(found) == 4
        for logits in found:
            torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


def test_one_plan_serves_all_layers_and_tokens_of_a_request(monkeypatch):
    made, plain = [], var.GainPlan
    monkeypatch.setattr(var, "GainPlan", lambda *args, **kwargs: made.append(args) or plain(*args, **kwargs))
    with vlmattn.applied(build("llava"), VAR(dims=DIMS, tau=TAU, **GATES)) as model:
        for count in (1, 2):
            generate(model, prompt("llava"), 4)
            assert len(made) == count


# --- Profiles


def profile_of(model: PreTrainedModel, **facts) -> SinkProfile:
    return SinkProfile(
        **{"fingerprint": find_family(model).anatomy(model).fingerprint, "dims": DIMS, "tau": TAU, **facts}
    )


def logits_with(model: PreTrainedModel, method: VAR) -> Tensor:
    inputs = inputs_of(model, [talk("llava", [1, "img", 6], plant={3: MASSIVE})])
    with vlmattn.applied(model, method), warnings.catch_warnings():
        warnings.simplefilter("error")
        return model(**inputs).logits


GATES = dict(max_sink=0.9, min_visual=0.01, layers="0:")


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_profile_gives_dimensions_and_threshold(tmp_path, as_folder):
    model = planted("llava")
    path = profile_of(model).save(tmp_path if as_folder else tmp_path / "mine.json")
    assert path == tmp_path / ("vlmattn_sinks.json" if as_folder else "mine.json")
    assert SinkProfile.load(path) == profile_of(model)
    expected = logits_with(model, VAR(dims=DIMS, tau=TAU, **GATES))
    method = VAR(profile=str(tmp_path if as_folder else path), **GATES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlmattn.unwrap(vlmattn.wrap(model, method))  # binding must not warn: everything is known
    assert torch.equal(logits_with(model, method), expected)
    assert not torch.equal(logits_with(model, VAR(dims=(5,), tau=TAU, **GATES)), expected), "dimensions matter"
    assert not torch.equal(logits_with(model, VAR(dims=DIMS, tau=5.0, **GATES)), expected), "the threshold matters"
    other = profile_of(model, dims=(5,), tau=TAU).save(tmp_path / "other.json")
    assert torch.equal(
        logits_with(model, VAR(profile=str(other), **GATES)), logits_with(model, VAR(dims=(5,), tau=TAU, **GATES))
    )


def test_dimensions_that_are_given_win_over_the_profile(tmp_path):
    model = planted("llava")
    path = profile_of(model, dims=(5,)).save(tmp_path)
    expected = logits_with(model, VAR(dims=DIMS, tau=TAU, **GATES))
    assert torch.equal(logits_with(model, VAR(profile=str(path), dims=DIMS, **GATES)), expected)
    assert not torch.equal(logits_with(model, VAR(profile=str(path), **GATES)), expected)


def test_a_profile_beside_the_model_is_found(tmp_path):
    model = planted("llava")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with pytest.warns(UserWarning, match="find_sinks|cannot fire"):
        vlmattn.wrap(again, VAR(**GATES))
    vlmattn.unwrap(again)
    profile_of(again).save(tmp_path)
    expected = logits_with(again, VAR(dims=DIMS, tau=TAU, **GATES))
    assert torch.equal(logits_with(again, VAR(**GATES)), expected)
    assert not torch.equal(logits_with(again, VAR(dims=(5,), tau=TAU, **GATES)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlmattn.wrap(again, "var")
    assert again.vlmattn.recipe.interventions == (VAR(),), "the recipe stays what was asked for"


def test_a_recipe_carries_its_profile(tmp_path):
    """Saved with a recipe or with the model, and found again without the place it came from."""
    model = planted("llava")
    path = profile_of(model).save(tmp_path / "mine.json")
    asked = VAR(profile=str(path), **GATES)
    expected = logits_with(model, asked)
    Recipe.of(asked).save_pretrained(tmp_path / "recipe")
    vlmattn.wrap(model, asked).save_pretrained(tmp_path / "model")
    vlmattn.unwrap(model)
    path.unlink()
    for folder in (tmp_path / "recipe", tmp_path / "model"):
        assert SinkProfile.load(folder) == profile_of(model)
        again = Recipe.of(folder)
        assert again.interventions == (VAR(profile=str(folder / SinkProfile.FILE_NAME), **GATES),)
        assert torch.equal(logits_with(model, again), expected)
    with pytest.raises(InputError, match=r"mine\.json.*no such file"):
        Recipe.of(asked).save_pretrained(tmp_path / "lost")


def test_a_profile_beside_the_model_goes_with_it(tmp_path):
    model = planted("llava")
    model.save_pretrained(tmp_path / "first")
    profile_of(model).save(tmp_path / "first")
    found = type(model).from_pretrained(tmp_path / "first").eval()
    vlmattn.wrap(found, VAR(**GATES)).save_pretrained(tmp_path / "second")
    assert Recipe.of(tmp_path / "second").interventions == (VAR(**GATES),)
    second = type(model).from_pretrained(tmp_path / "second").eval()
    expected = logits_with(second, VAR(dims=DIMS, tau=TAU, **GATES))
    assert torch.equal(logits_with(second, VAR(**GATES)), expected)


def test_a_profile_of_another_model_is_refused(tmp_path):
    model = planted("llava")
    path = profile_of(model, fingerprint="0" * 16, source="somewhere").save(tmp_path / "p.json")
    with pytest.raises(OptionError, match=r"var\.profile.*another language model.*'somewhere'"):
        vlmattn.wrap(model, VAR(profile=str(path)))
    assert "vlmattn" not in model.__dict__
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    profile_of(model, fingerprint="0" * 16).save(tmp_path)
    with pytest.raises(OptionError, match="another language model"):
        vlmattn.wrap(again, "var")


def test_profiles_that_cannot_be_are_refused(tmp_path):
    model = planted("llava")
    with pytest.raises(InputError, match=r"cannot read the profile.*nowhere"):
        vlmattn.wrap(model, VAR(profile=str(tmp_path / "nowhere.json")))
    for number, text in enumerate(["", "[]", "{}", '{"fingerprint": "x", "dims": [1]}', '{"fingerprint": 3}', "\x00"]):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(InputError, match=str(number)):
            vlmattn.wrap(model, VAR(profile=str(path)))
    path = profile_of(model, tau=32**0.5).save(tmp_path / "high.json")
    with pytest.raises(OptionError, match="which no token can reach"):
        vlmattn.wrap(model, VAR(profile=str(path)))
    path = profile_of(model, dims=(32,)).save(tmp_path / "dims.json")
    with pytest.raises(OptionError, match=r"0\.\.31"):
        vlmattn.wrap(model, VAR(profile=str(path)))


@pytest.mark.parametrize(("sinks", "edited"), [("phi", [0, 1, 2, 3]), ("cos", [1, 2]), ("either", [1, 2])])
def test_sinks_by_direction_act_where_the_profile_has_sinks(tmp_path, sinks, edited):
    model = planted("llava")
    path = profile_of(model, layers=(1, 3)).save(tmp_path / "p.json")
    vlmattn.wrap(model, VAR(profile=str(path), sinks=sinks, **GATES))
    model(**inputs_of(model, [talk("llava", [1, "img", 6], plant={3: MASSIVE})]))
    ran = model.vlmattn.report()["layers"]["prefill"]
    assert sorted(layer for name, layers in ran.items() if "base" not in name for layer in layers) == edited
