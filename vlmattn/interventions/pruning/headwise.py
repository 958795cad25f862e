"""What RazorAttention and DuoAttention share: some KV heads keep every token, the others the first and the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.files import beside
from vlmattn.interventions.profiles import HeadProfile, check_heads
from vlmattn.interventions.pruning.policy import KVPolicy, host_counts
from vlmattn.options import option, parse_heads
from vlmattn.request import HeadSplit, LayerContext


@dataclass(frozen=True, kw_only=True)
class HeadWise(KVPolicy):
    """Base of policies by heads: ``heads`` keep everything, or the best ``share`` by a score of a HeadProfile.

    The score of a KV head is the largest of its query heads'. Layers whose heads all keep everything are left alone.
    """

    needs_images: ClassVar[bool] = False
    files: ClassVar[Mapping[str, str]] = {"profile": HeadProfile.FILE_NAME}
    compensate: ClassVar[bool] = False
    late: ClassVar[bool] = False  # a new token sees the whole window that was kept, and itself
    sinks: int = 4
    share: float = 0.25
    heads: str = option("", about="KV heads that keep everything, layer.head joined by commas; empty: by share")
    profile: str = option("", about="HeadProfile file; empty: vlmattn_heads.json beside the model")
    score: str = option("retrieval", about="score of the profile by which heads keep everything")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_heads(self.heads, f"{self.info.name}.heads", "layer.KV head")
        if self.mode == "mask":
            raise OptionError(f"{self.info.name} has no mode 'mask'; compare with a larger share")

    def at(self, share: float) -> HeadWise:
        """``share`` is that of the KV heads which keep everything."""
        return replace(self, share=share)

    def window(self, tokens: int) -> int:
        """Most recent tokens that the other heads keep of a prompt of so many tokens."""
        raise NotImplementedError

    def bind(self, anatomy: Anatomy) -> HeadWise:
        KVPolicy.bind(self, anatomy)
        if anatomy.latent:
            raise UnsupportedError(
                f"'{self.info.name}' keeps heads apart in the cache, and {anatomy.family} has latent attention, whose"
                " layers take the cache's keys and values for one tensor; use a policy for all heads, like recycled"
            )
        chosen = list(parse_heads(self.heads, f"{self.info.name}.heads"))
        path = self.profile
        if not chosen:
            path = path or str(beside(anatomy.source, HeadProfile.FILE_NAME) or "")
            if not path:
                raise OptionError(
                    f"{self.info.name}: which heads keep everything? Give heads='12.3,14.7' (layer.KV head), or measure"
                    " them: find_heads(model, samples).save(folder of the model)"
                )
            chosen = self._best(path, anatomy)
        check_heads(chosen, anatomy, anatomy.kv_heads, f"{self.info.name}.heads", "KV head")
        return replace(self, heads=",".join(f"{layer}.{head}" for layer, head in sorted(chosen)), profile=path)

    def _best(self, path: str, anatomy: Anatomy) -> list[tuple[int, int]]:
        found = HeadProfile.load(path)
        found.check(anatomy, f"{self.info.name}.profile")
        return self._chosen(found, anatomy)

    def _chosen(self, found: HeadProfile, anatomy: Anatomy) -> list[tuple[int, int]]:
        """KV heads that keep everything, by a profile."""
        return self._top(found, anatomy, self.score, self.share)

    def _top(self, found: HeadProfile, anatomy: Anatomy, score: str, share: float) -> list[tuple[int, int]]:
        """The ``share`` of KV heads with the highest score, at least one."""
        found.top(score, 1.0)  # says which scores there are
        repeat, table = anatomy.heads // anatomy.kv_heads, found.scores[score]
        ranked = sorted(
            ((layer, head) for layer in self.active_layers(anatomy) for head in range(anatomy.kv_heads)),
            key=lambda place: -max(table[place[0]][place[1] * repeat : (place[1] + 1) * repeat]),
        )
        return list(ranked[: max(1, round(share * len(ranked)))])

    def _full(self, layer: int) -> tuple[int, ...]:
        """KV heads of a layer that keep everything (once bound)."""
        return tuple(head for number, head in parse_heads(self.heads, "heads") if number == layer)

    def cached(self, layer: int, images: int, text: int, kv_heads: int) -> tuple[float, float]:
        """A mean of what was let go counts as one more slot."""
        tokens = images + text
        near = min(self.sinks + self.window(tokens), tokens) + self.compensate
        full = len(self._full(layer))
        if full == kv_heads:
            return tokens, tokens
        held = (full * tokens + (kv_heads - full) * near) / kv_heads
        return held, held

    def split(self, context: LayerContext) -> HeadSplit | None:
        tokens = tuple(n + words for n, words in zip(*host_counts(context.request, context.keys), strict=True))
        window = tuple(map(self.window, tokens))
        return HeadSplit(self._full(context.layer), self.sinks, window, tokens, self.compensate, self.late)
