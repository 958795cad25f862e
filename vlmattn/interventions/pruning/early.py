"""The shape of methods that choose among the tokens of each image before the first layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmattn.anatomy import Anatomy
from vlmattn.interventions.base import check_tower
from vlmattn.interventions.pruning.base import Pruning, ScorerPruning
from vlmattn.options import option
from vlmattn.request import Image, ImageFeatures, KeptTokens, PruningStage


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of images that have equally many of them.

    Attributes:
        embeddings: what the language model gets, ``[images, n, hidden]``.
        asked: mean of the normalised embeddings of the text behind the first image of each one's prompt, ``[images,
            hidden]``; of all text where there is none behind.
        seen: for ``TowerPruning`` how much the summary token of the vision tower attends to each token, mean over
            heads, ``[images, n]``. ``features``: what the tower says of each, ``[images, n, width]``.
    """

    embeddings: Tensor
    asked: Tensor
    seen: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class EarlyPruning(ScorerPruning):
    """Base of methods that choose among the tokens of each image by their embeddings: only ``pick`` is theirs.

    Every image (every frame of a video) keeps the same share. Where image features come in after the first layers
    (DeepStack), tokens are chosen as early and go behind the last of those.
    """

    earliest: ClassVar[int] = 0
    layer: int = option(0, 0, 10**4, "first layer that only kept tokens reach")
    keep_ratio: float = option(0.25, 0, 1, "share of the tokens of each image that stays")
    keep_tokens: int = option(0, 0, 10**6, "tokens of each image that stay; 0: by keep_ratio")

    @property
    def merges(self) -> bool:
        """What stays is changed, so it must be there before any layer."""
        return False

    def bind(self, anatomy: Anatomy) -> Pruning:
        bound = self if self.merges else replace(self, layer=max(self.layer, anatomy.deepstack))
        Pruning.bind(bound, anatomy)
        return bound

    def kept(self, layer: int, given: Sequence[int], left: int) -> int:
        return sum(map(self.budget, given))

    def budget(self, tokens: int) -> int:
        """How many of an image's tokens stay."""
        return min(self.keep_tokens or round(self.keep_ratio * tokens), tokens)

    def pick(self, tokens: Tokens, count: int) -> Tensor:
        """The ``count`` tokens of each image that stay, bool ``[images, n]``."""
        raise NotImplementedError

    def more(self, stage: PruningStage) -> dict[str, Tensor]:
        """What else is known of the rows, ``[batch, rows, ...]``, by its name in ``Tokens``."""
        return {}

    def on_embeddings(self, stage: PruningStage) -> None:
        stays = torch.zeros_like(stage.visual)
        asked, more = asked_of(stage), self.more(stage)
        for rows, slots in alike(stage):
            found = {name: values[rows[:, None], slots] for name, values in more.items()}
            tokens = Tokens(stage.hidden[rows[:, None], slots], asked[rows], **found)
            stays[rows[:, None], slots] = self.pick(tokens, self.budget(slots.shape[1]))
        stage.request.store(self).by_slot("stays", False, torch.bool).write(stage.start, stays)

    def staying(self, stage: PruningStage) -> Tensor:
        """What was picked, bool ``[batch, rows]``."""
        stop = stage.start + stage.hidden.shape[1]
        stays = stage.request.read(stage.request.store(self).slots["stays"], stop, stage.hidden.device)
        return stays[:, stage.start :] & stage.visual

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        return KeptTokens(self.staying(stage), self.counts(stage))


@dataclass(frozen=True, kw_only=True)
class TowerPruning(EarlyPruning):
    """Base of methods that also know what the last but one layer of the vision tower saw in each token.

    Raises:
        UnsupportedError: a family whose image tokens are not those of its tower. OptionError: a tower of one layer.
        InputError: image features were given instead of pixels.
    """

    def tower_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        check_tower(self.info.name, anatomy)
        return (anatomy.tower_layers - 2,)

    def on_image_features(self, features: ImageFeatures) -> None:
        (layer,) = features.images[0].attention
        seen = features.place([image.attention[layer].mean(0) for image in features.images])
        said = features.place([image.features for image in features.images])
        features.request.store(self).rows |= {"seen": seen, "features": said}

    def more(self, stage: PruningStage) -> dict[str, Tensor]:
        rows = stage.request.store(self).rows
        return {name: rows.pop(name).to(stage.hidden.device) for name in ("seen", "features")}


@dataclass(frozen=True, kw_only=True)
class TowerChoice(EarlyPruning):
    """Base of methods that choose by what the vision tower saw alone, image by image: only ``of_image`` is theirs."""

    def of_image(self, image: Image) -> Tensor:
        """The tokens of an image that stay, bool ``[tokens]``."""
        raise NotImplementedError

    def on_image_features(self, features: ImageFeatures) -> None:
        stays = features.place([self.of_image(image) for image in features.images])
        features.request.store(self).by_slot("stays", False, torch.bool).write(features.start, stays)

    def on_embeddings(self, stage: PruningStage) -> None:
        """What stays is known."""

    def choose_tokens(self, stage: PruningStage) -> KeptTokens:
        stays = self.staying(stage)
        return KeptTokens(stays, tuple(stays.sum(1).tolist()))


def images_of(stage: PruningStage) -> list[tuple[int, Tensor]]:
    """Every image before the first layer: its sequence, and the rows of its tokens."""
    found: list[tuple[int, Tensor]] = []
    for row, sizes in enumerate(stage.given):
        found += [(row, slots) for slots in torch.split(stage.visual[row].nonzero().flatten(), list(sizes))]
    return found


def alike(stage: PruningStage) -> Iterator[tuple[Tensor, Tensor]]:
    """Images with equally many tokens together: sequences ``[images]`` and rows of their tokens ``[images, n]``."""
    groups = defaultdict(list)
    for row, slots in images_of(stage):
        groups[len(slots)].append((row, slots))
    for group in groups.values():
        rows = torch.tensor([row for row, _ in group], device=stage.hidden.device)
        yield rows, torch.stack([slots for _, slots in group])


def asked_of(stage: PruningStage) -> Tensor:
    """Mean of the normalised embeddings of each sequence's text behind its first image token, ``[batch, hidden]``."""
    behind = stage.text & (stage.visual.cumsum(1) > 0)
    words = torch.where(behind.any(1, keepdim=True), behind, stage.text)[..., None]
    unit = normalize(stage.hidden.float(), dim=-1)
    return (unit * words).sum(1) / words.sum(1).clamp_min(1)
