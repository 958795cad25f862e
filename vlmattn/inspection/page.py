"""One answer, or the same question under two recipes, as one HTML file with sliders."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmattn import pages
from vlmattn.errors import InputError
from vlmattn.inspection.measures import group_masses, sink_levels, sink_scores, sink_tokens
from vlmattn.inspection.recipes_compared import Side
from vlmattn.inspection.trace import GROUPS, Trace
from vlmattn.models import Piece

_HERE = Path(__file__).parent
_MOST = 4_000_000  # bytes of single heads' attention on a page; beyond, only some heads of each layer
_FEW = 4  # heads of a layer that are kept then
_LISTED = 12  # tokens of a layer in the table of sinks
_LEVELS = ("", "secondary", "primary")
_LONGEST = 672  # pixels of a picture


def inspect_page(
    sides: Sequence[Side],
    pictures: Sequence[Any],
    question: str,
    *,
    scores: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
    tau: float = 20.0,
) -> str:
    """The page: answers by token, attention over the pictures, heads, sinks, masses of groups, log-probabilities.

    Attention is stored in 255 steps of each head's largest value on the images (the answer's row, one layer).

    Args:
        sides: one answer or more, of one question (``compare_answers``).
        pictures: PIL images, in the order of the prompt.
        scores: name -> ``[layers][heads]``, of the model's saved HeadProfile; those of other sizes, or with nan, are
            left out.
        facts: what to say about how it was made, by name.
        tau: sink threshold of phi.

    Raises:
        InputError: not as many pictures as images in the prompt.
    """
    first = sides[0].trace
    if len(pictures) != len(first.pieces):
        raise InputError(f"the prompt has {len(first.pieces)} images and {len(pictures)} pictures were given")
    tables = {name: _of_layers(table, first) for name, table in (scores or {}).items()}
    data: dict[str, Any] = {
        "pictures": [_picture(picture) for picture in pictures],
        "layers": first.layers,
        "heads": first.heads,
        "groups": GROUPS,
        "colours": pages.COLOURS,
        "images": [_drawn(pieces) for pieces in first.pieces],
        "counts": [int(first.keys_of("image", image).sum()) for image in range(len(first.pieces))],
        "scores": {name: table for name, table in tables.items() if table is not None},
        "tau": tau,
        "sides": [_side(side, tau) for side in sides],
    }
    every = all(side["some"] is None for side in data["sides"])
    some = f"the {_FEW} heads of each layer that look at the images most, and the mean of all"
    parts = {
        "question": question,
        "notes": _notes(sides),
        "heads": "every head" if every else some,
        "facts": _facts(facts or {}),
        "style": pages.Html(_own("page.css")),
        "data": data,
        "script": pages.Html(_own("page.js")),
    }
    return pages.document(f"vlmattn inspect: {question}", pages.filled(_own("page.html"), parts))


def _notes(sides: Sequence[Side]) -> pages.Html:
    notes = [html.escape(f"{side.trace.recipe}: {note}") for side in sides for note in side.trace.notes]
    return pages.Html("".join(f"<p class='note'>{note}</p>" for note in notes))


def _facts(facts: Mapping[str, str]) -> pages.Html:
    return pages.Html(
        "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(fact)}</dd>" for name, fact in facts.items())
    )


def _own(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _of_layers(table: Any, trace: Trace) -> list[list[float]] | None:
    """The rows of a score that are shown; None if it does not belong to such a model, or holds what is no number."""
    try:
        rows = np.array([list(table[layer]) for layer in trace.layers], dtype=float)
    except (IndexError, ValueError):
        return None
    fits = rows.shape == (len(trace.layers), trace.heads) and np.isfinite(rows).all()
    return rows.tolist() if fits else None


def _side(side: Side, tau: float) -> dict[str, Any]:
    """What the script knows of one answer."""
    trace = side.trace
    visual = trace.keys_of("image")
    attention = [trace.attention(row).values for row in trace.answer_rows]
    every = torch.stack([of_row[..., visual] for of_row in attention])  # [step, layer, head, cell]
    masses, some, single = group_masses(trace).values, None, every
    if every.numel() > _MOST:
        some = every.sum((0, 3)).topk(min(_FEW, trace.heads), 1).indices.sort(1).values  # [layer, few]
        single = every.gather(2, some[None, :, :, None].expand(len(every), -1, -1, every.shape[-1]))
    phi = trace.phi[list(trace.layers), :][:, visual[: trace.phi.shape[1]]].nan_to_num(0.0)
    return {
        "name": trace.recipe,
        "tokens": [
            {
                "text": text,
                "likely": {name: round(float(values[step]), 4) for name, values in side.logprobs.items()},
                "rivals": [[rival, round(value, 3)] for rival, value in trace.rivals[step]],
            }
            for step, text in enumerate(trace.tokens[trace.prompt :])
        ],
        "mean": _bytes(every.mean(2)),
        "single": _bytes(single),
        "some": None if some is None else some.tolist(),
        "visual": _rounded(masses[..., GROUPS.index("image")]),
        "masses": _rounded(masses.mean(2)),
        "gains": _rounded(torch.stack([trace.gains[row] for row in trace.answer_rows])),
        "sinks": _sinks(trace, tau),
        "phi": [_rounded(row, 1) for row in phi],
    }


def _sinks(trace: Trace, tau: float) -> list[dict[str, Any]]:
    """For each layer: how many tokens are sinks, and those with the largest phi."""
    massive, received, levels = sink_tokens(trace, tau).values, sink_scores(trace).values, sink_levels(trace).values
    visual, found = trace.keys_of("image")[: trace.phi.shape[1]], []
    for place, layer in enumerate(trace.layers):
        phi = trace.phi[layer].nan_to_num(-1.0)

        def row(token: int, layer: int = layer, phi: Tensor = phi, place: int = place) -> dict[str, Any]:
            image = trace.images[token]
            return {
                "token": token,
                "text": trace.tokens[token] if image < 0 else f"image {image + 1}",
                "phi": round(float(phi[token]), 1),
                "dim": int(trace.dims[layer, token]),
                "level": _LEVELS[int(levels[layer, token])],
                "norm": round(float(trace.norms[layer, token]), 1),
                "received": round(float(received[place, token].nan_to_num(0.0)), 4),
            }

        top = phi.topk(min(_LISTED, len(phi))).indices.tolist()
        found.append(
            {
                "text": int((massive[layer] & ~visual).sum()),
                "image": int((massive[layer] & visual).sum()),
                "primary": int((levels[layer] == 2).sum()),
                "secondary": int((levels[layer] == 1).sum()),
                "tokens": [row(token) for token in top if phi[token] >= 0],
            }
        )
    return found


def _drawn(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """The pieces that are drawn over the picture: boxes, and numbers of tokens."""
    chosen = pages.shown([piece.box for piece in pieces], [piece.tokens.numel() for piece in pieces])
    return [{"box": [round(side, 5) for side in pieces[n].box], "cells": pieces[n].tokens.tolist()} for n in chosen]


def _bytes(values: Tensor) -> dict[str, Any]:
    """Values ``[..., cell]`` as bytes relative to the largest cell of each map: value = byte / 255 scale."""
    top = values.amax(-1)
    share = (values / top.clamp_min(1e-12)[..., None] * 255).round().to(torch.uint8)
    return {
        "shape": list(values.shape),
        "bytes": base64.b64encode(share.numpy().tobytes()).decode(),
        "scale": base64.b64encode(top.float().numpy().astype("<f4").tobytes()).decode(),
    }


def _rounded(values: Tensor, digits: int = 4) -> Any:
    return np.round(values.double().numpy(), digits).tolist()


def _picture(picture: Any) -> dict[str, Any]:
    shown = picture.convert("RGB")
    shown.thumbnail((_LONGEST, _LONGEST))
    data = io.BytesIO()
    shown.save(data, format="PNG")
    return {
        "source": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}",
        "width": shown.width,
        "height": shown.height,
    }
