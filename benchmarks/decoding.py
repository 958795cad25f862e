"""What decoding rules cost, on a random LLaVA of 12 layers, 768 wide, 576 image tokens, and on the bundled model.

The first token (prompts of all branches) and a decode step (the median of 32) are reported apart. ``sequential`` is VCD the
usual way: a second cache and a second forward per token. ``two rows`` is the bare model on a batch of two prompts.

python -m benchmarks.decoding --out benchmarks/results
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import vlmattn
from benchmarks.generate import build
from benchmarks.runner import rows, write_csv
from vlmattn.decoding import VCD
from vlmattn.embedded.scenes import make_scene

PRESETS = ("vcd", "pai_guidance", "icd", "avisc", "rbd", "dola_low", "pai_official+pai_guidance")
STEPS = 32


def bundled() -> tuple[Any, dict[str, torch.Tensor]]:
    """The bundled model and a captioning prompt about one scene."""
    model, processor = vlmattn.load("embedded")
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=make_scene(12, 0, "clear")[1], return_tensors="pt", add_special_tokens=False)
    return model, dict(inputs)


class Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def sequential(model: Any, inputs: dict[str, torch.Tensor], clock: Clock) -> None:
    """VCD with two caches and two forwards per token."""
    contrast = VCD().contrast(None)  # type: ignore[arg-type]
    clock.put(inputs["input_ids"])
    noised = contrast.branches[0].image(inputs["pixel_values"])  # type: ignore[operator]
    caches = [DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
    feeds = [inputs, {**inputs, "pixel_values": noised}]
    for t in range(1, 2 + STEPS):
        logits = [
            model(**feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            for feed, cache in zip(feeds, caches, strict=True)
        ]
        token = contrast.rule(logits[0], logits[1:], torch.tensor([t]))[:, -1].argmax(-1)
        clock.put(token)
        feeds = [{"input_ids": token[:, None]}] * 2


def measure(
    model: Any, inputs: dict[str, torch.Tensor], presets: Sequence[str], where: str, rounds: int
) -> list[dict[str, object]]:
    """Rows for the first token, and for a step after it."""
    settings = dict(max_new_tokens=1 + STEPS, min_new_tokens=1 + STEPS, do_sample=False, pad_token_id=0)
    twice = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in inputs.items()}

    def run(name: str) -> list[float]:
        clock = Clock()
        if name == "sequential":
            sequential(model, inputs, clock)
        elif name == "two rows":
            model.generate(**twice, **settings, preset="none", streamer=clock)
        else:
            model.generate(**inputs, **settings, preset=name, streamer=clock)
        return clock.times

    names = ["none", *presets, "sequential", "two rows"]
    first: dict[str, list[float]] = {name: [] for name in names}
    step: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode(), vlmattn.applied(model, "none"):
        for number in tqdm(range(1 + rounds), leave=False):
            for name in names:  # all of them in every round, so that drift hits them alike
                times = run(name)
                if number:  # the first round warms up
                    first[name].append(times[1] - times[0])
                    step[name].append(statistics.median(b - a for a, b in pairwise(times[1:])))
    return rows(f"{where}: first token", first, "none") + rows(f"{where}: decode step", step, "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a random model has no chat template
    model, inputs = build()
    table = measure(model, inputs, [name for name in PRESETS if name != "icd"], "12 layers, 768 wide", options.rounds)
    model, inputs = bundled()
    table += measure(model, inputs, PRESETS, "bundled model", options.rounds)
    for row in table:
        print(
            f"{row['what']:34} {row['candidate']:28} {float(row['median_s']) * 1e3:9.2f} ms   x{row['ratio']}"
            f" [{row['ratio_q1']}, {row['ratio_q3']}] n={row['n']}"
        )
    write_csv(options.out / "decoding.csv", table)


if __name__ == "__main__":
    main()
