"""Changes of hidden states: parts equal the reference, methods equal formulas put into the bare model by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import IMAGE_TOKEN, build, left_padded, prompt
from torch.nn.functional import cosine_similarity, normalize
from zoo import ZOO

import vlmattn
from vlmattn import PAI, VCD, VHR, FastV, Recipe
from vlmattn.decoding import SLA
from vlmattn.errors import FileError, InputError, OptionError, UnsupportedError
from vlmattn.interventions import VISTA, VTI, Directions, Nullu, Steer, load_directions
from vlmattn.kernels import Add, Near, Project, Rows, Scale, Turn, reference, steered
from vlmattn.models import find_family

FAMILIES = ["llava", "qwen2_5_vl"]
NEW = 5
families = pytest.mark.parametrize("family", FAMILIES)
pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore")]


# --- Parts


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    batch, rows, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 6))
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        on = Rows(torch.rand(batch, rows) > 0.5) if draw(st.booleans()) else None
        gate = Near(torch.randn(hidden), draw(st.floats(-0.5, 0.5))) if draw(st.booleans()) else None
        strength = draw(st.floats(-2, 2))
        width = draw(st.integers(1, hidden))
        parts.append(
            draw(
                st.sampled_from(
                    [
                        Add(on, gate, vector=torch.randn(hidden)),
                        Add(on, gate, vector=torch.randn(batch, 1, hidden)),
                        Scale(on, gate, factor=strength),
                        Project(
                            on, gate, basis=torch.linalg.qr(torch.randn(hidden, width)).Q.T, strength=strength, onto=draw(st.booleans())
                        ),
                        Turn(on, gate, directions=torch.randn(width, hidden), strength=strength, opposed=draw(st.booleans())),
                        Turn(on, gate, directions=torch.randn(batch, width, hidden), strength=strength, opposed=True),
                    ]
                )
            )
        )  # fmt: skip
    return torch.randn(batch, rows, hidden), tuple(parts)


@given(cases())
@settings(max_examples=80)
def test_parts_equal_the_reference_row_by_row(case):
    x, parts = case
    for part in parts:  # a gate may stand at its threshold in one arithmetic and not in the other
        if part.gate is not None:
            near = cosine_similarity(x.double(), part.gate.direction.double(), dim=-1)
            if bool(((near - part.gate.least).abs() < 1e-3).any()):
                return
    if sum(part.gate is not None for part in parts) > 1:
        return  # what a gate sees is what the parts before it left
    found, wanted = steered(x, parts), reference.steered(x, parts)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    for cut in range(len(parts) + 1):
        assert torch.equal(steered(steered(x, parts[:cut]), parts[cut:]), found)
    untouched = torch.ones(x.shape[:2], dtype=torch.bool)
    for part in parts:
        untouched &= False if part.rows is None else ~part.rows.mask
    assert torch.equal(found[untouched], x[untouched])


def test_what_parts_keep():
    x, basis = torch.randn(2, 3, 8), torch.linalg.qr(torch.randn(8, 3)).Q.T
    turned = steered(x, (Turn(directions=torch.randn(2, 8), strength=0.7),))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    off = steered(x, (Project(basis=basis),))
    torch.testing.assert_close(off @ basis.T, torch.zeros(2, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(steered(off, (Project(basis=basis),)), off)
    torch.testing.assert_close(off + steered(x, (Project(basis=basis, onto=True),)), x)


# --- Methods


def directions(family, k=2, seed=0):
    anatomy = find_family(model := build(family)).anatomy(model)
    generator = torch.Generator().manual_seed(seed)
    by_layer = {layer: torch.randn(k, anatomy.hidden_size, generator=generator) for layer in range(anatomy.layers)}
    return Directions(by_layer, anatomy.fingerprint, "here", "drawn", "none")


@pytest.fixture
def files(tmp_path):
    return {family: str(directions(family).save(tmp_path / f"{family}.safetensors")) for family in FAMILIES}


def turned(x, d, alpha):
    y = sum((1 + cosine_similarity(x, -one, dim=-1).clamp_min(0))[..., None] * normalize(one, dim=-1) for one in d)
    return normalize(normalize(x, dim=-1) + 0.1 * alpha * y / len(d), dim=-1) * x.norm(dim=-1, keepdim=True)


def off(x, d, rank=2):
    basis = torch.linalg.svd(d[:rank], full_matrices=False).Vh
    return x - (x @ basis.T) @ basis


METHODS = {
    "steer": (Steer(alpha=0.8), "layer", lambda x, d: x + 0.8 * d[0]),
    "steer_text": (Steer(alpha=0.8, rows="text", layers="1:3"), "layer", lambda x, d: x + 0.8 * d[0]),
    "steer_image": (Steer(alpha=2.0, rows="image"), "layer", lambda x, d: x + 2.0 * d[0]),
    "vti": (VTI(alpha=4.0), "mlp", lambda x, d: turned(x, d, 4.0)),
    "nullu": (Nullu(rank=2, layers="1:"), "mlp", off),
}
every_method = pytest.mark.parametrize("name", METHODS)


def method_of(name, file):
    return replace(METHODS[name][0], file=file)


def answered(family, recipe):
    """Prompts of a padded batch, and the tokens and logits that a model under a recipe answers with; the model too."""
    prompts = [prompt(family, 1, words=4), prompt(family, 1, words=9, seed=3)]
    model = vlmattn.wrap(build(family), recipe)
    out = model.generate(
        **left_padded(prompts), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return prompts, out.sequences[:, -NEW:].tolist(), out.logits, model


def with_answer(inputs, answer):
    """A prompt with what was said so far."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        full["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return full


