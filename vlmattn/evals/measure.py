"""What the presets that act on measured heads need on the bundled model: ``python -m vlmattn.evals.measure``.

Scenes come from a stream of their own, which neither training nor any evaluation draws from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlmattn
from vlmattn.embedded import FOLDER
from vlmattn.evals.suites.which import Which
from vlmattn.evals.suites.world import World, absent_objects
from vlmattn.inspection import Conflict, Span, find_heads, fit_directions, score_heads
from vlmattn.interventions.focus import save_directions
from vlmattn.models import find_family

SEED = 31
_SOURCE = "the bundled model"  # not the folder it lies in on some machine


def main() -> None:
    """Measure heads and fit directions, and write both beside the bundled model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--scenes", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = vlmattn.load("embedded")
    conflicts = list(_conflicts(processor, options.scenes))
    effects = find_heads(model, [conflict for conflict, _ in conflicts], seed=SEED, progress=sys.stderr.isatty())
    scored = score_heads(model, [conflict.inputs for conflict, _ in conflicts], seed=SEED)
    prompts = tuple(dict.fromkeys(prompt for _, prompt in conflicts))
    profile = replace(scored.merged(effects), source=_SOURCE, prompts=prompts)
    print(f"wrote {profile.save(options.out)}")
    heads = profile.top("visual", 0.1)
    spans = list(_spans(processor, options.scenes))
    found = fit_directions(model, spans, heads, seed=SEED, progress=sys.stderr.isatty())
    query, key = (
        {int(name.split(".")[1]): value for name, value in found.items() if name.startswith(side)}
        for side in ("query", "key")
    )
    anatomy = replace(find_family(model).anatomy(model), source=_SOURCE)
    print(f"wrote {save_directions(query, key, options.out, anatomy)} for heads {heads}")


def _encoded(processor: Any, prompt: str, images: list[Any]) -> dict[str, Any]:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=text, images=images, return_tensors="pt", add_special_tokens=False))


def _conflicts(processor: Any, scenes: int) -> Iterator[tuple[Conflict, str]]:
    """Is there a thing that is not there, but usually goes with what is? The image says no, the prior yes."""
    yes, no = (processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    world = World("faint", 1.0, scenes, SEED)
    for index in range(scenes):
        absent = absent_objects(world.scene(index), "adversarial", np.random.default_rng([SEED, index]))[0]
        prompt = f"Is there a {absent} in the image?"
        yield Conflict(_encoded(processor, prompt, world.image(index)), no, yes), prompt


def _spans(processor: Any, scenes: int) -> Iterator[Span]:
    """In which of two images is the thing? What matters is that image."""
    for sample in Which(World("clear", 0.0, scenes, SEED), (2,)).samples():
        inputs = _encoded(processor, sample.prompt, sample.images())
        slots = (inputs["input_ids"][0] == processor.image_token_id).nonzero().flatten().tolist()
        half = len(slots) // 2
        mine = slots[:half] if sample.truth == "1" else slots[half:]
        yield Span(inputs, mine[0], mine[-1] + 1)


if __name__ == "__main__":
    main()
