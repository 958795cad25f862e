"""Videos for the models of the zoo that read them: what a prompt with one looks like, and which frame each token shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from packaging.version import parse
from torch import Tensor
from torch.nn.functional import pad
from zoo import CLOSE, FAKE, IMG, OPEN, ROW, VID, ZOO

OF_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass(frozen=True)
class Film:
    """How a model of the zoo reads videos.

    Attributes:
        layout: ids of a video of so many frames.
        pixels: its inputs.
        pieces: rows and columns of the pieces of a frame, by its number; token: its placeholder; kind: their type.
        mixed: the bare model reads a prompt with an image and a video.
        lengths: tokens of each frame; hidden: of them, at the front, those that show no place; behind: those
             at the end of each row.
        batch: frames of two videos that one batch may have.
    """

    layout: Callable[[int], list[int]]
    pixels: Callable[[int, torch.Generator], dict[str, Tensor]]
    pieces: Callable[[int], list[tuple[int, int]]] = lambda frame: [(2, 2)]
    token: int = VID
    kind: int = 2
    behind: int = 0
    mixed: bool = True
    lengths: Callable[[int], list[int]] = lambda frames: [4] * frames
    hidden: int = 0
    batch: tuple[int, int] = (3, 2)


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


def timed(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**grids([96])(frames, generator), "video_second_per_grid": torch.tensor([1.0])}


def in_pairs(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Twice as many frames, of which two become one."""
    return grids([48])(2 * frames, generator)


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


