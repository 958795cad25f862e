"""The decode kernels against the float64 reference: on a GPU where there is one (``pytest -m gpu``), else interpreted."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import build, prompt
from torch import Tensor

import vlmattn
from vlmattn.errors import UnsupportedError
from vlmattn.interventions import VAF, VAR, VHR
from vlmattn.kernels import (
    AttentionEdit,
    BoostPlan,
    GainPart,
    GainPlan,
    HeadPart,
    LevelPlan,
    LogitPart,
    MaskPart,
    MassGate,
    Problem,
    Rows,
    Visibility,
    attend,
)

triton_decode = pytest.importorskip("vlmattn.kernels.triton_decode", reason="triton is not installed")
pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3.2e-2}  # 8 and 16 units in the last place of 1
PLANS = {
    1: GainPlan((0.3,), (1,), scale=(0.7,)),
    2: GainPlan((0.6, 0), (0, 1)),
    3: GainPlan((0, 0.6, 0.2), (0, 0, 1), renormalise=True, scale=(1, 0.5, 2)),
    4: GainPlan((0, 0.6, 0, 0.6), (0, 0, 1, 0), gates=(MassGate((0, 0, 1, 1), 0.2), MassGate((1, 1, 1, 1), 0.5))),
}


class Call:
    """One attention call on a cache that is larger than what is in it, its sink at slot 5 with mass ``sink``."""

    def __init__(
        self, keys: int = 70, rows: int = 1, kv_heads: int = 2, repeat: int = 1, dim: int = 64, dtype: torch.dtype = torch.float16,
        padding: int = 0, sink: float = 0.0, batch: int = 2, seed: int = 0,
    ) -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        query = self.normal(batch, rows, kv_heads * repeat, dim).transpose(1, 2) * 2
        key, value = (self.normal(batch, kv_heads, keys + 9, dim)[:, :, :keys] for _ in range(2))
        if sink:
            query *= 0.2  # the others are alike
            query[..., 0] = 4.0
            key[..., 0] = 0.0
            key[:, :, 5, 0] = (torch.logit(torch.tensor(sink)) + torch.tensor(keys).log()) * dim**0.5 / 4
        real = torch.ones(batch, keys, dtype=torch.bool)
        real[0, :padding] = False
        causal = torch.arange(keys) <= keys - rows + torch.arange(rows)[:, None]
        mask = (causal & real[:, None])[:, None].to(DEVICE)
        self.query, self.key, self.value = (tensor.to(DEVICE, dtype) for tensor in (query, key, value))
        self.see = Visibility(mask, keys - rows, real.to(DEVICE) if padding else None)
        self.batch, self.heads, self.keys, self.rows, self.dim = batch, kv_heads * repeat, keys, rows, dim

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(DEVICE)

    def some(self, *shape: int, share: float = 0.5) -> Tensor:
        return self.uniform(*shape) < share

    def groups(self, count: int) -> Tensor:
        """Contiguous runs, as prompts have them, with single keys of other groups (sinks) among them."""
        runs = torch.arange(self.keys) * count // self.keys
        found = runs.expand(self.batch, -1).clone()
        single = torch.rand(self.batch, self.keys, generator=self.generator) < 0.1
        found[single] = torch.randint(0, count, (int(single.sum()),), generator=self.generator)
        return found.to(DEVICE, torch.uint8)

    def run(self, edit: AttentionEdit, backend: str, **model: object) -> Tensor:
        return attend(self.problem(edit, **model), backend)[0].float()

    def problem(self, edit: AttentionEdit, **model: object) -> Problem:
        return Problem(self.query, self.key, self.value, self.see, self.dim**-0.5, edit, **model)

    def check(self, edit: AttentionEdit, changes: bool = True, **model: object) -> None:
        exact = self.run(edit, "reference", **model)
        got = self.run(edit, "triton", **model)
        torch.testing.assert_close(got, exact, rtol=TOLERANCE[self.query.dtype], atol=TOLERANCE[self.query.dtype])
        if changes:
            plain = self.run(AttentionEdit(), "reference", **model)
            assert (plain - exact).abs().max() > 4 * TOLERANCE[self.query.dtype], "the edit must change something"


SHAPES = [
    (dim, dtype, groups, repeat)
    for number, (dim, groups, repeat) in enumerate(itertools.product((64, 80, 96, 128, 256), (1, 2, 3, 4), (1, 4, 7)))
    for dtype in ((torch.float16,), (torch.bfloat16,))[number % 2]
]


@pytest.mark.parametrize(("dim", "dtype", "groups", "repeat"), SHAPES)
def test_every_shape_matches_the_reference(dim, dtype, groups, repeat):
    seed = dim + groups * 7 + repeat
    keys = (17, 64, 129)[seed % 3]
    call = Call(keys, kv_heads=1 + seed % 2, repeat=repeat, dim=dim, dtype=dtype, padding=seed % 4, seed=seed)
    call.check(AttentionEdit(), changes=False)
    call.check(AttentionEdit(gain=(GainPart(call.groups(groups), PLANS[groups]),)), changes=groups == 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sink", [0.9, 0.999])
@pytest.mark.parametrize("rows", [1, 3])
def test_dominant_sinks(dtype, sink, rows):
    call = Call(dtype=dtype, sink=sink, rows=rows, padding=3)
    groups = torch.full((2, 70), 2, dtype=torch.uint8, device=DEVICE)
    groups[:, :20], groups[:, 5] = 0, 1
    plan = GainPlan((0, 0.6, 0), (0, 0, 1))
    call.check(AttentionEdit(gain=(GainPart(groups, plan),)))
    mass = (call.query[:, 0].float() @ call.key[:, 0].float().mT * call.dim**-0.5).softmax(-1)[..., 5]
    assert (1 - mass).max() < 5 * (1 - sink), "the sink must have its mass"


def parts(call: Call) -> dict[str, AttentionEdit]:
    """Every part that the kernel runs in a decode step, alone."""
    batch, heads, keys = call.batch, call.heads, call.keys
    first_only = Rows(torch.tensor([[True]] + [[False]] * (batch - 1), device=DEVICE))
    group = GainPart(call.groups(3), PLANS[3])
    logit = lambda *shape: LogitPart(call.uniform(*shape) + 0.5, call.uniform(*shape), bias=call.uniform(*shape))  # noqa: E731
    ids = lambda count: torch.randint(-1, 2, (batch, count), generator=call.generator).to(DEVICE)  # noqa: E731
    order = torch.stack([torch.randperm(keys, generator=call.generator)[:20] for _ in range(batch * call.key.shape[1])])
    read = order.view(batch, -1, 20).to(DEVICE)
    read[..., -1] = -1
    weight = call.uniform(batch, keys) * 3
    weight[:, ::7] = 0
    return {
        "scale, lift and bias": AttentionEdit(logit=(logit(batch, keys),)),
        "of heads": AttentionEdit(logit=(logit(batch, heads, keys),)),
        "mixed": AttentionEdit(logit=(LogitPart(call.uniform(batch, heads, keys), call.uniform(batch, keys)),)),
        "logit in some rows": AttentionEdit(logit=(LogitPart(lift=call.uniform(batch, keys) * 2, rows=first_only),)),
        "gains in some rows": AttentionEdit(gain=(GainPart(group.groups, group.plan, first_only),)),
        "no mass to give to": AttentionEdit(gain=(GainPart(group.groups * 0, PLANS[3]),)),
        "boost": AttentionEdit(gain=(GainPart(call.groups(3), BoostPlan(), weight=weight),)),
        "boost in some rows": AttentionEdit(gain=(GainPart(call.groups(3), BoostPlan(), first_only, weight=weight),)),
        "level": AttentionEdit(gain=(GainPart(call.groups(4), LevelPlan(4, 0.8)),)),
        "weights that nobody uses": AttentionEdit(gain=(GainPart(call.groups(3), PLANS[3], weight=weight),)),
        "keep": AttentionEdit(keep=call.some(batch, keys)),
        "read": AttentionEdit(read=read),
        "read and gains": AttentionEdit(read=read, gain=(group,)),
        "hide": AttentionEdit(mask=(MaskPart(ids(1) * 0, ids(keys), 0.0),)),
        "hide, then open softly": AttentionEdit(
            mask=(MaskPart(ids(1) * 0, ids(keys), 0.0), MaskPart(ids(1) * 0, ids(keys), 0.3)),
            logit=(LogitPart(bias=call.uniform(batch, keys), rows=first_only),),
        ),
        "heads": AttentionEdit(head_gain=(HeadPart(call.uniform(batch, heads) * 2),)),
        "heads in some rows": AttentionEdit(gain=(group,), head_gain=(HeadPart(call.uniform(1, heads) * 2, first_only),)),
        "heads twice, with offset": AttentionEdit(
            gain=(group,),
            head_gain=(HeadPart(call.uniform(1, heads)), HeadPart(call.uniform(1, heads), None, call.uniform(1, heads, call.dim))),
        ),
        "everything": AttentionEdit(
            (MaskPart(ids(1) * 0, ids(keys), 0.0),), (logit(batch, keys),), (group,), (HeadPart(call.uniform(batch, heads) * 2),),
            call.some(batch, keys, share=0.8), read,
        ),
    }  # fmt: skip


IDLE = ("no mass to give to",)


@pytest.mark.parametrize("name", list(parts(Call())))
@pytest.mark.parametrize("setting", [dict(padding=4, repeat=2), dict(keys=130, kv_heads=1, repeat=7, dim=128)])
def test_every_part_matches_the_reference(name, setting):
    call = Call(**setting)
    call.check(parts(call)[name], changes=name not in IDLE)


@pytest.mark.parametrize("name", ["boost", "everything", "gains in some rows"])
def test_sinks_and_caps_of_the_model(name):
    call = Call(repeat=2, padding=3)
    edit = parts(call)[name]
    sinks = call.uniform(call.heads) * 6
    call.check(edit, sinks=sinks)
    call.check(edit, softcap=2.0)
    call.check(AttentionEdit(), changes=False, sinks=sinks, softcap=2.0)
    bare = call.run(AttentionEdit(), "triton")
    assert (call.run(AttentionEdit(), "triton", sinks=sinks) - bare).abs().max() > 0.02
    assert (call.run(AttentionEdit(), "triton", softcap=2.0) - bare).abs().max() > 0.02


@pytest.mark.parametrize("backend", ["eager", "merge"])
def test_other_backends_know_sinks_and_caps(backend):
    call = Call(keys=40, rows=6)
    call.query, call.key, call.value = call.query.float(), call.key.float(), call.value.float()
    edit = AttentionEdit(
        gain=(GainPart(call.groups(3), PLANS[3], Rows(torch.ones(2, 6, dtype=torch.bool, device=DEVICE))),)
    )
    model = dict(sinks=call.uniform(call.heads) * 3, **({"softcap": 2.0} if backend == "eager" else {}))
    torch.testing.assert_close(
        call.run(edit, backend, **model), call.run(edit, "reference", **model), rtol=0, atol=2e-5
    )
    if backend == "merge":
        with pytest.raises(UnsupportedError, match="cap"):
            call.run(edit, backend, softcap=2.0)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_masks_of_any_form(additive, rows):
    """A window, something a user made up, an additive mask with values of its own."""
    call = Call(rows=rows)
    mask = call.see.mask & (torch.arange(70, device=DEVICE) > 30) & call.some(2, 1, rows, 70, share=0.8)
    mask[1, :, -1] = False  # a row that sees nothing
    if additive:
        bias = call.uniform(2, 1, rows, 70)
        mask = torch.where(mask, bias, torch.finfo(torch.float16).min).to(torch.float16)
    call.see = Visibility(mask, 70 - rows, plain=False)
    edit = AttentionEdit(gain=(GainPart(call.groups(3), PLANS[3]),))
    call.check(edit)
    assert call.run(edit, "triton")[1, :, -1].abs().max() == 0
    if rows == 1:
        call.check(parts(call)["everything"])


@pytest.mark.parametrize("rows", [2, 5, 12])
@pytest.mark.parametrize("name", ["gains", "boost", "logit", "keep", "read", "nothing"])
def test_several_rows(rows, name):
    """Drafts of assisted decoding, causal behind a cache."""
    call = Call(rows=rows, repeat=3, padding=3, keys=70)
    later = Rows(torch.arange(rows, device=DEVICE).expand(2, rows) >= rows // 2, rows // 2)
    edit = {
        "gains": AttentionEdit(
            gain=(GainPart(call.groups(4), PLANS[4], later),), head_gain=(HeadPart(call.uniform(2, 6) * 2, later),)
        ),
        "boost": AttentionEdit(gain=(GainPart(call.groups(3), BoostPlan(), later, weight=call.uniform(2, 70) * 3),)),
        "logit": AttentionEdit(logit=(LogitPart(lift=call.uniform(2, 70) * 2, rows=later),)),
        "keep": AttentionEdit(keep=call.some(2, 70)),
        "read": AttentionEdit(read=parts(call)["read"].read),
        "nothing": AttentionEdit(),
    }[name]
    call.check(edit, changes=name != "nothing")


def test_several_rows_read_slots_in_any_order():
    call = Call(rows=40, keys=70)
    order = torch.stack([torch.randperm(70, generator=call.generator)[:60] for _ in range(4)])
    call.check(AttentionEdit(read=order.view(2, 2, 60).to(DEVICE)))


def test_rows_that_all_see_everything():
    """A camera's tokens against its map: no causal order, and no mask of size query x key."""
    call = Call(rows=20, keys=90, padding=5)
    mask = call.see.real[:, None, None].expand(2, 1, 20, 90)
    call.see = Visibility(mask, 70, call.see.real, plain=False)
    call.check(AttentionEdit(), changes=False)
    call.check(AttentionEdit(gain=(GainPart(call.groups(3), PLANS[3]),)))


