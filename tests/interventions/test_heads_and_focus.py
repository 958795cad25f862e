"""Head steering and focus directions against hooks on a bare model, and its own attention on shifted queries."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack

import pytest
import torch
from numerics import TINY_MODEL, bound, near
from safetensors.torch import load_file, save_file
from test_masks import PAD, Token, batch_of, inputs_of, mask_of, plain, write
from tiny import FAMILIES, build, generate, shifted_queries
from torch import Tensor, nn
from transformers import PreTrainedModel

import vlmattn
from vlmattn import PAI, FocusDirections, HeadProfile, Heads, InputError, OptionError
from vlmattn.interventions.focus import save_directions
from vlmattn.models import find_family
from vlmattn.wrapping import record_of

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)  # logits of a random model are smaller
PLACEHOLDERS = [96, 97, 98, 99]
LAYERS, HEADS, KV_HEADS, DIM = 4, 4, 2, 8
CHOSEN = {0: [1], 2: [0, 3], 3: [2]}
NAMES = "0.1,2.0,2.3,3.2"
family_matrix = pytest.mark.parametrize("family", FAMILIES)
attn_matrix = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def anatomy(model: PreTrainedModel):
    return find_family(model).anatomy(model)


def prompts(family: str) -> list[list[Token]]:
    """A padded batch: text before and after images, two images, two turns."""
    rows = [
        write(family, [2, "img", 4]),
        write(family, ["img", 2, "img", 3], seed=5),
        write(family, [1, "img", 2], [3], seed=9),
    ]
    return batch_of(rows)


def after_image(row: list[Token]) -> list[bool]:
    seen, out = False, []
    for token in row:
        seen = seen or token.image >= 0
        out.append(seen and token.is_text and token.real)
    return out


def with_words(rows: list[list[Token]], logits: Tensor) -> list[list[Token]]:
    """The prompts with the greedy tokens of ``logits`` but the last."""
    allowed = logits.clone()
    allowed[..., [2, *PLACEHOLDERS]] = -torch.inf
    said = allowed.argmax(-1)[:, :-1].tolist()
    return [row + [Token(t, generated=True) for t in said[b]] for b, row in enumerate(rows)]


def real_rows(rows: list[list[Token]]) -> Tensor:
    return torch.tensor([[t.real for t in row] for row in rows])


def check(family: str, method, bare_run, attn: str = "sdpa", processor=None) -> None:
    """A direct forward and greedy steps, cached or not, of the wrapped model against ``bare_run(model, rows, inputs)``."""
    rows, model = prompts(family), build(family, attn)
    inputs = inputs_of(model, rows)
    bare = model(**inputs).logits
    vlmattn.wrap(model, method)
    got, expected = model(**inputs).logits, bare_run(build(family, "eager"), rows, inputs)
    real = real_rows(rows)
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=TOLERANCE)
    assert (expected - bare)[real].abs().max() > 1e-2
    del inputs["position_ids"]
    steps = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    longer = with_words(rows, steps)
    forced = bare_run(build(family, "eager"), longer, inputs_of(model, longer))[:, -4:]
    torch.testing.assert_close(steps, forced, rtol=0, atol=TOLERANCE)
    for options in (dict(use_cache=False), dict(cache_implementation="static")):
        again = generate(model, inputs, suppress_tokens=PLACEHOLDERS, **options)
        torch.testing.assert_close(again, steps, rtol=0, atol=TOLERANCE)


# --- Heads


def hooked(change):
    """A bare run in which ``change(out, layer)`` edits head outputs ``[batch, rows, heads, dim]`` before ``o_proj``."""

    def run(model, rows, inputs, chosen=CHOSEN):
        with ExitStack() as stack:
            for layer, heads in chosen.items():

                def hook(_, args, layer=layer, heads=heads):
                    out = args[0].unflatten(-1, (HEADS, DIM)).clone()
                    change(out, layer, heads, rows)
                    return (out.flatten(-2),)

                module = model.model.language_model.layers[layer].self_attn.o_proj
                stack.callback(module.register_forward_pre_hook(hook).remove)
            return model(**inputs).logits

    return run


def setting(value, everywhere: bool):
    """Sets or scales the outputs of chosen heads, in text rows after an image or in all rows."""

    def change(out, layer, heads, rows):
        for b, row in enumerate(rows):
            steered = [t.real for t in row] if everywhere else after_image(row)
            for i, on in enumerate(steered):
                for h in heads if on else ():
                    out[b, i, h] = value(out[b, i, h], layer, h)

    return change


@pytest.mark.parametrize("rows", ["instruction", "all"])
@pytest.mark.parametrize("operation", ["block", "amplify"])
@attn_matrix
@family_matrix
def test_block_and_amplify_scale_what_o_proj_gets(family, attn, operation, rows):
    gain = 0.0 if operation == "block" else 2.5
    method = Heads(operation=operation, heads=NAMES, gain=2.5, rows=rows)
    check(family, method, hooked(setting(lambda out, *_: gain * out, rows == "all")), attn)


def profile_of(model: PreTrainedModel, **facts) -> HeadProfile:
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(LAYERS, HEADS, generator=generator)
    for layer, heads in CHOSEN.items():
        scores[layer, heads] += 1.0  # the best quarter
    means = torch.randn(LAYERS, HEADS, DIM, generator=generator)
    nested = lambda t: tuple(nested(x) for x in t) if t.ndim > 1 else tuple(t.tolist())  # noqa: E731
    known = dict(fingerprint=anatomy(model).fingerprint, scores={"causal": nested(scores)}, means=nested(means))
    return HeadProfile(**{**known, **facts})


@pytest.mark.parametrize("rows", ["instruction", "all"])
@family_matrix
def test_mean_ablation_lets_a_head_say_its_mean(family, rows, tmp_path):
    profile = profile_of(build(family))
    path = profile.save(tmp_path)
    method = Heads(heads=NAMES, ablation="mean", rows=rows, profile=str(path))
    mean = lambda out, layer, head: torch.tensor(profile.means[layer][head])  # noqa: E731
    check(family, method, hooked(setting(mean, rows == "all")))


@pytest.mark.parametrize("rows", ["instruction", "all"])
@attn_matrix
@family_matrix
def test_cut_heads_do_not_see_the_image(family, attn, rows):
    def run(model, tokens, inputs):
        mask = mask_of(tokens, plain)
        cut = {}
        for layer, heads in CHOSEN.items():
            cut[layer] = mask.repeat(1, HEADS, 1, 1)
            for b, row in enumerate(tokens):
                for i, steered in enumerate(after_image(row)):
                    for j, key in enumerate(row):
                        if steered and key.image >= 0:
                            cut[layer][b, heads, i, j] = torch.finfo(torch.float32).min
        with ExitStack() as stack:
            for layer, edited in cut.items():
                hook = lambda _, args, kwargs, edited=edited: (args, {**kwargs, "attention_mask": edited})  # noqa: E731
                module = model.model.language_model.layers[layer]
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            return model(**{**inputs, "attention_mask": mask}).logits

    check(family, Heads(operation="cut", heads=NAMES, rows=rows), run, attn)


def test_layers_restrict_the_heads():
    model, rows = build("llava"), prompts("llava")
    inputs = inputs_of(model, rows)
    zero = hooked(setting(lambda out, *_: 0 * out, False))
    expected = zero(build("llava"), rows, inputs, {2: [0, 3]})
    vlmattn.wrap(model, Heads(heads=NAMES, layers="1:3"))
    torch.testing.assert_close(
        model(**inputs).logits[real_rows(rows)], expected[real_rows(rows)], rtol=0, atol=TOLERANCE
    )
    assert model.vlmattn.report()["layers"]["prefill"] == {"base:sdpa": [0, 1, 3], "base:sdpa+head_gain": [2]}
    assert model.vlmattn.report()["fired"] == {"heads": 2}


def test_the_best_share_of_a_profile(tmp_path):
    model, rows = build("llava"), prompts("llava")
    inputs = inputs_of(model, rows)
    bare = model(**inputs).logits
    with vlmattn.applied(model, Heads(heads=NAMES)):
        expected = model(**inputs).logits
    assert (expected - bare).abs().max() > 1e-2
    path = profile_of(model).save(tmp_path / "heads.json")
    with vlmattn.applied(model, Heads(profile=str(path), share=0.25)):
        assert torch.equal(model(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    beside = type(model).from_pretrained(tmp_path).eval()
    profile_of(model).save(tmp_path)
    with vlmattn.applied(beside, Heads(share=0.25)):
        near(beside(**inputs).logits, expected)


def test_the_top_of_a_profile_is_ranked_best_first():
    table = ((0.1, 0.9, 0.2, 0.0), (0.3, -5.0, 0.8, 0.0))
    profile = HeadProfile(fingerprint="x", scores={"causal": table})
    assert profile.top("causal", 0.375) == ((0, 1), (1, 2), (1, 0))
    assert profile.top("causal", 0.0) == ((0, 1),)
    with pytest.raises(OptionError, match="causal"):
        profile.top("other", 0.5)


def test_profiles_of_one_model_merge():
    one = HeadProfile(fingerprint="x", prompts=("a", "b"), scores={"vhd": ((1.0,),)}, means=(((1.0,),),))
    other = HeadProfile(fingerprint="x", prompts=("b", "c"), scores={"vhd": ((3.0,),), "causal": ((2.0,),)}, seed=4)
    both = one.merged(other)
    assert both.scores == {"vhd": ((3.0,),), "causal": ((2.0,),)}
    assert (both.prompts, both.means, both.seed) == (("a", "b", "c"), one.means, 4)
    with pytest.raises(OptionError, match="two language models"):
        one.merged(HeadProfile(fingerprint="y", scores=one.scores))


def test_heads_that_are_named_need_no_profile(tmp_path):
    """One of another model beside this one is not even read."""
    model = build("llava")
    model.save_pretrained(tmp_path)
    profile_of(model, fingerprint="0" * 16).save(tmp_path)
    beside = type(model).from_pretrained(tmp_path).eval()
    with vlmattn.applied(beside, Heads(heads=NAMES)):
        assert beside.vlmattn.recipe.interventions == (Heads(heads=NAMES),)
    for needing in (Heads(), Heads(heads=NAMES, ablation="mean")):
        with pytest.raises(OptionError, match="another language model"):
            vlmattn.wrap(beside, needing)


def test_random_heads_are_those_of_the_seed():
    model = build("llava")
    sizes, found = find_family(model).anatomy(model), {}
    for seed in range(8):
        bound = Heads(operation="amplify", score="random", share=0.25, seed=seed).bind(sizes)
        assert bound == Heads(operation="amplify", score="random", share=0.25, seed=seed).bind(sizes)
        found[seed] = set(bound.heads.split(","))
        assert len(found[seed]) == LAYERS * HEADS // 4
    assert len({frozenset(heads) for heads in found.values()}) > 5
    assert len(set.union(*found.values())) > LAYERS * HEADS // 2
    some = Heads(operation="block", score="random", share=0.5, layers="1:3").bind(sizes).heads
    assert {pair[0] for pair in some.split(",")} <= {"1", "2"}
    assert len(some.split(",")) == HEADS
    named = Heads(operation="block", score="random", heads=NAMES).bind(sizes)
    assert named.heads == NAMES


def test_a_lent_recipe_leaves_nothing_behind():
    model, inputs = build("llava"), inputs_of(build("llava"), prompts("llava"))
    vlmattn.wrap(model, PAI(layers="0:"))
    expected, handle = model(**inputs).logits, model.vlmattn
    before = handle.report()
    handle.disable()

    def use_and_fail() -> None:
        assert (model(**inputs).logits - expected).abs().max() > 1e-3
        assert handle.report()["fired"]["heads"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), record_of(model).temporarily(Heads(heads=NAMES)):
        use_and_fail()
    assert not handle.enabled
    handle.enable()
    assert handle.report() == before
    assert torch.equal(model(**inputs).logits, expected)
    assert list(record_of(model)._plans) == [handle.recipe]


def test_head_profiles_are_checked(tmp_path):
    model = build("llava")
    with pytest.raises(OptionError, match="which heads"):
        vlmattn.wrap(model, "heads_block")
    path = profile_of(model, fingerprint="0" * 16).save(tmp_path / "other.json")
    with pytest.raises(OptionError, match="another language model"):
        vlmattn.wrap(model, Heads(profile=str(path)))
    path = profile_of(model, means=()).save(tmp_path / "bare.json")
    with pytest.raises(OptionError, match="no mean outputs"):
        vlmattn.wrap(model, Heads(profile=str(path), ablation="mean"))
    for heads in ("4.0", "0.4"):
        with pytest.raises(OptionError, match="4 layers of 4 heads"):
            vlmattn.wrap(model, Heads(heads=heads))
    with pytest.raises(OptionError, match=r"layer\.head"):
        vlmattn.wrap(model, Heads(heads="1,2"))
    with pytest.raises(OptionError, match="none of the heads"):
        vlmattn.wrap(model, Heads(heads="0.1", layers="2:"))
    assert "vlmattn" not in model.__dict__


def test_a_profile_that_is_measured_again_is_read_again(tmp_path):
    """The same file with other heads, on a model that is wrapped anew."""
    model, rows = build("llava"), prompts("llava")
    inputs, path = inputs_of(model, rows), tmp_path / "heads.json"
    found = []
    for head in range(2):
        scores = torch.zeros(LAYERS, HEADS)
        scores[2, head] = 1.0
        profile_of(model, scores={"causal": tuple(map(tuple, scores.tolist()))}).save(path)
        with vlmattn.applied(model, Heads(profile=str(path), share=0.0)):
            found.append(model(**inputs).logits)
        with vlmattn.applied(model, Heads(heads=f"2.{head}")):
            assert torch.equal(model(**inputs).logits, found[-1])
    assert not torch.equal(*found)


# --- Focus directions


ALPHA = 0.7


def directions(seed: int = 1) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = {layer: torch.randn(HEADS, DIM, generator=generator) for layer in (0, 2, 3)}
    query[0][1] = 0.0
    return query


def saved(folder, model: PreTrainedModel, seed: int = 1) -> str:
    return str(save_directions(directions(seed), folder / f"{seed}.safetensors", anatomy(model)))


def shifted(alpha: float = ALPHA, seed: int = 1, layers=range(LAYERS)):
    """A bare run with the directions added to the rotated queries."""

    def run(model, rows, inputs):
        vectors = {layer: alpha * value for layer, value in directions(seed).items() if layer in layers}
        with shifted_queries(model, vectors):
            return model(**inputs).logits

    return run


@attn_matrix
@family_matrix
def test_directions_are_added_after_the_rotation(family, attn, tmp_path):
    check(family, FocusDirections(alpha=ALPHA, file=saved(tmp_path, build(family))), shifted(), attn)


@attn_matrix
@family_matrix
def test_the_cache_keeps_the_keys_and_the_model_its_own_attention(family, attn, tmp_path):
    """No S x S weights in prefill: the report names the model's implementation, and cached keys of layer 0 are bare."""
    model = build(family, attn)
    inputs = inputs_of(model, prompts(family))
    plain = model(**inputs).past_key_values.layers[0].keys
    vlmattn.wrap(model, FocusDirections(alpha=ALPHA, file=saved(tmp_path, model)))
    assert torch.equal(model(**inputs).past_key_values.layers[0].keys, plain)
    assert model.vlmattn.report()["backends"]["prefill"] == {f"base:{attn}+shift": 3, f"base:{attn}": 1}