def by_hand(family, name, file, inputs, answer=()):
    """Logits of the bare model, the whole text read anew, with the formula in its layers."""
    method, site, formula = METHODS[name]
    model, found = build(family), load_directions(file).by_layer
    full = with_answer(inputs, answer)
    ids = full["input_ids"]
    visual, slots, last = ids[0] == IMAGE_TOKEN, torch.arange(ids.shape[1]), inputs["input_ids"].shape[1] - 1
    rows = {"all": slots >= 0, "generated": slots >= last, "image": visual, "text": ~visual}[method.rows]
    layers = method.active_layers(find_family(model).anatomy(model))
    for number, layer in enumerate(find_family(model).layers(model)):

        def change(module, args, output, number=number):
            hidden = output[0] if isinstance(output, tuple) else output
            new = torch.where(rows[:, None], formula(hidden, found[number]), hidden)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        if number in layers:
            (layer if site == "layer" else layer.mlp).register_forward_hook(change)
    return model(**full, use_cache=False).logits[0]


@families
@every_method
def test_methods_equal_their_formulas_in_the_bare_model(family, name, files):
    inputs = prompt(family, 2, words=6)
    model = vlmattn.wrap(build(family), method_of(name, files[family]))
    wanted = by_hand(family, name, files[family], inputs)
    torch.testing.assert_close(model(**inputs).logits[0], wanted, rtol=0, atol=2e-4)
    bare = build(family)(**inputs).logits[0]
    assert (wanted[-1] - bare[-1]).abs().max() > 1e-2


@families
@every_method
def test_cached_answers_of_a_padded_batch_equal_recomputing(family, name, files):
    prompts, answers, logits, model = answered(family, method_of(name, files[family]))
    for row, inputs in enumerate(prompts):
        for step in range(NEW):
            wanted = by_hand(family, name, files[family], inputs, answers[row][:step])[-1]
            torch.testing.assert_close(logits[step][row], wanted, rtol=0, atol=2e-4)
    assert model.vlmattn.report()["fired"][METHODS[name][0].info.name] > 0


@families
@every_method
def test_beams_are_those_of_each_prompt_alone(family, name, files):
    prompts = [prompt(family, 2, words=4), prompt(family, 1, words=9, seed=3)]
    model = vlmattn.wrap(build(family), method_of(name, files[family]))
    settings = dict(num_beams=3, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
    together = model.generate(**left_padded(prompts), **settings)
    for row, inputs in enumerate(prompts):
        assert torch.equal(together[row, -NEW:], model.generate(**inputs, **settings)[0, -NEW:])


@every_method
def test_strength_zero_and_unwrap_leave_every_bit(name, files):
    method, inputs = method_of(name, files["llava"]), prompt("llava", 2)
    idle = replace(method, **({"strength": 0.0} if name == "nullu" else {"alpha": 0.0}))
    model = build("llava")
    bare = model(**inputs).logits
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert torch.equal(vlmattn.wrap(model, idle)(**inputs).logits, bare)
    vlmattn.unwrap(model)
    vlmattn.wrap(model, method)
    assert not torch.equal(model(**inputs).logits, bare)
    vlmattn.unwrap(model)
    assert torch.equal(model(**inputs).logits, bare)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_with_attention_edits_rules_and_dropped_tokens(files):
    """Each beside steering changes the answer further, and steering changes it beside each."""
    inputs, steer = prompt("llava", 2), method_of("steer", files["llava"])
    for other in (PAI(alpha=0.9, layers="0:"), VCD(), FastV(layer=2, keep_ratio=0.25)):
        scores = []
        for recipe in ([other], [steer], [other, steer]):
            model = vlmattn.wrap(build("llava"), recipe)
            out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)  # fmt: skip
            scores.append(torch.stack(out.logits).nan_to_num(neginf=0))
        assert (scores[2] - scores[0]).abs().max() > 1e-2
        assert (scores[2] - scores[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["vti", "nullu", "steer"])
def test_a_stream_beside_the_prompt_does_not_take_its_steering(name, files):
    """VHR runs the text alone within each layer; with a gain of almost 1 it leaves the steered answer as it is."""
    inputs, method = prompt("llava", 2), method_of(name, files["llava"])
    alone, beside = (
        vlmattn.wrap(build("llava"), recipe)(**inputs).logits
        for recipe in ([method], [VHR(layers="0:", alpha=1 + 1e-6), method])
    )
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-3)
    assert (alone - build("llava")(**inputs).logits).abs().max() > 1e-2


