"""Choices that methods share, against the same told one token at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from vlmattn.interventions.pruning import choices

TOKENS = torch.randn(3, 25, 6, generator=torch.Generator().manual_seed(3))


def max_min(tokens, count):
    """DivPrune's greedy choice of one image, by lists."""
    unit = normalize(tokens, dim=-1)
    far = lambda a, b: 1 - float(unit[a] @ unit[b])  # noqa: E731
    others = range(len(tokens))
    taken = [max(others, key=lambda a: min(far(a, b) for b in others if b != a))]
    while len(taken) < count:
        left = [token for token in others if token not in taken]
        taken.append(max(left, key=lambda a: min(far(a, b) for b in taken)))
    return sorted(taken)


@pytest.mark.parametrize("count", [1, 2, 7, 25])
def test_farthest_is_greedy_max_min(count):
    found = choices.farthest(TOKENS, count)
    assert [row.nonzero().flatten().tolist() for row in found] == [max_min(image, count) for image in TOKENS]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_determinantal_takes_the_largest_determinant_in_each_step(count):
    quality = torch.rand(3, 25, generator=torch.Generator().manual_seed(4)) + 0.1
    kernel = quality[:, :, None] * choices.likeness(TOKENS) * quality[:, None]
    found = choices.determinantal(kernel, count)
    for image, stays in zip(kernel.double(), found, strict=True):
        taken: list[int] = []
        for _ in range(count):
            left = [token for token in range(25) if token not in taken]
            taken.append(max(left, key=lambda a: float(torch.linalg.det(image[[*taken, a]][:, [*taken, a]]))))
        assert stays.nonzero().flatten().tolist() == sorted(taken)


def test_determinantal_goes_on_behind_the_rank_of_the_kernel():
    found = choices.determinantal(choices.likeness(TOKENS), 20)  # of rank 6
    assert found.sum(1).tolist() == [20] * 3


def test_top_takes_the_first_of_equals():
    assert choices.top(torch.tensor([[1.0, 2, 2, 0], [0, 0, 0, 0]]), 1).tolist() == [
        [False, True, False, False],
        [True, False, False, False],
    ]


@pytest.mark.parametrize("n", [1, 4, 16, 25, 30, 576])
def test_a_grid_has_as_many_places_as_asked(n):
    for count in range(0, n + 1, 1 if n < 100 else 13):
        assert int(choices.grid(n, count, torch.device("cpu")).sum()) == count


def test_a_grid_covers_the_picture():
    assert choices.grid(16, 4, torch.device("cpu")).view(4, 4).nonzero().tolist() == [[1, 1], [1, 3], [3, 1], [3, 3]]
    assert choices.grid(10, 2, torch.device("cpu")).nonzero().flatten().tolist() == [2, 7]


def test_neighbours_join_the_nearest_place_and_are_averaged():
    stays = choices.grid(16, 4, torch.device("cpu"))
    where = choices.nearest_site(16, stays)
    places = list(itertools.product(range(4), repeat=2))
    sites = [places[i] for i in stays.nonzero().flatten()]
    for token, (row, column) in enumerate(places):
        assert where[token] == min(range(4), key=lambda s: (row - sites[s][0]) ** 2 + (column - sites[s][1]) ** 2)
    means = choices.merged(TOKENS[0, :16], stays, where)
    for site in range(4):
        torch.testing.assert_close(means[site], TOKENS[0, :16][where == site].mean(0))


def test_the_most_alike_of_those_that_stay():
    stays = torch.zeros(25, dtype=torch.bool)
    stays[[2, 9, 20]] = True
    unit = normalize(TOKENS[0], dim=-1)
    expected = [max(range(3), key=lambda s: float(unit[token] @ unit[[2, 9, 20][s]])) for token in range(25)]
    assert choices.most_alike(TOKENS[0], stays).tolist() == expected
