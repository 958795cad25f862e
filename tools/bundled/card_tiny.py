"""Measures the bundled model with the project's own suites and writes its card.

    python -m tools.bundled.card_tiny --model vlmattn/embedded/tiny-scenes

writes ``figures.json`` and ``README.md`` into the model folder. Gates were fixed before the model was trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bundled.gates import Gate, ask, bare_tables, figure, figure_rows, gate_rows, missed, rows_of, say
from tools.bundled.train_tiny import BATCH, MANY_STEPS, MULTI_IMAGE_FROM, SEED, TEXT_STEPS, VISION_STEPS
from vlmattn.embedded.scenes import HARD_SHARE
from vlmattn.evals.environment import versions
from vlmattn.evals.journal import write_json
from vlmattn.evals.runner import Result, evaluate
from vlmattn.evals.suites import PQA, Chair, Pope, Which, World
from vlmattn.files import write_whole

CHECK_SCENES = 60  # the small set on which a test compares the committed weights with the card
_PRIORS = (0.25, 0.5, 0.75, 1.0)
_IMAGES = (2, 3, 4, 6, 8)  # in one prompt


def gates(result: Result, faint: str, clear: str, broken: str, swapped: str) -> list[Gate]:
    """The gates of the bundled model; arguments are the names of the conditions."""
    accuracy = {
        (c, s): figure(result, "pope", c, s, "accuracy")
        for c in (faint, clear, broken, swapped)
        for s in ("random", "popular", "adversarial")
    }
    drop = accuracy[faint, "random"] - accuracy[faint, "adversarial"]
    chance = max(abs(accuracy[swapped, s] - 50) for s in ("random", "popular", "adversarial"))
    return [
        Gate("clear: POPE random", accuracy[clear, "random"], 97, 100),
        Gate("clear: POPE adversarial", accuracy[clear, "adversarial"], 92, 100),
        Gate("clear, prior broken: POPE random", accuracy[broken, "random"], 88, 100),
        Gate("clear: in which of 2 images", figure(result, "which", clear, "2 images", "accuracy"), 95, 100),
        Gate("clear: in which of 4 images", figure(result, "which", clear, "4 images", "accuracy"), 85, 100),
        Gate("clear: in which of 8 images", figure(result, "which", clear, "8 images", "accuracy"), 70, 100),
        Gate("faint: POPE random", accuracy[faint, "random"], 85, 92),
        Gate("faint: POPE random minus adversarial", drop, 4, 100),
        Gate("faint: CHAIR_i", figure(result, "chair", faint, "captions", "chair_i"), 10, 25),
        Gate("faint: recall of captions", figure(result, "chair", faint, "captions", "recall"), 60, 100),
        Gate("another scene's image: POPE, largest distance from 50", chance, 0, 6),
        Gate("faint: captions that name an object twice", figure(result, "chair", faint, "captions", "repeats"), 0, 10),
        Gate("clear: captions that name an object twice", figure(result, "chair", clear, "captions", "repeats"), 0, 10),
    ]


def sink_statistics(model: Any, processor: Any, scenes: int = 100) -> list[dict[str, float]]:
    """Per layer, over existence questions about clear scenes: are there attention sinks or massive activations?

    ``bos``: mean attention of text rows on the first token. ``massive``: max |h| / median |h| of the residual stream
    that enters the layer, largest over tokens. ``phi``: largest sink value max |h| / RMS(h) (VAR asks for more than
    20). ``top3``: share of the last row's visual attention on its three strongest visual tokens; ``top3_background``:
    how many of those show background; ``background``: share of background patches.
    """
    asked = ask(model, processor, scenes)
    return [
        _sinks_of_layer(hidden, attention, asked.visual, asked.first, asked.background)
        for hidden, attention in zip(asked.hidden, asked.attention, strict=True)
    ]


def _sinks_of_layer(
    hidden: Tensor, attention: Tensor, visual: Tensor, first: Tensor, background: Tensor
) -> dict[str, float]:
    samples = torch.arange(len(hidden))
    after = visual.cumsum(1) == visual.sum(1, keepdim=True)
    text = after & ~visual
    bos = attention[samples, :, :, first].mean(1)[text].mean()
    magnitude = hidden.abs()
    real = torch.arange(hidden.shape[1])[None] >= first[:, None]
    massive = (magnitude.amax(-1) / magnitude.median(-1).values)[real].max()
    phi = (magnitude.amax(-1) / hidden.square().mean(-1).sqrt())[real].max()
    last = attention[:, :, -1].mean(1)[visual].view(len(hidden), -1)
    top = last.topk(3, -1)
    return {
        "bos": round(float(bos), 3),
        "massive": round(float(massive), 1),
        "phi": round(float(phi), 1),
        "top3": round(float((top.values.sum(-1) / last.sum(-1)).mean()), 2),
        "top3_background": round(float(background.gather(1, top.indices).float().mean()), 2),
        "background": round(float(background.float().mean()), 2),
    }


def measure(model: Any, processor: Any, images: int) -> dict[str, Any]:
    """All figures of the card."""
    faint, clear = World("faint", 0, images), World("clear", 0, images)
    broken = [World("clear", share, images) for share in _PRIORS]
    others = [World(look, 0, images) for look in ("dim", "tiny")]
    swapped = World("faint", 0, images, swapped=True)
    small = World("faint", 0, CHECK_SCENES)
    with tempfile.TemporaryDirectory() as folder:
        suites = [
            Pope.on_scenes([faint, clear, *others, *broken, swapped]),
            Chair.on_scenes([faint, clear]),
            Which(clear, _IMAGES),
            PQA.on_scenes(clear, (2, 4, 8), sets=20),
        ]
        result = evaluate(model, processor, suites, ["none"], Path(folder) / "full", "embedded")
        check = evaluate(model, processor, [Pope.on_scenes([small])], ["none"], Path(folder) / "small", "embedded")
    found = gates(result, faint.name, clear.name, broken[-1].name, swapped.name)
    return {
        "images": images,
        "gates": [gate.to_dict() for gate in found],
        "tables": bare_tables(result),
        "sinks": sink_statistics(model, processor),
        "check": {t["split"]: t["rows"]["none"]["metrics"]["accuracy"]["value"] for t in check.summary["tables"]},
        "versions": versions(),
    }


def card(figures: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The model card in markdown."""
    phi = max(row["phi"] for row in figures["sinks"])
    minutes = (
        sum(max((line["seconds"] for line in log if line["stage"] == stage), default=0) for stage in (1, 2, 3)) / 60
    )
    return _CARD.format(
        images=figures["images"],
        gates=gate_rows(figures["gates"]),
        tables=figure_rows(figures["tables"]),
        **rows_of(figures["sinks"]),
        phi=phi,
        vision=VISION_STEPS,
        text=TEXT_STEPS,
        many=MANY_STEPS,
        missed=missed(figures["gates"]),
        batch=BATCH,
        multi=MULTI_IMAGE_FROM,
        seed=SEED,
        hard=HARD_SHARE,
        minutes=minutes,
        torch=figures["versions"]["torch"],
        transformers=figures["versions"]["transformers"],
    )


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny-scenes: a small LLaVA that hallucinates for a reason

