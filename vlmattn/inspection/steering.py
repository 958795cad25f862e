"""Measuring directions in hidden states: where two ways to answer the same question differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vlmattn.errors import InputError, OptionError
from vlmattn.inspection.looking import watched
from vlmattn.inspection.measuring import prepared_one
from vlmattn.interventions.directions import Directions
from vlmattn.kernels import AttentionEdit
from vlmattn.models import find_family
from vlmattn.request import LayerContext, Step, Weights

WAYS = ("mean", "pca", "svd")


@dataclass(frozen=True)
class Pair:
    """Two prompts ``good`` and ``bad``, as a processor returns them, which say the same but for what is steered.

    ``rows``: how many tokens at their end are looked at, in each (answers may differ in length); 1 = the last row.
    """

    good: Mapping[str, Any]
    bad: Mapping[str, Any]
    rows: tuple[int, int] = (1, 1)


def fit_steering(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    way: str = "mean",
    *,
    rank: int = 1,
    examples: str = "",
    progress: bool = True,
    path: str | os.PathLike[str] | None = None,
) -> Directions:
    """Measure directions from bad to good answers in the hidden states between layers.

    With h the mean over the last rows of what layer l puts out, for pair i:

        D_i = h(good_i) - h(bad_i)
        mean: d = mean_i D_i                          for ``steer``
        pca:  d = the first ``rank`` principal components of D about its mean, each turned so that the mean of D lies on
              its side, times the length of that mean; for ``vti``
        svd:  d = the first ``rank`` right singular vectors of D, orthonormal; for ``nullu``

    The model is only read; a recipe on it does not act meanwhile. There is no direction for the last layer: what it
    puts out enters no other one.

    Args:
        pairs: single prompts without padding; at least ``rank``, for "pca" one more.
        way: mean, pca or svd.
        rank: directions of a layer.
        examples: what the pairs are, noted in the file.
        progress: show a bar.
        path: file or folder to save them to; None = nowhere.

    Raises:
        OptionError: another way, a rank below 1 or above the number of pairs.
        InputError: no pairs, one that is not two single prompts, rows that it does not have.
    """
    if way not in WAYS:
        raise OptionError(f"way must be one of {', '.join(WAYS)}, got '{way}'")
    needed = rank + (way == "pca")
    if rank < 1 or len(pairs) < needed:
        raise OptionError(f"{rank} directions by {way} need at least {max(needed, 1)} pairs, got {len(pairs)}")
    anatomy = find_family(model).anatomy(model)
    found: dict[int, list[Tensor]] = {layer: [] for layer in range(anatomy.layers - 1)}
    for pair in tqdm(pairs, desc="directions", disable=not progress):
        good, bad = (
            _states(model, inputs, rows) for inputs, rows in ((pair.good, pair.rows[0]), (pair.bad, pair.rows[1]))
        )
        for layer, kept in found.items():
            kept.append(good[layer] - bad[layer])
    by_layer = {layer: _directions(torch.stack(kept), way, rank) for layer, kept in found.items()}
    made = Directions(by_layer, anatomy.fingerprint, anatomy.source, way, examples or f"{len(pairs)} pairs")
    if path is not None:
        made.save(path)
    return made


def _directions(differences: Tensor, way: str, rank: int) -> Tensor:
    """float32 ``[rank, hidden]`` from ``[pairs, hidden]``."""
    mean = differences.mean(0)
    if way == "mean":
        return mean[None]
    centred = differences - mean if way == "pca" else differences
    main: Tensor = torch.linalg.svd(centred, full_matrices=False).Vh[:rank]
    if way == "pca":
        main = main * torch.where(main @ mean < 0, -1.0, 1.0)[:, None] * mean.norm()
    return main


def _states(model: PreTrainedModel, inputs: Mapping[str, Any], rows: int) -> dict[int, Tensor]:
    """float32 ``[hidden]`` of each layer's output but the last's, on the cpu."""
    given = prepared_one(model, inputs)
    length = given["input_ids"].shape[1]
    if not 1 <= rows <= length:
        raise InputError(f"a pair looks at the last {rows} rows of a prompt of {length} tokens")
    reader = _Reader(rows)
    with torch.no_grad(), watched(model, None, "none", reader):
        model(**given, use_cache=False)
    return {layer - 1: state for layer, state in reader.entered.items() if layer}


@dataclass(eq=False)
class _Reader:
    """Notes what enters each layer."""

    rows: int
    entered: dict[int, Tensor] = field(default_factory=dict)

    def enter(self, step: Step, layer: int, hidden: Tensor) -> None:
        self.entered[layer] = hidden[0, -self.rows :].float().mean(0).cpu()

    def attended(self, context: LayerContext, edit: AttentionEdit, weights: Weights) -> None:
        """Attention is not looked at."""