def test_a_layer_that_raises_leaves_no_steering_behind(files):
    inputs, model = prompt("llava", 2), vlmattn.wrap(build("llava"), method_of("vti", files["llava"]))
    layer = find_family(model).layers(model)[1]

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = layer.mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(**inputs)
    handle.remove()
    states = torch.randn(1, 3, model.config.get_text_config().hidden_size)
    assert torch.equal(layer.mlp(states), type(layer.mlp).forward(layer.mlp, states))


def test_the_branches_of_a_rule_are_steered_too(files):
    """VCD over a steered model: both rows are what a steered model says of either picture."""
    inputs, steer = prompt("llava", 2), method_of("steer", files["llava"])
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    rule = vlmattn.ContrastiveDecoding((vlmattn.Branch(name="b", image="blank"),), vlmattn.Contrast((1.0,), beta=0.0))
    model = vlmattn.wrap(build("llava"), [steer, rule])
    found = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0).logits[0][0]  # fmt: skip
    main, other = (by_hand("llava", "steer", files["llava"], one)[-1] for one in (inputs, blank))
    torch.testing.assert_close(found, 2 * main - other, rtol=0, atol=4e-4)


# --- As released


@pytest.mark.parametrize("name", ["one", "three", "simple"])
def test_turns_are_those_of_the_released_layer_of_vista(name):
    """Outputs of VSVLayer (github.com/LzVv123456/VISTA, MIT), which puts out half precision."""
    golden = load_file(Path(__file__).parents[1] / "goldens" / "steering" / "vista.safetensors")
    x, v, out = (golden[f"{name}.{part}"] for part in ("x", "v", "out"))
    simple = name == "simple"
    found = steered(x, (Turn(directions=v, strength=0.7 if simple else 0.1, opposed=not simple),))
    torch.testing.assert_close(found, out, rtol=1e-3, atol=1e-3)


@families
def test_nullu_equals_projected_weights(family, files):
    """The release multiplies the last matrix of the MLP by the projection off the subspace."""
    inputs, found = prompt(family, 2), load_directions(files[family]).by_layer
    edited, method = build(family), method_of("nullu", files[family])
    anatomy = find_family(edited).anatomy(edited)
    for number in method.active_layers(anatomy):
        main = torch.linalg.svd(found[number][:2], full_matrices=False).Vh
        weight = find_family(edited).layers(edited)[number].mlp.down_proj.weight
        weight.copy_((torch.eye(anatomy.hidden_size) - main.T @ main) @ weight)
    model = vlmattn.wrap(build(family), method)
    torch.testing.assert_close(model(**inputs).logits, edited(**inputs).logits, rtol=0, atol=2e-4)


def without_image(inputs):
    ids = inputs["input_ids"]
    return {"input_ids": ids[:, ids[0] != IMAGE_TOKEN]}


def outputs(model, inputs):
    """What each layer puts out in the last row."""
    found, handles = {}, []
    for number, layer in enumerate(find_family(model).layers(model)):

        def note(module, args, output, number=number):
            found[number] = (output[0] if isinstance(output, tuple) else output)[0, -1]

        handles.append(layer.register_forward_hook(note))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def vista_by_hand(family, inputs, answer, alpha):
    """As the release does it: vectors of the prompt with and without its image, then every MLP is followed by a turn."""
    model = build(family)
    seeing, blind = outputs(model, inputs), outputs(build(family), without_image(inputs))
    for number, layer in enumerate(find_family(model).layers(model)):

        def change(module, args, output, number=number):
            return turned(output, (seeing[number] - blind[number])[None], 10 * alpha)

        layer.mlp.register_forward_hook(change)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    return model(**with_answer(inputs, answer), use_cache=False).logits[0]


@families
def test_vista_turns_towards_what_the_image_adds(family):
    prompts, answers, logits, _ = answered(family, VISTA(alpha=0.5))
    for row, inputs in enumerate(prompts):
        for step in range(NEW):
            wanted = vista_by_hand(family, inputs, answers[row][:step], 0.5)[-1]
            torch.testing.assert_close(logits[step][row], wanted, rtol=0, atol=5e-4)
    bare = build(family)(**prompts[0]).logits[0, -1]
    assert (logits[0][0] - bare).abs().max() > 1e-2


