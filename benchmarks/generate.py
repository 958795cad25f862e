"""What presets cost end to end, on a random LLaVA of 12 layers, 768 wide, 576 image tokens: prefill and 32 new tokens.

python -m benchmarks.generate --out benchmarks/results
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import vlmattn
from benchmarks.runner import paired, rows, write_csv

PRESETS = (
    "var", "vhr", "pai", "paint", "vaf", "heads_guided", "sofa", "bidirectional_prompt", "knockout_image_text",
)  # fmt: skip


def build() -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model in eval mode and a prompt of one image and forty words."""
    torch.manual_seed(0)
    text = dict(
        model_type="llama", vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=336, patch_size=14, projection_dim=64,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=999, image_seq_length=576)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlavaForConditionalGeneration(config).to(device).eval()
    ids = torch.tensor([[1, 5, *[999] * 576, *range(10, 50)]])
    pixels = torch.randn(1, 3, 336, 336)
    return model, {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a random model has no known sinks
    model, inputs = build()

    def run(preset: str, new: int) -> object:
        settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return model.generate(**inputs, **settings, preset=preset)

    table = []
    with torch.inference_mode(), vlmattn.applied(model, "none"):
        for what, new in (("prefill (1 new token)", 1), ("33 new tokens", 33)):
            candidates = {name: (lambda name=name, new=new: run(name, new)) for name in ("none", *PRESETS)}
            table += rows(what, paired(candidates, options.rounds), "none")
    for row in table:
        print(
            f"{row['what']:24} {row['candidate']:20} {row['median_s']:8.3f} s   x{row['ratio']} [{row['ratio_q1']}, {row['ratio_q3']}] n={row['n']}"
        )
    write_csv(options.out / "generate.csv", table)


if __name__ == "__main__":
    main()
