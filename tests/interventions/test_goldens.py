"""Law 7, faithful: what the released code of VAR and PAI computes, through the function that transformers calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine import plan_of, registered, request_of
from numerics import bound
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmattn import PAI, VAR, UnsupportedError
from vlmattn.anatomy import Anatomy
from vlmattn.interventions.sinks import sink_values
from vlmattn.request import IMAGE, TEXT, LayerContext, Request, Step, number_images

pytestmark = pytest.mark.usefixtures("no_grad")

GOLDENS = Path(__file__).parent.parent / "goldens"
TOLERANCE = bound(torch.float32, 64 + 8, scale=4.0)  # keys and a score; the largest outputs
LAYER = 7


def cases(folder: str) -> list[dict]:
    """The cases of an index that have a file here."""
    found = json.loads((GOLDENS / folder / "index.json").read_text())["cases"]
    return [case for case in found if (GOLDENS / folder / case["file"]).exists()]


def parametrize(folder: str, keep=lambda case: True):
    chosen = [case for case in cases(folder) if keep(case)]
    return pytest.mark.parametrize("case", chosen, ids=[case["file"].removesuffix(".safetensors") for case in chosen])


def load(folder: str, case: dict) -> dict[str, Tensor]:
    return load_file(GOLDENS / folder / case["file"])


class Layer(nn.Module):
    """What transformers passes as ``module``."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.layer_idx, self.num_key_value_groups, self.is_causal = LAYER, groups, True


def causal(rows: int, keys: int) -> Tensor:
    """Additive mask ``[1, 1, rows, keys]`` of the last rows."""
    hidden = torch.arange(keys) > torch.arange(keys - rows, keys)[:, None]
    return torch.zeros(1, 1, rows, keys).masked_fill(hidden, torch.finfo(torch.float32).min)


def start_of(case: dict, backend: str | None) -> int | None:
    """Cache slot of the first row; decoding does not know it on the host, but the merge backend needs it."""
    return None if case["Q"] == 1 and backend != "merge" else case["K"] - case["Q"]


def make_request(case: dict, method: VAR | PAI, hidden: Tensor | None, batch: int = 1, padding: int = 0) -> Request:
    """The prompt as it was read: all of it for several rows, all but the generated token for one.

    Rows that follow cached keys were read in two pieces. Each piece is observed as the layer's pre-hook does it.
    """
    sizes = Anatomy(
        "llava", LAYER + 2, case.get("H", 8), case.get("H_kv", 8), case.get("head_dim", 4), 32, ("llama", 32, 9, 64)
    )
    request = request_of(method, sizes)
    prompt = case["K"] - 1 if case["Q"] == 1 else case["K"]
    types = torch.full((batch, prompt), TEXT, dtype=torch.uint8)
    types[:, slice(*case["image_span"])] = IMAGE
    mask = torch.ones(batch, prompt, dtype=torch.long)
    mask[-1, :padding] = 0
    images = number_images(types, None)
    cut = 0 if case["Q"] == 1 else case["K"] - case["Q"]
    for first, last in ((0, cut), (cut, prompt)):
        if first == last:
            continue
        request.extend(first, types[:, first:last], images[:, first:last], mask[:, :last], None)
        context = LayerContext(Step(request, "sdpa", first), LAYER, last - first, last, torch.device("cpu"))
        for method in plan_of(request).on_hidden_states[LAYER]:
            method.on_hidden_states(context, hidden[:, first:last])
    return request


