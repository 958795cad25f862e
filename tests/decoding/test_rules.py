"""Rules of decoding: released scores of VCD and PAI, formulas written apart, laws for any logits, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numerics import near
from safetensors.torch import load_file
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

from vlmattn import decoding
from vlmattn.decoding import (
    AGLA,
    ICD,
    M3ID,
    RBD,
    VCD,
    AvisC,
    BlindTokens,
    Branch,
    Buckets,
    Contrast,
    ContrastiveDecoding,
    DeCo,
    Decoding,
    DoLa,
    Growth,
    Instead,
    Mixture,
    Noise,
    PAIGuidance,
    TopAttended,
    plausible,
)
from vlmattn.errors import OptionError, UnknownNameError
from vlmattn.interventions import PAI
from vlmattn.registry import all_presets, find_method, make_method

GOLDENS = Path(__file__).parent.parent / "goldens"
VCD_GOLDEN = json.loads((GOLDENS / "vcd" / "vcd_goldens.json").read_text())
INF = math.inf
T = torch.tensor([1, 2, 7, 50, 200])
betas = st.floats(0, 1)


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def bits(scores: Tensor) -> Tensor:
    return scores == -INF


@st.composite
def some_views(draw, count: int = 3):
    """Logits ``[row, position, vocabulary]`` of several views, with ties and extremes."""
    shape = (count, *(draw(st.integers(1, most)) for most in (3, 3, 7)))
    return list(torch.from_numpy(draw(arrays(np.float32, shape, elements=st.floats(-30, 30, width=32)))))


def counted(views: list[Tensor]) -> Tensor:
    return torch.arange(1, views[0].shape[1] + 1)


# Released code


@pytest.mark.parametrize("idle", [True, False], ids=["as built", "without idle"])
@pytest.mark.parametrize("case", VCD_GOLDEN["cases"], ids=[case["name"] for case in VCD_GOLDEN["cases"]])
def test_vcd_gives_the_released_scores(case, idle):
    golden = load_file(GOLDENS / "vcd" / "vcd_goldens.safetensors")
    main, wanted = golden["main"], golden[f"{case['name']}.scores"]
    kwargs = case["kwargs"]
    alpha, beta = (0, 0) if kwargs is None else (kwargs.get("cd_alpha", 0.5), kwargs.get("cd_beta", 0.1))
    contrast = VCD(alpha=alpha, beta=beta).contrast(None)
    assert contrast.is_identity == (kwargs is None)
    contrast = contrast if idle else contrast.without_idle()
    assert len(contrast.branches) == (idle or alpha > 0)
    scores = contrast.rule(main, [golden["cd"]] * len(contrast.branches), torch.arange(1, main.shape[1] + 1))
    warpers = {"t": TemperatureLogitsWarper, "k": TopKLogitsWarper}
    for name, value in case["warpers"].items():
        scores = torch.stack([warpers[name](value)(None, step) for step in scores.unbind(1)], 1)
    assert torch.equal(bits(scores), bits(wanted))
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    if kwargs is None:
        assert torch.equal(scores, main)


def test_pai_gives_the_released_guidance():
    (case,) = [c for c in json.loads((GOLDENS / "pai" / "index.json").read_text())["cases"] if "gamma" in c]
    golden = load_file(GOLDENS / "pai" / case["file"])
    rule = PAIGuidance(gamma=case["gamma"]).contrast(None).rule
    assert rule.beta == case["plausibility"]
    for call in "01":
        main, unseen, wanted = (golden[name + call][:, None] for name in ("scores", "uncond", "out"))
        scores = rule(main, [unseen], torch.tensor([1 + int(call)]))
        assert torch.equal(bits(scores), bits(wanted))
        assert 0 < bits(wanted).sum() < wanted.numel() - 1
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)


# Formulas of the specification, per row and position in float64


def logp(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def m3id(rate: float, cap: float = INF):
    def formula(main, seen, t):
        gamma = math.exp(-rate * t)
        return logp(main) + min((1 - gamma) / gamma, cap) * (logp(main) - logp(seen["unseen"]))

    return formula


FORMULAS = {
    "vcd": (VCD(alpha=1.5, beta=0.02), lambda m, v, t: 2.5 * m - 1.5 * v["noised"]),
    "icd": (ICD(alpha=0.5, beta=0.3), lambda m, v, t: 1.5 * m - 0.5 * v["confused"]),
    "avisc": (AvisC(alpha=2.5), lambda m, v, t: 3.5 * m - 2.5 * v["blind"]),
    "agla": (AGLA(), lambda m, v, t: m + 2 * v["augmented"]),
    "agla_attention": (AGLA(alpha=0.5, beta=0, augment="attention"), lambda m, v, t: m + 0.5 * v["augmented"]),
    "rbd": (RBD(text=1.2, visual=0.4), lambda m, v, t: (1 + 1.2 - 0.4) * m + 0.4 * v["visual"] - 1.2 * v["text"]),
    "pai": (
        PAIGuidance(gamma=1.7, beta=0.05),
        lambda m, v, t: 1.7 * (logp(m) - logp(v["unseen"])) + logp(v["unseen"]),
    ),
    "m3id": (M3ID(), m3id(0.02)),
    "m3id_cap": (M3ID(rate=0.3, cap=4.0, beta=0), m3id(0.3, 4.0)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    method, formula = FORMULAS[name]
    contrast = method.contrast(None)
    main = draw(3, len(T), 40, scale=1.5)
    views = {branch.name: draw(3, len(T), 40, seed=seed, scale=1.5) for seed, branch in enumerate(contrast.branches, 1)}
    got = contrast.rule(main, list(views.values()), T)
    assert got.shape == main.shape
    dropped = 0
    for row in range(3):
        for position, t in enumerate(T.tolist()):
            own = main[row, position].double().numpy()
            seen = {name: view[row, position].double().numpy() for name, view in views.items()}
            wanted = formula(own, seen, t)
            likely = np.exp(logp(own))
            wanted[likely < method.beta * likely.max()] = -INF
            dropped += np.isinf(wanted).sum()
            np.testing.assert_allclose(got[row, position].numpy(), wanted, rtol=1e-5, atol=2e-5)
    assert 0 < dropped < main.numel() - 3 * len(T) if method.beta else dropped == 0


@pytest.mark.parametrize("name", [*FORMULAS, "mixture"])
def test_positions_do_not_meet(name):
    """Several positions in one forward (assisted decoding) are what one position and one row at a time give."""
    contrast = FORMULAS[name][0].contrast(None) if name in FORMULAS else Buckets().contrast(None)
    main, *others = (draw(2, len(T), 12, seed=seed) for seed in range(len(contrast.branches) + 1))
    together = contrast.rule(main, others, T)
    for row in range(2):
        for at in range(len(T)):
            here = np.s_[row : row + 1, at : at + 1]
            alone = contrast.rule(main[here], [other[here] for other in others], T[at : at + 1])
            near(together[here], alone, terms=8 * 12)  # a rule adds up the vocabulary a few times


@pytest.mark.parametrize("text", [0.5, 1.0])
def test_rbd_without_a_visual_branch_is_vcd(text):
    found = RBD(text=text, visual=0, beta=0.2, seed=3).contrast(None).without_idle()
    vcd = VCD(alpha=text, beta=0.2, seed=3).contrast(None)
    assert found.rule == vcd.rule
    assert [branch.image for branch in found.branches] == [branch.image for branch in vcd.branches] == [Noise(seed=3)]


# Plausibility


@given(some_views(), betas)
def test_the_most_likely_token_survives(views, beta):
    keep = plausible(views[0], beta)
    assert keep.gather(-1, views[0].argmax(-1, keepdim=True)).all()
    scores = Contrast((1.0, -0.5), beta=beta)(views[0], views[1:], counted(views))
    assert torch.equal(~bits(scores), keep)


@given(some_views(1))
def test_beta_one_keeps_the_most_likely_tokens_and_zero_all(views):
    (main,) = views
    assert torch.equal(plausible(main, 1.0), main == main.amax(-1, keepdim=True))
    assert plausible(main, 0.0).all()


def test_ties_at_the_threshold_stay():
    main = torch.tensor([0.0, 0.0, math.log(0.25), -9.0])
    assert plausible(main, 1.0).tolist() == [True, True, False, False]
    assert plausible(main, 0.25).tolist() == [True, True, True, False]


@given(some_views(1), betas, betas)
def test_plausibility_is_monotone(views, one, other):
    low, high = sorted((one, other))
    assert (plausible(views[0], low) | ~plausible(views[0], high)).all()


# Contrast


@given(some_views(1), st.lists(st.floats(-5, 5), max_size=3), st.sampled_from(["logits", "logprobs"]), betas)
def test_a_branch_that_agrees_changes_nothing(views, weights, space, beta):
    (main,) = views
    scores = Contrast(tuple(weights), space, beta)(main, [main] * len(weights), counted(views))
    own = main if space == "logits" else main.log_softmax(-1)
    torch.testing.assert_close(scores, own.masked_fill(~plausible(main, beta), -INF), rtol=1e-5, atol=5e-4)


@given(some_views(), st.booleans(), betas)
def test_weight_zero_is_the_identity(views, plus, beta):
    main, *others = views
    scores = Contrast((0.0, 0.0), plus=plus, beta=beta)(main, others, counted(views))
    assert torch.equal(scores, main.masked_fill(~plausible(main, beta), -INF))


def test_plus_adds_and_may_grow():
    main, one, other = (draw(2, len(T), 9, seed=seed) for seed in range(3))
    scores = Contrast((0.5, Growth(0.1)), plus=True)(main, [one, other], T)
    wanted = main + 0.5 * one + torch.expm1(0.1 * T)[:, None] * other
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["logits", "logprobs"])
def test_sure_rows_are_left_alone(space):
    main, branch = draw(4, 6, 5), draw(4, 6, 5, seed=1)
    likely = main.double().softmax(-1).amax(-1)
    threshold = float(likely.flatten().sort().values[11:13].mean())
    rule = Contrast((1.0,), space, 0.3, unsure_below=threshold)
    scores, always = rule(main, [branch], T), Contrast((1.0,), space, 0.3)(main, [branch], T)
    sure = likely >= threshold
    assert sure.sum() == 12
    assert torch.equal(scores[sure], main[sure])
    assert torch.equal(scores[~sure], always[~sure])


def test_ends_of_unsure_below():
    main, branch = torch.tensor([[[90.0, 0.0, 1.0], [0.1, 0.0, 0.2]]]), draw(1, 2, 3)
    assert main.softmax(-1).amax() == 1
    assert torch.equal(Contrast((1.0,), unsure_below=0.0)(main, [branch], T), main)
    assert torch.equal(Contrast((1.0,))(main, [branch], T), 2 * main - branch)


@given(st.floats(0, 1), st.integers(1, 5000), st.floats(0, 1e6))
def test_growth(rate, t, cap):
    got = float(Growth(rate, cap)(torch.tensor([t]))[0])
    assert got == pytest.approx(min(math.expm1(min(rate * t, 700.0)), cap), rel=1e-3)
    if 1e-3 < rate * t < 10:
        gamma = math.exp(-rate * t)
        assert float(Growth(rate)(torch.tensor([t]))[0]) == pytest.approx((1 - gamma) / gamma, rel=1e-3)


def test_growth_of_the_specification():
    got = Growth(0.02)(torch.tensor([1, 25, 50, 200])).tolist()
    assert got == pytest.approx([0.0202, 0.649, 1.718, 53.6], rel=1e-3)
    assert float(M3ID().contrast(None).rule.weights[0](torch.tensor([10**6]))[0]) == 1e3


def test_growth_without_a_cap_gives_no_nan():
    main, branch = draw(1, 1, 9), draw(1, 1, 9, seed=1)
    assert not Contrast((Growth(0.5),), "logprobs")(main, [branch], torch.tensor([200])).isnan().any()


RULES = {
    "alpha 1": Contrast((1.0, 0.5)),
    "alpha 5": Contrast((5.0, 2.0)),
    "logprobs": Contrast((Growth(0.02), 0.7), "logprobs"),
    "towards": Contrast((1.0, -0.5)),
    "plus": Contrast((2.0, 1.0), plus=True),
    "unsure": Contrast((1.0, 1.0), unsure_below=0.7),
    "mixture": Mixture(),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_tokens_that_the_model_suppresses_stay_suppressed(rule):
    views = [draw(2, len(T), 9, seed=seed) for seed in range(3)]
    for view in views:
        view[..., [2, 5]] = -INF
    scores = rule(views[0], views[1:], T)
    assert (scores[..., [2, 5]] == -INF).all()
    assert scores[..., [0, 1, 3, 4, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, pytest.param(3.0)])  # fmt: skip
def test_tokens_suppressed_by_the_smallest_number_give_no_nan(alpha):
    """Chameleon writes ``finfo.min`` over the logits of its image tokens."""
    main, branch = draw(2, len(T), 9), draw(2, len(T), 9, seed=1)
    main[..., 4] = branch[..., 4] = torch.finfo(torch.float32).min
    scores = Contrast((alpha,))(main, [branch], T)
    assert not scores.isnan().any()
    assert (scores.softmax(-1)[..., 4] == 0).all()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -0.5)], ids=str)
def test_tokens_that_branches_alone_suppress_give_a_distribution(weights):
    main, others = draw(2, len(T), 9), [draw(2, len(T), 9, seed=seed) for seed in range(1, len(weights) + 1)]
    for other in others:
        other[..., 4] = -INF
    assert Contrast(weights)(main, others, T).softmax(-1).isfinite().all()


# Mixture


@given(some_views(4), st.floats(0.1, 5))
def test_mixtures(views, temperature):
    rule, t = Mixture(temperature), counted(views)
    mixed = rule(views[0], views[1:], t)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(mixed.shape[:-1]), rtol=0, atol=1e-5)
    for first in range(4):
        rest = [view for at, view in reversed(list(enumerate(views))) if at != first]
        torch.testing.assert_close(rule(views[first], rest, t), mixed, rtol=1e-5, atol=1e-5)
    agreed = rule(views[0], [views[0]] * 3, t)
    torch.testing.assert_close(agreed, views[0].log_softmax(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(rule(views[0], [], t), views[0].log_softmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_mixture_formula(temperature):
    views = [draw(2, 3, 11, seed=seed) for seed in range(3)]
    got = Mixture(temperature)(views[0], views[1:], torch.arange(1, 4))
    for row in range(2):
        for at in range(3):
            p = [np.exp(logp(view[row, at].double().numpy())) for view in views]
            w = [math.exp(one.max() / temperature) for one in p]
            wanted = sum(weight * one for weight, one in zip(w, p, strict=True)) / sum(w)
            np.testing.assert_allclose(got[row, at].exp().numpy(), wanted, rtol=1e-5)


# Idle branches


IDENTITIES = [
    VCD(alpha=0, beta=0), ICD(alpha=0, beta=0), AvisC(alpha=0, beta=0), AGLA(alpha=0, beta=0), PAIGuidance(gamma=1),
    RBD(text=0, visual=0, beta=0), M3ID(rate=0, beta=0), M3ID(cap=0, beta=0),
]  # fmt: skip


@pytest.mark.parametrize("method", IDENTITIES, ids=repr)
def test_no_weight_and_no_cut_off_is_the_model_itself(method):
    contrast = method.contrast(None)
    assert contrast.is_identity
    live = contrast.without_idle()
    assert live.is_identity
    assert live.branches == ()
    main = draw(2, len(T), 9)
    torch.testing.assert_close(live.rule(main, [], T).softmax(-1), main.softmax(-1))


@pytest.mark.parametrize("method", [VCD(alpha=0), RBD(text=0, visual=0), M3ID(rate=0), DoLa(), Buckets()], ids=repr)
def test_a_cut_off_or_another_rule_is_not_the_model_itself(method):
    contrast = method.contrast(SimpleNamespace(layers=6))
    assert not contrast.is_identity
    assert not contrast.without_idle().is_identity


def test_idle_branches_and_layers_go():
    branches = tuple(Branch(name=name) for name in "abcd")
    rule = Contrast((0.0, 1.5, Growth(0.1), 0, 0.0, -0.5), "logprobs", 0.2, unsure_below=0.9)
    contrast = ContrastiveDecoding(branches, rule, (3, 5))
    live = contrast.without_idle()
    assert [branch.name for branch in live.branches] == ["b", "c"]
    assert live.layers == (5,)
    assert live.rule == Contrast((1.5, Growth(0.1), -0.5), "logprobs", 0.2, unsure_below=0.9)
    main, *others = (draw(2, len(T), 9, seed=seed) for seed in range(7))
    torch.testing.assert_close(live.rule(main, [others[at] for at in (1, 2, 5)], T), contrast.rule(main, others, T))
    assert live.without_idle() is live
    mixed = ContrastiveDecoding(branches, Mixture())
    assert mixed.without_idle() is mixed


# Presets


CONSTANTS = {
    "vcd": {"alpha": 1.0, "beta": 0.1, "step": 500},
    "vcd_pope": {"alpha": 1.0, "beta": 0.2, "step": 500},
    "icd": {"alpha": 1.0, "beta": 0.1},
    "pai_guidance": {"gamma": 1.1, "beta": 0.1},
    "pai_guidance_cli": {"gamma": 2.0, "beta": 0.1},
    "m3id": {"rate": 0.02, "beta": 0.1, "unsure_below": 1.0},
    "agla": {"alpha": 2.0, "beta": 0.5, "augment": "given"},
    "agla_attention": {"alpha": 2.0, "beta": 0.5, "augment": "attention"},
    "rbd": {"text": 1.0, "visual": 0.5, "beta": 0.1, "step": 500},
    "avisc": {"beta": 0.1},
    "buckets": {"factors": [1.75, 1.8, 1.9, 2.0, 2.5]},
    "dola_low": {"beta": 0.1},
    "dola_high": {"beta": 0.1},
    "deco": {"alpha": 0.6, "top_p": 0.9, "top_k": 20},
}
PRESETS = {name: preset for name, preset in all_presets().items() if issubclass(find_method(preset.method), Decoding)}


def test_every_decoding_method_has_a_preset():
    classes = {cls for cls in vars(decoding).values() if isinstance(cls, type) and issubclass(cls, Decoding)}
    assert {find_method(preset.method) for preset in PRESETS.values()} >= classes - {Decoding}
    assert PRESETS.keys() >= CONSTANTS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    method = make_method(PRESETS[name].method, PRESETS[name].options)
    assert isinstance(method, Decoding)
    assert method.options().items() >= CONSTANTS.get(name, {}).items()
    assert make_method(method.info.name, json.loads(json.dumps(method.options()))) == method
    sizes = SimpleNamespace(layers=6)
    contrast = method.contrast(sizes)
    assert isinstance(contrast, ContrastiveDecoding)
    assert contrast.without_idle() == contrast
    assert set(contrast.layers) <= set(range(6))
    for branch in contrast.branches:
        if branch.tokens is not None:
            assert set() < set(branch.tokens.layers(sizes)) <= set(range(6))
    main, *others = (draw(2, 3, 30, seed=seed) for seed in range(1 + len(contrast.branches) + len(contrast.layers)))
    assert others
    scores = contrast.rule(main, others, torch.arange(1, 4))
    assert scores.shape == main.shape
    torch.testing.assert_close(scores.softmax(-1).sum(-1), torch.ones(2, 3))


def test_unknown_options_of_a_method():
    with pytest.raises(UnknownNameError, match="did you mean alpha"):
        make_method("vcd", {"alfa": 1.0})


def only(method: Decoding) -> Branch:
    (branch,) = method.contrast(None).branches
    return branch


def test_branches_of_the_methods():
    assert only(VCD(step=300, seed=5)).image == Noise(300, 5)
    assert (only(PAIGuidance()).image, only(PAIGuidance()).edits) == ("drop", "off")
    assert (only(M3ID()).image, only(M3ID()).edits) == ("drop", "inherit")
    assert only(ICD(system="Look away.")).prompt == Instead("Look away.")
    assert (only(AGLA()).image, only(AGLA()).needs) == ("given", ("pixel_values",))
    attended = only(AGLA(augment="attention", share=0.25, layers="2:4"))
    assert attended.tokens == TopAttended(0.25, "2:4", blank=True)
    assert (attended.image, attended.needs, attended.shares_prompt) == ("same", (), False)
    assert only(AvisC(mass=0.3, deviations=2)).tokens == BlindTokens(0.3, 2)
    assert not only(AvisC()).shares_prompt
    assert [branch.rope for branch in Buckets(factors=[1, 1.5, 2]).contrast(None).branches] == [1.5, 2]


@pytest.mark.parametrize(
    ("edits", "text", "visual"),
    [("both", "inherit", "inherit"), ("visual", "off", "inherit"), ("none", "off", "off")],
)
def test_branches_of_rbd(edits, text, visual):
    noised, chosen = RBD(step=300, seed=5, share=0.2, edits=edits).contrast(None).branches
    assert (noised.image, noised.edits) == (Noise(300, 5), text)
    assert (chosen.tokens, chosen.edits) == (TopAttended(0.2, "1/4:3/4"), visual)
    assert chosen.shares_prompt


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "probs"}, "space must be logits or logprobs"),
        ({"beta": -0.1}, "beta must be"),
        ({"beta": 1.1}, "beta must be"),
        ({"beta": math.nan}, "beta must be"),
        ({"unsure_below": -1}, "unsure_below must be"),
        ({"unsure_below": 2}, "unsure_below must be"),
        ({"weights": (INF,)}, "weights must be finite"),
        ({"weights": (Growth(0.1), math.nan)}, "weights must be finite"),
    ],
)
def test_contrast_refuses(options, message):
    with pytest.raises(OptionError, match=message):
        Contrast(**({"weights": (1.0,)} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "noise"}, "branch 'b': image must be one of same, blank, drop, given"),
        ({"image": None}, "image must be"),
        ({"prompt": "drop"}, "branch 'b': prompt must be"),
        ({"edits": "on"}, "branch 'b': edits must be"),
        ({"edits": ["pai"]}, "edits must be"),
        ({"edits": (PAI(), VCD())}, "edits must be"),
        ({"rope": 0}, "branch 'b': rope must be"),
        ({"rope": -2.0}, "rope must be"),
        ({"rope": INF}, "rope must be"),
        ({"rope": math.nan}, "rope must be"),
        *(
            ({"tokens": TopAttended(0.5, "0:")} | other, "chosen in the main prompt")
            for other in ({"image": "blank"}, {"image": Noise()}, {"prompt": Instead("No.")}, {"rope": 2.0})
        ),
        ({"tokens": TopAttended(0.5, "0:"), "edits": [PAI()]}, "shares the main prompt"),
    ],
)
def test_branches_refuse(options, message):
    with pytest.raises(OptionError, match=message):
        Branch(name="b", **options)


def test_branches_take():
    assert Branch(name="b", image=torch.zeros_like, prompt=torch.flip).needs == ()
    assert Branch(name="b", image="given", prompt="given").needs == ("input_ids", "attention_mask", "pixel_values")
    assert Branch(name="b", edits=[PAI()]).edits == (PAI(),)
    assert Branch(name="b", tokens=BlindTokens(0.5, 1.0), edits=[PAI()]).sees
    assert Branch(name="b", image="blank").sees
    assert not Branch(name="b", prompt=Instead("No.")).sees


def test_contrastive_decoding_refuses():
    a, b = Branch(name="a"), Branch(name="b")
    with pytest.raises(OptionError, match="names of their own, got a, b, a"):
        ContrastiveDecoding((a, b, a), Mixture())
    for weights, layers in (((1.0,), ()), ((1.0, 1.0, 1.0), ()), ((1.0, 1.0), (3,))):
        with pytest.raises(OptionError, match=f"{len(weights)} weights for {2 + len(layers)} branches and layers"):
            ContrastiveDecoding((a, b), Contrast(weights), layers)
    assert ContrastiveDecoding([a, b], Contrast((1.0, 1.0, 1.0)), (3,)).branches == (a, b)


def test_a_rule_refuses_another_number_of_views():
    main = draw(1, 1, 4)
    with pytest.raises(ValueError, match="argument 2"):
        Contrast((1.0, 1.0))(main, [main], T[:1])


BAD = [
    *((cls, "beta", value) for cls in (VCD, ICD, AGLA, M3ID, RBD, AvisC, PAIGuidance, DoLa) for value in (-0.1, 1.01)),
    *((cls, "alpha", value) for cls in (VCD, ICD, AGLA, AvisC, DeCo) for value in (-1, 101, INF, math.nan, "1", True)),
    *((PAIGuidance, "gamma", value) for value in (-0.1, 100.5, None)),
    *((cls, "step", value) for cls in (VCD, RBD) for value in (-1, 1000, 1.5, True)),
    *((cls, "seed", value) for cls in (VCD, RBD) for value in (-1, 2**63, 0.5)),
    *((RBD, name, value) for name in ("text", "visual") for value in (-0.5, 101)),
    *((cls, "share", value) for cls in (AGLA, RBD) for value in (-0.1, 1.1)),
    *((cls, "layers", value) for cls in (AGLA, RBD, DoLa, DeCo) for value in (3, None)),
    *((cls, "layers", value) for cls in (DoLa, DeCo) for value in ("middle", "1:2:3:4", "1/0:")),
    (RBD, "edits", "text"),
    (AGLA, "augment", "gradcam"),
    (ICD, "system", None),
    *((M3ID, "rate", value) for value in (-0.01, 11)),
    *((M3ID, "cap", value) for value in (-1, INF)),
    *((M3ID, "unsure_below", value) for value in (-0.1, 1.1)),
    *((AvisC, "mass", value) for value in (-0.1, 1.1)),
    *((AvisC, "deviations", value) for value in (-11, 11)),
    *((DeCo, "top_p", value) for value in (-0.1, 1.1)),
    *((DeCo, "top_k", value) for value in (0, 2.5)),
    *((Buckets, "factors", value) for value in ([-1.5], ["2"], 2.0, [True])),
]


@pytest.mark.parametrize(("cls", "name", "value"), BAD, ids=[f"{c.info.name}.{n}={v!r}" for c, n, v in BAD])
def test_methods_refuse(cls, name, value):
    with pytest.raises(OptionError, match=rf"{cls.info.name}\.{name}"):
        cls(**{name: value})


@pytest.mark.parametrize("cls", [AGLA, RBD])
def test_methods_refuse_what_is_no_layer_range(cls):
    with pytest.raises(OptionError, match=r"\.layers"):
        cls(layers="middle")


@pytest.mark.parametrize("factor", [0.0, INF, math.nan])
def test_buckets_refuse_what_is_no_factor(factor):
    with pytest.raises(OptionError):
        Buckets(factors=(factor,))
