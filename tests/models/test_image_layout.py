"""Where image tokens lie in the picture, as families say it and as towers see it.

The oracle: a cell of a piece is painted over in the picture, the processor (transformers' own, or a few lines that do the same where
that one needs torchvision) and the model's tower run again, and the token that changed most must be the token of that cell.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from zoo import BREAK, CLOSE, COLUMN, EVERY, FAKE, IMG, LAST, OPEN, ROW, ZOO, Tiny

from vlmattn.models import WHOLE, Piece, find_family, marker_ids_of
from vlmattn.models.generic import Generic
from vlmattn.models.image_layout import cells, inside, tiled
from vlmattn.models.inputs import OF_IMAGES
from vlmattn.models.llama4 import filled
from vlmattn.models.tiles import arranged, joined

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]

Made = tuple[dict[str, Tensor], list[list[int]]]
"""Image inputs, and the ids of each image's tokens with what is around and between them."""

SQUARE = dict(height=16, width=16)
SHAPES = [[16 * high, 16 * wide] for high in range(1, 4) for wide in range(1, 4) if high * wide > 1]
NO_PLACE = {
    "idefics2": "latents", "aria": "queries", "blip2": "queries", "instructblip": "queries", "instructblipvideo": "queries",
    "kosmos2": "queries", "kosmos2_5": "queries", "mllama": "placeholders", "mllama_tiles": "placeholders", "deepseek_ocr2": "queries",
    "granite4_vision": "queries",
}  # fmt: skip
# Their processors are not run here: whether their pieces cover the tokens is looked at with the prompts of the zoo.
SOUND = {
    "llava_next_video", "video_llama_3", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "molmo2", "lighton_ocr", "mistral_large4",
    "got_ocr2", "pp_chart2table", "unlimited_ocr", "step3p7", "granite_docling", "fuyu", "gemma4", "gemma4_shared", "gemma4_key_value", "gemma4_unified", "nemotron_h_omni",
    "cosmos3_edge", "paddleocr_vl", "hunyuan_vl", "muse_glimmer", "muse_spark", "minimax_m3_vl", "lfm3_vl", "ernie4_5_vl_moe",
    "apertus1p5", "hy_v4_vl",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """How a prompt of pictures is made for a tiny model.

    Attributes:
        make: what a processor does with pictures ``[3, height, width]`` of uint8.
        sizes: (height, width) of the pictures to look at; for each how many pieces show the whole picture, how many a part of it,
            and how many tokens no place. config: fields of the model's to change.
    """

    make: Callable[[Sequence[Tensor]], Made]
    sizes: Mapping[tuple[int, int], tuple[int, int, int]] = field(default_factory=lambda: {(480, 480): (1, 0, 0)})
    config: Mapping[str, Any] = field(default_factory=dict)


# What processors do


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth picture, uint8 ``[3, height, width]``, without black."""
    noise = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (interpolate(noise, (height, width), mode="bilinear") * 150 + 50)[0].byte()


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """-1 to 1."""
    return interpolate(image[None].float() / 127.5 - 1, (height, width), mode="bilinear", antialias=True)[0]


def cut(canvas: Tensor, side: int = 16) -> list[Tensor]:
    """Squares ``[3, side, side]`` in reading order."""
    return [square for row in canvas.split(side, 1) for square in row.split(side, 2)]


def squeezed(name: str = "pixel_values", count: int = 16) -> Callable[..., Made]:
    """Every picture becomes a square of 16 pixels and as many tokens."""

    def make(images: Sequence[Tensor]) -> Made:
        return {name: torch.stack([resized(image, 16, 16) for image in images])}, [
            [OPEN, *[IMG] * count] for _ in images
        ]

    return make


def by(processor: Any, runs: Callable[[Any], list[list[int]]], nested: bool = False) -> Callable[..., Made]:
    """A processor of transformers."""

    def make(images: Sequence[Tensor]) -> Made:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        out = processor([pictures] if nested else pictures, return_tensors="pt")
        return {name: out[name] for name in OF_IMAGES if name in out}, runs(out)

    return make


def merged(out: Any) -> list[list[int]]:
    return [[OPEN, *[IMG] * (high * wide // 4), CLOSE] for _, high, wide in out["image_grid_thw"].tolist()]


def in_rows(side: int) -> Callable[[Any], list[list[int]]]:
    """Pixtral: a token behind each row."""
    return lambda out: [[*[IMG] * (wide // side), BREAK] * (high // side) for high, wide in out["image_sizes"].tolist()]


def in_one_run(out: Any) -> list[list[int]]:
    return [[OPEN, *[IMG] * (4 * tiles), CLOSE] for tiles in out["num_patches"].tolist()]


def aya(out: Any) -> list[list[int]]:
    some = [IMG] * 4
    return [[OPEN, *[ROW, *some] * (tiles - 1), LAST, *some, CLOSE] for tiles in out["num_patches"].tolist()]


def cohere2(out: Any) -> list[list[int]]:
    return [[OPEN, *[*[IMG] * 4, BREAK] * tiles, CLOSE] for tiles in out["num_patches"].tolist()]


def idefics3(out: Any) -> list[list[int]]:
    found = []
    for rows, columns in zip(out["rows"][0], out["cols"][0], strict=True):
        names = [[FAKE, 20 + 4 * row + column] for row in range(rows) for column in range(columns)]
        tiles = [[*name, *[IMG] * 4, *([13] if n % columns == columns - 1 else [])] for n, name in enumerate(names)]
        found.append([*chain(*tiles), *([13] if rows else []), FAKE, LAST, *[IMG] * 4, FAKE])
    return found


def ovis2(out: Any) -> list[list[int]]:
    found = []
    for rows, columns in out["grids"].tolist():
        ends = [LAST if n % columns == 0 else COLUMN for n in range(1, rows * columns)] + [CLOSE]
        tiles = [[*[IMG] * 4, end] for end in ends] if len(ends) > 1 else [[CLOSE]]
        found.append([OPEN, *[IMG] * 4, ROW, *chain(*tiles)])
    return found


def llama4(images: Sequence[Tensor]) -> Made:
    """The first of these canvases whose form is near enough; the picture lies at its top left."""
    pixels, runs, some = [], [], [IMG] * 4
    for image in images:
        height, width = image.shape[1:]
        rows, columns = (1, 1) if height == width else (2, 3) if width > height else (3, 1)
        scale = min(16 * rows / height, 16 * columns / width)
        whole = resized(image, int(height * scale), int(width * scale))
        canvas = pad(whole, (0, 16 * columns - whole.shape[2], 0, 16 * rows - whole.shape[1]), value=-1)
        tiles = cut(canvas) if rows * columns > 1 else []
        pixels += [*tiles, resized(image, 16, 16)]
        ends = [ROW if n % columns else COLUMN for n in range(1, len(tiles) + 1)]
        runs.append([OPEN, *chain(*([*some, end] for end in ends)), LAST, *some, CLOSE])
    return {"pixel_values": torch.stack(pixels)}, runs


def perception_lm(images: Sequence[Tensor]) -> Made:
    """The picture in small, then 2 x 3 tiles."""
    pixels = [torch.stack([resized(image, 16, 16), *cut(resized(image, 32, 48))]) for image in images]
    return {"pixel_values": torch.stack(pixels)}, [[OPEN, *[IMG] * (16 * 7)] for _ in images]


def patches_of(image: Tensor) -> Tensor:
    """``[rows, columns, 3, 4, 4]``."""
    return image.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4)


def kimi_k25(images: Sequence[Tensor]) -> Made:
    """Patch by patch, row by row."""
    patches = [patches_of(resized(image, 8 * (image.shape[1] // 128), 8 * (image.shape[2] // 128))) for image in images]
    grid = torch.tensor([[1, *image.shape[:2]] for image in patches])
    return {"pixel_values": torch.cat([image.flatten(0, 1) for image in patches]), "image_grid_thw": grid}, merged(
        {"image_grid_thw": grid}
    )


def lfm2_vl(images: Sequence[Tensor]) -> Made:
    """Tiles of 4 x 4 patches and the picture in small in its own form; small pictures have no tiles."""
    patches, runs = [], []
    for image in images:
        height, width = image.shape[1:]
        rows, columns = (0, 0) if height == width else (2, 3) if width > height else (3, 1)
        high, wide = (16, 24) if width > height else (24, 8) if height > width else (16, 16)
        tiles = cut(resized(image, 16 * rows, 16 * columns)) if rows else []
        patches += [patches_of(tile) for tile in [*tiles, resized(image, high, wide)]]
        runs.append([OPEN, *[ROW, *[IMG] * 4] * len(tiles), LAST, *[IMG] * (high * wide // 64), CLOSE])
    shapes = torch.tensor([image.shape[:2] for image in patches])
    flat = [image.permute(0, 1, 3, 4, 2).reshape(-1, 48) for image in patches]
    pixels = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
    mask = (torch.arange(pixels.shape[1]) < shapes.prod(1)[:, None]).long()
    return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}, runs


def hybrid(images: Sequence[Tensor]) -> Made:
    """The detailed tower sees one picture all the time, see the test of its own."""
    pixels, runs = squeezed()(images)
    return {**pixels, "high_res_pixel_values": resized(picture(480, 480), 64, 64).expand(len(images), -1, -1, -1)}, runs


def as_many_as_features(out: Any) -> list[list[int]]:
    """One run for each image, without markers: see ``prompt``."""
    return []


WIDE, TALL, FLAT, NEARLY = (400, 720), (720, 320), (150, 720), (480, 500)
WHOLE_ONLY = (1, 0, 0)
GRIDS = dict.fromkeys([(512, 512), (512, 768), (768, 384)], WHOLE_ONLY)
ANYRES = {
    WIDE: (1, 1, 6),
    TALL: (2, 0, 12),
    FLAT: (1, 1, 2),
    NEARLY: (2, 0, 12),
}  # some padding goes with part of the picture
TILES = {WIDE: (1, 2, 0), TALL: (1, 2, 0), FLAT: (1, 5, 0), (400, 660): (1, 6, 0), (300, 300): (1, 4, 0)}
GOT = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=6)
ONEVISION = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=SHAPES)
QWEN = Case(
    by(Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=dict(shortest_edge=64, longest_edge=4096)), merged),
    GRIDS,
)
GLM = Case(
    by(Glm4vImageProcessorPil(patch_size=4, merge_size=2, size=dict(shortest_edge=64, longest_edge=8192)), merged),
    GRIDS,
)
IDEFICS3 = Case(
    by(
        Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, return_row_col_info=True),
        idefics3, nested=True,
    ),
    {WIDE: (1, 6, 0), TALL: (1, 6, 0), FLAT: (1, 3, 0)},
)  # fmt: skip
CASES = {
    "llava": Case(squeezed()),
    "llava, with CLS": Case(
        squeezed(count=17), {(480, 480): (1, 0, 1)}, {"vision_feature_select_strategy": "full", "image_seq_length": 17}
    ),
    "llava_qwen2": Case(squeezed()),
    "llava_pixtral": Case(by(PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=dict(height=4, width=4)), in_rows(4)), GRIDS),
    "mistral3": Case(by(PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size=dict(height=8, width=8)), in_rows(8)), GRIDS),
    "llava_next": Case(
        by(LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=SHAPES), as_many_as_features),
        ANYRES, {"image_grid_pinpoints": SHAPES},
    ),
    "llava_onevision": Case(by(ONEVISION, as_many_as_features), ANYRES, {"image_grid_pinpoints": SHAPES}),
    "llava_onevision, shrunk": Case(
        by(ONEVISION, as_many_as_features), {NEARLY: (2, 0, 8)},
        {"image_grid_pinpoints": SHAPES, "vision_aspect_ratio": "anyres_max_4"},
    ),
    "llava_onevision, several images": Case(
        by(ONEVISION, as_many_as_features, nested=True), {WIDE: (0, 1, 9), (480, 480): (1, 0, 1)}, {"image_grid_pinpoints": SHAPES}
    ),
    "vipllava": Case(squeezed()),
    "video_llava": Case(squeezed("pixel_values_images")),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), QWEN),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "exaone4_5", "hyperclovax_vision_v2", "cosmos3_omni"), QWEN),
    "cohere_compass": QWEN,
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga"), GLM),
    "qianfan_ocr": Case(by(GOT, in_one_run), TILES),
    "shieldgemma2": Case(squeezed(count=4)),
    "kimi_k25": Case(kimi_k25, GRIDS),
    "internvl": Case(by(GOT, in_one_run), TILES),
    "aya_vision": Case(by(GOT, aya), TILES),
    "cohere2_vision": Case(by(GOT, cohere2), TILES),
    "idefics3": IDEFICS3, "smolvlm": IDEFICS3,
    "ovis2": Case(
        by(Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=6), ovis2), {WIDE: (1, 6, 0), FLAT: (1, 5, 0)}
    ),
    # the picture ends within a cell, which counts if more than half of it is filled
    "llama4": Case(llama4, {WIDE: (1, 6, 6), (720, 240): (1, 3, 0), (480, 480): WHOLE_ONLY, (720, 200): (1, 3, 0), (720, 160): (1, 3, 6)}),
    "lfm2_vl": Case(lfm2_vl, {WIDE: (1, 6, 0), TALL: (1, 3, 0), (480, 480): WHOLE_ONLY}),
    "perception_lm": Case(perception_lm, {WIDE: (1, 6, 0)}),
    "paligemma": Case(squeezed()), "paligemma2": Case(squeezed()),
    "gemma3": Case(squeezed(count=4)), "gemma3n": Case(squeezed()),
    "deepseek_vl": Case(squeezed()), "deepseek_vl_hybrid": Case(hybrid), "janus": Case(squeezed()), "fast_vlm": Case(squeezed()),
}  # fmt: skip


# The oracle


def build(name: str) -> Any:
    """The tiny model, with a tower whose attention adds nothing, so that tokens say little of other places."""
    model = tiny(name).build()
    for key, value in CASES[name].config.items() if name in CASES else ():
        setattr(model.config, key, value)
    for key, weight in model.named_parameters():
        if re.search(r"(vision|visual|image|tower).*att.*\.(out_proj|o_proj|proj|projection_layer)\.weight", key):
            weight.zero_()
    return model


def tiny(name: str) -> Tiny:
    return ZOO[name.split(",")[0]]


def features(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the language model gets ``[tokens, hidden]`` of all images of a prompt."""
    encode = getattr(model, "model", model).get_image_features
    takes = inspect.signature(encode).parameters
    given = {name.removesuffix("_images"): value for name, value in inputs.items() if name in OF_IMAGES}
    given["batch_num_images"] = inputs.get("batch_num_images")
    out = encode(**{name: value for name, value in given.items() if name in takes})
    if model.config.model_type == "llama4":
        return model.multi_modal_projector(out.last_hidden_state.flatten(0, -2))
    return torch.cat([part.flatten(0, -2) for part in out.pooler_output])


def prompt(name: str, model: Any, images: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a prompt of pictures, and what the language model gets of them."""
    inputs, runs = CASES[name].make(images)
    if not runs:
        names = ("pixel_values", "image_sizes", "batch_num_images")
        found = model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs}).pooler_output
        runs = [[IMG] * len(image) for image in found]
    ids = torch.tensor([[1, 5, *chain(*runs), 6]])
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, features(model, inputs)


def pieces_of(name: str, model: Any, inputs: Mapping[str, Tensor], image: int) -> tuple[tuple[Piece, ...], Tensor]:
    """The pieces of an image, and which of all image tokens are its own."""
    family = find_family(model)
    marker_ids = marker_ids_of(family, SimpleNamespace(get_vocab=lambda: tiny(name).vocabulary))
    numbers = family.image_numbers(model, inputs, family.types_of_call(model, inputs), marker_ids)[0]
    own = (numbers[numbers >= 0] == image).nonzero()[:, 0]
    return family.image_layout(model, inputs, image, len(own), marker_ids), own


def painted(image: Tensor, piece: Piece, y: int, x: int) -> Tensor:
    """The picture with the inner part of a cell in other colours."""
    (rows, columns), (_, height, width) = piece.tokens.shape, image.shape
    left, top, right, bottom = piece.box
    spans = []
    for low, high, cell, count, length in ((top, bottom, y, rows, height), (left, right, x, columns, width)):
        spans.append(slice(*(round((low + (high - low) * (cell + part) / count) * length) for part in (0.2, 0.8))))
    found = image.clone()
    found[:, spans[0], spans[1]] = 255 - image[:, spans[0], spans[1]]
    return found


def some_cells(piece: Piece) -> list[tuple[int, int]]:
    """Corners, and cells drawn by lot."""
    rows, columns = piece.tokens.shape
    drawn = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[:5].tolist()
    return [(0, columns - 1), (rows - 1, 0), *(divmod(cell, columns) for cell in drawn)]


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in CASES.items() for size in case.sizes])
def test_the_token_of_a_cell_sees_it_most(name, size):
    """In a prompt of two images, of which the second is looked at; tokens in no piece see little."""
    model, other, image = build(name), picture(480, 480, 1), picture(*size)
    inputs, before = prompt(name, model, [other, image])
    pieces, own = pieces_of(name, model, inputs, 1)
    parts = [piece for piece in pieces if piece.box != WHOLE]
    placeless = sorted({*range(len(own))} - {token for piece in pieces for token in piece.tokens.flatten().tolist()})
    assert (len(pieces) - len(parts), len(parts), len(placeless)) == CASES[name].sizes[size]
    sound(pieces, len(own))
    for piece in pieces:
        rivals = torch.cat([one.tokens.flatten() for one in (parts if piece.box != WHOLE else [piece])])
        for y, x in some_cells(piece):
            change = (prompt(name, model, [other, painted(image, piece, y, x)])[1] - before).norm(dim=-1)[own]
            assert rivals[change[rivals].argmax()] == piece.tokens[y, x], (piece.box, y, x)
            assert not placeless or change[placeless].max() < change.max()


def sound(pieces: Sequence[Piece], count: int) -> None:
    """Tokens are distinct and within the image, boxes within the picture, and its parts cover it without overlap."""
    used = torch.cat([piece.tokens.flatten() for piece in pieces])
    assert used.dtype == torch.int64
    assert len(used.unique()) == len(used)
    assert 0 <= int(used.min()) <= int(used.max()) < count
    covered = torch.zeros(840, 840)
    for piece in pieces:
        left, top, right, bottom = piece.box
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        if piece.box != WHOLE:
            covered[round(top * 840) : round(bottom * 840), round(left * 840) : round(right * 840)] += 1
    assert covered.max() <= 1
    assert covered.max() == 0 or covered.mean() > 0.75  # a cell of padding takes its part of the picture with it


def test_both_towers_of_the_hybrid_have_the_same_order():
    """The detailed one ends in convolutions, so that the change is looked at by where its middle is."""
    name, image = "deepseek_vl_hybrid", picture(480, 480)
    model = build(name)
    inputs, before = prompt(name, model, [image])
    ((piece,), _) = pieces_of(name, model, inputs, 0)
    for y, x in ((1, 1), (1, 2), (2, 1)):
        given = {**inputs, "high_res_pixel_values": resized(painted(image, piece, y, x), 64, 64)[None]}
        change = (features(model, given) - before).square().sum(-1)[piece.tokens]
        for axis, wanted in ((1, y), (0, x)):
            middle = (change.sum(axis) * torch.arange(4)).sum() / change.sum()
            assert abs(float(middle) - wanted) < 0.75


def test_codes_of_emu3_are_in_rows_with_an_end():
    model, mapping = ZOO["emu3"].build(), ZOO["emu3"].build().model.vocabulary_mapping
    pixels = torch.stack([resized(picture(320, 480, seed), 16, 24) for seed in range(2)])
    ids = torch.tensor([[OPEN, *[IMG] * 104, CLOSE, OPEN, *[IMG] * 104]])
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 24]] * 2), "input_ids": ids}
    ((piece,), own) = pieces_of("emu3", model, inputs, 1)
    codes = model.model.vqmodel.encode(pixels, inputs["image_sizes"], return_dict=True).image_tokens[
        1
    ]  # as the tower has them
    assert codes.shape == piece.tokens.shape == (8, 12)
    embed, seen = model.get_input_embeddings(), features(model, inputs)[own]
    assert torch.equal(seen[piece.tokens], embed(mapping.convert_img2bpe(codes)[:, :-1]))
    assert len(own) - piece.tokens.numel() == 8


def test_patches_of_fuyu_are_in_rows_with_a_newline():
    """As many rows and columns as newlines say."""
    model, given = ZOO["fuyu"].build(), ZOO["fuyu"].prompt(1)
    ((piece,), own) = pieces_of("fuyu", model, given.inputs, 0)
    assert piece.box == WHOLE
    assert piece.tokens.tolist() == [[0, 1], [2, 3]]
    ids = torch.tensor([[*[IMG] * 5, BREAK, *[IMG] * 5, BREAK, 1, 7]])
    ((piece,), own) = pieces_of("fuyu", model, {"input_ids": ids}, 0)
    assert piece.tokens.shape == (2, 5)
    assert len(own) == 10


def test_codes_of_chameleon_are_in_reading_order():
    model = ZOO["chameleon"].build()
    given = ZOO["chameleon"].prompt(2).inputs
    codes = model.model.get_image_tokens(given["pixel_values"])  # as the codebook has them, row by row
    for image in range(2):
        ((piece,), own) = pieces_of("chameleon", model, given, image)
        seen = model.model.get_image_features(given["pixel_values"]).pooler_output.flatten(0, 1)[own]
        assert piece.box == WHOLE
        assert piece.tokens.tolist() == torch.arange(16).view(4, 4).tolist()
        assert torch.equal(seen[piece.tokens], model.get_input_embeddings()(codes[image].view(4, 4)))


# What has no place, and what is not known


def test_every_family_of_the_zoo_is_looked_at():
    again = {"mistral3_window", "mistral3_small4", "gemma3_window", "cohere2_window"}
    assert {name.split(",")[0] for name in CASES} | NO_PLACE.keys() | SOUND | again | {
        "emu3",
        "chameleon",
        "florence2",
    } == EVERY.keys()


@pytest.mark.parametrize("name", [name for name in ZOO if name != "florence2"])  # nothing serves it
def test_prompts_of_the_zoo(name):
    model, images = ZOO[name].build(), 1 if ZOO[name].single_image else 2
    given = ZOO[name].prompt(images)
    for image in range(images):
        pieces, own = pieces_of(name, model, given.inputs, image)
        assert bool(pieces) == (name not in NO_PLACE)
        if pieces:
            sound(pieces, len(own))


@pytest.mark.parametrize("name", ["internvl", "aya_vision", "perception_lm"])
def test_tiles_that_look_alike_have_no_place(name):
    """Only the small picture has: any arrangement of the tiles is as likely as another."""
    model = build(name)
    inputs, _ = prompt(name, model, [torch.full((3, 400, 660), 90, dtype=torch.uint8)])
    ((piece,), own) = pieces_of(name, model, inputs, 0)
    assert piece.box == WHOLE
    assert len(own) == 7 * piece.tokens.numel()
    assert torch.equal(piece.tokens.flatten(), torch.arange(len(own)).view(7, -1)[0 if name == "perception_lm" else -1])


def test_without_a_tokenizer_each_tile_is_an_image():
    model = build("idefics3")
    family, (inputs, _) = find_family(model), prompt("idefics3", model, [picture(*WIDE)])
    for tile in range(7):
        (piece,) = family.image_layout(model, inputs, tile, 4)
        assert (piece.box, piece.tokens.tolist()) == (WHOLE, [[0, 1], [2, 3]])
    assert family.image_layout(model, inputs, 0, 28) == ()  # it was counted with marks


def test_models_of_no_family_have_no_places():
    model = build("qwen2_vl")
    inputs, _ = prompt("qwen2_vl", model, [picture(512, 512)])
    assert find_family(model).image_layout(model, inputs, 0, 64)
    assert Generic().image_layout(model, inputs, 0, 64) == ()


def test_numbers_of_tokens_that_do_not_fit_have_no_place():
    assert tiled(12, 5, 2) == ()
    assert tiled(10, 2, 1) == ()
    model = build("llava")
    inputs, _ = prompt("llava", model, [picture(480, 480)])
    assert find_family(model).image_layout(model, inputs, 0, 15) == ()


# Parts


def test_cells_beyond_the_picture_are_left_out():
    (piece,) = inside(cells(4, 3), (-0.1, 0.5, 1.1, 1.3))
    assert piece.tokens.tolist() == [[0, 1, 2], [3, 4, 5]]  # the middle of the third row is at 1.0
    assert piece.box == pytest.approx((0, 0.5, 1, 0.9))
    assert inside(cells(2, 2), (0, 1.2, 1, 1.6)) == ()


def test_padding_is_told_from_what_the_picture_has_itself():
    image = resized(picture(320, 480), 32, 48)
    image[:, 24:] = -1  # its own black border
    small = interpolate(image[None], (16, 16), mode="area")[0]
    assert filled(image, small) == pytest.approx((1, 1))
    assert filled(pad(image, (0, 16, 0, 8), value=-1), small) == pytest.approx((0.8, 0.75))
    assert filled(torch.full_like(image, -1), torch.full_like(small, -1)) == (1, 1)


def test_tiles_are_arranged_as_the_picture_was():
    image = resized(picture(480, 480), 48, 32)
    tiles = torch.stack(cut(image))
    assert torch.equal(joined(tiles, 3), image)
    assert arranged(tiles, interpolate(image[None], (16, 16), mode="area")) == 3
    assert arranged(tiles, torch.zeros(1, 3, 16, 16)) is None
    assert arranged(tiles[:1], torch.zeros(1, 3, 16, 16)) == 1


def test_a_piece_is_written_and_read():
    again = Piece.from_dict(json.loads(json.dumps(Piece(cells(2, 3, 5), (0, 0.25, 1, 0.75)).to_dict())))
    assert again.tokens.tolist() == [[5, 6, 7], [8, 9, 10]]
    assert again.tokens.dtype == torch.int64
    assert again.box == (0, 0.25, 1, 0.75)
