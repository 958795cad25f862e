"""Videos: every frame is an image of its own, with a place in the picture; every kind of method runs on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from tiny import generate
from torch import Tensor
from torch.nn.functional import pad
from zoo import CLOSE, FAKE, IMG, OPEN, ROW, VID, ZOO

import vlmattn
from vlmattn import PAI, VCD, VHR, FastV, Knockout, SoFA
from vlmattn.inspection import look
from vlmattn.models import find_family

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
NEAR, NEW = 2e-4, 3


@dataclass(frozen=True)
class Film:
    """How a model of the zoo reads videos.

    Attributes:
        layout: ids of a video of so many frames.
        pixels: its inputs.
        cells: rows and columns of the tokens of a frame that show a place; token: its placeholder.
        mixed: the bare model reads a prompt with an image and a video; kept: per video, not per row of pixels.
    """

    layout: Callable[[int], list[int]]
    pixels: Callable[[int, torch.Generator], dict[str, Tensor]]
    cells: tuple[int, int] = (2, 2)
    token: int = VID
    mixed: bool = True
    lengths: Callable[[int], list[int]] = lambda frames: [4] * frames
    vocabulary: dict[str, int] = field(default_factory=dict)


def grids(
    width: Sequence[int], apart: bool = False, merged: int = 1
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """Frames of 4 x 4 patches: one grid for all, or one for each; ``merged`` frames are read as one."""

    def make(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = [[merged, 4, 4]] * frames if apart else [[frames, 4, 4]]
        return {
            "pixel_values_videos": torch.randn(16 * merged * frames, *width, generator=generator),
            "video_grid_thw": torch.tensor(grid),
        }

    return make


def clip(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(1, frames, 3, 16, 16, generator=generator)}


def placed(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Frames of 4 x 4 patches, each with its place."""
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
    return {
        "pixel_values_videos": torch.rand(frames, 16, 48, generator=generator),
        "video_position_ids": places.expand(frames, -1, -1),
        "num_frames_per_video": torch.tensor([frames]),
    }


# Kimi K2.5 merges frames that are read together; before 5.24 transformers counted their tokens wrongly.
MERGED = 2 if parse(transformers.__version__) >= parse("5.24") else 1


def stamped(before: int, after: int) -> Callable[[int], list[int]]:
    """A time before each frame."""
    return lambda frames: [token for second in range(frames) for token in (40 + second, before, *[VID] * 4, after)]


FILMS = {
    "qwen2_vl": Film(lambda frames: [OPEN, *[VID] * 4 * frames, CLOSE], grids([96])),
    "qwen2_5_vl": Film(lambda frames: [OPEN, *[VID] * 4 * frames, CLOSE], grids([96])),
    "qwen3_vl": Film(stamped(OPEN, CLOSE), grids([96])),
    "glm4v": Film(
        lambda frames: [FAKE, *(t for n in range(frames) for t in (OPEN, *[IMG] * 4, CLOSE, 40 + n)), ROW], grids([96]),
        token=IMG, mixed=False,
    ),
    "kimi_k25": Film(stamped(OPEN, CLOSE), grids([3, 4, 4], apart=True, merged=MERGED)),
    "llava_onevision": Film(
        lambda frames: [VID] * (4 * frames + 1), clip, lengths=lambda frames: [*[4] * (frames - 1), 5]
    ),
    "llava_next_video": Film(lambda frames: [VID] * 4 * frames, clip),
    "cosmos3_omni": Film(stamped(OPEN, CLOSE), grids([96])),
    "qwen3_5": Film(stamped(OPEN, CLOSE), grids([96])),
    "gemma4": Film(stamped(OPEN, CLOSE), placed),
    "gemma4_key_value": Film(stamped(OPEN, CLOSE), placed),
    "gemma4_unified": Film(
        lambda frames: [token for n in range(frames) for token in (40 + n, OPEN, *[VID] * 16, CLOSE)], placed, (4, 4),
        lengths=lambda frames: [16] * frames,
    ),
    "video_llava": Film(lambda frames: [VID] * 17 * frames, clip, (4, 4), lengths=lambda frames: [17] * frames),
}  # fmt: skip


