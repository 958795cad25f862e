"""What decoding rules cost, on a random LLaVA of 12 layers, 768 wide, 576 image tokens, and on the bundled model.

The first token (prompts of all branches) and a decode step (the median of 32) are reported apart. ``sequential`` is VCD
the
usual way: a second cache and a second forward per token. ``two rows`` is the bare model on a batch of two prompts.

python -m benchmarks.decoding --out benchmarks/results
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

import vlmattn
from vlmattn.decoding import VCD
from vlmattn.embedded.scenes import make_scene
from vlmattn.evals.bench import Clock, bench, encode, random_inputs, random_model
from vlmattn.evals.timing import Row, line, write_csv

PRESETS = ("vcd", "pai_guidance", "icd", "avisc", "rbd", "dola_low", "pai_official+pai_guidance")
STEPS = 32


def sequential(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> Clock:
    """VCD with two caches and two forwards per token."""
    contrast = VCD().contrast(None)  # type: ignore[arg-type]
    clock = Clock()
    clock.put(inputs["input_ids"])
    noised = contrast.branches[0].image(inputs["pixel_values"])  # type: ignore[operator]
    caches = [DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
    feeds = [inputs, {**inputs, "pixel_values": noised}]
    for t in range(1, 1 + new_tokens):
        logits = [
            model(**feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            for feed, cache in zip(feeds, caches, strict=True)
        ]
        token = contrast.rule(logits[0], logits[1:], torch.tensor([t]))[:, -1].argmax(-1)
        clock.put(token)
        feeds = [{"input_ids": token[:, None]}] * 2
    return clock


def two_rows(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> Clock:
    """The bare model on the prompt twice."""
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    clock = Clock()
    lengths = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    model.generate(**twice, **lengths, do_sample=False, pad_token_id=0, streamer=clock)
    return clock


def measure(
    where: str, model: Any, inputs: dict[str, torch.Tensor], presets: Sequence[str], rounds: int, processor: Any = None
) -> list[Row]:
    beside = {
        "sequential": lambda new_tokens: sequential(model, inputs, new_tokens),
        "two rows": lambda new_tokens: two_rows(model, inputs, new_tokens),
    }
    table = bench(model, inputs, presets, rounds, 1 + STEPS, processor, beside)
    return [row | {"what": f"{where}: {row['what']}"} for row in table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a random model has no chat template
    model = random_model()
    branches = [name for name in PRESETS if name != "icd"]  # icd needs a tokenizer
    table = measure("12 layers, 768 wide", model, random_inputs(model), branches, options.rounds)
    model, processor = vlmattn.load("embedded")
    inputs = encode(processor, model, Image.fromarray(make_scene(12, 0)[1]), "Describe the image.")
    table += measure("bundled model", model, inputs, PRESETS, options.rounds, processor)
    print(*map(line, table), sep="\n")
    write_csv(options.out / "decoding.csv", table)


if __name__ == "__main__":
    main()