@family_matrix
def test_key_directions_change_nothing_and_are_said_to_be_left_out(family, tmp_path):
    model = build(family)
    inputs, path = inputs_of(model, prompts(family)), tmp_path / "old.safetensors"
    tensors = load_file(saved(tmp_path, model)) | {"key.1": torch.randn(KV_HEADS, DIM)}
    save_file(tensors, path, {"fingerprint": anatomy(model).fingerprint})
    with vlmattn.applied(model, FocusDirections(file=saved(tmp_path, model))):
        expected = model(**inputs).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            with vlmattn.applied(model, FocusDirections(file=str(path))):
                assert torch.equal(model(**inputs).logits, expected)
    (one,) = said
    assert "old.safetensors are left out" in str(one.message)
    save_file({"key.1": torch.randn(KV_HEADS, DIM)}, tmp_path / "keys.safetensors")
    with pytest.raises(InputError, match=r"needs query\.LAYER"):
        vlmattn.wrap(model, FocusDirections(file=str(tmp_path / "keys.safetensors")))


def test_layers_restrict_the_directions(tmp_path):
    model, rows = build("llava"), prompts("llava")
    inputs, real = inputs_of(model, rows), real_rows(rows)
    vlmattn.wrap(model, FocusDirections(alpha=ALPHA, file=saved(tmp_path, model), layers="3"))
    expected = shifted(layers=[3])(build("llava"), rows, inputs)
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], rtol=0, atol=TOLERANCE)


