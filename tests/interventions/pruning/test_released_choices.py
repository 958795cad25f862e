"""Which tokens the released functions of CDPruner, VisPruner, EVS, VidCom2, DART and HiRED keep: the same here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from vlmattn.interventions.pruning.cdpruner import CDPruner
from vlmattn.interventions.pruning.dart import DART
from vlmattn.interventions.pruning.early import Tokens
from vlmattn.interventions.pruning.evs import EVS
from vlmattn.interventions.pruning.hired import HiRED
from vlmattn.interventions.pruning.vidcom2 import VidCom2
from vlmattn.interventions.pruning.vispruner import VisPruner
from vlmattn.request import Image
from vlmattn.request.store import Store

GOLDENS = load_file(Path(__file__).parents[2] / "goldens" / "choices" / "choices.safetensors")


def cases(method):
    return sorted(name.removesuffix("_kept") for name in GOLDENS if name.startswith(method) and name.endswith("_kept"))


@pytest.mark.parametrize("case", cases("cdpruner"))
def test_cdpruner(case):
    tokens, text, kept = (GOLDENS[f"{case}_{what}"] for what in ("tokens", "text", "kept"))
    asked = normalize(text, dim=-1).mean(0)[None]
    found = CDPruner(sign="negative").pick(Tokens(tokens, asked), int(kept.sum()))
    assert torch.equal(found, kept)
    other = CDPruner(sign="positive").pick(Tokens(tokens, asked), int(kept.sum()))
    assert not torch.equal(other, kept)


@pytest.mark.parametrize("case", cases("vispruner"))
def test_vispruner(case):
    features, attention, kept = (GOLDENS[f"{case}_{what}"] for what in ("features", "attention", "kept"))
    tokens = Tokens(features, features[:, 0], seen=attention.mean(1), features=features)
    found = VisPruner(important=float(case.split("_")[3])).pick(tokens, int(kept.sum()))
    assert torch.equal(found, kept)


@pytest.mark.parametrize(
    ("method", "case"), [(EVS, c) for c in cases("evs")] + [(VidCom2, c) for c in cases("vidcom2")]
)
def test_videos(method, case):
    found = method(keep_ratio=float(case.split("_")[3])).pick_frames(GOLDENS[f"{case}_video"])
    assert torch.equal(found, GOLDENS[f"{case}_kept"])


@pytest.mark.parametrize("case", cases("dart"))
def test_dart(case):
    hidden, keys, kept = (GOLDENS[f"{case}_{what}"] for what in ("hidden", "keys", "kept"))
    images, first, share = (float(part) for part in case.split("_")[1:])
    slots = torch.arange(hidden.shape[1])[None]
    visual = (slots >= first) & (slots < first + images)
    store = Store(rows={"sizes": keys.abs().sum((1, 3))})
    stage = SimpleNamespace(
        hidden=hidden, visual=visual, text=~visual, given=((int(images),),), counts=(int(images),), layer=2,
        request=SimpleNamespace(store=lambda method: store),
    )  # fmt: skip
    found = DART(keep_ratio=share).choose_tokens(stage)
    assert torch.equal(found.visual, kept)
    assert found.counts == (int(kept.sum()),)


@pytest.mark.parametrize("case", cases("hired"))
def test_hired(case):
    first, last, kept = (GOLDENS[f"{case}_{what}"] for what in ("first", "last", "kept"))
    share, whole = (float(part) for part in case.split("_")[2:])
    tiles, heads, patches = first.shape
    seen = {layer: values.transpose(0, 1).reshape(heads, -1) for layer, values in ((0, first), (22, last))}
    numbers = torch.arange(tiles).repeat_interleave(patches)
    image = Image(seen, {}, torch.zeros(tiles * patches, 4), None, lambda features: features, numbers)
    found = HiRED(keep_ratio=share, whole=whole).of_image(image)
    assert torch.equal(found.view(tiles, patches), kept)
