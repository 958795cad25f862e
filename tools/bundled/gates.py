"""What the cards of the bundled models share: bounds that figures must keep, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlmattn.embedded.scenes import patch_labels
from vlmattn.embedded.text import existence_question
from vlmattn.evals.report import bounds
from vlmattn.evals.runner import Result
from vlmattn.evals.suites import World


@dataclass(frozen=True)
class Gate:
    """A bound that a figure must keep, both ends included."""

    name: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "value": round(self.value, 2), "passed": self.passed}


def figure(result: Result, suite: str, condition: str, split: str, metric: str) -> float:
    """A figure of the bare model.

    Raises:
        KeyError: there is none.
    """
    for table in result.summary["tables"]:
        if (table["suite"], table["condition"], table["split"]) == (suite, condition, split):
            return float(table["rows"]["none"]["metrics"][metric]["value"])
    raise KeyError((suite, condition, split))


def bare_tables(result: Result) -> list[dict[str, Any]]:
    """The tables of a run, with the row of the bare model only."""
    return [
        {k: v for k, v in table.items() if k != "rows"} | table["rows"]["none"] for table in result.summary["tables"]
    ]


def figure_rows(tables: Iterable[Mapping[str, Any]]) -> str:
    """A line of a Markdown table for each table: suite, scenes, split, figures."""
    lines = []
    for table in tables:
        cells = table["metrics"]
        if table["suite"] == "pope":
            shown = f"accuracy {_with_interval(cells['accuracy'])}, yes-ratio {cells['yes_ratio']['value']:.1f}"
        elif table["suite"] == "chair":
            shown = (
                f"CHAIR_i {_with_interval(cells['chair_i'])}, CHAIR_s {cells['chair_s']['value']:.1f},"
                f" recall {cells['recall']['value']:.1f}, {cells['length']['value']:.1f} words, repeats"
                f" {cells['repeats']['value']:.1f}"
            )
        else:
            shown = f"accuracy {_with_interval(cells['accuracy'])}"
            if "inconsistency" in cells and "position" not in table["split"]:
                shown += f", inconsistency {_with_interval(cells['inconsistency'])}"
                shown += f", yes-ratio {cells['yes_ratio']['value']:.1f}"
            if "prior" in cells and "disagrees" in table["split"]:
                shown += f", answers by the prior {_with_interval(cells['prior'])}"
        lines.append(f"| {table['suite']} | {table['condition']} | {table['split']} | {shown} |")
    return "\n".join(lines)


def gate_rows(gates: Iterable[Mapping[str, Any]]) -> str:
    """A line of a Markdown table for each gate: name, measured, bound, passed."""
    return "\n".join(
        f"| {g['name']} | {g['value']:.1f} | {g['low']:g} to {g['high']:g} | {'yes' if g['passed'] else '**no**'} |"
        for g in gates
    )


def missed(gates: Iterable[Mapping[str, Any]]) -> str:
    """What was not reached, in a sentence."""
    failed = [g for g in gates if not g["passed"]]
    if not failed:
        return "All gates are passed."
    named = "; ".join(f"{g['name']} {g['value']:.1f} instead of {g['low']:g} to {g['high']:g}" for g in failed)
    return f"**Missed**: {named}. Read figures about these with that in mind."


def say(gates: Iterable[Mapping[str, Any]]) -> None:
    """Print the gates."""
    for g in gates:
        bound = f"(bound {g['low']:g} to {g['high']:g})"
        print(f"{'passed' if g['passed'] else 'MISSED'}  {g['name']}: {g['value']} {bound}")


def rows_of(table: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Head, rule and lines of a Markdown table that has a line for each layer."""
    keys = list(table[0])
    lines = [f"| {layer} | " + " | ".join(str(row[key]) for key in keys) + " |" for layer, row in enumerate(table)]
    return {
        "sink_head": " | ".join(keys),
        "sink_rule": "|".join(["---"] * (len(keys) + 1)),
        "sinks": "\n".join(lines),
    }


@dataclass(frozen=True)
class Asked:
    """Existence questions about clear scenes, one each, as the model met them.

    Attributes:
        inputs: one left-padded batch.
        visual: image tokens, bool ``[prompts, tokens]``.
        first: position of the first token of each prompt.
        background: image tokens that show background, bool ``[prompts, image tokens]``.
        hidden: what enters each layer, ``[prompts, tokens, hidden]``.
        attention: of each layer, ``[prompts, heads, query, key]``.
    """

    inputs: Mapping[str, Tensor]
    visual: Tensor
    first: Tensor
    background: Tensor
    hidden: Sequence[Tensor]
    attention: Sequence[Tensor]


@torch.inference_mode()
def ask(model: Any, processor: Any, scenes: int) -> Asked:
    """Ask about clear scenes with all attention kept: for small models and few scenes."""
    world = World("clear", 0.0, scenes)
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in (existence_question(world.scene(i).categories[0]) for i in range(scenes))
    ]
    processor.tokenizer.padding_side = "left"
    inputs = processor(
        text=texts,
        images=[world.image(i)[0] for i in range(scenes)],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    return Asked(
        inputs,
        inputs["input_ids"] == model.config.image_token_id,
        inputs["attention_mask"].argmax(1),
        torch.stack([torch.from_numpy(patch_labels(world.scene(i))[0] == 0) for i in range(scenes)]),
        out.hidden_states[: len(out.attentions)],
        out.attentions,
    )


def _with_interval(cell: Mapping[str, Any]) -> str:
    ends = bounds(cell)
    return f"{cell['value']:.1f} " + ("(no interval)" if ends is None else f"[{ends[0]:.1f}, {ends[1]:.1f}]")