def run(golden: dict[str, Tensor], scale: float, step: Step | None, value: Tensor | None = None) -> Tensor:
    """Head outputs ``[batch, heads, query, dim]`` of the registered attention function."""
    query, key = golden["q"], golden["k"]
    mask = golden.get("mask", causal(query.shape[2], key.shape[2]))
    value = golden["v"] if value is None else value
    layer = Layer(query.shape[1] // key.shape[1])
    out = registered(step, layer, query, key, value, mask, scaling=scale, dropout=0.0)
    return out.transpose(1, 2)


def attention_map(golden: dict[str, Tensor], scale: float, step: Step | None) -> Tensor:
    """The edited attention weights: what comes out for unit vectors as values."""
    batch, heads, keys = golden["k"].shape[:3]
    return run(golden, scale, step, torch.eye(keys).expand(batch, heads, keys, keys))


def method_of(case: dict) -> VAR:
    """The released code's ``p`` is the kept fraction and its ``rho`` the largest share of sinks."""
    return VAR(
        keep=case["p"], max_sink=case["rho"], min_visual=case["summ"], tau=case["tau"], dims=case["sink_dims"],
        need_visual_sink=True, layers="2:",
    )  # fmt: skip


def compared_rows(case: dict) -> slice:
    """All rows; but with cached keys the release edits the image row 40 too, which is not a text row."""
    return slice(1, None) if 1 < case["Q"] < case["K"] else slice(None)


BACKENDS = pytest.mark.parametrize("backend", [None, "eager", "merge", "reference"])
var_cases = parametrize("var", lambda case: "Q" in case)


@BACKENDS
@var_cases
def test_var_gives_the_released_head_outputs(case, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("VLMATTN_BACKEND", backend)
    golden = load("var", case)
    request = make_request(case, method_of(case), golden["hidden_states"])
    out = run(golden, 0.25, Step(request, "sdpa", start_of(case, backend)))
    rows = compared_rows(case)
    torch.testing.assert_close(out[:, :, rows], golden["head_out"][:, :, rows], rtol=0, atol=TOLERANCE)
    ran = {name for _, name, _ in request.ledger.read("calls")}
    assert ran == {backend or ("eager" if case["Q"] == 1 else "merge")}

    plain = run(golden, 0.25, None)
    off = (plain - golden["head_out"])[:, :, rows].abs().max()
    assert off > 1e-3 if case["n_edited_rows"] else off < TOLERANCE, (
        "the golden must tell the edit from plain attention"
    )


@var_cases
def test_var_edits_the_released_rows_and_weights(case, monkeypatch):
    monkeypatch.setenv("VLMATTN_BACKEND", "eager")
    golden = load("var", case)
    request = make_request(case, method_of(case), golden["hidden_states"])
    got = attention_map(golden, 0.25, Step(request, "sdpa", start_of(case, "eager")))
    saved = slice(*case["saved_attn_rows"])
    first = compared_rows(case).start or 0
    torch.testing.assert_close(got[:, :, saved][:, :, first:], golden["attn_out"][:, :, first:], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got.sum(-1)), rtol=0, atol=TOLERANCE)
    changed = (got - attention_map(golden, 0.25, None)).abs().amax(-1) > 1e-6
    official = golden["candidate_coords"].long()
    if case["count"] < 0:  # the release's row filter of a first prompt
        official = official[official[:, 2] >= case["image_span"][1]]
    official = official[official[:, 2] >= first]
    assert {tuple(c) for c in changed.nonzero().tolist()} == {tuple(c) for c in official.tolist()}


@var_cases
def test_var_finds_the_released_sinks(case):
    golden = load("var", case)
    request = make_request(case, method_of(case), golden["hidden_states"])
    (method,) = plan_of(request).by_layer[LAYER]
    groups = request.store(method, LAYER).slots["groups"].read(case["K"], torch.device("cpu"))[0]
    assert (groups % 2 == 1).nonzero().flatten().tolist() == sorted(golden["sink_indices"].tolist())
    image = (groups >= 2).nonzero().flatten().tolist()
    assert image == list(range(*case["image_span"]))
    assert (groups == 3).nonzero().flatten().tolist() == case["visual_sinks"]
    assert (groups == 1).nonzero().flatten().tolist() == case["text_sinks"]
    assert request.ledger.read("fired") == {("var",): len(golden["sink_indices"])}


@parametrize("var", lambda case: "sink_indices" in case)
def test_sink_values_are_the_released_ones(case):
    golden = load("var", case)
    phi = sink_values(golden["hidden_states"], tuple(case["sink_dims"]))
    torch.testing.assert_close(phi, golden["phi"], rtol=1e-5, atol=1e-5)
    assert (
        (phi[0] > case["tau"]).nonzero().flatten().tolist() == case["sink_indices"] == golden["sink_indices"].tolist()
    )
    assert float(phi[0, 12]) == pytest.approx(case["phi_tok12"], rel=1e-5)  # just below the threshold
    everything = sink_values(golden["hidden_states"], ())
    assert everything[0, 50] > case["tau"] > phi[0, 50], "token 50 is massive, but not in a sink dimension"


def test_text_sinks_alone_are_only_a_noop_in_the_released_form():
    """The paper's form also moves the mass of text sinks; the release wants a visual sink."""
    (case,) = [case for case in cases("var") if case["file"] == "decode_q1_only_text_sink.safetensors"]
    golden = load("var", case)
    paper = VAR(tau=case["tau"], dims=case["sink_dims"], layers="2:")
    out = run(golden, 0.25, Step(make_request(case, paper, golden["hidden_states"]), "sdpa", None))
    assert (out - golden["head_out"]).abs().max() > 1e-3


pai_cases = parametrize("pai", lambda case: case.get("edited_rows_b_q"))


def pai_step(case: dict, backend: str | None = None) -> Step:
    method = PAI(alpha=case["alpha"])
    request = make_request(case, method, None, batch=case["B"], padding=case["left_pad_last_sample"])
    return Step(request, "sdpa", start_of(case, backend))


@pytest.mark.parametrize("backend", [None, "eager", "reference"])
@pai_cases
def test_pai_gives_the_released_head_outputs(case, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("VLMATTN_BACKEND", backend)
    golden = load("pai", case)
    step = pai_step(case)
    torch.testing.assert_close(run(golden, 0.5, step), golden["head_out"], rtol=0, atol=TOLERANCE)
    assert {name for _, name, _ in step.request.ledger.read("calls")} == {backend or "eager"}
    plain = run(golden, 0.5, None)
    assert (plain - golden["head_out"]).abs().max() > 1e-3, "the golden must tell the edit from plain attention"


@pai_cases
def test_pai_edits_the_released_rows_and_weights(case, monkeypatch):
    monkeypatch.setenv("VLMATTN_BACKEND", "eager")
    golden = load("pai", case)
    got, plain = attention_map(golden, 0.5, pai_step(case)), attention_map(golden, 0.5, None)
    torch.testing.assert_close(got, golden["attn_out"], rtol=0, atol=TOLERANCE)
    changed = ((got - plain).abs().amax((1, 3)) > 1e-6).nonzero().tolist()
    assert changed == case["edited_rows_b_q"]
    image = slice(*case["image_span"])
    before, after = (float(weights[:, :, -1, image].sum(-1).mean()) for weights in (plain, got))
    assert [before, after] == pytest.approx(case["visual_mass_before_after"], abs=1e-5)


@pai_cases
def test_pai_never_falls_back_from_a_forced_merge(case, monkeypatch):
    monkeypatch.setenv("VLMATTN_BACKEND", "merge")
    with pytest.raises(UnsupportedError, match="logit"):
        run(load("pai", case), 0.5, pai_step(case, "merge"))


@parametrize("pai", lambda case: case.get("edited_rows_b_q") == [])
def test_without_a_step_attention_is_plain(case):
    """The release's image-free branch runs unedited attention."""
    golden = load("pai", case)
    torch.testing.assert_close(run(golden, 0.5, None), golden["head_out"], rtol=0, atol=TOLERANCE)