def test_text_alone_may_be_focused(tmp_path):
    model = build("llava")
    ids = torch.tensor([[1, 20, 30, 40]])
    expected = shifted()(build("llava"), [], dict(input_ids=ids))
    vlmattn.wrap(model, FocusDirections(alpha=ALPHA, file=saved(tmp_path, model)))
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=TOLERANCE)


def test_directions_beside_the_model(tmp_path):
    model, rows = build("llava"), prompts("llava")
    inputs, real = inputs_of(model, rows), real_rows(rows)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with pytest.raises(OptionError, match="which directions"):
        vlmattn.wrap(again, "focus")
    save_directions(directions(), tmp_path, anatomy(model))
    vlmattn.wrap(again, FocusDirections(alpha=ALPHA))
    expected = shifted()(model, rows, inputs)
    torch.testing.assert_close(again(**inputs).logits[real], expected[real], rtol=0, atol=TOLERANCE)


def our_hooks(model: nn.Module) -> list:
    tables = [table for m in model.modules() for table in (m._forward_pre_hooks, m._forward_hooks)]
    return [hook for table in tables for hook in table.values() if _module_of(hook).startswith("vlmattn")]


def _module_of(hook) -> str:
    return getattr(getattr(hook, "func", hook), "__module__", "") or ""


