"""CDPruner: keep image tokens that are unlike each other and matter for the question (arXiv 2506.10967)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from vlmattn.interventions.pruning import choices
from vlmattn.interventions.pruning.early import EarlyPruning, Tokens
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "cdpruner",
    paper="arXiv:2506.10967 (NeurIPS 2025)",
    code="github.com/Theia-4869/CDPruner",
    faithful="golden (the choice; relevance by the language model's embeddings is ours)",
    parts="keep",
    cost="prefill: pairs of an image's tokens, a greedy choice; all layers run on the rest. Decode: fewer keys",
    presets={
        "cdpruner": ("released default: 64 of the 576 tokens of LLaVA-1.5, before the first layer", {}),
        "cdpruner_128": ("128 of the 576 tokens of LLaVA-1.5", {"keep_ratio": 128 / 576}),
        "cdpruner_negative": ("the sign that the released code gives to CLIP's relevance", {"sign": "negative"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class CDPruner(EarlyPruning):
    """Before the first layer keep the tokens of each image that a determinantal point process prefers.

    With x the n tokens of an image as the language model gets them, e the embeddings of the text behind the image, and
    r scaled to 0..1 over the image's tokens:

        r_i = mean_t cos(x_i, e_t);   L_ij = r_i cos(x_i, x_j) r_j;   S grows by argmax_i det L(S + i)

    until round(keep_ratio n) are taken (greedy MAP). The released code takes r from CLIP's text tower, which is not in
    the model, with the sign turned ("negative"), as CLIP's patches are least like what they show; embeddings of the
    language model take its place here. Kept tokens have their order and position ids. Counts dropped tokens.
    """

    keep_ratio: float = option(64 / 576, 0, 1, "share of the tokens of each image that stays", source="released: 64")
    sign: str = option(
        "positive", about="what counts as relevant: like the text, or unlike", choices=("positive", "negative")
    )

    def comparing(self, layer: int, given: Sequence[int], width: int) -> int:
        return sum(2 * width * tokens * (tokens + 1) for tokens in given)

    def pick(self, tokens: Tokens, count: int) -> Tensor:
        relevance = relevance_of(tokens) * (1 if self.sign == "positive" else -1)
        low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
        relevance = (relevance - low + 1e-6) / (high - low).clamp_min(1e-6)
        kernel = relevance[:, :, None] * choices.likeness(tokens.embeddings) * relevance[:, None]
        return choices.determinantal(kernel, count)


def relevance_of(tokens: Tokens) -> Tensor:
    """Mean cosine of each token with the words of the text behind the image, float32 ``[images, n]``."""
    found: Tensor = (normalize(tokens.embeddings.float(), dim=-1) @ tokens.asked.float()[..., None])[..., 0]
    return found