@families
def test_sla_mixes_what_late_layers_say(family):
    inputs, alpha = prompt(family), 0.4
    model = vlmattn.wrap(build(family), SLA(alpha=alpha, layers="2,3"))
    found = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0).logits[0]  # fmt: skip
    bare = build(family)
    states = outputs(bare, inputs)
    main = bare(**inputs).logits[0, -1]
    late = torch.stack([bare.lm_head(states[layer]) for layer in (1, 2)]).mean(0)
    torch.testing.assert_close(found[0], (1 - alpha) * main + alpha * late, rtol=0, atol=2e-4)


# --- Files


def test_controls_have_the_same_norms_and_other_directions(files):
    model, inputs = build("llava"), prompt("llava")
    answers = [
        vlmattn.wrap(build("llava"), Recipe.of(name, file=files["llava"]))(**inputs).logits
        for name in ("steer", "steer_random")
    ]
    assert not torch.equal(*answers)
    assert not torch.equal(answers[1], model(**inputs).logits)
    again = vlmattn.wrap(build("llava"), Recipe.of("steer_random", file=files["llava"]))(**inputs).logits
    assert torch.equal(answers[1], again)


def test_directions_are_found_beside_the_model(tmp_path):
    build("llava").save_pretrained(tmp_path)
    model = type(build("llava")).from_pretrained(tmp_path)
    with pytest.raises(OptionError, match="steer: which directions"):
        vlmattn.wrap(model, "steer")
    found = directions("llava")
    found.save(tmp_path)
    vlmattn.wrap(model, "steer")
    read = load_directions(str(tmp_path / "vlmattn_steering.safetensors"))
    assert (read.source, read.method, read.examples) == ("here", "drawn", "none")
    assert all(torch.equal(read.by_layer[layer], value) for layer, value in found.by_layer.items())


def damaged(made, what):
    if what == "another model":
        return replace(made, fingerprint="0123")
    layer, value = next(iter(made.by_layer.items()))
    others = {"wrong width": value[:, :-1], "not finite": value * float("nan"), "no layer": value}
    return replace(made, by_layer={99 if what == "no layer" else layer: others[what]})


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("another model", OptionError, "belong to another language model (measured on 'here'"),
        ("wrong width", OptionError, "'direction.0' is of shape [2, 31]; the model has layers 0..3 and needs [k, 32]"),
        ("no layer", OptionError, "'direction.99' is of shape [2, 32]; the model has layers 0..3"),
        ("not finite", InputError, "direction.0 has numbers that are not finite"),
    ],
)
def test_directions_that_do_not_fit_are_refused_in_one_line(tmp_path, what, error, words):
    path = damaged(directions("llava"), what).save(tmp_path / "d.safetensors")
    with pytest.raises(error, match=re.escape(words)) as told:
        vlmattn.wrap(build("llava"), Recipe.of("steer", file=str(path)))
    assert "\n" not in str(told.value)


def test_files_that_are_no_directions(tmp_path):
    for text, error in ((None, FileError), ("words", InputError)):
        path = tmp_path / "x.safetensors"
        if text is not None:
            path.write_text(text)
        with pytest.raises((error, InputError, FileError)) as told:
            vlmattn.wrap(build("llava"), Recipe.of("steer", file=str(path)))
        assert "\n" not in str(told.value)
    with pytest.raises(OptionError, match="layer"):
        vlmattn.wrap(build("llava"), Steer(file=str(directions("llava").save(tmp_path)), layers="9"))


# --- Families


@pytest.mark.parametrize("name", [name for name in ZOO if not ZOO[name].unbuildable])
def test_every_family_is_steered_or_says_why_not(name, tmp_path):
    """A warning that nothing fired is an error."""
    model, inputs = ZOO[name].build(), ZOO[name].prompt(1, 5, 1).inputs
    try:
        anatomy = find_family(model).anatomy(model)
    except UnsupportedError:
        pytest.skip("not served")
    drawn = {layer: torch.randn(2, anatomy.hidden_size) for layer in range(anatomy.layers)}
    file = str(Directions(drawn, anatomy.fingerprint).save(tmp_path))
    bare = model(**inputs).logits[:, -1]
    for method, reasons in (
        (Steer(file=file, alpha=0.5), ("streams",)),
        (VTI(file=file, alpha=4.0), ("streams", "MLP")),
    ):
        try:
            vlmattn.wrap(model, method)
        except UnsupportedError as error:
            assert any(f"{reason}" in str(error) for reason in reasons)  # noqa: PT017
            continue
        assert (model(**inputs).logits[:, -1] - bare).abs().max() > 1e-3
        assert model.vlmattn.report()["fired"][method.info.name] == anatomy.layers
        vlmattn.unwrap(model)