def test_another_recipe_and_disabling_end_the_directions(tmp_path):
    model, rows = build("llava"), prompts("llava")
    inputs = inputs_of(model, rows)
    bare = model(**inputs).logits
    vlmattn.wrap(model, "none")
    model.vlmattn.set(FocusDirections(file=saved(tmp_path, model)))
    focused = model(**inputs).logits
    assert not torch.equal(focused, bare)
    model.vlmattn.disable()
    assert torch.equal(model(**inputs).logits, bare)
    model.vlmattn.enable()
    assert torch.equal(model(**inputs).logits, focused)
    model.vlmattn.set(FocusDirections(file=saved(tmp_path, model, seed=2)))
    expected = shifted(0.2, seed=2)(build("llava"), rows, inputs)
    real = real_rows(rows)
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], rtol=0, atol=TOLERANCE)
    model.vlmattn.set("none")
    assert torch.equal(model(**inputs).logits, bare)


def test_a_second_model_of_the_same_thread_is_left_alone(tmp_path):
    """Between the steps of one model, a wrapped and a bare one run, and a projection by itself."""
    model, other, bare = build("llava"), build("llava", seed=3), build("llava", seed=4)
    one, two = inputs_of(model, [write("llava", ["img", 3])]), inputs_of(model, [write("llava", ["img", 4], seed=5)])
    expected = other(**two).logits, bare(**two).logits
    vlmattn.wrap(model, FocusDirections(alpha=ALPHA, file=saved(tmp_path, model)))
    vlmattn.wrap(other, FocusDirections(alpha=3.0, file=saved(tmp_path, model, seed=2)))
    focused, shifted_other = model(**one).logits, other(**two).logits
    assert not torch.equal(shifted_other, expected[0])
    for _ in range(2):
        assert torch.equal(model(**one).logits, focused)
        assert torch.equal(bare(**two).logits, expected[1])
        assert torch.equal(other(**two).logits, shifted_other)
    with vlmattn.applied(bare, PAI(alpha=0.0, layers="0:")):
        near(bare(**two).logits, expected[1])


