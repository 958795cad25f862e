"""The tiny models themselves, bare: they run, images matter, and a padded batch is what its rows are alone."""

from __future__ import annotations

import pytest
import torch
from tiny import generate
from zoo import ZOO, padded

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", [name for name, tiny in ZOO.items() if not tiny.unbuildable])
def test_bare(name):
    tiny = ZOO[name]
    model = tiny.build()
    prompts = [tiny.prompt(1 if tiny.single_image else 2, 5, 1), tiny.prompt(1, 9, 2)]
    alone = [generate(model, prompt.inputs, 3) for prompt in prompts]
    for key in ("pixel_values", "pixel_values_images"):
        if key in prompts[0].inputs:
            other = {**prompts[0].inputs, key: prompts[0].inputs[key].flip(-1)}
            assert (generate(model, other, 3) - alone[0]).abs().max() > 1e-2, "the image must matter"
    without = generate(model, prompts[0].inputs, 3, use_cache=False, suppress_tokens=[tiny.image_token])
    kept = generate(model, prompts[0].inputs, 3, suppress_tokens=[tiny.image_token])
    assert torch.allclose(without, kept, atol=1e-3) != bool(tiny.uncached)
    together = generate(model, padded(tiny, prompts), 3)
    near = all(torch.allclose(together[row], one[0], atol=1e-3) for row, one in enumerate(alone))
    assert near != bool(tiny.padding)
