"""The ways people run models: placed in parts, in half precision, quantised, with adapters, under gradient checkpointing."""

from __future__ import annotations

import copy
import inspect
import os
import threading

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from choices import Choices
from numerics import TINY_MODEL, bound, near, size
from tiny import build, generate, left_padded, prompt
from transformers import AutoModelForImageTextToText, GenerationConfig, TextIteratorStreamer, set_seed

import vlmattn
from vlmattn import PAI, VAR, VCD, VHR, Bidirectional, FastV, SoFA, UnsupportedError
from vlmattn.wrapping import handle_of

SINKS = VAR(tau=1.2, keep=0.2, dims=(3, 5), max_sink=1.0, min_visual=0.0, layers="0:")
RECIPES = {
    "var": SINKS,
    "vhr": VHR(layers="0:"),
    "pai": PAI(alpha=0.9, layers="0:"),
    "sofa": SoFA(sigma=0.5),
    "bidirectional": Bidirectional(span="prompt"),
    "vcd": VCD(),
    "fastv": FastV(layer=2, keep_ratio=0.5),
}
no_grad = pytest.mark.usefixtures("no_grad")
all_recipes = pytest.mark.parametrize("name", RECIPES)
families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])


def prompts(family: str) -> dict[str, torch.Tensor]:
    return left_padded([prompt(family, 2), prompt(family, 1, words=7, seed=3)])


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Without the tokens that a decoding rule rules out."""
    return logits.nan_to_num(neginf=0.0)


def acts(found: torch.Tensor, bare: torch.Tensor) -> bool:
    return bool((finite(found) - finite(bare)).abs().max() > 1e-2)


# Weights that are elsewhere


def on_cpu(model, folder):
    return cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    return disk_offload(model, folder, execution_device="cpu")


def in_parts(model, folder):
    """Every second decoder layer is on disk."""
    places = {name: "cpu" for name, _ in model.named_parameters() if ".language_model.layers." not in name}
    layers = next(name for name, _ in model.named_modules() if name.endswith("language_model.layers"))
    places |= {f"{layers}.{n}": "disk" if n % 2 else "cpu" for n in range(4)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@no_grad
@pytest.mark.parametrize("place", [on_cpu, on_disk, in_parts])
@families
@all_recipes
def test_state_follows_layers_that_are_placed_elsewhere(name, family, place, tmp_path):
    inputs, choices = prompts(family), Choices()
    with choices.noted():
        wanted = generate(vlmattn.wrap(build(family), RECIPES[name]), inputs)
    placed = place(build(family), tmp_path)
    bare = generate(placed, inputs)
    assert acts(wanted, bare)
    with choices.repeated():
        near(generate(vlmattn.wrap(placed, RECIPES[name]), inputs), wanted)
    vlmattn.unwrap(placed)
    assert torch.equal(generate(placed, inputs), bare)
    assert any(hasattr(module, "_hf_hook") for module in placed.modules()), "accelerate's hooks stay"
    wrapped_before = place(vlmattn.wrap(build(family), RECIPES[name]), tmp_path / "again")
    with choices.repeated():
        near(generate(wrapped_before, inputs), wanted)


# Half precision and quantised weights


@no_grad
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@families
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "vcd"])  # does nothing in a forward alone
def test_half_precision_costs_an_edited_model_what_it_costs_the_bare_one(name, family, dtype):
    """Logits of a prompt: at most three times as far (root mean square) from float32 as the bare model's, under the same choices."""
    inputs, choices = prompt(family, 2), Choices()
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    exact, rough = build(family), build(family).to(dtype)
    bare = exact(**inputs).logits
    cost = (rough(**half).logits.float() - bare).square().mean().sqrt()
    with choices.noted():
        edited = vlmattn.wrap(exact, RECIPES[name])(**inputs).logits
    with choices.repeated():
        found = vlmattn.wrap(rough, RECIPES[name])(**half).logits
    assert bool(choices.made) == (name in ("var", "vhr", "fastv"))
    assert found.dtype == dtype
    assert acts(edited[:, -1], bare[:, -1])
    assert rough.vlmattn.report()["fired"][name]
    assert (found.float() - edited).square().mean().sqrt() < 3 * cost


@no_grad
@families
@all_recipes
def test_half_precision_stays_finite(name, family):
    inputs = {k: v.half() if v.is_floating_point() else v for k, v in prompts(family).items()}
    assert finite(generate(vlmattn.wrap(build(family).half(), RECIPES[name]), inputs)).isfinite().all()


