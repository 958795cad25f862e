"""What the presets that act on measured heads need on a bundled model: ``python -m tools.bundled.measure``.

``--model smol`` takes long (each of its 270 heads is taken away in turn): ``--scenes 12 --threads 2``.

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
from vlmattn.embedded import BUNDLED, FOLDER
from vlmattn.embedded.smol.cache import ADAPTER
from vlmattn.evals.steering_pairs import of_scenes
from vlmattn.evals.suites.which import Which
from vlmattn.evals.suites.world import World, absent_objects
from vlmattn.inspection import (
    Conflict,
    Span,
    ablate_heads,
    find_heads,
    fit_directions,
    fit_steering,
    retrieve_images,
    score_heads,
)
from vlmattn.interventions.focus import save_directions
from vlmattn.models import find_family

SEED = 31
_STEPS = 10_000  # of the fit (ours)
_FOLDERS = {"embedded": FOLDER, "smol": ADAPTER.parent}
_SAID = {"embedded": ("yes", "no"), "smol": ("Yes", "No")}


def main() -> None:
    """Measure heads and fit directions, and write both beside a bundled model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=BUNDLED, default="embedded")
    parser.add_argument("--out", type=Path, help="folder; by default the one that the package carries")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = vlmattn.load(options.model)
    out, shown = options.out or _FOLDERS[options.model], sys.stderr.isatty()
    conflicts = list(_conflicts(processor, options.scenes, _SAID[options.model]))
    asked = [conflict.inputs for conflict, _ in conflicts]
    spans = list(_spans(processor, options.scenes))
    profile = (
        ablate_heads(model, asked, seed=SEED, progress=shown)
        .merged(retrieve_images(model, [span for span, _ in spans], seed=SEED))
        .merged(score_heads(model, asked, seed=SEED))
        .merged(find_heads(model, [conflict for conflict, _ in conflicts], seed=SEED, progress=shown))
    )
    prompts = tuple(dict.fromkeys(prompt for _, prompt in (*conflicts, *spans)))
    source = f"the bundled model {options.model}"  # not the folder it lies in on some machine
    profile = replace(profile, source=source, prompts=prompts)
    print(f"wrote {profile.save(out)}")
    found = fit_directions(model, [span for span, _ in spans], epochs=_STEPS // len(spans), seed=SEED, progress=shown)
    query = {int(name.removeprefix("query.")): value for name, value in found.items()}
    heads = [(layer, head) for layer, of in query.items() for head in of.any(-1).nonzero().flatten().tolist()]
    anatomy = replace(find_family(model).anatomy(model), source=source)
    print(f"wrote {save_directions(query, out, anatomy)} for heads {heads}")
    steer(model, processor, options.model, options.scenes, out, shown)


def steer(model: Any, processor: Any, name: str, scenes: int, out: Path, shown: bool) -> None:
    """Directions from untrue to true answers in hidden states, written beside the model."""
    pairs = list(of_scenes(model, processor, scenes, _SAID[name]))
    found = fit_steering(model, pairs, examples=f"{scenes} scenes, is there a thing", progress=shown)
    print(f"wrote {replace(found, source=f'the bundled model {name}').save(out)}")


def _encoded(processor: Any, prompt: str, images: list[Any]) -> dict[str, Any]:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=text, images=images, return_tensors="pt", add_special_tokens=False))


def _conflicts(processor: Any, scenes: int, said: tuple[str, str]) -> Iterator[tuple[Conflict, str]]:
    """Is there a thing that is not there, but usually goes with what is? The image says no, the prior yes."""
    yes, no = (processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in said)
    world = World("faint", 1.0, scenes, SEED)
    for index in range(scenes):
        absent = absent_objects(world.scene(index), "adversarial", np.random.default_rng([SEED, index]))[0]
        prompt = f"Is there a {absent} in the image?"
        yield Conflict(_encoded(processor, prompt, world.image(index)), no, yes), prompt


def _spans(processor: Any, scenes: int) -> Iterator[tuple[Span, str]]:
    """In which of two images is the thing? What matters is that image."""
    for sample in Which(World("clear", 0.0, scenes, SEED), (2,)).samples():
        inputs = _encoded(processor, sample.prompt, sample.images())
        slots = (inputs["input_ids"][0] == processor.image_token_id).nonzero().flatten().tolist()
        half = len(slots) // 2
        mine = slots[:half] if sample.truth == "1" else slots[half:]
        yield Span(inputs, mine[0], mine[-1] + 1), sample.prompt


if __name__ == "__main__":
    main()
