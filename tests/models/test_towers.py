"""What the summary query of a vision tower attends to: CLIP's own weights, and the mean query of SigLIP and Qwen by hand."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from numerics import bound, near
from tiny import IMAGE_TOKEN, build
from tiny import TEXT as TEXT_CONFIG
from torch import Tensor
from transformers import LlavaConfig, PreTrainedModel, Qwen2_5_VLConfig

import vlmattn
from vlmattn import PAINT, UnsupportedError
from vlmattn.models import find_family

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, 1024)  # shares of attention, after a tower of two layers
HEADS = 4


def llava(kind: str = "clip_vision_model", strategy: str = "default", attn: str = "sdpa") -> PreTrainedModel:
    vision = dict(
        model_type=kind, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=HEADS, image_size=24,
        patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=dict(model_type="llama", **TEXT_CONFIG), vision_config=vision, image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    return sharpened(build("llava", config=config), attn)


def qwen(window: int = 16, attn: str = "sdpa") -> PreTrainedModel:
    """Windows of ``window`` pixels a side; patches have 4, and 2 x 2 patches make a token."""
    text = {**TEXT_CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = dict(
        depth=4, hidden_size=32, out_hidden_size=32, intermediate_size=64, num_heads=HEADS, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2, window_size=window, fullatt_block_indexes=[3],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, video_token_id=98, vision_start_token_id=97,
        vision_end_token_id=96,
    )  # fmt: skip
    return sharpened(build("qwen2_5_vl", config=config), attn)


def sharpened(model: PreTrainedModel, attn: str) -> PreTrainedModel:
    """With a tower whose attention is far from uniform."""
    torch.manual_seed(5)
    tower = find_family(model).tower(model)
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tower.set_attn_implementation(attn)
    return model


def look(model: PreTrainedModel, layer: int, *args: Any, **kwargs: Any) -> list[Tensor]:
    """``summary_attention`` of one layer while the bare tower runs."""
    family, seen = find_family(model), []
    module = family.tower_attention(model)[layer]

    def note(_, given, named):
        hidden = given[0] if given else named["hidden_states"]
        seen.extend(family.summary_attention(model, module, hidden, kwargs))

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        family.tower(model)(*args, **kwargs)
    return seen


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_clip_is_the_attention_of_its_cls_token(layer, strategy):
    """The tower that is asked runs on sdpa; the one that tells its weights on eager."""
    model, told = llava(strategy=strategy), llava(attn="eager")
    pixels = torch.randn(3, 3, 24, 24)
    weights = told.model.vision_tower(pixels, output_attentions=True).attentions[layer]
    found = look(model, layer, pixels)
    assert len(found) == 3
    for image, got in enumerate(found):
        expected = weights[image, :, 0] if strategy == "full" else weights[image, :, 0, 1:]
        assert got.shape == (HEADS, 37 if strategy == "full" else 36)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert weights[:, :, 0].amax(-1).min() > 2 / 37, "the premise: attention is not uniform"


def mean_query(queries: Tensor, keys: Tensor) -> list[list[float]]:
    """Attention of the mean query, for each head, from ``[tokens, width]``, by loops."""
    size = queries.shape[1] // HEADS
    out = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        mean = sum(queries[:, part].double()) / len(queries)
        scores = torch.stack([sum(mean * k) / size**0.5 for k in keys[:, part].double()])
        out.append((scores.exp() / scores.exp().sum()).tolist())
    return out


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_siglip_is_the_attention_of_the_mean_query(layer, strategy):
    """SigLIP has no CLS token; LLaVA drops the first patch all the same unless told to take all."""
    model = llava("siglip_vision_model", strategy)
    pixels = torch.randn(2, 3, 24, 24)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    block = [m for m in model.model.vision_tower.modules() if hasattr(m, "self_attn")][layer]
    found = look(model, layer, pixels)
    for image, got in enumerate(found):
        hidden = block.layer_norm1(states[image])
        wanted = torch.tensor(mean_query(block.self_attn.q_proj(hidden), block.self_attn.k_proj(hidden)))
        torch.testing.assert_close(got, wanted[:, strategy == "default" :].float(), rtol=0, atol=TOLERANCE)
        assert wanted.max() > 1.3 / 36, "the premise: attention is not uniform"


# --- Qwen: windows


def places(grid: list[int]) -> list[tuple[int, int, int]]:
    """(frame, row, column) of every patch in the order of the pixels: the four patches of a token stand together."""
    t, h, w = grid
    return [
        (f, 2 * i + a, 2 * j + b)
        for f in range(t)
        for i in range(h // 2)
        for j in range(w // 2)
        for a in (0, 1)
        for b in (0, 1)
    ]


def by_hand(model: PreTrainedModel, layer: int, pixels: Tensor, grids: list[list[int]]) -> tuple[list[Tensor], Tensor]:
    """Mean-query attention per image, and the features of all tokens, with every patch left where the pixels have it.

    The tower moves patches so that windows are contiguous; here a window is a mask over coordinates instead.
    """
    tower = model.model.visual
    side = tower.window_size // 4
    coordinates = [(n, *place) for n, grid in enumerate(grids) for place in places(grid)]
    hidden = tower.patch_embed(pixels)
    size = hidden.shape[1] // HEADS
    steps = torch.tensor([10000 ** (-2 * n / (size // 2)) for n in range(size // 4)])
    angles = torch.stack([torch.cat([r * steps, c * steps]) for _, _, r, c in coordinates])
    angles = torch.cat([angles, angles], -1)[:, None]
    one_frame = torch.tensor([[a[:2] == b[:2] for b in coordinates] for a in coordinates])
    one_window = torch.tensor(
        [
            [a[:2] == b[:2] and a[2] // side == b[2] // side and a[3] // side == b[3] // side for b in coordinates]
            for a in coordinates
        ]
    )
    found = []

    def turned(x: Tensor) -> Tensor:
        return x * angles.cos() + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * angles.sin()

    for number, block in enumerate(tower.blocks):
        query, key, value = block.attn.qkv(block.norm1(hidden)).chunk(3, -1)
        if number == layer:
            start = 0
            for t, h, w in grids:
                mine = slice(start, start + t * h * w)
                patches = torch.tensor(mean_query(query[mine], key[mine]))
                found.append(
                    torch.stack([patches[:, 4 * n : 4 * n + 4].sum(1) for n in range(t * h * w // 4)], 1).float()
                )
                start += t * h * w
        q, k, v = (x.unflatten(-1, (HEADS, size)) for x in (query, key, value))
        scores = torch.einsum("ihd,jhd->hij", turned(q), turned(k)) / size**0.5
        seen = one_frame if number in tower.fullatt_block_indexes else one_window
        mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        hidden = hidden + block.attn.proj(mixed.flatten(1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return found, tower.merger(hidden)


GRIDS = {
    "one window": [[1, 4, 4]],
    "four windows": [[1, 8, 8]],
    "ragged windows": [[1, 6, 10]],
    "several images": [[1, 8, 8], [1, 4, 4], [1, 6, 10]],
    "a video": [[2, 8, 4]],
}


def pixels_of(grids: list[list[int]], seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4, generator=generator)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", GRIDS)
def test_qwen_is_the_attention_of_the_mean_query_in_the_order_of_the_prompt(name, layer):
    model, grids = qwen(), GRIDS[name]
    pixels = pixels_of(grids)
    expected, features = by_hand(model, layer, pixels, grids)
    told = model.model.visual(pixels, grid_thw=torch.tensor(grids)).pooler_output
    near(features, told)  # the oracle knows the tower and the order of its tokens
    found = look(model, layer, pixels, grid_thw=torch.tensor(grids))
    assert len(found) == len(grids)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
        assert got.sum(-1).tolist() == pytest.approx([1.0] * HEADS, abs=1e-5)


def test_qwen_saliency_moves_with_the_content():
    """In the first layer only content counts: tokens that change places take their saliency along."""
    model, grid = qwen(), [[1, 8, 8]]
    pixels = pixels_of(grid)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    moved = pixels.view(16, 4, -1)[order].flatten(0, 1)
    (before,) = look(model, 0, pixels, grid_thw=torch.tensor(grid))
    (after,) = look(model, 0, moved, grid_thw=torch.tensor(grid))
    torch.testing.assert_close(after, before[:, order], rtol=0, atol=TOLERANCE)
    assert (after - before).abs().max() > 1e-2


# --- What a wrapped model sees is that


@pytest.mark.filterwarnings("ignore:vlmattn")  # encoded does nothing here
def test_sights_of_a_wrapped_model(monkeypatch):
    """Through generate() and a direct forward, image by image."""
    model, grids = qwen(), [[1, 8, 8], [1, 4, 4]]
    pixels = pixels_of(grids)
    tokens = [t * h * w // 4 for t, h, w in grids]
    ids = [1, 7, 97, *[IMAGE_TOKEN] * tokens[0], 96, 97, *[IMAGE_TOKEN] * tokens[1], 96, 8, 9]
    ids = torch.tensor([ids])
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE_TOKEN).int(), pixel_values=pixels,
        image_grid_thw=torch.tensor(grids),
    )  # fmt: skip
    expected = {layer: by_hand(model, layer, pixels, grids)[0] for layer in (0, 2)}
    sights = []
    monkeypatch.setattr(PAINT, "on_image_features", lambda self, sight: sights.append(sight))
    with vlmattn.applied(model, PAINT()):
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert len(sights) == 2
    for sight in sights:
        assert sorted(sight.patches) == [0, 2]
        for layer, wanted in expected.items():
            for got, image in zip(sight.patches[layer], wanted, strict=True):
                torch.testing.assert_close(got, image, rtol=0, atol=TOLERANCE)


def test_towers_of_other_kinds_are_not_looked_at():
    config = LlavaConfig(
        text_config=dict(model_type="llama", **TEXT_CONFIG),
        vision_config=dict(
            model_type="pixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ),
        image_token_index=IMAGE_TOKEN,
    )
    with pytest.raises(
        UnsupportedError,
        match="does not run on llava: the image tokens of its prompts are not those of its vision tower",
    ):
        vlmattn.wrap(build("llava", config=config), "paint")