def test_a_prompt_without_a_mask_is_causal():
    call = Call(rows=40, keys=40)
    call.see = Visibility(None, 0)
    call.check(AttentionEdit(), changes=False)
    call.check(AttentionEdit(gain=(GainPart(call.groups(3), PLANS[3]),)))


@pytest.mark.parametrize("name", ["gains", "boost"])
def test_splits_change_nothing_and_scratch_is_never_read_before_it_is_written(name, monkeypatch):
    """Groups lie in runs, so most splits leave some of them without a key; their scratch holds nan here."""
    call = Call(keys=300, repeat=2)
    weight = call.uniform(2, 300) * 3 if name == "boost" else None
    edit = AttentionEdit(gain=(GainPart(call.groups(3), PLANS[3] if weight is None else BoostPlan(), weight=weight),))
    allocate = torch.Tensor.new_empty
    exact = call.run(edit, "reference")

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        found = allocate(*args, **kwargs)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for splits in (1, 2, 5):
        got = triton_decode.attention(call.problem(edit), splits)
        torch.testing.assert_close(got.float(), exact, rtol=0, atol=TOLERANCE[torch.float16])


def test_neutral_groups_are_plain_attention():
    call = Call(keys=130, padding=3)
    plan = GainPlan((0, 0, 0, 0), (0, 0, 0, 0))
    edit = AttentionEdit(gain=(GainPart(call.groups(4), plan),))
    torch.testing.assert_close(
        call.run(edit, "triton"), call.run(AttentionEdit(), "triton"), rtol=0, atol=TOLERANCE[torch.float16]
    )


