"""Videos: every frame is an image of its own, with a place in the picture; every kind of method runs on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from films import FILMS, OF_TOKENS, filmed, processor_of, together
from tiny import generate
from torch import Tensor
from torch.nn.functional import pad
from zoo import IMG, VID, ZOO

import vlmattn
from vlmattn import PAI, VCD, VHR, FastV, Knockout, SoFA
from vlmattn.inspection import look
from vlmattn.models import find_family

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
NEAR, NEW = 2e-4, 3


def near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= NEAR * max(1.0, float(wanted.abs().max())))


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return generate(model, inputs, NEW, suppress_tokens=[IMG, VID])


WAYS = [(name, False) for name in FILMS] + [(name, True) for name, film in FILMS.items() if film.mixed]
ways = pytest.mark.parametrize(("name", "image"), WAYS, ids=[f"{name}{'-mixed' * image}" for name, image in WAYS])


@ways
def test_every_frame_is_an_image(name, image):
    """In a forward, where generate() encodes before, and in a padded batch."""
    model = vlmattn.wrap(ZOO[name].build(), PAI(layers="0:"), processor=processor_of(name))
    given = [filmed(name, 3, 4, image), filmed(name, 3, 7, image, seed=2)]
    for inputs, numbers in given:
        found = model(**inputs, use_cache=True).past_key_values._vlmattn_request
        assert torch.equal(found.images(numbers.shape[1], torch.device("cpu")).long(), numbers)
    length = max(numbers.shape[1] for _, numbers in given)
    wanted = torch.cat([pad(numbers, (length - numbers.shape[1], 0), value=-1) for _, numbers in given])
    out = model.generate(
        **together(name, [inputs for inputs, _ in given]),
        max_new_tokens=1,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    assert torch.equal(out.past_key_values._vlmattn_request.images(length, torch.device("cpu")).long(), wanted)


METHODS = {
    "pai": PAI(alpha=0.9, layers="0:"),
    "knockout": Knockout(layers="0:"),
    "sofa": SoFA(sigma=0.3, layers="0:-1"),
    "vhr": VHR(layers="0:"),
    "fastv": FastV(layer=2, keep_ratio=0.5),
    "vcd": VCD(),
}


@pytest.mark.parametrize("method", METHODS)
@ways
def test_every_kind_of_method_runs_alone_as_in_a_batch(name, image, method):
    given = [filmed(name, 3, 4, image)[0], filmed(name, 3, 7, image, seed=2)[0]]
    bare, model = answer(ZOO[name].build(), given[0]), ZOO[name].build()
    kind = {"fastv": "pruning", "vcd": "decoding"}.get(method, "edits")
    if kind in dict(find_family(model).anatomy(model).refused):
        pytest.skip(f"{kind} is refused")
    vlmattn.wrap(model, METHODS[method], processor=processor_of(name))
    alone = [answer(model, inputs) for inputs in given]
    assert near(alone[0], bare) == (method == "sofa" and name == "molmo2")  # whose images see each other anyway
    if method != "vcd":  # noise is drawn for a batch
        both = answer(model, together(name, given))
        assert near(both[0], alone[0][0])
        assert near(both[1], alone[1][0])


@ways
def test_maps_of_frames(name, image):
    """`look` has a map for each frame: the eager model's attention at the frame's tokens, row by row."""
    inputs, numbers = filmed(name, 3, 4, image)
    trace = look(ZOO[name].build(), processor_of(name), inputs, answer=[7], rows=[-1])
    assert trace.images[:-1] == tuple(numbers[0].tolist())
    assert len(trace.pieces) == 3 + image
    eager = ZOO[name].build("eager")(**inputs, output_attentions=True).attentions
    eager = [layer for layer in eager if layer is not None]
    row = inputs["input_ids"].shape[1] - 1
    for frame in range(3):
        pieces = trace.pieces[frame + image]
        assert [tuple(piece.tokens.shape) for piece in pieces] == FILMS[name].pieces(frame)
        slots = (numbers[0] == frame + image).nonzero()[:, 0]
        shown = torch.cat([piece.tokens.flatten() for piece in pieces])
        first, behind = FILMS[name].hidden, FILMS[name].behind
        wide = pieces[0].tokens.shape[1]
        assert shown.tolist() == [first + place + place // wide * behind for place in range(len(shown))]
        seen = trace.attention(row).values[..., slots].mean((0, 1))[shown]
        wanted = torch.stack([layer[0, :, row, slots] for layer in eager]).mean((0, 1))[shown]
        torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "frame", "boxes"),
    [
        ("video_llama_3", 0, [(0, 0, 1, 1)]),
        ("video_llama_3", 2, [(0, 0, 0.5, 0.5), (0, 0.5, 1, 1)]),  # without its second token
        ("minicpmv4_6", 1, [(0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)]),
        ("minicpmv4_7", 2, [(0, 0, 1, 1)]),
    ],
)
def test_pieces_of_a_frame_lie_where_they_were_cut(name, frame, boxes):
    inputs, _ = filmed(name)
    model, tokens = ZOO[name].build(), FILMS[name].lengths(3)[frame]
    found = find_family(model).image_layout(model, inputs, frame, tokens, ZOO[name].vocabulary)
    assert [piece.box for piece in found] == boxes


@ways
def test_inputs_of_each_prompt(name, image):
    """Every input that comes image by image is taken apart where the prompts are."""
    given = [filmed(name, frames, 4, image, seed=2 + row)[0] for row, frames in enumerate(FILMS[name].batch)]
    model = ZOO[name].build()
    found = find_family(model).per_row(model, together(name, given))
    assert found.keys() == {key for key in given[0] if key not in OF_TOKENS}
    for key, counts in found.items():
        axis = ZOO[name].pixel_axis if key.startswith("pixel_values") else 0
        assert counts == [prompt[key].shape[axis] for prompt in given], key


@ways
def test_a_search_takes_prompts_apart(name, image):
    """OPERA reads the prompts of a batch one by one, each as if it came alone."""
    model = ZOO[name].build()
    refused = dict(find_family(model).anatomy(model).refused)
    if {"decoding", "looking"} & refused.keys() or find_family(model).anatomy(model).window:
        pytest.skip("a search is refused")
    vlmattn.wrap(model, "opera", processor=processor_of(name))
    given = [filmed(name, frames, 4, image, seed=2 + row)[0] for row, frames in enumerate(FILMS[name].batch)]
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, suppress_tokens=[IMG, VID])
    alone = [model.generate(**inputs, **options)[0, -3:].tolist() for inputs in given]
    assert alone[0] != alone[1]
    assert model.generate(**together(name, given), **options)[:, -3:].tolist() == alone


@pytest.mark.parametrize("name", FILMS)
def test_an_identity_is_exact(name):
    inputs, _ = filmed(name)
    model = ZOO[name].build()
    bare = answer(model, inputs)
    with vlmattn.applied(model, "none"):
        assert torch.equal(answer(model, inputs), bare)
    assert torch.equal(answer(model, inputs), bare)
    assert find_family(model).image_layout(model, inputs, 0, 1) == ()  # not as many tokens
