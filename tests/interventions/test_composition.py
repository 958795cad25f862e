"""Methods together: every legal pair agrees with the oracle, every other is refused; and input that cannot be."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import SETTINGS, STOP, Speech, anatomy, dialogue, directions, fitted, head_profile, inputs_of
from test_matrix import PLACEHOLDERS, apart, generate, model_of
from tiny import FAMILIES, build, left_padded, prompt
from torch import nn

import vlmattn
from vlmattn import InputError, OptionError, Recipe, UnknownNameError
from vlmattn.binding import bind
from vlmattn.interventions import (
    GIFT,
    MMA,
    PAI,
    PAINT,
    VAF,
    VAR,
    VHR,
    Bidirectional,
    Calibration,
    FocusDirections,
    Heads,
    HeadsGuided,
    Isolation,
    Knockout,
    SinkProfile,
    SoFA,
)
from vlmattn.registry import make_method

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:va[rf]|vlmattn:UserWarning")]


def footprint(model: nn.Module) -> dict:
    """Hooks, attributes, attention and config: everything that wrapping may touch."""
    tables = ("_forward_pre_hooks", "_forward_hooks")
    return {
        "hooks": [(name, list(getattr(m, t))) for name, m in model.named_modules() for t in tables if getattr(m, t)],
        "attributes": sorted(model.__dict__),
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "config": model.config.to_dict(),
    }


# --- pairs against the oracle


@settings(max_examples=40)
@given(
    family=st.sampled_from(FAMILIES),
    pair=st.lists(st.sampled_from(list(SETTINGS)), min_size=2, max_size=2, unique=True),
    batch=st.integers(1, 2),
    images=st.integers(1, 2),
    seed=st.integers(0, 9),
    layers=st.sampled_from([None, "1:3", "0,2"]),
)
def test_pairs_agree_with_the_oracle(family, pair, batch, images, seed, layers):
    """Prefill and three decode steps, in both orders; the first method's layers vary."""
    methods = [fitted(SETTINGS[name], family) for name in pair]
    if layers is not None and not pair[0].startswith(("focus", "heads_", "gift")):
        methods[0] = replace(methods[0], layers=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bind(Recipe.of(methods), anatomy(family))
        except OptionError:
            assume(False)
        prompts = [
            dialogue(family, images=images, words=2, seed=seed),
            dialogue(family, images=1, words=3, seed=seed + 10),
        ]
        inputs, model = left_padded(prompts[:batch]), model_of(family)
        start = inputs["input_ids"].shape[1]
        for recipe in (methods, methods[::-1]):
            with vlmattn.applied(model, recipe, processor=Speech()):
                logits = generate(model, inputs)
                tokens = logits.clone().index_fill_(-1, torch.tensor([*PLACEHOLDERS, 2]), -1e9).argmax(-1)
                force = lambda row, ids, tokens=tokens: [int(tokens[row, len(ids) - start])]  # noqa: E731
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("VLMATTN_BACKEND", "reference")
                    oracle = generate(model, inputs, prefix_allowed_tokens_fn=force)
                ran = model.vlmattn.report()["backends"]
            assert apart(oracle, logits) < 1e-4, f"{[m.info.name for m in recipe]}: {ran}"


# --- conflicts

CONFLICTS = [
    (SoFA(), Isolation()),
    (SoFA(mode="mix"), Isolation(between="documents")),
    (Bidirectional(span="images"), Isolation()),
    (Bidirectional(span="prompt"), Isolation(between="documents", separator=(STOP,))),
    (MMA(), Knockout(source="text", target="image")),
    (Bidirectional(span="prompt"), Knockout(source="text", target="image")),
    (Bidirectional(span="prompt"), Knockout(source="text", target="text")),
    (Bidirectional(span="prompt"), Knockout(source="image", target="text")),
    (Bidirectional(span="image"), Knockout(source="image", target="image")),
    (SoFA(), Knockout(source="image", target="image")),
    (Bidirectional(span="prompt"), Heads(operation="cut", heads="0.1")),
    (MMA(), Isolation(between="documents")),  # text of a later document is opened to an image, and hidden from it
]
pair_names = [f"{a.info.name}-{b.info.name}-{i}" for i, (a, b) in enumerate(CONFLICTS)]


@pytest.mark.parametrize(("one", "other"), CONFLICTS, ids=pair_names)
def test_conflicts_are_refused_before_the_model_is_touched(one, other):
    model = build("llava")
    before = footprint(model)
    for pair in ([one, other], [other, one]):
        with pytest.raises(OptionError, match="conflict") as refused:
            vlmattn.wrap(model, pair, processor=Speech())
        assert f"'{one.info.name}'" in str(refused.value)
        assert f"'{other.info.name}'" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert footprint(model) == before


@pytest.mark.parametrize(("one", "other"), CONFLICTS, ids=pair_names)
def test_conflicts_are_fine_on_layers_that_do_not_meet(one, other):
    other = replace(other, layers="2:", **({"heads": "2.1"} if isinstance(other, Heads) else {}))
    with vlmattn.applied(model_of("llava"), [replace(one, layers="0:2"), other], processor=Speech()) as model:
        assert generate(model, dialogue("llava", images=2)).isfinite().all()
        assert all(count for count in model.vlmattn.report()["fired"].values())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_method_twice(name):
    model, method = build("llava"), fitted(SETTINGS[name], "llava")
    before = footprint(model)
    with pytest.raises(
        OptionError, match=rf"'{method.info.name}' is in the recipe twice.*layer ranges that do not meet"
    ):
        vlmattn.wrap(model, [method, method], processor=Speech())
    assert footprint(model) == before
    halves = ("1", "2") if method.info.name in ("heads", "focus") else ("0:2", "2:")
    apart_ = [replace(method, layers=part) for part in halves]
    if name == "gift":
        apart_ = [replace(method, layers="2"), replace(method, layers="3")]
    vlmattn.wrap(model, apart_, processor=Speech())
    assert generate(model, dialogue("llava", images=2)).isfinite().all()


@pytest.mark.parametrize("name", SETTINGS)
def test_halves_of_the_layers_are_the_whole(name):
    """The same method on two halves of its layers is one method; state and counts do not get in each other's way."""
    method = fitted(SETTINGS[name], "llava")
    if name.startswith(("gift", "vhr")):
        pytest.skip("reads the prompt another time, and there a half does not see the other's edits")
    inputs = left_padded([dialogue("llava", images=2, seed=3), dialogue("llava", seed=4)])
    bound = method.bind(anatomy("llava"))
    layers = bound.active_layers(anatomy("llava"))
    half = [",".join(map(str, part)) for part in (layers[:1], layers[1:])]
    with vlmattn.applied(model_of("llava"), method, processor=Speech()) as model:
        whole = generate(model, inputs)
    with vlmattn.applied(
        model_of("llava"), [replace(method, layers=part) for part in half], processor=Speech()
    ) as model:
        assert apart(generate(model, inputs), whole) < 5e-5


# --- options that cannot be

WRONG = [
    ("pai", {"alpha": 1.0}, r"pai\.alpha must be a number within 0\.\.0\.999"),
    ("paint", {"beta": -0.1}, r"paint\.beta must be a number within 0\.\.0\.999"),
    ("paint", {"local": 1.5}, r"paint\.local must be a number within 0\.\.1"),
    ("gift", {"alpha": 21}, r"gift\.alpha must be a number within 0\.\.20"),
    ("vaf", {"enhance": 0.9}, r"vaf\.enhance must be a number within 1\.\.10"),
    ("vaf", {"suppress": 1.1}, r"vaf\.suppress must be a number within 0\.\.1"),
    ("vaf", {"heads": 0}, r"vaf\.heads must be a number within 0\.01\.\.1"),
    ("heads_guided", {"alpha": float("inf")}, r"heads_guided\.alpha must be a number"),
    ("heads", {"operation": "kill"}, r"heads\.operation must be one of block, amplify, cut; got 'kill'"),
    ("heads", {"heads": "1.2", "gain": 11}, r"heads\.gain must be a number within 0\.\.10"),
    ("mma", {"sigma": 1.01}, r"mma\.sigma must be a number within 0\.\.1"),
    ("sofa", {"mode": "x"}, r"sofa\.mode must be one of mask, mix; got 'x'"),
    ("sofa", {"sigma": -0.5}, r"sofa\.sigma must be a number within 0\.\.1"),
    ("bidirectional", {"span": "row"}, r"bidirectional\.span must be one of image, images, prompt"),
    ("bidirectional", {"sigma": True}, r"bidirectional\.sigma must be a number"),
    ("knockout", {"source": "video"}, r"knockout\.source must be one of image, text"),
    ("knockout", {"target": "all"}, r"knockout\.target must be one of text, image, last, generated"),
    ("isolation", {"between": "words"}, r"isolation\.between must be one of images, documents"),
    ("isolation", {"separator": 5}, r"isolation\.separator must be a list of whole numbers"),
    ("isolation", {"separator": (-1,)}, r"isolation\.separator"),  # no token id; -1 stands for unknown tokens
    ("calibration", {"separator": (-1,)}, r"calibration\.separator"),
    ("calibration", {"basket": 0}, r"calibration\.basket must be a number within 1\.\."),
    ("calibration", {"basket": 1.5}, r"calibration\.basket"),  # a whole number of tokens
    ("calibration", {"segments": "words"}, r"calibration\.segments must be one of tokens, documents"),
    ("calibration", {"strength": float("nan")}, r"calibration\.strength must be a number within 0\.\.1"),
    ("focus", {"alpha": 101}, r"focus\.alpha must be a number within -100\.\.100"),
    ("var", {"sinks": "both"}, r"var\.sinks must be one of phi, cos, either"),
    ("var", {"profile": 3}, r"var\.profile must be of type str"),
]


@pytest.mark.parametrize(
    ("name", "options", "match"), WRONG, ids=[f"{n}-{next(reversed(o))}-{i}" for i, (n, o, _) in enumerate(WRONG)]
)
def test_options_out_of_range(name, options, match):
    with pytest.raises(OptionError, match=match) as refused:
        make_method(name, options)
    assert "\n" not in str(refused.value)


def test_unknown_options_name_the_known():
    with pytest.raises(UnknownNameError, match="unknown option of 'sofa' 'sigam'; did you mean sigma"):
        make_method("sofa", {"sigam": 0.1})


EVERYWHERE = [PAI, PAINT, VAF, VHR, HeadsGuided, MMA, SoFA, Bidirectional, Knockout, Isolation, Calibration, GIFT, VAR]


def refused(method, match: str, error: type[Exception] = OptionError, processor=None) -> None:
    """Wrapping with the method is refused with one clear line, and leaves the model alone."""
    model = build("llava")
    before = footprint(model)
    with pytest.raises(error, match=match) as caught:
        vlmattn.wrap(model, method, processor=processor)
    assert "\n" not in str(caught.value)
    assert footprint(model) == before


@pytest.mark.parametrize("cls", EVERYWHERE, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("layers", ["40:", "40", "2:1", "-9:-5", "x", "1/0:", "", ":::", "1,,2"])
def test_layers_that_the_model_does_not_have(cls, layers):
    model = build("llava")
    before = footprint(model)
    with pytest.raises(
        OptionError,
        match=rf"{cls.info.name}\.layers .*(selects none of the layers 0\.\.3|must look like|has layers 0\.\.3)",
    ):
        vlmattn.wrap(model, cls(layers=layers), processor=Speech())
    assert footprint(model) == before


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (Heads(heads="9.0"), r"head 0 of layer 9, but the model has 4 layers of 4 heads"),
        (Heads(heads="0.40"), r"head 40 of layer 0, but the model has 4 layers of 4 heads"),
        (Heads(heads="3,4"), r"heads\.heads must look like '12\.3,14\.7'"),
        (Heads(heads="a.b"), r"heads\.heads must look like"),
        (Heads(heads="1.2;2.0"), r"heads\.heads must look like"),
        (Heads(heads="-1.0"), r"heads\.heads must look like"),
        (Heads(heads="1.2,"), r"heads\.heads must look like"),
        (Heads(heads=" "), r"heads\.heads must look like"),
        (Heads(heads="1.2", layers="0"), r"heads\.layers '0' has none of the heads 1\.2"),
        (Heads(), r"which heads\? Give heads=.*find_heads.*profile="),
        (Heads(heads="1.2", ablation="mean"), r"which heads\?|means"),
        (FocusDirections(), r"which directions\? .*fit_directions.*file="),
        (GIFT(saliency="0:2"), r"gift\.saliency must name one layer"),
        (GIFT(saliency="40"), r"gift\.saliency names layer 40"),
        (VAR(tau=2.0, dims=(32,)), r"var\.dims must lie within 0\.\.31"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_model(method, match):
    refused(method, match, processor=Speech())


def test_files_of_other_models(tmp_path):
    other = "0" * 16
    sinks = SinkProfile(fingerprint=other, source="llava-7b", dims=(1,), tau=2.0).save(tmp_path)
    for method in (
        VAR(profile=str(sinks)), Heads(profile=head_profile("qwen2_5_vl")), FocusDirections(file=directions("qwen2_5_vl"))
    ):  # fmt: skip
        refused(method, r"belongs to another language model.*again on this one")


def test_files_that_cannot_be_read(tmp_path):
    junk = tmp_path / "junk.json"
    junk.write_text("{}")
    for method in (VAR(profile=str(junk)), Heads(profile=str(junk)), FocusDirections(file=str(junk))):
        refused(method, r"junk\.json", InputError)
    nowhere = str(tmp_path / "nowhere.json")
    for method in (VAR(profile=nowhere), Heads(profile=nowhere), FocusDirections(file=nowhere)):
        refused(method, r"cannot read .*nowhere\.json", InputError)


def test_a_directions_file_with_a_layer_too_many(tmp_path):
    from vlmattn.interventions.focus import save_directions

    path = save_directions({9: torch.ones(4, 8)}, tmp_path, anatomy("llava"))
    refused(FocusDirections(file=str(path)), r"query\.9.*the model")


# --- turns


@pytest.mark.parametrize("method", [MMA(), GIFT(saliency="1", layers="2:")], ids=["mma", "gift"])
def test_turns_need_a_processor_and_a_user(method):
    refused(
        method, r"must know where the user's turn ends; give the processor: wrap\(model, \.\.\., processor=processor\)"
    )
    refused(method, "no chat template", InputError, processor=SimpleNamespace(chat_template=None))
    name = method.info.name
    with vlmattn.applied(model_of("llava"), method, processor=Speech()) as model:
        good, lost = dialogue("llava"), prompt("llava")
        batch = left_padded([good, lost])
        for call in (model, lambda **inputs: generate(model, inputs)):
            with pytest.raises(InputError, match=rf"{name} must know the user's turn, and row 1 .*apply_chat_template"):
                call(**batch)
        embeds = model.get_input_embeddings()(good["input_ids"])
        with pytest.raises(InputError, match=rf"{name} must know the user's turns, which need input_ids"):
            model(inputs_embeds=embeds, attention_mask=good["attention_mask"], pixel_values=good["pixel_values"])
        assert generate(model, good).isfinite().all(), "refused calls leave no trace"


def test_a_processor_that_nobody_needs_is_no_reason_to_refuse():
    """PAI does not ask for turns, so a tokenizer without a chat template is welcome."""
    vlmattn.wrap(build("llava"), PAI(), processor=SimpleNamespace(chat_template=None))


def test_separators_need_token_ids():
    """Never silent: with embeddings no separator can be found, and nothing would be isolated or evened out."""
    inputs = dialogue("llava", images=2)
    embeds = model_of("llava").get_input_embeddings()(inputs["input_ids"])
    for method in (SETTINGS["isolate_separated"], SETTINGS["calibration_documents"]):
        with vlmattn.applied(model_of("llava"), method) as model, pytest.raises(InputError, match="input_ids"):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"])


# --- features instead of pixels, too many segments


def test_paint_needs_pixels():
    inputs = dialogue("llava")
    with vlmattn.applied(model_of("llava"), PAINT(layers="0:")) as model:
        right = generate(model, inputs)
        encoded = model.get_image_features(inputs["pixel_values"], return_dict=True)
        given = {key: value for key, value in inputs.items() if key != "pixel_values"}
        for call in (model, lambda **other: generate(model, other)):
            with pytest.raises(InputError, match=r"paint must see the vision tower at work; give pixel_values"):
                call(**given, mm_encoder_outputs={"image": encoded})
        assert apart(generate(model, inputs), right) == 0


def test_features_from_before_do_not_matter_to_others():
    inputs = dialogue("llava", images=2)
    with vlmattn.applied(model_of("llava"), SoFA(layers="0:")) as model:
        encoded = model.get_image_features(inputs["pixel_values"], return_dict=True)
        given = {key: value for key, value in inputs.items() if key != "pixel_values"}
        assert (
            apart(generate(model, {**given, "mm_encoder_outputs": {"image": encoded}}), generate(model, inputs)) < 5e-5
        )


def test_too_many_segments():
    ids = [1, 10, *[30 + i % 50 for i in range(260)], 11]
    text = inputs_of("llava", ids, 0)
    del text["pixel_values"]
    tokens, separated = Calibration(basket=1), Calibration(segments="documents", separator=(30,))
    with (
        vlmattn.applied(model_of("llava"), tokens) as model,
        pytest.raises(InputError, match=r"calibration: 263 segments, at most 255; give a larger basket"),
    ):
        model(**text)
    with vlmattn.applied(model_of("llava"), separated) as model:
        assert model(**text).logits.isfinite().all()
    many = inputs_of("llava", [1, *[30] * 300, 11], 0)
    del many["pixel_values"]
    no_baskets = r"calibration: \d+ segments, at most 255; (?!give a larger basket)"
    with vlmattn.applied(model_of("llava"), separated) as model, pytest.raises(InputError, match=no_baskets):
        model(**many)


def test_text_alone_is_welcome_where_nothing_needs_an_image():
    text = inputs_of("llava", [1, 10, 30, 31, STOP, 32, 33, 34, 11], 0)
    del text["pixel_values"]
    for name in ("calibration", "calibration_documents", "focus"):
        with vlmattn.applied(model_of("llava"), fitted(SETTINGS[name], "llava")) as model:
            assert generate(model, text).isfinite().all()
    both = [SETTINGS["calibration"], PAI()]
    with vlmattn.applied(model_of("llava"), both) as model:
        found = generate(model, text)
    assert torch.equal(found, generate(model_of("llava"), text))


@pytest.mark.parametrize("name", SETTINGS)
def test_recipes_survive_being_written(name):
    method = fitted(SETTINGS[name], "llava")
    recipe = Recipe.of([method])
    for text in (recipe.to_json(), recipe.to_yaml()):
        assert Recipe.from_text(text) == recipe