def test_a_deep_copy_is_focused_by_itself(tmp_path):
    model, rows = build("llava"), prompts("llava")
    inputs = inputs_of(model, rows)
    bare = model(**inputs).logits
    vlmattn.wrap(model, FocusDirections(alpha=ALPHA, file=saved(tmp_path, model)))
    early = copy.deepcopy(model)
    focused = model(**inputs).logits
    assert not torch.equal(focused, bare)
    late = copy.deepcopy(model)
    for one in (early, late):
        assert torch.equal(one(**inputs).logits, focused)
        vlmattn.unwrap(one)
        assert not our_hooks(one)
        assert torch.equal(one(**inputs).logits, bare)
        assert torch.equal(model(**inputs).logits, focused)
    vlmattn.unwrap(model)
    assert not our_hooks(model)
    assert torch.equal(model(**inputs).logits, bare)


def test_a_written_file_is_read_again(tmp_path):
    model, rows = build("llava"), prompts("llava")
    inputs, real = inputs_of(model, rows), real_rows(rows)
    for seed in (1, 2):
        path = save_directions(directions(seed), tmp_path / "same.safetensors", anatomy(model))
        with vlmattn.applied(model, FocusDirections(alpha=ALPHA, file=str(path))):
            got = model(**inputs).logits
        expected = shifted(seed=seed)(build("llava"), rows, inputs)
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=TOLERANCE)


