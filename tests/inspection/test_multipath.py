"""Multi-path answers against whole forwards without a cache, one path after another, and the formula by itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sorting import build_tokenizer, bundled, chat, hooks, image, picture, processor, text
from tiny import FAMILIES, build
from transformers import LogitsProcessor

import vlmattn
from vlmattn import PAI, VAF, VAR, VHR, InputError, OptionError, UnsupportedError
from vlmattn.embedded.scenes import make_scene
from vlmattn.inspection.multipath import VIEWS, Path, _Reader, multi_path, score

YES, NO, END = 91, 92, 2
SAID = (10, 11, 12, 13, YES, NO, END)
QUESTION = "w40 w41 w42"
CAPTIONS = ("w50 w51", "", "w60")


def speaker(family, attn="sdpa", seed=0):
    """A model that says nothing but ``SAID``, and is not too sure of it."""
    model = build(family, attn, seed)
    head = model.lm_head.weight.data
    kept = head[list(SAID)].clone()
    head.zero_()
    head[list(SAID)] = 10 * kept
    model.lm_head.register_forward_hook(silence)  # zero is not never
    return model


def silence(_module, _args, out):
    never = torch.full_like(out, -1e4)
    never[..., list(SAID)] = 0
    return out + never


def ask(family, model, captions=CAPTIONS, **options):
    settings = dict(captions=captions, temperature=0, max_new_tokens=8, first_tokens=4)
    return multi_path(model, processor(family), picture(0), QUESTION, **{**settings, **options})


def prompt(family, caption):
    words = f"{caption}\n{QUESTION}" if caption else QUESTION
    return processor(family).apply_chat_template(
        chat(image(0), text(words)), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def likely(model, inputs, tokens):
    """The distribution after a prompt and some tokens: a whole forward, positions left to the model."""
    more = torch.tensor([tokens], dtype=torch.long)
    new = {"input_ids": more, "attention_mask": torch.ones_like(more), "mm_token_type_ids": torch.zeros_like(more)}
    extended = {
        name: torch.cat([value, new[name].to(value)], 1) if name in new else value for name, value in inputs.items()
    }
    return model(**extended, use_cache=False).logits[0, -1].double().softmax(-1)


def margin(distribution):
    first, second = distribution.topk(2).values.tolist()
    return first - second


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_is_what_whole_forwards_say(family, seed):
    model, words = speaker(family, seed=seed), build_tokenizer().convert_ids_to_tokens(range(100))
    found = ask(family, model)
    lengths, expected = set(), {"yes": 0.0, "no": 0.0}
    paths = list(found.paths)
    for view, caption in enumerate(CAPTIONS):
        inputs = prompt(family, caption)
        first = likely(model, inputs, [])
        for p_first, token in zip(*(best.tolist() for best in first.topk(4)), strict=True):
            path, tokens, certainties = paths.pop(0), [token], [margin(first)]
            while len(tokens) < 8 and tokens[-1] != END and not {YES, NO} & set(tokens[:-1]):
                after = likely(model, inputs, tokens)
                tokens.append(int(after.argmax()))
                certainties.append(margin(after))
            said = [words[token] for token in tokens if token != END]
            places = [n for n, token in enumerate(tokens) if token in (YES, NO)]
            assert (path.view, path.first, path.text) == (view, "" if token == END else words[token], " ".join(said))
            assert path.p_first == pytest.approx(p_first, rel=1e-4)
            if not places:
                assert (path.answer, path.certainty) == (None, 0)
                continue
            assert path.answer == words[tokens[places[0]]]
            assert path.certainty == pytest.approx(certainties[places[0]], rel=1e-3, abs=1e-5)
            expected[path.answer] += (0.4, 0.4, 0.2)[view] * p_first * certainties[places[0]]
            lengths.add(places[0])
    assert not paths
    assert found.scores == pytest.approx(expected, rel=1e-3)
    assert found.answer == max(expected, key=expected.get)
    assert len(lengths) > 1  # answers at several depths


EDITS = {
    "none": None,
    "pai": PAI(),
    "pai+var": [PAI(), VAR(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0)],
    "vhr": VHR(alpha=5.0),
    "vaf": VAF(layers="1:"),
}


class Forced(LogitsProcessor):
    """Makes generate() begin with a token."""

    def __init__(self, token, length):
        self.token, self.length = token, length

    def __call__(self, ids, scores):
        if ids.shape[1] == self.length:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.token] = 0
        return scores


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_paths_are_what_generate_says(family, name):
    """With the edits of a wrapped model: they follow the rows that the first tokens make."""
    model = speaker(family)
    bare = ask(family, model)
    if EDITS[name]:
        vlmattn.wrap(model, EDITS[name])
    found = ask(family, model)
    assert (found == bare) == (name == "none")
    paths = list(found.paths)
    for caption in CAPTIONS:
        inputs = prompt(family, caption)
        length = inputs["input_ids"].shape[1]
        for _ in range(4):
            path = paths.pop(0)
            token = build_tokenizer().convert_tokens_to_ids(path.first) if path.first else END
            out = model.generate(
                **inputs,
                logits_processor=[Forced(token, length)],
                max_new_tokens=8,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            steps = torch.cat(out.logits).double().softmax(-1)
            tokens = out.sequences[0, length:].tolist()
            places = [n for n, token in enumerate(tokens) if token in (YES, NO)]
            assert path.p_first == pytest.approx(float(steps[0, token]), rel=1e-4)
            if places:
                assert path.answer == {YES: "yes", NO: "no"}[tokens[places[0]]]
                assert path.certainty == pytest.approx(margin(steps[places[0]]), rel=1e-3, abs=1e-5)
            else:
                assert path.answer is None
    assert not paths
    if EDITS[name]:
        assert all(model.vlmattn.report()["fired"].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_over_the_prompt_and_one_forward_for_all_paths(family):
    model, shapes = speaker(family), []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    found = ask(family, model, [""], weights=[1], max_new_tokens=6, answers=("w3", "w4"))
    assert shapes[0] == (1, prompt(family, "")["input_ids"].shape[1])
    assert set(shapes[1:]) == {(len(found.paths), 1)}
    assert len(shapes) <= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_does_not_depend_on_the_others(family):
    model = speaker(family, seed=2)
    alone, many = ask(family, model, first_tokens=1), ask(family, model, first_tokens=6)
    for path in alone.paths:
        (twin,) = [other for other in many.paths if (other.view, other.first) == (path.view, path.first)]
        assert (twin.text, twin.answer) == (path.text, path.answer)
        assert twin.certainty == pytest.approx(path.certainty, rel=1e-3, abs=1e-6)


def test_the_seed_decides():
    model = speaker("llava")
    state = torch.get_rng_state()
    one, same, other = (ask("llava", model, temperature=2.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == same
    assert [path.text for path in one.paths] != [path.text for path in other.paths]
    assert [path.p_first for path in one.paths] == [path.p_first for path in other.paths]
    cold = ask("llava", model, temperature=1e-5)
    assert cold == ask("llava", model, temperature=0)


def test_draws_follow_the_tempered_distribution():
    """The second token of the first path, drawn with many seeds."""
    model, inputs = speaker("llava"), prompt("llava", "")
    first = int(likely(model, inputs, []).argmax())
    second = likely(model, inputs, [first])
    expected = (second.log() / 2).softmax(-1)
    words = build_tokenizer()
    counts = torch.zeros(100)
    settings = dict(weights=[1], answers=("w3", "w4"), first_tokens=1, max_new_tokens=2, temperature=2.0)
    for seed in range(300):
        (path,) = ask("llava", model, [""], seed=seed, **settings).paths
        said = path.text.split()
        counts[END if len(said) < 2 else words.convert_tokens_to_ids(said[1])] += 1
    seen = counts / 300
    assert (seen - expected).abs().max() < 0.1
    assert (seen - expected).abs().sum() < (seen - second).abs().sum(), "and not the model's own"


@pytest.mark.parametrize("family", FAMILIES)
def test_few_first_tokens(family):
    model = speaker(family)
    every = ask(family, model, first_tokens=100, min_probability=1e-9).paths
    assert [sum(path.view == view for path in every) for view in range(3)] == [len(SAID)] * 3
    assert sum(path.p_first for path in every) == pytest.approx(3, rel=1e-4)
    bound = sorted(path.p_first for path in every)[5]
    assert len(ask(family, model, first_tokens=100, min_probability=bound).paths) == len(every) - 5
    nothing = ask(family, model, min_probability=0.9999)
    assert (nothing.answer, nothing.paths, nothing.scores) == (None, (), {"yes": 0, "no": 0})


def test_without_an_answer_word_there_is_no_answer():
    found = ask("llava", speaker("llava"), answers=("w3", "w4"))
    assert found.answer is None
    assert found.scores == {"w3": 0, "w4": 0}
    assert all(path.answer is None for path in found.paths)
    assert max(len(path.text.split()) for path in found.paths) == 8


def test_captions_are_asked_for():
    model, made = bundled()
    pictures = [make_scene(12, 0, "clear")[1]]
    found = multi_path(model, made, pictures, "Is there a dog in the image?", caption_tokens=9)
    for view, caption in zip(VIEWS, found.captions, strict=True):
        content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": view}]
        inputs = made.apply_chat_template(
            chat(*content), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=9, do_sample=False)
        assert caption == made.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    given = multi_path(model, made, pictures[0], "Is there a dog in the image?", captions=found.captions)
    assert given == found
    assert found.answer in ("yes", "no")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_as_it_was(family):
    model = speaker(family)
    ask(family, model)
    inputs, count = prompt(family, ""), hooks(model)
    with vlmattn.applied(model, "pai"):
        handle = model.vlmattn
        with torch.no_grad():
            edited = model(**inputs).logits
        ask(family, model)
        assert model.vlmattn is handle
        assert handle.enabled
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, edited)
    if family != "llava":
        model.model.rope_deltas = torch.tensor([[-3]])
        ask(family, model)
        assert model.model.rope_deltas.tolist() == [[-3]]
    assert hooks(model) == count


# --- The formula

finite = st.floats(0, 1, allow_nan=False)
paths = st.lists(
    st.builds(Path, st.integers(0, 2), st.just("x"), finite, finite, st.sampled_from(["yes", "no", None]), st.just("x"))
)
weights = st.tuples(finite, finite, finite)


@given(paths, weights)
def test_scores_by_the_formula(found, chosen):
    scores = score(found, chosen, ("yes", "no"))
    for answer in ("yes", "no"):
        views = [
            math.fsum(path.p_first * path.certainty for path in found if path.view == view and path.answer == answer)
            for view in range(3)
        ]
        assert scores[answer] == pytest.approx(sum(w * s for w, s in zip(chosen, views, strict=True)), abs=1e-9)


@given(paths, weights)
def test_paths_without_answer_count_for_nobody_and_order_does_not_matter(found, chosen):
    spoken = [path for path in found[::-1] if path.answer is not None]
    expected = score(found, chosen, ("yes", "no"))
    assert score(spoken, chosen, ("yes", "no")) == pytest.approx(expected, abs=1e-9)


def test_scores_of_a_recorded_set_of_paths():
    recorded = [
        Path(0, "Yes", 0.6, 0.3, "yes", "Yes"),
        Path(0, "The", 0.1, 0.9, "no", "The answer is no."),
        Path(1, "No", 0.8, 0.7, "no", "No"),
        Path(2, "I", 0.5, 0.0, None, "I am"),
    ]
    scores = score(recorded, (0.4, 0.4, 0.2), ("yes", "no"))
    assert scores == pytest.approx({"yes": 0.4 * 0.18, "no": 0.4 * 0.09 + 0.4 * 0.56})


# --- Answer words


class Pieces:
    """A tokenizer whose tokens are strings."""

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(token for token in tokens if token != "</s>")


def reader(answers=("yes", "no"), stops=("</s>",)):
    return _Reader(Pieces(), answers, frozenset(stops))


def test_answers_are_whole_words_in_any_case():
    for tokens, expected in (
        (["Yes"], ("yes", 0)),
        (["The", " answer", " is", " NO", "."], ("no", 3)),
        (["No", "thing"], None),
        (["Y", "es", ","], ("yes", 0)),
        (["Well", ",", " y", "es"], ("yes", 2)),
        (["yes", " no"], ("yes", 0)),
        (["I", " know", " nothing", "</s>"], None),
        (["</s>"], None),
    ):
        assert reader().answer(tokens) == expected
    assert reader(("Red ", "dark red")).answer(["dark", " red"]) == ("dark red", 0)
    assert reader(("Red ", "dark red")).answer(["RED"]) == ("Red ", 0)
    assert reader(("c++", "c")).answer(["C", "++"]) == ("c++", 0)


def test_a_path_is_done_when_the_word_is_whole():
    assert not reader().is_done(["No"])
    assert not reader().is_done(["No", "thing"])
    assert not reader().is_done(["No", "thing", " new"])
    for tokens in (["No", "."], ["No", " way"], ["No", "</s>"], ["</s>"], ["Hm", "</s>"]):
        assert reader().is_done(tokens)


# --- Errors


def test_what_cannot_be_answered_is_said():
    model, made = speaker("llava"), processor("llava")

    class Bare:
        tokenizer, chat_template = made.tokenizer, None

    for match, options in (
        ("each view needs a weight; got 3 weights", dict(captions=["a"])),
        ("each view needs a weight", dict(captions=[], weights=[])),
        ("each view needs a weight", dict(captions="abc")),
        ("each view needs a weight", dict(captions=None, views=VIEWS[:2])),
        ("weights must be", dict(weights=(0.5, -0.1, 0.6))),
        ("weights must be", dict(weights=(0, 0, 0))),
        ("weights must be", dict(weights=(1, 1, math.nan))),
        ("answers must be", dict(answers=["yes"])),
        ("answers must be", dict(answers=["yes", "YES"])),
        ("answers must be", dict(answers=["yes", " "])),
        ("answers must be", dict(answers="yes")),
        ("first_tokens", dict(first_tokens=0)),
        ("max_new_tokens", dict(max_new_tokens=0)),
        ("max_new_tokens", dict(max_new_tokens=1.0)),
        ("caption_tokens", dict(caption_tokens=0)),
        ("min_probability", dict(min_probability=1)),
        ("min_probability", dict(min_probability=math.nan)),
        ("temperature", dict(temperature=-1)),
        ("temperature", dict(temperature=math.inf)),
    ):
        with pytest.raises(OptionError, match=match):
            ask("llava", model, **{"captions": CAPTIONS, **options})
    with pytest.raises(InputError, match="no chat template"):
        multi_path(model, Bare(), picture(0), QUESTION)
    with pytest.raises(UnsupportedError, match="not a transformers"):
        multi_path(torch.nn.Linear(1, 1), made, picture(0), QUESTION)


@pytest.mark.parametrize("preset", ["vcd", "pai+dola_low", "opera"])
def test_decoding_rules_are_refused(preset):
    model = speaker("llava")
    vlmattn.wrap(model, preset)
    with pytest.raises(UnsupportedError, match="draws its tokens itself"):
        ask("llava", model)
    model.vlmattn.disable()
    assert ask("llava", model).paths