def eight_bits(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.language_model, Int8WeightOnlyConfig())


def four_bits(model):
    import bitsandbytes

    for module in list(model.model.language_model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, torch.nn.Linear):
                small = bitsandbytes.nn.Linear4bit(
                    part.in_features, part.out_features, part.bias is not None, torch.float32, quant_type="nf4"
                )
                small.weight = bitsandbytes.nn.Params4bit(part.weight.data, requires_grad=False, quant_type="nf4")
                small.bias = part.bias
                setattr(module, name, small)
    model.to("cpu")


@no_grad
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "quantise"), [("torchao", eight_bits), ("bitsandbytes", four_bits)])
@families
@all_recipes
def test_quantised_weights(name, family, package, quantise):
    """The edited model is the edited model whose weights are what the quantised ones stand for."""
    pytest.importorskip(package)
    inputs, model, choices = prompt(family, 2), build(family), Choices()
    quantise(model)
    bare = model(**inputs).logits
    plain = generate(model, inputs)
    wrapped = vlmattn.wrap(model, RECIPES[name])
    with choices.noted():
        found = wrapped(**inputs).logits
    answer = generate(wrapped, inputs)
    assert acts(answer, plain)
    same = build(family)
    for module, small in zip(same.model.language_model.modules(), model.model.language_model.modules(), strict=False):
        if isinstance(module, torch.nn.Linear):  # what it does to the identity
            module.weight.data = small(torch.eye(module.in_features)).T - (
                0 if small.bias is None else small.bias[:, None]
            )
    torch.testing.assert_close(same(**inputs).logits, bare, rtol=0, atol=2e-2)
    with choices.repeated():
        again = vlmattn.wrap(same, RECIPES[name])(**inputs).logits
    torch.testing.assert_close(again, found, rtol=0, atol=5e-2)
    vlmattn.unwrap(model)
    assert torch.equal(model(**inputs).logits, bare)


# Adapters


def with_adapters(peft, model):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def adapted(family: str):
    peft = pytest.importorskip("peft")
    return with_adapters(peft, build(family))


@no_grad
@families
@all_recipes
def test_adapters(name, family):
    """Wrapping the adapted model, its base model, or the model before it gets adapters comes to the same."""
    inputs, model, choices = prompts(family), adapted(family), Choices()
    bare = generate(model, inputs)
    assert vlmattn.wrap(model, RECIPES[name]) is model
    with choices.noted():
        found = generate(model, inputs)
    assert acts(found, bare)
    assert model.vlmattn.report()["fired"][model.vlmattn.recipe.names[0]]
    with model.disable_adapter():
        near(generate(model, inputs), generate(vlmattn.wrap(build(family), RECIPES[name]), inputs))
    assert vlmattn.unwrap(model) is model
    assert torch.equal(generate(model, inputs), bare)
    with vlmattn.applied(model.get_base_model(), RECIPES[name]):
        assert torch.equal(generate(model, inputs), found)
    vlmattn.wrap(model, RECIPES[name])
    merged = model.merge_and_unload()
    with choices.repeated():
        near(generate(merged, inputs), found)
    assert handle_of(merged) is not None


@no_grad
@families
def test_adapters_added_later(family):
    peft = pytest.importorskip("peft")
    inputs = prompts(family)
    wanted = generate(vlmattn.wrap(adapted(family), SINKS), inputs)
    later = with_adapters(peft, vlmattn.wrap(build(family), SINKS))
    near(generate(later, inputs), wanted)


@no_grad
@families
def test_adapters_are_saved_with_the_recipe(family, tmp_path):
    """Saving the PEFT model that was wrapped; a model from the folder is wrapped with what lies there."""
    peft = pytest.importorskip("peft")
    inputs, model = prompts(family), adapted(family)
    attributes = set(model.__dict__)
    vlmattn.wrap(model, RECIPES["var"])
    wanted = generate(model, inputs)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "vlmattn_config.json"} <= set(os.listdir(tmp_path))
    loaded = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    with pytest.raises(
        vlmattn.InputError, match=r"the folder of the adapter, which PEFT does not tell: wrap\(model, folder\)"
    ):
        vlmattn.wrap(loaded)
    vlmattn.wrap(loaded, tmp_path)
    assert loaded.vlmattn.recipe == model.vlmattn.recipe
    torch.testing.assert_close(generate(loaded, inputs), wanted, rtol=0, atol=1e-5)
    for unwrapped in (model, model.get_base_model()):  # either way nothing is left on the PEFT model
        vlmattn.unwrap(unwrapped)
        assert set(model.__dict__) == attributes
        (tmp_path / "bare").mkdir(exist_ok=True)
        model.save_pretrained(tmp_path / "bare")
        assert "vlmattn_config.json" not in os.listdir(tmp_path / "bare")
        vlmattn.wrap(model, RECIPES["var"])


