"""Which slots kvpress' presses keep on a tiny text model: writes tests/goldens/kvpress/slots.safetensors.

Runs in an environment of its own (``pip install torch kvpress``), which has another transformers than this project.
The model is written out as plain tensors: the test rebuilds it and chooses by itself.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from kvpress import ObservedAttentionPress, PyramidKVPress, SnapKVPress, StreamingLLMPress, TOVAPress
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

CONFIG = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
PRESSES = {
    "snapkv": SnapKVPress(0.75, window_size=6, kernel_size=5),
    "pyramidkv": PyramidKVPress(0.5, window_size=4, kernel_size=3, beta=4),
    "tova": TOVAPress(0.75),
    "h2o_mean": ObservedAttentionPress(0.75),
    "streaming": StreamingLLMPress(0.75, n_sink=4),
}


def main(target: str) -> None:
    """Write weights, tokens, and the kept slots of each press and layer, ``[kv_heads, kept]``, ascending."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).eval()
    with torch.no_grad():
        for weight in model.parameters():  # attention with peaks
            weight.copy_(torch.randn_like(weight) * 0.2 if weight.ndim > 1 else torch.ones_like(weight))
    tokens = torch.randint(2, 64, (1, 80))
    found = {f"model.{name}": weight.clone() for name, weight in model.state_dict().items()} | {"tokens": tokens}
    for name, press in PRESSES.items():
        whole, cache = DynamicCache(), DynamicCache()
        with torch.no_grad():
            model(tokens, past_key_values=whole)
            with press(model):
                model(tokens, past_key_values=cache)
        for index, (every, kept) in enumerate(zip(whole.layers, cache.layers, strict=True)):
            apart = (kept.keys[0, :, :, None] - every.keys[0, :, None]).abs().amax(-1)  # [kv_heads, kept, slots]
            assert apart.amin(-1).max() < 1e-6
            found[f"{name}.{index}"] = apart.argmin(-1).sort(-1).values
    metadata = {"kvpress": version("kvpress"), "transformers": version("transformers"), "torch": torch.__version__}
    save_file(found, target, metadata)


if __name__ == "__main__":
    main(sys.argv[1])