def refused() -> dict[str, tuple[object, str]]:
    """What is wrong with a call (a function that spoils it, or an edit), and what the error must name."""

    def shapes(call: Call) -> None:
        call.value = call.value[:, :, :5]

    def misfit(call: Call) -> None:
        call.query = call.query[:, :1]

    def single(call: Call) -> None:
        call.query, call.key, call.value = call.query.float(), call.key.float(), call.value.float()

    def mixed(call: Call) -> None:
        call.key = call.key.bfloat16()

    def strided(call: Call) -> None:
        call.key = call.key.transpose(-1, -2).contiguous().transpose(-1, -2)

    def wide(call: Call) -> None:
        call.__init__(dim=320)  # type: ignore[misc]

    def of_heads(call: Call) -> None:
        call.see = Visibility(call.see.mask.expand(-1, call.heads, -1, -1), 69, plain=False)

    call = Call()
    groups, keys = GainPart(call.groups(4), PLANS[4]), torch.zeros(2, 70, dtype=torch.long, device=DEVICE)
    five = GainPart(call.groups(4), LevelPlan(5, 0.5))
    lift, one = LogitPart(lift=call.uniform(2, 70)), keys[:, :1]
    return {
        "shapes": (shapes, r"\[batch, kv_heads, key, dim\]"),
        "heads": (misfit, "multiple of kv_heads"),
        "float32": (single, "bfloat16 and float16"),
        "two dtypes": (mixed, "all alike"),
        "strides": (strided, "last dimension"),
        "head dimension": (wide, "up to 256, got 320"),
        "mask of heads": (of_heads, "one mask for all heads"),
        "five groups": (AttentionEdit(gain=(five,)), "up to 4 groups, got 5"),
        "two gains": (AttentionEdit(gain=(groups, groups)), "one group gain"),
        "two logit parts": (AttentionEdit(logit=(lift, lift)), "one logit part"),
        "mean over heads": (AttentionEdit(logit=(LogitPart(guide=call.uniform(2, 70)),)), "mean over heads"),
        "mixture": (AttentionEdit(mask=(MaskPart(one, keys, 0.5, mix=True),)), "mixtures"),
        "masks of heads": (AttentionEdit(mask=(MaskPart(one, keys, heads=call.some(1, 2)),)), "all heads"),
        "slots": (AttentionEdit(read=keys), r"\[batch, kv_heads, n\]"),
    }


