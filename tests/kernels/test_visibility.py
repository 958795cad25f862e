"""The two forms of a mask, and what some rows of a call see."""

from __future__ import annotations

import pytest
import torch

from vlmattn.kernels import AttentionEdit, MaskPart, Problem, Visibility, additive, attend, hide, visible

SEEN = torch.tensor([[True, False, True], [False, False, False]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bool_and_additive_masks_become_each_other(dtype):
    added = additive(SEEN, dtype)
    assert added.dtype == dtype
    assert added[0, :2].tolist() == [0, torch.finfo(dtype).min]
    assert torch.equal(visible(added), SEEN)
    assert visible(SEEN) is SEEN
    assert visible(torch.tensor([-1e3, -torch.inf, 2.0]).to(dtype)).tolist() == [True, False, True]


def test_hiding_keeps_the_form():
    hidden = torch.tensor([True, False, False])
    assert torch.equal(hide(SEEN, hidden), SEEN & ~hidden)
    assert torch.equal(visible(hide(additive(SEEN, torch.float32) + 0.5, hidden)), SEEN & ~hidden)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_no_mask_is_causal_for_several_rows_and_everything_for_one(backend, rows):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, rows, 8, generator=generator)
    key, value = torch.randn(2, 1, 1, 5, 8, generator=generator)
    problem = Problem(query, key, value, Visibility(None), 1.0, AttentionEdit(keep=torch.ones(1, 5, dtype=torch.bool)))
    got, _ = attend(problem, backend)
    score = (query @ key.mT).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril()[5 - rows :], -torch.inf)
    torch.testing.assert_close(got, score.softmax(-1) @ value)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_an_edit_opens_keys_within_the_window_only(backend):
    key = value = torch.eye(6)[None, None]
    opened = MaskPart(torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long))
    see = Visibility(torch.eye(6, dtype=torch.bool)[None, None], plain=False, window=3)
    out, _ = attend(Problem(torch.zeros(1, 1, 6, 6), key, value, see, 1.0, AttentionEdit((opened,))), backend)
    near = (torch.arange(6)[:, None] - torch.arange(6)).abs() < 3
    assert torch.equal(out[0, 0] > 0, near)