A test-bed, not an assistant. It is a real LLaVA (CLIP tower with a CLS token, last-but-one layer, two-layer projector, Llama
decoder: 6 layers, 192 wide, 8 query and 4 key/value heads of 32; 49 image tokens; 3.8 M parameters in float16), trained from
scratch on generated 56 x 56 scenes with 16 kinds of things. It loads with `vlmattn.load("embedded")` and with plain
`from_pretrained` on this folder.

## Why it hallucinates
Things go together in the training scenes (a cup with its plate, a dog with its ball), and {hard:.0%} of the things in them are
nearly invisible or 6-8 pixels small, yet named in every answer. For those the model can only say what is likely. On clear
scenes it sees well; where the evidence is weak its prior wins. Two dials of the generator show this: visibility (clear, dim,
faint, tiny) and the share of scenes that break the co-occurrences.

## Data and training
Generated data only, no third-party content. Scenes, questions and captions: `vlmattn/embedded/scenes.py` and `tools/bundled/language.py`; 15 % of
the training scenes break the prior. Captions name things in a fixed order of categories, so that a caption knows what it has
already said.

    python -m tools.bundled.train_tiny --out runs/embedded
    python -m tools.bundled.train_tiny --out runs/embedded --export vlmattn/embedded/tiny-scenes
    python -m tools.bundled.card_tiny --model vlmattn/embedded/tiny-scenes