def compressed(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """VideoLLaMA 3: the first frame whole, of each later one what has changed: all but its second token."""
    kept = torch.ones(frames, 4, dtype=torch.bool)
    kept[1:, 1] = False
    return {
        **grids([48])(frames, generator), "video_merge_sizes": torch.tensor([2]), "video_compression_mask": kept.flatten(),
    }  # fmt: skip


def strip(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """MiniCPM-V: frames of 8 x 8 patches, the second of which has two slices besides."""
    sizes = torch.tensor([size for n in range(frames) for size in ([8, 8], *([[4, 8]] * 2 if n == 1 else []))])
    pixels = torch.randn(1, 3, 4, 4 * int(sizes.prod(1).sum()), generator=generator)
    return {"pixel_values_videos": pixels, "target_sizes_videos": sizes.int()}


def sliced(frames: int) -> list[int]:
    slices = [FAKE, *[VID] * 2, ROW] * 2
    return [token for n in range(frames) for token in (OPEN, *[VID] * 4, CLOSE, *(slices if n == 1 else []))]


def pooled(frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Molmo 2: frames of 4 x 4 patches, four of which become a token."""
    square = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values_videos": torch.randn(frames, 16, 48, generator=generator),
        "video_token_pooling": torch.cat([square + 16 * n for n in range(frames)]),
        "video_grids": torch.tensor([[frames, 2, 2]]),
    }


def stamped(before: int, after: int) -> Callable[[int], list[int]]:
    """A time before each frame."""
    return lambda frames: [token for second in range(frames) for token in (40 + second, before, *[VID] * 4, after)]


def unbroken(frames: int) -> list[int]:
    return [OPEN, *[VID] * 4 * frames, CLOSE]


GLM = Film(
    lambda frames: [FAKE, *(t for n in range(frames) for t in (OPEN, *[IMG] * 4, CLOSE, 40 + n)), ROW],
    grids([96]),
    token=IMG,
    mixed=False,
)
SLICED = Film(
    sliced, strip, lambda frame: [(2, 2), (1, 2), (1, 2)] if frame == 1 else [(2, 2)],
    lengths=lambda frames: [4, 8, *[4] * (frames - 2)],
)  # fmt: skip

FILMS = {
    "qwen2_vl": Film(unbroken, grids([96])),
    "qwen2_5_vl": Film(unbroken, grids([96])),
    "qwen3_vl": Film(stamped(OPEN, CLOSE), grids([96])),
    "glm4v": GLM,
    "glm_ocr": GLM,
    "qwen2_5_omni_thinker": Film(unbroken, timed),
    "qwen3_omni_moe_thinker": Film(unbroken, timed),
    "exaone4_5": Film(unbroken, grids([96])),
    "cohere_compass": Film(stamped(OPEN, CLOSE), grids([96])),
    "qwen4_exp": Film(stamped(OPEN, CLOSE), grids([96])),
    "ernie4_5_vl_moe": Film(lambda frames: [FAKE, *[VID] * 4 * frames, ROW], in_pairs),
    "kimi_k25": Film(stamped(OPEN, CLOSE), grids([3, 4, 4], apart=True, merged=MERGED)),
    "llava_onevision": Film(
        lambda frames: [VID] * (4 * frames + 1), clip, batch=(3, 3), lengths=lambda frames: [*[4] * (frames - 1), 5]
    ),
    "llava_next_video": Film(lambda frames: [VID] * 4 * frames, clip, batch=(3, 3)),
    "video_llama_3": Film(
        lambda frames: [token for n in range(frames) for token in (40 + n, *[VID] * (3 if n else 4), 41)], compressed,
        lambda frame: [(1, 1), (1, 2)] if frame else [(2, 2)], lengths=lambda frames: [4, *[3] * (frames - 1)],
    ),
    "minicpmv4_6": SLICED,
    "minicpmv4_7": SLICED,
    "molmo2": Film(
        lambda frames: [t for n in range(frames) for t in (40 + n, ROW, *[IMG] * 4, 94)], pooled, token=IMG, kind=1,
        mixed=False,
    ),
    "hy_v4_vl": Film(
        lambda frames: [OPEN, *[VID] * 6 * frames, CLOSE], grids([48]), lengths=lambda frames: [6] * frames, behind=1
    ),
    "hyperclovax_vision_v2": Film(lambda frames: [OPEN, *[VID] * 4 * frames, CLOSE], grids([96])),
    "cosmos3_omni": Film(stamped(OPEN, CLOSE), grids([96])),
    "qwen3_5": Film(stamped(OPEN, CLOSE), grids([96])),
    "gemma4": Film(stamped(OPEN, CLOSE), placed),
    "gemma4_key_value": Film(stamped(OPEN, CLOSE), placed),
    "gemma4_unified": Film(
        lambda frames: [token for n in range(frames) for token in (40 + n, OPEN, *[VID] * 16, CLOSE)], placed, lambda frame: [(4, 4)],
        lengths=lambda frames: [16] * frames,
    ),
    "video_llava": Film(
        lambda frames: [VID] * 17 * frames, clip, lambda frame: [(4, 4)], lengths=lambda frames: [17] * frames, hidden=1, batch=(3, 3)
    ),
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
    types = torch.tensor([[0 if n < 0 else 1 if image and n == 0 else film.kind for n in numbers]])
    inputs = dict(input_ids=found, attention_mask=torch.ones_like(found), **film.pixels(frames, generator))
    if tiny.types(found):
        inputs |= tiny.types(found) | {"mm_token_type_ids": types}
    if image:
        inputs |= tiny.pixels(1, generator)
    return inputs, torch.tensor([numbers])


def together(name: str, prompts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The prompts as one batch, padded on the left."""
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for key in prompts[0]:
        parts = [prompt[key] for prompt in prompts]
        if key in OF_TOKENS:
            parts = [pad(part, (length - part.shape[1], 0)) for part in parts]
        elif key == "video_token_pooling":  # numbers of patches among those of all prompts
            before = [0, *(prompt["pixel_values_videos"][..., 0].numel() for prompt in prompts)]
            parts = [part + sum(before[: row + 1]) for row, part in enumerate(parts)]
        batch[key] = torch.cat(parts, ZOO[name].pixel_axis if key.startswith("pixel_values") else 0)
    return batch


def processor_of(name: str) -> Any:
    """Its tokenizer knows the markers."""
    return SimpleNamespace(
        tokenizer=SimpleNamespace(get_vocab=lambda: ZOO[name].vocabulary, decode=lambda ids, **_: str(ids))
    )