@pytest.mark.parametrize("name", list(refused()))
def test_a_forced_kernel_says_what_is_allowed(name):
    call, (wrong, words) = Call(), refused()[name]
    edit = AttentionEdit(gain=(GainPart(call.groups(4), PLANS[4]),))
    if isinstance(wrong, AttentionEdit):
        edit = wrong
    else:
        wrong(call)  # type: ignore[operator]
    with pytest.raises(UnsupportedError, match=words) as caught:
        call.run(edit, "triton")
    assert "\n" not in str(caught.value)
    assert "unset VLMATTN_BACKEND" in str(caught.value)


def test_several_rows_have_no_mask_parts():
    call = Call(rows=3)
    part = MaskPart(
        torch.zeros(2, 3, dtype=torch.long, device=DEVICE), torch.zeros(2, 70, dtype=torch.long, device=DEVICE), 0.0
    )
    with pytest.raises(UnsupportedError, match="one query row only"):
        call.run(AttentionEdit(mask=(part,)), "triton")


def test_gradients_are_refused():
    call = Call()
    call.query.requires_grad_()
    with pytest.raises(UnsupportedError, match="gradient"):
        call.run(AttentionEdit(), "triton")


def test_who_runs_when_nobody_is_forced():
    """On a GPU the kernel, where it can; on a CPU never, as it would only be interpreted."""
    call = Call()
    edit = AttentionEdit(gain=(GainPart(call.groups(4), PLANS[4]),))
    ran = lambda edit: attend(call.problem(edit))[1]  # noqa: E731
    assert ran(edit) == ("triton" if DEVICE == "cuda" else "eager")
    assert ran(AttentionEdit(logit=(LogitPart(guide=call.uniform(2, 70)),))) == "eager"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "recipe",
    ["pai", VAR(tau=0.5, layers="1:"), [VHR(), VAR(tau=0.5, layers="1:")], VAF(layers="1:3")],
    ids=["pai", "var", "vhr+var", "vaf"],
)
def test_a_whole_model_says_the_same_on_the_kernel(family, recipe, monkeypatch, no_grad):
    model = build(family).to(DEVICE, torch.bfloat16)
    inputs = {name: value.to(DEVICE) for name, value in prompt(family).items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    found = {}
    for backend in ("eager", "triton"):
        monkeypatch.setenv("VLMATTN_BACKEND", backend)
        with vlmattn.applied(model, recipe):
            out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)  # fmt: skip
            found[backend] = out.logits[0]
            assert backend in model.vlmattn.report()["backends"]["decode"]
    torch.testing.assert_close(found["triton"], found["eager"], rtol=0.05, atol=0.15)


@pytest.mark.skipif(DEVICE == "cpu", reason="flash attention needs a GPU")
@pytest.mark.parametrize("name", ["pai", "var", "fastv"])
def test_models_that_were_loaded_with_flash_attention(name):
    """Without an edit bit for bit as bare; with one as on a model with sdpa."""
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    inputs = {key: value.to(DEVICE) for key, value in prompt("llava").items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    models = [build("llava").to(DEVICE, torch.bfloat16) for _ in range(2)]
    models[1].set_attn_implementation({"text_config": "flash_attention_2"})
    with torch.no_grad():
        bare = models[1](**inputs).logits
        assert torch.equal(vlmattn.wrap(models[1], "none")(**inputs).logits, bare)
        vlmattn.unwrap(models[1])
        sdpa, flash = (vlmattn.wrap(model, name)(**inputs).logits.float() for model in models)
    assert models[1].vlmattn.report()["layers"]["prefill"]
    torch.testing.assert_close(flash, sdpa, rtol=0, atol=5e-2 * float(sdpa.abs().max()))
