"""Omni models: sound beside images, and between the frames of a video."""

from __future__ import annotations

import pytest
import torch
from tiny import generate
from torch import Tensor
from torch.nn.functional import pad
from zoo import CLOSE, IMG, OPEN, VID, ZOO

import vlmattn
from vlmattn import OPERA, PAI, VCD, FastV
from vlmattn.models import find_family

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
SOUND, BEGIN, END = 95, 94, 93
#: Tokens of a second of sound: 100 steps of its spectrum.
HEARD = {"qwen2_5_omni_thinker": 25, "qwen3_omni_moe_thinker": 13}
models = pytest.mark.parametrize("name", HEARD)


def sounds(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Sounds of a second each."""
    return {
        "input_features": torch.randn(count, 16, 100, generator=generator),
        "feature_attention_mask": torch.ones(count, 100, dtype=torch.long),
    }


def with_sound(name: str, count: int, words: int, seed: int = 1) -> dict[str, Tensor]:
    """A prompt with an image and ``count`` sounds."""
    generator = torch.Generator().manual_seed(seed)
    sound = [BEGIN, *[SOUND] * HEARD[name], END]
    said = torch.randint(5, 40, (words,), generator=generator).tolist()
    ids = torch.tensor([[1, 16, *ZOO[name].layout(0), 17, *sound * count, *said]])
    pixels = ZOO[name].pixels(1, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, **sounds(count, generator)}


def with_sound_in_video(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Four frames; where stretches of sound stand between them, a stretch may follow two frames."""
    generator = torch.Generator().manual_seed(1)
    half = HEARD[name] // 2
    film = [*[VID] * 8, *[SOUND] * half, *[VID] * 8, *[SOUND] * (HEARD[name] - half)]
    ids = torch.tensor([[1, 16, OPEN, BEGIN, *film, END, CLOSE, 17, 18]])
    numbers = torch.full_like(ids, -1)
    numbers[ids == VID] = torch.arange(4).repeat_interleave(4)
    video = {
        "pixel_values_videos": torch.randn(64, 96, generator=generator),
        "video_grid_thw": torch.tensor([[4, 4, 4]]),
        "video_second_per_grid": torch.tensor([0.25]),
        "use_audio_in_video": True,
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **video, **sounds(1, generator)}, numbers


def answer(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return generate(model, inputs, 3, suppress_tokens=[IMG, VID, SOUND])


@models
def test_frames_between_stretches_of_sound(name):
    inputs, numbers = with_sound_in_video(name)
    model = vlmattn.wrap(ZOO[name].build(), PAI(alpha=0.9, layers="0:"))
    found = model(**inputs, use_cache=True).past_key_values._vlmattn_request
    assert torch.equal(found.images(numbers.shape[1], torch.device("cpu")).long(), numbers)
    layout = find_family(model).image_layout(model, inputs, 3, 4)
    assert [piece.tokens.tolist() for piece in layout] == [[[0, 1], [2, 3]]]


@models
@pytest.mark.parametrize("method", [PAI(alpha=0.9, layers="0:"), FastV(layer=2, keep_ratio=0.5), VCD()], ids=str)
def test_sound_is_heard_and_methods_act(name, method):
    for inputs in (with_sound(name, 2, 4), with_sound_in_video(name)[0]):
        model = ZOO[name].build()
        bare = answer(model, inputs)
        muted = answer(model, {**inputs, "input_features": torch.zeros_like(inputs["input_features"])})
        assert not torch.allclose(bare, muted), "the bare model hears"
        with vlmattn.applied(model, method):
            edited = answer(model, inputs)
        assert not torch.allclose(edited, bare)
        assert torch.equal(answer(model, inputs), bare)


@models
def test_a_search_hears_the_sounds_of_its_row(name):
    """OPERA takes rows apart, with their sounds, times and images; with one beam and one candidate it is greedy."""
    given = [with_sound(name, 2, 4), with_sound(name, 1, 7, seed=2)]
    length = max(one["input_ids"].shape[1] for one in given)
    batch = {
        key: torch.cat(
            [pad(one[key], (length - one[key].shape[1], 0)) if key in ("input_ids", "attention_mask") else one[key]
             for one in given]
        )
        for key in given[0]
    }  # fmt: skip
    model = ZOO[name].build()
    film, _ = with_sound_in_video(name)
    options = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[IMG, VID, SOUND, 2], pad_token_id=0)
    bare = [model.generate(**one, **options) for one in (*given, film)]
    greedy = OPERA(num_beams=1, candidates=1)
    with vlmattn.applied(model, greedy):
        assert torch.equal(model.generate(**batch, **options)[:, -6:], torch.cat([one[:, -6:] for one in bare[:2]]))
        assert torch.equal(model.generate(**film, **options), bare[2])
    counts = find_family(model).per_row(model, batch)
    assert counts["input_features"] == counts["feature_attention_mask"] == [2, 1]
