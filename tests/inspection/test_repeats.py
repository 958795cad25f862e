"""Echo and induction scores against full attention, by a loop over rows."""

from __future__ import annotations

import pytest
import torch
from tiny import build

from vlmattn import OptionError
from vlmattn.inspection import score_repeats


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("lead", [[1], [], [5, 6]], ids=["bos", "nothing", "two"])
def test_scores_by_a_loop(family, lead):
    model, length, times = build(family, "eager"), 40, 3
    caught = {}

    def note(module, args, kwargs):
        if "input_ids" in kwargs:
            caught["ids"] = kwargs["input_ids"]

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    found = score_repeats(model, length=length, times=times, first=lead, seed=2)
    hook.remove()
    ids = caught["ids"]
    assert ids.shape[1] == len(lead) + length * times
    assert ids[0, : len(lead)].tolist() == lead
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    for layer, attention in enumerate(maps):
        for head in range(attention.shape[1]):
            sums = {"echo": 0.0, "induction": 0.0}
            rows = range(len(lead) + length, ids.shape[1])
            for i in rows:
                for j in range(i - length, len(lead) - 1, -length):
                    assert ids[0, i] == ids[0, j]
                    sums["echo"] += float(attention[0, head, i, j])
                    sums["induction"] += float(attention[0, head, i, j + 1])
            for name, total in sums.items():
                assert abs(found.scores[name][layer][head] - total / len(rows)) < 1e-5
    assert max(map(max, found.scores["echo"])) > 0


def test_too_few():
    with pytest.raises(OptionError, match="at least 2, got 1 and 4"):
        score_repeats(build("llava"), length=1)