def test_files_of_directions_are_checked(tmp_path):
    model = build("llava")
    with pytest.raises(InputError, match="nowhere"):
        vlmattn.wrap(model, FocusDirections(file=str(tmp_path / "nowhere.safetensors")))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="junk"):
        vlmattn.wrap(model, FocusDirections(file=str(tmp_path / "junk.safetensors")))
    query = directions()
    wrong = save_directions({0: query[0][:, :4]}, tmp_path / "shape.safetensors", anatomy(model))
    with pytest.raises(OptionError, match="shape"):
        vlmattn.wrap(model, FocusDirections(file=str(wrong)))
    deep = save_directions({7: query[0]}, tmp_path / "deep.safetensors", anatomy(model))
    with pytest.raises(OptionError, match=r"query\.7"):
        vlmattn.wrap(model, FocusDirections(file=str(deep)))
    other = find_family(build("qwen2_5_vl")).anatomy(build("qwen2_5_vl"))
    foreign = save_directions(query, tmp_path / "foreign.safetensors", other)
    with pytest.raises(OptionError, match="another language model"):
        vlmattn.wrap(model, FocusDirections(file=str(foreign)))
    assert "vlmattn" not in model.__dict__
    assert prompts("llava")[0][0] == PAD, "the premise of the checks above: batches are padded"
