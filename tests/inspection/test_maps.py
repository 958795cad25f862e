"""Attention on images, against weights that the bare model returns itself, and where it is drawn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from zoo import ZOO

from vlmattn.inspection import image_attention

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next", "idefics3", "emu3", "idefics2"])
def test_maps_are_the_weights_of_the_last_row(name):
    model, prompt = ZOO[name].build("eager"), ZOO[name].prompt(2)
    weights = model(**prompt.inputs, output_attentions=True, use_cache=False).attentions
    row = torch.stack(weights)[:, 0, :, -1].mean((0, 1))
    processor = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: ZOO[name].vocabulary))
    found = image_attention(model, processor, prompt.inputs)
    assert len(found) == 2
    for image, maps in enumerate(found):
        own = row[prompt.images[0] == image]
        for (box, grid), (wanted, tokens) in zip(maps, PLACES[name](image), strict=True):
            assert box == pytest.approx(wanted)
            torch.testing.assert_close(grid, own[torch.tensor(tokens)], rtol=0, atol=1e-5)


def rows(high: int, wide: int, first: int = 0, behind: int = 0) -> list[list[int]]:
    return [[first + y * (wide + behind) + x for x in range(wide)] for y in range(high)]


WHOLE = (0, 0, 1, 1)
PLACES = {
    "llava": lambda image: [(WHOLE, rows(4, 4))],
    "qwen2_5_vl": lambda image: [(WHOLE, rows(2, 2 + 2 * image))],
    "llava_next": lambda image: [(WHOLE, rows(4, 4)), (WHOLE, rows(2 + 2 * image, 8, 16, behind=1))],
    "idefics3": lambda image: [((0, 0, 0.5, 1), rows(2, 2)), ((0.5, 0, 1, 1), rows(2, 2, 4)), (WHOLE, rows(2, 2, 8))],
    "emu3": lambda image: [(WHOLE, rows(8, 8, behind=1))],
    "idefics2": lambda image: [],
}  # written out for the images of the zoo
