"""What a trace shows, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlmattn import pages
from vlmattn.inspection.measures import group_masses, image_maps, sink_tokens
from vlmattn.inspection.recipes_compared import Side
from vlmattn.inspection.trace import GROUPS, Trace
from vlmattn.models import Piece

_COLUMNS = 6


def figures(sides: Sequence[Side], pictures: Sequence[Any]) -> dict[str, Any]:
    """All figures by name: tokens, layers, heads, masses and sinks (if any) of each side; and log-probabilities.

    Args:
        pictures: PIL images, in the order of the prompt.
    """
    found: dict[str, Any] = {}
    for number, side in enumerate(sides):
        trace, name = side.trace, f"{number}-{side.trace.recipe}"
        step = _parting(sides) if len(sides) > 1 else 0
        step = min(step, len(trace.answer) - 1)
        for image, picture in enumerate(pictures):
            if trace.pieces[image]:
                found[f"{name}-tokens-image{image + 1}"] = token_maps(trace, picture, image)
                found[f"{name}-layers-image{image + 1}"] = layer_maps(trace, picture, step, image)
                if bool(sink_tokens(trace).values.any()):
                    found[f"{name}-sinks-image{image + 1}"] = sink_maps(trace, picture, image)
        found[f"{name}-heads"] = head_map(trace, step)
        found[f"{name}-groups"] = group_lines(trace)
    if len(sides) > 1:
        found["log-probabilities"] = likely_bars(sides)
    return found


def token_maps(trace: Trace, picture: Any, image: int = 0) -> Any:
    """Attention of each answer token's row on an image, a mean over layers and heads, on one scale."""
    shown = [image_maps(trace, image, step) for step in range(len(trace.answer))]
    values = [[piece.mean("layer", "head").values for piece in pieces] for pieces in shown]
    titles = [repr(text)[1:-1] for text in trace.tokens[trace.prompt :]]
    return _over(picture, trace.pieces[image], values, titles, f"{trace.recipe}: attention of each answer token")


def layer_maps(trace: Trace, picture: Any, step: int, image: int = 0) -> Any:
    """Attention of one answer token's row on an image in each layer, a mean over heads, on one scale."""
    shown = [piece.mean("head") for piece in image_maps(trace, image, step)]
    values = [[piece.pick(layer=place).values for piece in shown] for place in range(len(trace.layers))]
    word = repr(trace.tokens[trace.prompt + step])
    return _over(picture, trace.pieces[image], values, [f"layer {n}" for n in trace.layers], f"{trace.recipe}: {word}")


def sink_maps(trace: Trace, picture: Any, image: int = 0) -> Any:
    """Sink value phi of an image's tokens as they enter each layer, on one scale."""
    own = trace.phi[:, trace.keys_of("image", image)[: trace.phi.shape[1]]].nan_to_num(0.0)
    values = [[own[layer][piece.tokens] for piece in trace.pieces[image]] for layer in trace.layers]
    return _over(picture, trace.pieces[image], values, [f"layer {n}" for n in trace.layers], f"{trace.recipe}: phi")


def head_map(trace: Trace, step: int) -> Any:
    """How much of its attention each head has on the images at one answer token: layers x heads."""
    from vlmattn.drawing import Figure

    table = group_masses(trace).pick(step=step, group=GROUPS.index("image")).values
    drawn = Figure(figsize=(4.2, min(max(4.0 * len(table) / table.shape[1], 2.4), 6)), layout="constrained")
    axis = drawn.subplots()
    seen = axis.imshow(table, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="none")
    axis.set_title(
        f"{trace.recipe}: {trace.tokens[trace.prompt + step]!r}, share on the images", loc="left", fontsize=10
    )
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    drawn.colorbar(seen, ax=axis, fraction=0.05, pad=0.02).outline.set_visible(False)
    return drawn


def group_lines(trace: Trace) -> Any:
    """Mass on each kind of token through the layers (mean over the answer), and the answer (mean over layers)."""
    from vlmattn.drawing import Figure

    masses = group_masses(trace).mean("head")
    drawn = Figure(figsize=(8, 2.8), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    for axis, gone, label in zip(axes, ("step", "layer"), ("layer", "answer token"), strict=True):
        lines = masses.mean(gone).values
        for group, (name, colour) in enumerate(zip(GROUPS, pages.COLOURS, strict=False)):
            axis.plot(
                range(len(lines)), lines[:, group], color=colour, label=name, marker="." if len(lines) == 1 else ""
            )
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[0].set_ylabel("attention mass")
    drawn.suptitle(f"{trace.recipe}: where attention goes", fontsize=10)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(GROUPS), frameon=False)
    return drawn


def likely_bars(sides: Sequence[Side]) -> Any:
    """Log-probability of each token of each answer, under every recipe."""
    from vlmattn.drawing import Figure

    longest = max(len(side.trace.answer) for side in sides)
    drawn = Figure(figsize=(3.6 * len(sides), 1.2 + 0.26 * longest), layout="constrained")
    for axis, side in zip(drawn.subplots(1, len(sides), sharex=True, squeeze=False)[0], sides, strict=True):
        words = [repr(text)[1:-1] for text in side.trace.tokens[side.trace.prompt :]]
        width = 0.8 / len(side.logprobs)
        for number, (name, values) in enumerate(side.logprobs.items()):
            places = np.arange(len(words)) + (number - (len(side.logprobs) - 1) / 2) * width
            axis.barh(places, values.numpy(), width * 0.9, color=pages.COLOURS[number], label=name)
        axis.set_yticks(range(len(words)), words, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"answer of {side.trace.recipe}", fontsize=10)
        axis.set_xlabel("log-probability")
        axis.spines[["top", "right"]].set_visible(False)
    drawn.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _parting(sides: Sequence[Side]) -> int:
    """The first token in which the answers differ; 0 if they do not."""
    answers = [side.trace.answer for side in sides]
    return next((n for n, tokens in enumerate(zip(*answers, strict=False)) if len(set(tokens)) > 1), 0)


def _over(
    picture: Any, pieces: Sequence[Piece], values: Sequence[Sequence[Tensor]], titles: Sequence[str], title: str
) -> Any:
    """A panel for each entry of ``values``: the picture under the maps of its pieces."""
    from vlmattn.drawing import Figure

    columns = min(_COLUMNS, len(values))
    rows = -(-len(values) // columns)
    high, wide = picture.height / max(picture.size), picture.width / max(picture.size)
    drawn = Figure(figsize=(1.7 * columns * wide + 0.9, (1.7 * high + 0.25) * rows + 0.5), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    shown = pages.shown([piece.box for piece in pieces], [piece.tokens.numel() for piece in pieces])
    top = max(float(maps[number].max()) for maps in values for number in shown) or 1.0
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, maps, name in zip(axes.flat, values, titles, strict=False):
        axis.imshow(picture, extent=(0, 1, 1, 0), aspect=picture.height / picture.width, interpolation="nearest")
        for number in shown:
            left, upper, right, lower = pieces[number].box
            seen = axis.imshow(
                maps[number], extent=(left, right, lower, upper), cmap="cividis", vmin=0, vmax=top, alpha=0.6,
                aspect=picture.height / picture.width, interpolation="nearest",
            )  # fmt: skip
        axis.set_xlim(0, 1)
        axis.set_ylim(1, 0)
        axis.set_title(name, fontsize=8)
    drawn.suptitle(title, fontsize=10)
    drawn.colorbar(seen, ax=axes, fraction=0.03, pad=0.01).outline.set_visible(False)
    return drawn