def filmed(
    name: str, frames: int = 3, words: int = 4, image: bool = False, seed: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a prompt with a video, and an image before it; the number of the image of each token, -1 for text."""
    film, tiny, generator = FILMS[name], ZOO[name], torch.Generator().manual_seed(seed)
    still = tiny.layout(0) if image else []
    ids = [1, 16, *still, 17, *film.layout(frames), *torch.randint(5, 40, (words,), generator=generator).tolist()]
    numbers, count, of_frame = [], 0, [n for n, length in enumerate(film.lengths(frames)) for _ in range(length)]
    for place, token in enumerate(ids):
        if 2 <= place < 2 + len(still):
            numbers.append(0 if token == IMG else -1)
        elif token == film.token:
            numbers.append(of_frame[count] + bool(image))
            count += 1
        else:
            numbers.append(-1)
    found = torch.tensor([ids])
    types = torch.tensor([[0 if n < 0 else 1 if image and n == 0 else 2 for n in numbers]])
    inputs = dict(input_ids=found, attention_mask=torch.ones_like(found), **film.pixels(frames, generator))
    if tiny.types(found):
        inputs["mm_token_type_ids"] = types
    if image:
        inputs |= tiny.pixels(1, generator)
    return inputs, torch.tensor([numbers])


def together(prompts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The prompts as one batch, padded on the left."""
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for name in prompts[0]:
        parts = [prompt[name] for prompt in prompts]
        of_tokens = name in ("input_ids", "attention_mask", "mm_token_type_ids")
        batch[name] = torch.cat([pad(part, (length - part.shape[1], 0)) for part in parts] if of_tokens else parts)
    return batch


def near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= NEAR * max(1.0, float(wanted.abs().max())))


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return generate(model, inputs, NEW, suppress_tokens=[IMG, VID])


WAYS = [(name, False) for name in FILMS] + [(name, True) for name, film in FILMS.items() if film.mixed]
ways = pytest.mark.parametrize(("name", "image"), WAYS, ids=[f"{name}{'-mixed' * image}" for name, image in WAYS])


@ways
def test_every_frame_is_an_image(name, image):
    """In a forward, where generate() encodes before, and in a padded batch."""
    model = vlmattn.wrap(ZOO[name].build(), PAI(layers="0:"))
    given = [filmed(name, 3, 4, image), filmed(name, 3, 7, image, seed=2)]
    for inputs, numbers in given:
        found = model(**inputs, use_cache=True).past_key_values._vlmattn_request
        assert torch.equal(found.images(numbers.shape[1], torch.device("cpu")).long(), numbers)
    length = max(numbers.shape[1] for _, numbers in given)
    wanted = torch.cat([pad(numbers, (length - numbers.shape[1], 0), value=-1) for _, numbers in given])
    out = model.generate(
        **together([inputs for inputs, _ in given]), max_new_tokens=1, return_dict_in_generate=True, pad_token_id=0
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
    vlmattn.wrap(model, METHODS[method])
    alone = [answer(model, inputs) for inputs in given]
    assert not near(alone[0], bare)
    if method != "vcd":  # noise is drawn for a batch
        both = answer(model, together(given))
        assert near(both[0], alone[0][0])
        assert near(both[1], alone[1][0])


@ways
def test_maps_of_frames(name, image):
    """`look` has a map for each frame: the eager model's attention at the frame's tokens, row by row."""
    inputs, numbers = filmed(name, 3, 4, image)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict, decode=lambda ids, **_: str(ids)))
    trace = look(ZOO[name].build(), processor, inputs, answer=[7], rows=[-1])
    assert trace.images[:-1] == tuple(numbers[0].tolist())
    assert len(trace.pieces) == 3 + image
    eager = ZOO[name].build("eager")(**inputs, output_attentions=True).attentions
    eager = [layer for layer in eager if layer is not None]
    row = inputs["input_ids"].shape[1] - 1
    for frame in range(3):
        (piece,) = trace.pieces[frame + image]
        assert tuple(piece.tokens.shape) == FILMS[name].cells
        slots = (numbers[0] == frame + image).nonzero()[:, 0]
        skipped = name == "video_llava"  # the CLS token
        assert piece.tokens.flatten().tolist() == list(range(skipped, skipped + piece.tokens.numel()))
        shown = trace.attention(row).values[..., slots].mean((0, 1))[piece.tokens]
        wanted = torch.stack([layer[0, :, row, slots] for layer in eager]).mean((0, 1))[piece.tokens]
        torch.testing.assert_close(shown, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FILMS)
def test_an_identity_is_exact(name):
    inputs, _ = filmed(name)
    model = ZOO[name].build()
    bare = answer(model, inputs)
    with vlmattn.applied(model, "none"):
        assert torch.equal(answer(model, inputs), bare)
    assert torch.equal(answer(model, inputs), bare)
    assert find_family(model).image_layout(model, inputs, 0, 1) == ()  # not as many tokens
