"""The tiny models themselves, bare: they run, images matter, and a padded batch is what its rows are alone."""

from __future__ import annotations

import pytest
import torch
from tiny import generate
from zoo import ZOO, padded

pytestmark = pytest.mark.usefixtures("no_grad")
CLOSE = dict(rtol=0, atol=1e-4)
every = pytest.mark.parametrize("name", [name for name, tiny in ZOO.items() if not tiny.unbuildable])


def prompts(name):
    """Two prompts of different lengths, one with two images where there may be two."""
    tiny = ZOO[name]
    return [tiny.prompt(1 if tiny.single_image else 2, 5, 1), tiny.prompt(1, 9, 2)]


@every
def test_every_image_input_matters(name):
    model = ZOO[name].build()
    for prompt in prompts(name):
        logits = model(**prompt.inputs).logits[:, -1]
        assert logits.isfinite().all()
        images = [key for key in prompt.inputs if "pixel_values" in key or key == "flattened_patches"]
        assert images
        for key in images:
            first = 2 if key == "flattened_patches" else 0  # row and column of a patch stay
            value = prompt.inputs[key]
            other = {**prompt.inputs, key: torch.cat([value[..., :first], value[..., first:].flip(-1)], -1)}
            assert (model(**other).logits[:, -1] - logits).abs().max() > 1e-2


@every
def test_the_number_of_placeholders_is_the_number_of_image_tokens(name):
    for prompt in prompts(name):
        assert torch.equal(prompt.images >= 0, prompt.inputs["input_ids"] == ZOO[name].image_token)


@every
def test_padding_is_invisible_or_said_to_be_seen(name):
    model, tiny = ZOO[name].build(), ZOO[name]
    alone = [generate(model, prompt.inputs, 3)[0] for prompt in prompts(name)]
    together = generate(model, padded(tiny, prompts(name)), 3)
    near = all(torch.allclose(together[row], one, **CLOSE) for row, one in enumerate(alone))
    assert near != bool(tiny.padding)


@every
def test_a_cache_is_invisible_or_said_to_be_seen(name):
    model, tiny = ZOO[name].build(), ZOO[name]
    inputs, options = prompts(name)[0].inputs, dict(suppress_tokens=[tiny.image_token])
    cached = generate(model, inputs, 3, use_cache=True, **options)
    try:
        recomputed = generate(model, inputs, 3, use_cache=False, **options)
    except IndexError:
        assert tiny.uncached
    else:
        assert torch.allclose(cached, recomputed, **CLOSE) != bool(tiny.uncached)
