"""Models that nothing acts on are refused by name, with the reason and what runs instead, and are left as they were."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as hf

import vlmattn
from vlmattn import UnsupportedError
from vlmattn.models import registered

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
MADE = {
    "blip": ("BlipForConditionalGeneration", "BlipConfig", {"text_config": TEXT, "vision_config": TEXT}),
    "git": ("GitForCausalLM", "GitConfig", {**TEXT, "vision_config": TEXT}),
    "idefics": ("IdeficsForVisionText2Text", "IdeficsConfig", {"num_hidden_layers": 1, "hidden_size": 32}),
    "pix2struct": ("Pix2StructForConditionalGeneration", "Pix2StructConfig", {}),
    "udop": ("UdopForConditionalGeneration", "UdopConfig", dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)),
    "vision-encoder-decoder": ("VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", {}),
    "pp_formulanet": ("PPFormulaNetForConditionalGeneration", "PPFormulaNetConfig", {}),
}  # fmt: skip


def make(name):
    """The model on the meta device, where weights take no room."""
    cls, config, options = MADE[name]
    if not hasattr(hf, cls):
        pytest.skip(f"transformers {hf.__version__} has no {cls}")
    if name == "vision-encoder-decoder":
        encoder, decoder = hf.ViTConfig(**TEXT), hf.BertConfig(**TEXT)
        made = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    else:
        made = getattr(hf, config)(**options)
    with torch.device("meta"):
        return getattr(hf, cls)(made)


@pytest.mark.parametrize("name", MADE)
def test_they_are_refused_with_the_reason_and_a_remedy(name):
    model = make(name)
    before, why = sorted(model.__dict__), registered()[name].unsupported
    assert "; take " in why
    with pytest.raises(UnsupportedError, match=re.escape(why)):
        vlmattn.wrap(model, "pai")
    assert sorted(model.__dict__) == before
    assert name not in vlmattn.supported_families()
