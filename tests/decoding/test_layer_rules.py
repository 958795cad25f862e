"""Rules of layers, DoLa and DeCo, against loops over rows and positions in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import near
from torch import Tensor

from vlmattn.decoding import DeCo, DoLa
from vlmattn.decoding.deco import SurestLayer
from vlmattn.decoding.dola import FarthestLayer
from vlmattn.errors import OptionError

INF = math.inf
ROWS, POSITIONS, VOCABULARY, LAYERS = 3, 4, 25, 5
T = torch.arange(1, POSITIONS + 1)


def views(seed: int, layers: int = LAYERS, scale: float = 1.5) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    main, *early = torch.randn(1 + layers, ROWS, POSITIONS, VOCABULARY, generator=generator) * scale
    return main, early


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def dola(main: np.ndarray, early: list[np.ndarray], beta: float) -> tuple[int, np.ndarray]:
    p = softmax(main)
    divergences = []
    for layer in early:
        q = softmax(layer)
        m = (p + q) / 2
        divergences.append(0.5 * (m * np.log(m / p)).sum() + 0.5 * (m * np.log(m / q)).sum())
    far = int(np.argmax(divergences))
    scores = np.log(p) - np.log(softmax(early[far]))
    return far, np.where(p >= beta * p.max(), scores, -INF)


def candidates(p: np.ndarray, top_p: float, top_k: int) -> list[int]:
    found, mass = [], 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if found and (mass >= top_p or len(found) == top_k):
            break
        found.append(token)
        mass += p[token]
    return found


def deco(main: np.ndarray, early: list[np.ndarray], alpha: float, top_p: float, top_k: int) -> tuple[int, np.ndarray]:
    found = candidates(softmax(main), top_p, top_k)
    sureness, layer = max((softmax(one)[token], -at) for at, one in enumerate(early) for token in found)
    scores = np.full_like(main, -INF)
    for token in found:
        scores[token] = main[token] + alpha * sureness * early[-layer][token]
    return -layer, scores


CASES = {
    "dola": (FarthestLayer(0.1), lambda main, early: dola(main, early, 0.1)),
    "dola, no cut-off": (FarthestLayer(0.0), lambda main, early: dola(main, early, 0.0)),
    "deco": (SurestLayer(0.6, 0.9, 20), lambda main, early: deco(main, early, 0.6, 0.9, 20)),
    "deco, few": (SurestLayer(2.0, 0.95, 4), lambda main, early: deco(main, early, 2.0, 0.95, 4)),
    "deco, nucleus": (SurestLayer(1.0, 0.6, 20), lambda main, early: deco(main, early, 1.0, 0.6, 20)),
}
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_layer_rules(name):
    rule, formula = CASES[name]
    chosen = set()
    for seed in range(5):
        main, early = views(seed)
        got = rule(main, early, T)
        assert got.shape == main.shape
        for row in range(ROWS):
            for at in range(POSITIONS):
                layer, wanted = formula(
                    main[row, at].double().numpy(), [one[row, at].double().numpy() for one in early]
                )
                chosen.add(layer)
                np.testing.assert_allclose(got[row, at].numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert chosen == set(range(LAYERS)), "every layer must be chosen somewhere"


@cases
def test_rows_and_positions_choose_for_themselves(name):
    rule, _ = CASES[name]
    main, early = views(7)
    together = rule(main, early, T)
    for row in range(ROWS):
        for at in range(POSITIONS):
            here = np.s_[row : row + 1, at : at + 1]
            alone = rule(main[here], [one[here] for one in early], T[at : at + 1])
            near(together[here], alone, terms=8 * 12)  # a rule adds up the vocabulary a few times


@cases
def test_one_layer_is_enough(name):
    rule, formula = CASES[name]
    main, early = views(3, layers=1)
    _, wanted = formula(main[0, 0].double().numpy(), [early[0][0, 0].double().numpy()])
    np.testing.assert_allclose(rule(main, early, T)[0, 0].numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_farthest_is_not_nearest():
    main = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
    near, far = main + torch.tensor([0.1, 0.0, 0.0, 0.0]), main.flip(-1)
    wanted = (main.log_softmax(-1) - far.log_softmax(-1)).tolist()[0][0]
    for early in ([near, far], [far, near]):
        assert FarthestLayer(0.0)(main, early, T[:1]).tolist()[0][0] == pytest.approx(wanted, abs=1e-6)


def test_a_layer_that_agrees_leaves_no_preference():
    main, _ = views(0)
    scores = FarthestLayer(0.1)(main, [main, main], T)
    assert (scores[scores.isfinite()] == 0).all()
    assert torch.equal(scores.isfinite(), main.softmax(-1) >= 0.1 * main.softmax(-1).amax(-1, keepdim=True))


def test_sureness_is_about_candidates():
    """Layer 0 is surest, but of a token that is no candidate; of the candidates layer 1 is surer."""
    main = torch.tensor([[[3.0, 2.5, 0.0, -5.0]]])
    distracted, plain = torch.tensor([[[0.0, 0.0, 0.0, 9.0]]]), torch.tensor([[[0.0, 1.0, 0.0, 0.0]]])
    rule = SurestLayer(1.0, 1.0, 2)
    assert rule.candidates(main).tolist() == [[[True, True, False, False]]]
    got = rule(main, [distracted, plain], T[:1])[0, 0].tolist()
    sureness = math.e / (math.e + 3)
    assert got == [pytest.approx(3.0), pytest.approx(2.5 + sureness), -INF, -INF]


@given(st.integers(0, 10**6), st.floats(0, 0.999), st.integers(1, 40))
def test_candidates(seed, top_p, top_k):
    main, _ = views(seed, layers=0)
    got = SurestLayer(1.0, top_p, top_k).candidates(main)
    for row in range(ROWS):
        for at in range(POSITIONS):
            p = softmax(main[row, at].double().numpy())
            crossing = np.abs(np.sort(p)[::-1].cumsum() - top_p).min()
            if crossing > 1e-6:
                assert set(got[row, at].nonzero().flatten().tolist()) == set(candidates(p, top_p, top_k))


def test_ends_of_the_candidates():
    main, _ = views(0)
    best = main == main.amax(-1, keepdim=True)
    assert torch.equal(SurestLayer(1.0, 0.0, 20).candidates(main), best)
    assert torch.equal(SurestLayer(1.0, 1.0, 1).candidates(main), best)
    assert torch.equal(SurestLayer(0.0, 0.0, 20)(main, views(1)[1], T).isfinite(), best)


def test_alpha_zero_keeps_the_scores_of_candidates():
    main, early = views(0)
    rule = SurestLayer(0.0, 0.9, 20)
    assert torch.equal(rule(main, early, T), main.masked_fill(~rule.candidates(main), -INF))


@pytest.mark.parametrize(
    "rule",
    [FarthestLayer(0.1), FarthestLayer(0.0), SurestLayer(0.6, 0.9, 20)],
    ids=repr,
)
@pytest.mark.parametrize("everywhere", [True, False], ids=["in all views", "in the last layer"])
def test_tokens_that_the_model_suppresses_change_no_choice(rule, everywhere):
    if isinstance(rule, FarthestLayer) and not everywhere:
        pytest.skip("divergences from the middle count what one view alone rules out")
    main, early = views(0)
    main[..., 4] = -1e4
    wanted = rule(main, [one.index_fill(-1, torch.tensor(4), -1e4) for one in early] if everywhere else early, T)
    main[..., 4] = -INF
    got = rule(main, [one.index_fill(-1, torch.tensor(4), -INF) for one in early] if everywhere else early, T)
    rest = torch.arange(VOCABULARY) != 4
    assert (got[..., 4] == -INF).all()
    torch.testing.assert_close(got[..., rest], wanted[..., rest])


@pytest.mark.parametrize(
    ("method", "layers", "wanted"),
    [
        (DoLa(), 32, tuple(range(0, 16, 2))),
        (DoLa(layers="1/2:-1:2"), 32, tuple(range(16, 32, 2))),
        (DoLa(), 40, tuple(range(0, 20, 2))),
        (DoLa(), 60, tuple(range(0, 20, 2))),
        (DoLa(), 80, tuple(range(0, 20, 2))),
        (DoLa(layers="high"), 32, tuple(range(16, 32, 2))),
        (DoLa(layers="high"), 40, tuple(range(20, 40, 2))),
        (DoLa(layers="high"), 60, tuple(range(40, 60, 2))),
        (DoLa(layers="high"), 80, tuple(range(60, 80, 2))),
        (DoLa(layers="high"), 7, (3, 5)),
        (DoLa(), 6, (0, 2)),
        (DoLa(layers="1/2:-1:2"), 6, (3,)),
        (DeCo(), 32, tuple(range(20, 29))),
        (DeCo(), 6, (3, 4, 5)),
        (DeCo(layers="-1"), 6, (5,)),
    ],
    ids=repr,
)
def test_candidate_layers(method, layers, wanted):
    contrast = method.contrast(SimpleNamespace(layers=layers))
    assert contrast.layers == wanted
    assert contrast.branches == ()


def test_options_reach_the_rules():
    sizes = SimpleNamespace(layers=6)
    assert DoLa(beta=0.3).contrast(sizes).rule == FarthestLayer(0.3)
    assert DeCo(alpha=0.2, top_p=0.8, top_k=7).contrast(sizes).rule == SurestLayer(0.2, 0.8, 7)


@pytest.mark.parametrize("cls", [DoLa, DeCo])
def test_layers_that_are_not_there_are_refused(cls):
    with pytest.raises(OptionError, match=r"selects none of the layers 0\.\.5"):
        cls(layers="8:").contrast(SimpleNamespace(layers=6))
    with pytest.raises(OptionError, match=r"has layers 0\.\.5"):
        cls(layers="8").contrast(SimpleNamespace(layers=6))
