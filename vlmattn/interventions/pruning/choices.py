"""Choices that methods which drop tokens share: of n tokens, which k stay. Tensors only, many images at once.

Every choice takes tokens or scores of images with equally many tokens, and gives bool ``[images, n]``. Ties go to the
earlier token. What is greedy takes k steps, each on all tokens of all images; nothing loops over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def top(scores: Tensor, count: int) -> Tensor:
    """The ``count`` tokens with the highest scores ``[images, n]``."""
    order = scores.float().argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def likeness(tokens: Tensor) -> Tensor:
    """Cosines between the tokens ``[images, n, width]`` of each image, float32 ``[images, n, n]``."""
    unit = normalize(tokens.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def farthest(tokens: Tensor, count: int) -> Tensor:
    """Greedy max-min: begin with the token whose nearest other is farthest, go on with the one farthest from all taken.

    Distance is 1 - cosine; tokens ``[images, n, width]``.
    """
    distance = 1 - likeness(tokens)
    apart = distance + torch.diag_embed(torch.full_like(distance[:, 0], float("inf")))
    nearest = apart.amin(1)  # a token alone is at infinity
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    for step in range(count):
        best = nearest.masked_fill(taken, float("-inf")).argmax(1, keepdim=True)
        taken.scatter_(1, best, True)
        towards = distance.gather(1, best[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        nearest = torch.minimum(nearest, towards) if step else towards
    return taken


def determinantal(kernel: Tensor, count: int) -> Tensor:
    """Greedy MAP of a determinantal point process: each step takes the token that makes the determinant largest.

    With L the kernel ``[images, n, n]`` of the tokens taken so far, a Cholesky row for each step keeps the gain
    d_i = det(L + i) / det(L) of every token; n k multiply-adds a step. Of tokens that are the same (newlines between
    rows of patches) rounding decides which one is taken.
    """
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = kernel.new_zeros(len(kernel), max(count, 1), kernel.shape[1])
    nothing = 1e-6 * gain.amax(1, keepdim=True).clamp_min(1e-30)  # less is rounding: doubles of what is taken
    taken = torch.zeros_like(gain, dtype=torch.bool)
    for step in range(count):
        best = (gain * (gain > nothing)).masked_fill(taken, float("-inf")).argmax(1, keepdim=True)
        taken.scatter_(1, best, True)
        before = rows[:, :step].gather(2, best[:, None].expand(-1, step, -1))  # [images, step, 1]
        row = kernel.gather(1, best[..., None].expand(-1, -1, kernel.shape[2]))[:, 0]
        most = gain.gather(1, best)
        row = (row - (before * rows[:, :step]).sum(1)) / most.clamp_min(nothing).sqrt()
        rows[:, step] = row = row * (most > nothing)
        gain = gain - row.square()
    return taken


def grid(n: int, count: int, device: torch.device) -> Tensor:
    """``count`` of n tokens spread evenly, bool ``[n]``: over the square, if n is one, else along the sequence."""
    rows, columns = _places(n, count)
    side = round(n**0.5) if rows is not None else n
    sites = columns if rows is None else rows * side + columns
    return torch.zeros(n, dtype=torch.bool, device=device).index_fill_(0, sites.to(device), True)


def _places(n: int, count: int) -> tuple[Tensor | None, Tensor]:
    """Rows (None: the tokens are no square) and columns of ``count`` evenly spread tokens."""
    steps, side = torch.arange(count), round(n**0.5)
    if side * side != n or not count:
        return None, ((2 * steps + 1) * n) // (2 * max(count, 1))
    lines = max(round(count**0.5), 1)
    line = steps * lines // count  # the line of each site; count / lines of them, rounded down or up
    first = -(-(line * count) // lines)  # the first site of that line
    many = -(-((line + 1) * count) // lines) - first
    return ((2 * line + 1) * side) // (2 * lines), ((2 * (steps - first) + 1) * side) // (2 * many)


def nearest_site(n: int, stays: Tensor) -> Tensor:
    """For each of n tokens the kept one that lies nearest in the picture, as its number among the kept ``[n]``.

    ``stays`` bool ``[n]``. In a square of tokens by distance, else along the sequence.
    """
    side = round(n**0.5)
    steps = torch.arange(n, device=stays.device)
    places = torch.stack([steps // side, steps % side], 1) if side * side == n else steps[:, None]
    return (places[:, None] - places[None, stays]).square().sum(-1).argmin(1)


def most_alike(tokens: Tensor, stays: Tensor) -> Tensor:
    """For each of the tokens ``[n, width]`` the kept one most alike (cosine), as its number among the kept ``[n]``."""
    unit = normalize(tokens.float(), dim=-1)
    return (unit @ unit[stays].T).argmax(1)


def merged(tokens: Tensor, stays: Tensor, goes_to: Tensor) -> Tensor:
    """Means ``[kept, width]`` of the tokens ``[n, width]`` that go to each kept one, itself among them."""
    number = stays.cumsum(0) - 1
    goes_to = torch.where(stays, number, goes_to)
    kept = int(stays.sum())
    sums = torch.zeros(kept, tokens.shape[-1], device=tokens.device).index_add_(0, goes_to, tokens.float())
    return (sums / torch.bincount(goes_to, minlength=kept)[:, None]).to(tokens)