# Training


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("reentrant", [False, True])
@families
@pytest.mark.parametrize(
    "name", ["var", "vhr", "sofa", "bidirectional"]
)  # pai changes the last row only, which has no label
def test_checkpointed_gradients_are_those_without(name, family, reentrant):
    inputs = prompts(family)
    bare_loss, _ = gradients(build(family).train(), inputs)
    model = vlmattn.wrap(build(family).train(), RECIPES[name])
    loss, wanted = gradients(model, inputs)
    assert abs(float(loss - bare_loss)) > 1e-6
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, found = gradients(model, inputs)
    near(again, loss)
    assert wanted.keys() == found.keys()
    # Some gradients are sums that come to nothing (those of the keys' biases), so the size is that of the largest.
    limit = bound(torch.float32, TINY_MODEL, max(size(gradient) for gradient in wanted.values()))
    worst = {name: size(found[name] - gradient) for name, gradient in wanted.items()}
    assert max(worst.values()) < limit, worst


# Other ways


@no_grad
@families
def test_inference_mode_a_streamer_and_a_seed(family):
    """Sampling with a streamer in another thread gives the tokens of a plain call with the same seed."""
    inputs, model = prompt(family), vlmattn.wrap(build(family), SINKS)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=True, pad_token_id=0)
    set_seed(3)
    wanted = model.generate(**inputs, **options)

    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)
    found = {}

    def work():
        with torch.inference_mode():
            set_seed(3)
            found["ids"] = model.generate(**inputs, **options, streamer=streamer)

    thread = threading.Thread(target=work)
    thread.start()
    said = "".join(streamer)
    thread.join()
    assert torch.equal(found["ids"], wanted)
    assert said.split() == [str(int(i)) for i in wanted[0, inputs["input_ids"].shape[1] :]]


@no_grad
@families
def test_saved_weights_are_those_of_the_bare_model(family, tmp_path):
    """No pickle: safetensors, the same keys, and the recipe beside them."""
    bare, inputs = build(family), prompt(family)
    model = vlmattn.wrap(copy.deepcopy(bare), RECIPES["pai"])
    assert model.state_dict().keys() == bare.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    near(generate(again, inputs), generate(bare, inputs))  # weights that lie elsewhere are multiplied in another order
    near(generate(vlmattn.wrap(again), inputs), generate(model, inputs))


@no_grad
@families
def test_a_wrapped_model_may_change_its_dtype(family):
    inputs = {k: v.half() if v.is_floating_point() else v for k, v in prompt(family).items()}
    found = generate(vlmattn.wrap(build(family), SINKS).half(), inputs)
    assert torch.equal(found, generate(vlmattn.wrap(build(family).half(), SINKS), inputs))


@no_grad
@families
def test_the_parameters_of_the_model_are_still_seen(family):
    """generate() asks them whether it may have ``inputs_embeds``."""
    model = build(family)
    before = inspect.signature(model.prepare_inputs_for_generation)
    assert inspect.signature(vlmattn.wrap(model, SINKS).prepare_inputs_for_generation) == before


def test_continuous_batching_is_refused_before_it_starts():
    model, texts = build("llava"), [[1, 5, 6, 7, 8], [1, 9, 10, 11]]
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    bare = model.generate_batch(inputs=texts, generation_config=settings, progress_bar=False)
    vlmattn.wrap(model, "pai")
    with pytest.raises(UnsupportedError, match=r"takes no images, .* 'pai' cannot edit; use generate\(\)"):
        model.generate_batch(inputs=texts, generation_config=settings, progress_bar=False)
    vlmattn.unwrap(model)
    again = model.generate_batch(inputs=texts, generation_config=settings, progress_bar=False)
    assert [one.generated_tokens for one in again.values()] == [one.generated_tokens for one in bare.values()]
