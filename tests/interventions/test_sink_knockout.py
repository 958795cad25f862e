"""Knockout of sinks and its controls against the definition in plain loops, and what they are on a batch and on smol."""

from __future__ import annotations

import pytest
import torch
from stores import kept
from test_masks import Token, batch_of, inputs_of
from test_var_options import DIMS, MASSIVE, OPPOSITE, check, family_matrix, planted, sinks_by_hand, talk
from torch import Tensor

import vlmattn
from vlmattn import OptionError, Recipe
from vlmattn.interventions import SinkKnockout

pytestmark = pytest.mark.usefixtures("no_grad")


def threshold(family: str, rows: list[list[Token]], layer: int) -> float:
    """One that a quarter of the image tokens exceed, halfway between two of them."""
    model = planted(family)
    states = model(**inputs_of(model, rows), output_hidden_states=True).hidden_states[layer]
    phi = (states[..., list(DIMS)].abs().amax(-1) / (states.square().mean(-1) + 1e-6).sqrt()).tolist()
    values = sorted(phi[b][n] for b, row in enumerate(rows) for n, token in enumerate(row) if token.image >= 0)
    above = len(values) * 3 // 4
    return (values[above - 1] + values[above]) / 2


def drawn(tokens: list[Token], sinks: set[int], method: SinkKnockout) -> set[int]:
    """Hidden slots of one prompt: in each image as many as it has sinks, in a random order of the prompt's tokens."""
    slots = [n for n, token in enumerate(tokens) if token.image >= 0]
    first = next(n for n, token in enumerate(tokens) if token.real)
    random = torch.randint(2**31, (999,), generator=torch.Generator().manual_seed(method.seed)).tolist()
    found = set()
    for image in {tokens[n].image for n in slots}:
        own = {n for n in slots if tokens[n].image == image}
        pool = own - sinks if method.hide == "others" else own
        wanted = len(own & sinks)
        found |= own & sinks if method.hide == "sinks" else set(sorted(pool, key=lambda n: random[n - first])[:wanted])
    return found


def by_hand(rows: list[list[Token]]):
    """A row of attention without the hidden keys."""

    def change(row: Tensor, sinks: set[int], image: set[int], method: SinkKnockout) -> Tensor:
        (tokens,) = [tokens for tokens in rows if {n for n, token in enumerate(tokens) if token.image >= 0} == image]
        row = row.clone()
        row[sorted(drawn(tokens, sinks, method))] = 0.0
        return row / row.sum()

    return change


@pytest.mark.parametrize("hide", ["sinks", "any", "others"])
@pytest.mark.parametrize("layer", [0, 3])  # what enters 1 and 2 of qwen3_vl gets image features that no output shows
@family_matrix
def test_hidden_keys(family, layer, hide):
    tokens = talk(family, [1, "img", 6], plant={3: MASSIVE})
    method = SinkKnockout(dims=DIMS, tau=threshold(family, [tokens], layer), layers=str(layer), hide=hide, seed=5)
    check(family, [tokens], method, layer, change=by_hand([tokens]))


@pytest.mark.parametrize("hide", ["sinks", "any", "others"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@family_matrix
def test_hidden_keys_in_a_padded_batch(family, attn, hide):
    rows = batch_of(
        [
            talk(family, [1, "img", 6], plant={3: MASSIVE}),
            talk(family, ["img", 1, "img", 3], seed=5, plant={2: OPPOSITE}),
            talk(family, ["img", 2], [3], seed=8),
        ]
    )
    layer = 3 if family == "qwen3_vl" else 1
    method = SinkKnockout(dims=DIMS, tau=threshold(family, rows, layer), layers=str(layer), hide=hide, seed=2)
    check(family, rows, method, layer, attn, by_hand(rows))


@pytest.mark.parametrize("hide", ["sinks", "any", "others"])
def test_as_many_are_hidden_as_there_are_sinks(hide):
    tokens = talk("llava", [1, "img", 6])
    model = planted("llava")
    inputs = inputs_of(model, [tokens])
    states = model(**inputs, output_hidden_states=True).hidden_states[2][0]
    image = {n for n, token in enumerate(tokens) if token.image >= 0}
    tau = threshold("llava", [tokens], 2)
    sinks = sinks_by_hand(states, tokens, "phi", False, tau) & image
    assert len(sinks) == len(image) // 4
    vlmattn.wrap(model, SinkKnockout(dims=DIMS, tau=tau, layers="2", hide=hide))
    cache = model(**inputs, use_cache=True).past_key_values
    hidden = set(kept(cache, "hidden")[2].read(len(tokens), torch.device("cpu"))[0].nonzero().flatten().tolist())
    assert len(hidden) == len(sinks)
    assert hidden <= image
    assert hidden == drawn(tokens, sinks, SinkKnockout(hide=hide))
    assert (hidden == sinks) == (hide == "sinks")
    assert hide != "others" or not hidden & sinks
    assert model.vlmattn.report()["fired"] == {"sink_knockout": len(sinks)}


def test_where_there_are_fewer_others_all_of_them_are_hidden():
    tokens = talk("llava", [1, "img", 6])
    model = planted("llava")
    inputs = inputs_of(model, [tokens])
    image = sum(token.image >= 0 for token in tokens)
    for hide, count in (("sinks", image), ("any", image), ("others", 0)):
        vlmattn.wrap(model, SinkKnockout(dims=DIMS, tau=0.001, layers="2", hide=hide))
        model(**inputs)
        assert model.vlmattn.report()["fired"] == {"sink_knockout": count}
        vlmattn.unwrap(model)


def test_another_seed_hides_others():
    tokens = talk("llava", [1, "img", 6])
    model, found = planted("llava"), []
    inputs, tau = inputs_of(model, [tokens]), threshold("llava", [tokens], 2)
    for seed in (0, 0, 1):
        with vlmattn.applied(model, SinkKnockout(dims=DIMS, tau=tau, layers="2", hide="any", seed=seed)):
            found.append(model(**inputs).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_presets_and_bad_options():
    assert Recipe.of("knockout_as_many").interventions == (SinkKnockout(hide="any"),)
    assert Recipe.of("knockout_others").interventions == (SinkKnockout(hide="others"),)
    with pytest.raises(OptionError, match=r"sink_knockout\.hide must be one of sinks, any, others"):
        SinkKnockout(hide="text")
    with pytest.raises(OptionError, match=r"sink_knockout\.dims must lie within"):
        vlmattn.wrap(planted("llava"), SinkKnockout(dims=(99,), tau=2.0))
