"""Attention sinks by massive activations: which hidden dimensions give them away, and the test for them."""

from __future__ import annotations

from torch import Tensor

# (language model type, hidden size, layers, MLP width) -> sink dimensions. They belong to the language model and its
# weights, not to the vision-language model built on it. For other models: vlmattn.inspection.find_sinks.
SINK_DIMS: dict[tuple[str, int, int, int], tuple[int, ...]] = {
    ("llama", 4096, 32, 11008): (1415, 2533),  # LLaMA-2-7B, Vicuna-7B: released code of VAR
    ("llama", 5120, 40, 13824): (2100, 4743),  # LLaMA-2-13B, Vicuna-13B: released code of VAR
}

# Read in third-party notes or recalled, checked by nobody here: used with a warning.
UNVERIFIED_SINK_DIMS: dict[tuple[str, int, int, int], tuple[int, ...]] = {
    ("qwen2_vl_text", 3584, 28, 18944): (458, 2570),  # Qwen2-7B
    ("internlm2", 4096, 32, 14336): (3584,),  # InternLM2.5-7B
    ("llama", 4096, 32, 14336): (788, 1384, 4062),  # LLaMA-3-8B
    ("mistral", 4096, 32, 14336): (2070,),  # Mistral-7B
}

#: |cos| with the first token that makes a secondary sink (released code of arXiv 2512.22213).
LIKE_FIRST = 0.9


def sink_values(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """phi(x) = max_{d in dims} |x_d| / RMS(x) in float32, ``[batch, tokens]``; over all dimensions when dims is empty.

    Never more than sqrt(hidden size).
    """
    hidden = hidden.float()
    rms = hidden.square().mean(-1).add(1e-6).sqrt()
    chosen = hidden[..., list(dims)] if dims else hidden
    return chosen.abs().amax(-1) / rms
