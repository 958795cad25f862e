"""Tokens of videos: the released rules told again on lists of frames, dropped as hidden, in batches, on families."""

from __future__ import annotations

import pytest
import torch
from films import FILMS, filmed, processor_of, together
from numerics import TINY_MODEL, bound
from tiny import generate as unrestricted
from torch.nn.functional import normalize
from transformers import DynamicCache
from zoo import IMG, VID, ZOO

import vlmattn
from vlmattn import Recipe
from vlmattn.errors import UnsupportedError
from vlmattn.interventions.pruning.evs import EVS
from vlmattn.interventions.pruning.vidcom2 import VidCom2
from vlmattn.interventions.pruning.video import videos

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_next_video", "llava_onevision", "video_llama_3", "gemma4")
METHODS = ("evs", "vidcom2", "random", "grid", "divprune")
# A slow change of a scene, one frame of another scene, then the scene again.
SCENE = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
DRIFT = 0.3 * torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(3))
FILM = torch.stack([SCENE, SCENE + DRIFT[1], DRIFT[2] * 4, SCENE + DRIFT[3], SCENE + DRIFT[4]])


def evs(video, share):
    """Flat numbers of the tokens that stay, by the rule of the released function (q = 1 - share)."""
    frames, tokens, _ = video.shape
    unit = normalize(video, dim=-1)
    changed = dict.fromkeys(range(tokens), 255.0)
    for t in range(1, frames):
        for j in range(tokens):
            changed[t * tokens + j] = 1 - float(unit[t, j] @ unit[t - 1, j])
    ranked = sorted(changed, key=lambda n: (-changed[n], n))
    return sorted(ranked[: max(tokens, int(share * frames * tokens))])


def vidcom2(video, share):
    """The same, of VidCom2's released function."""
    frames, tokens, width = video.shape
    flat = video.reshape(-1, width)
    spread = [float(((flat[:, c] - flat[:, c].mean()) ** 2).mean()) for c in range(width)]
    calm = sorted(range(width), key=lambda c: spread[c])[: int(width * 0.5)]
    unit = normalize(video[..., calm], dim=-1)
    like = lambda x, c: sum(torch.exp(-((x - c) ** 2).sum() / (2 * 2**k)).item() for k in range(-3, 2))  # noqa: E731
    middle = unit.mean((0, 1))
    of_video = [[like(unit[t, j], middle) for j in range(tokens)] for t in range(frames)]
    of_frame = [[like(unit[t, j], unit[t].mean(0)) for j in range(tokens)] for t in range(frames)]
    odd = torch.tensor([-sum(row) / tokens for row in of_video])
    weight = ((odd - odd.max()) / 0.01).softmax(0)
    found = []
    for t in range(frames):
        scale = min(share * (1 + float(weight[t] - weight.mean())), 1.0)
        count = max(round(scale * tokens), 1)
        score = [a + b for a, b in zip(of_video[t], of_frame[t], strict=True)]
        found += [t * tokens + j for j in sorted(range(tokens), key=lambda j: score[j])[:count]]
    return sorted(found)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.7, 1.0])
@pytest.mark.parametrize(("method", "rule"), [(EVS, evs), (VidCom2, vidcom2)])
def test_the_released_rule(method, rule, share):
    found = method(keep_ratio=share).pick_frames(FILM)
    assert found.flatten().nonzero().flatten().tolist() == rule(FILM, share)


def test_what_changes_keeps_more():
    """Of the scene that comes back EVS keeps the change from the odd frame too; VidCom2 gives the odd frame most."""
    counts = EVS(keep_ratio=0.4).pick_frames(FILM).sum(1).tolist()
    assert counts[0] == 6
    assert counts[2] + counts[3] == 6
    counts = VidCom2(keep_ratio=0.4).pick_frames(FILM).sum(1).tolist()
    assert counts[2] > max(counts[:2] + counts[3:])


def test_where_a_video_ends():
    assert list(videos([4, 4, 4])) == [(0, 3)]
    assert list(videos([4, 4, 5])) == [(0, 3)]  # a newline behind the last frame
    assert list(videos([4, 5, 4, 4])) == [(0, 2), (2, 2)]
    assert list(videos([4, 3, 3, 6])) == [(0, 1), (1, 2), (3, 1)]
    assert list(videos([])) == []


def answer(model, inputs):
    return unrestricted(model, inputs, 3, suppress_tokens=[IMG, VID])


def kept_of(model, inputs, numbers):
    """How many tokens of each frame reach the last layer."""
    cache = DynamicCache()
    model(**inputs, past_key_values=cache)
    slots = cache._vlmattn_request.maps[-1].slots[0]
    return torch.bincount(numbers[0, slots][numbers[0, slots] >= 0].long()).tolist()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_next_video", "llava_onevision", "gemma4"])
def test_evs_keeps_the_first_frame(family):
    inputs, numbers = filmed(family, 3)
    model = vlmattn.wrap(ZOO[family].build(), "evs@0.5", processor=processor_of(family))
    counts = kept_of(model, inputs, numbers)
    tokens = FILMS[family].lengths(3)
    assert counts[0] == tokens[0]
    more = tokens[-1] - tokens[0]  # a newline
    assert sum(counts) == max(tokens[0], int(0.5 * 3 * tokens[0])) + more


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_as_hidden_and_alone_as_in_a_batch(family, method, image):
    given = [filmed(family, 3, 4, image)[0], filmed(family, 3, 7, image, seed=2)[0]]
    model, bare = ZOO[family].build(), answer(ZOO[family].build(), given[0])
    found = {}
    for mode in ("drop", "mask"):
        recipe = Recipe.of(f"{method}@0.5", mode=mode)
        with vlmattn.applied(model, recipe, processor=processor_of(family)):
            found[mode] = answer(model, together(family, given))
            if mode == "drop":
                alone = [answer(model, inputs)[0] for inputs in given]
    assert float((found["drop"] - found["mask"]).abs().max()) < TOLERANCE
    for row in range(2):
        assert float((found["drop"][row] - alone[row]).abs().max()) < TOLERANCE
    assert float((alone[0] - bare).abs().max()) > 0.01


def test_what_they_cost():
    inputs, _ = filmed("qwen2_5_vl", 3)
    model = ZOO["qwen2_5_vl"].build()
    assert vlmattn.cost(model, inputs, "evs@0.5").edited.image_tokens[0] == 6
    with pytest.raises(UnsupportedError, match="known only once the video is read"):
        vlmattn.cost(model, inputs, "vidcom2")


def test_images_stay_whole():
    inputs = ZOO["qwen2_5_vl"].prompt(2).inputs
    model = ZOO["qwen2_5_vl"].build()
    bare = answer(model, inputs)
    for method in ("evs", "vidcom2"):
        with vlmattn.applied(model, method):
            assert float((answer(model, inputs) - bare).abs().max()) < TOLERANCE