Stage 1: {vision} steps of {batch} scenes, patches classified through the projector and the word embeddings. Stage 2: {text} steps
of {batch} scenes with 8 turns each; every fourth batch holds prompts of 2-4 images from step {multi} on. Stage 3: {many} steps, three
of four with prompts of 2-8 images, from the weights of stage 2 as stored; tower and projector stay. Seed {seed}, one CPU thread, {minutes:.0f} minutes of training, torch {torch}, transformers {transformers}. Every batch follows from seed and step; the same
torch on the same kind of CPU gives the same weights. The log is `training_log.json` (in the repository).

This is the second of two runs. The first (13,000 vision steps, .35 of the things hard, faint ones from 12 pixels up) passed all
gates but one: it saw faint scenes too well (POPE random 92.8, bound 92). So the training scenes were made harder and the vision
stage shorter. Stage 3 was added later, and run once.

## Gates
Fixed before training; {images} scenes per setting, three things each, greedy, seeds that training never uses.

| gate | measured | bound | passed |
|---|---:|---|---|
{gates}

{missed}

## Figures
95 % intervals by bootstrap over images; POPE negatives follow the statistics of the training scenes.

| suite | scenes | split | figures |
|---|---|---|---|
{tables}

## What it cannot validate
Per layer, over 100 questions about clear scenes (definitions: `tools.bundled.card_tiny.sink_statistics`):

| layer | {sink_head} |
|{sink_rule}|
{sinks}

- No massive activations: the largest sink value phi is {phi} where VAR asks for more than 20 (and at 192 dimensions phi cannot
  exceed 13.9). **VAR therefore never fires on this model; its rows in any table are those of the bare model and say nothing
  about VAR.** VAR is validated against recorded outputs of the released code instead.
- With 3 images and more the answers lean to some positions (see the splits by answer), the more the more images there are. To "is there a ... in
  image 5?" about 8 images it always says no (`pqa`: see the yes-ratio), so nothing can be told by that.
- It cannot tell left from right, and says "yes" too often when a wrong colour is named (suites `mme`, `amber_questions`).
- Tiny vocabulary, one caption style; figures here do not transfer to real models. A method that does not help here may help
  there, and the other way round.
- Deviations from LLaVA-1.5: no system prompt, 49 image tokens, a word tokenizer, trained from scratch.

## Measured beside it
`vlmattn_heads.json` (scores and mean outputs of every head) and `vlmattn_directions.safetensors` (focus directions) are what the
presets `heads_*` and `focus` act on. `python -m tools.bundled.measure` makes both again, in some minutes, from scenes that
neither training nor any evaluation uses.

Licence: Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder; the card is written into it")
    parser.add_argument("--images", type=int, default=500, help="scenes per setting")
    options = parser.parse_args()
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype="float32").eval()
    figures = measure(model, AutoProcessor.from_pretrained(options.model), options.images)
    log = json.loads((options.model / "training_log.json").read_text())
    write_json(options.model / "figures.json", figures)
    write_whole(options.model / "README.md", card(figures, log))
    say(figures["gates"])


if __name__ == "__main__":
    main()
