"""Differences between versions of transformers: one place knows them, and a version that nobody tried is named."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, prompt
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import vlmattn
from vlmattn import UnsupportedError, compat

PACKAGE = Path(vlmattn.__file__).parent


class Remote(nn.Module):
    """A module that is not transformers' own and keeps the older name."""

    def forward(self, hidden: Any, past_key_values: Any = None) -> Any:
        return hidden


def test_the_name_is_the_one_that_models_take():
    assert compat.cache_name() in inspect.signature(LlamaForCausalLM.forward).parameters
    assert compat.cache_name() in inspect.signature(LlamaForCausalLM.prepare_inputs_for_generation).parameters


NAMES = sorted({"past_key_values", compat.cache_name()})  # of caches that are given


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_found_and_replaced_under_either_name(name):
    first, second = DynamicCache(), DynamicCache()
    inputs = {"input_ids": 1, name: first}
    assert compat.cache_of(inputs) is first
    assert compat.with_cache(inputs, second) == {"input_ids": 1, name: second}
    assert compat.with_cache(inputs, None) == {"input_ids": 1, name: None}
    assert inputs[name] is first


def test_without_a_name_the_module_says_it():
    cache = DynamicCache()
    assert compat.with_cache({}, cache, Remote()) == {"past_key_values": cache}
    assert compat.with_cache({}, cache) == {compat.cache_name(): cache}
    assert compat.cache_of({"past_key_values": None, "input_ids": 1}) is None


def test_outputs():
    output, cache = CausalLMOutputWithPast(), DynamicCache()
    assert compat.output_cache(output) is None
    compat.set_output_cache(output, cache)
    assert compat.output_cache(output) is cache
    assert cache in output.to_tuple()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_of_continuous_batching_is_none_of_a_request(name):
    paged = object.__new__(PagedAttentionCache)
    assert compat.paged({name: paged})
    assert compat.cache_of({name: paged}) is None
    assert not compat.paged({name: DynamicCache()})
    model = vlmattn.wrap(build("llava"), "pai")
    with pytest.raises(UnsupportedError, match="continuous batching"), torch.no_grad():
        model(**prompt("llava"), **{name: paged})


@pytest.mark.parametrize("recipe", ["pai", "vcd", "fastv"])
def test_a_cache_may_be_given_under_either_name(recipe):
    """The name that this version deprecates as well, where it is known."""
    model, inputs = vlmattn.wrap(build("llava"), recipe), prompt("llava")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for name in NAMES:
            cache = DynamicCache(config=model.config.get_text_config())
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **{name: cache}), wanted)
            assert cache.get_seq_length() > inputs["input_ids"].shape[1]


def test_only_compat_knows_versions():
    """Neither the names of the cache as arguments, nor a version of transformers, outside of compat.py."""
    knows = re.compile(
        r"""["']past_key_values["']\]|get\(["'](past_key_values|cache)["']|past_key_values=|\.past_key_values"""
    )
    for file in PACKAGE.rglob("*.py"):
        if file.name != "compat.py":
            found = knows.search(file.read_text())
            assert found is None, f"{file}: {found and found.group()}"
            assert "transformers.__version__ " not in file.read_text()  # compared; printing it is fine


def test_only_compat_knows_the_inside_of_transformers():
    """A family may build on the modeling module that it serves; bundled models and programs are no part of the engine."""
    inside = re.compile(r"(?:from|import) (transformers\.[\w.]+)|\._attn_implementation|_(?:eos|pad)_token_tensor")
    found = set()
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE)
        if place.name != "compat.py" and place.parts[0] not in ("embedded", "evals", "tracking", "cli", "lmms_eval"):
            found |= {f"{place.as_posix()}: {hit.group()}" for hit in inside.finditer(file.read_text())}
    assert found == {"models/llava_next.py: from transformers.models.llava_next.modeling_llava_next"}


def test_a_newer_version_is_named_once(monkeypatch):
    compat.warn_if_untested.cache_clear()
    monkeypatch.setattr(compat, "INSTALLED", "5.99.1")
    with pytest.warns(UserWarning, match=r"transformers 5\.99\.1 is newer than 5\.24.*vlmattn doctor"):
        vlmattn.wrap(build("llava"), "pai")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vlmattn.wrap(build("llava"), "pai")
    compat.warn_if_untested.cache_clear()


@pytest.mark.parametrize("version", ["5.17.0", compat.TESTED[1] + ".3", "5.24.0.dev0"])
def test_tested_versions_are_silent(monkeypatch, version):
    compat.warn_if_untested.cache_clear()
    monkeypatch.setattr(compat, "INSTALLED", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vlmattn.wrap(build("llava"), "pai")


def test_doctor_names_what_fails(run, monkeypatch):
    from vlmattn.cli import checkup

    code, out, _ = run("doctor")
    assert code == 0, out
    assert all(re.search(rf"answer with '{preset}' +works", out) for preset in checkup.TRIED)

    monkeypatch.setattr(compat, "INSTALLED", "5.99.1")
    monkeypatch.setattr(compat, "cache_of", lambda inputs: 1 / 0)
    code, out, err = run("doctor")
    assert code == 2
    assert "newer than 5.24" in out
    assert re.search("answer with 'pai' +ZeroDivisionError", out)
    assert "wrapped answers fail with vhr, pai, fastv, vcd; install transformers 5.24" in " ".join(err.split())
