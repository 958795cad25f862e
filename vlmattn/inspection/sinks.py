"""Which hidden dimensions give the attention sinks of a language model away."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.errors import OptionError
from vlmattn.inspection.levels import split_levels
from vlmattn.inspection.measuring import Inputs, bare, prepared
from vlmattn.interventions.profiles import SinkProfile
from vlmattn.interventions.sinks import LIKE_FIRST, REPORTED_SINK_DIMS, SINK_DIMS, sink_values
from vlmattn.models import Family, find_family

_MIDDLE = (0.15, 0.85)  # share of the depth in which massive activations neither come nor go (ours)
_TOP, _MOST = 4, 4  # dimensions looked at in each token, dimensions in a profile (ours)
_AGREE = 0.8  # share of (layer, prompt) in which a dimension must be massive (ours)


@torch.no_grad()
def find_sinks(
    model: PreTrainedModel,
    inputs: Sequence[Inputs],
    *,
    tau: float = 20.0,
    seed: int = 0,
    prompts: Sequence[str] = (),
) -> SinkProfile:
    """Find the sink dimensions of a language model on a few prompts (the rule is ours; VAR's authors give a table).

    With x a token's residual stream as it enters a layer, a token is massive when max_d |x_d| / RMS(x) > tau. Each
    layer between 15% and 85% of the depth and each prompt votes for the dimensions that are among the 4 largest of a
    massive token and have |x_d| / RMS(x) > tau; those with at least 80% of the votes are sink dimensions, the 4 largest
    of them if there are more.
    ``layers`` spans those in which at least half of the prompts have a token with phi > tau over these dimensions.

    ``levels`` are by direction instead (arXiv 2512.22213): token j is a sink of layer l when |cos(x_j, x_first)| > .9
    and l lies between the largest rise and the largest fall of the first token's norm; primary when that holds in at
    least 60% of the layers, secondary in at least 12%. The first token itself is not counted.

    Where dimensions of this language model are known, or reported by others, and none of them is found, a warning says
    so. Edits of a wrapped model do not act meanwhile. Whatever the padding, the first real token counts as the first.

    Args:
        inputs: processor outputs, one prompt or one padded batch each; four varied prompts are enough.
        tau: threshold of phi, as in VAR; no token exceeds sqrt(hidden size).
        seed: recorded in the profile; nothing here is random.
        prompts: recorded in the profile.

    Returns:
        A profile; without dimensions (and with a warning) if nothing is massive.

    Raises:
        OptionError: tau that no token can exceed.
        InputError: no inputs, or inputs without token ids.
        UnsupportedError: a family that is not supported.
    """
    family = find_family(model)
    anatomy = family.anatomy(model)
    _check_tau(tau, anatomy.hidden_size)
    with bare(model):
        looks = [_look(model, family, batch, tau) for batch in prepared(model, inputs)]
    dims = _agreed([row for look in looks for row in look.leading], anatomy.layers)
    rows = [row for look in looks for row in look.massive]
    hit = [layer for layer in range(anatomy.layers) if 2 * sum(bool(dims & row[layer]) for row in rows) >= len(rows)]
    if surprise := _surprise(dims, tau, anatomy.backbone):
        warnings.warn(surprise, stacklevel=3)  # above no_grad
    levels = torch.stack([look.levels() for look in looks]).sum(0) / len(rows)
    return SinkProfile(
        fingerprint=anatomy.fingerprint,
        source=anatomy.source,
        prompts=tuple(prompts),
        seed=seed,
        dims=tuple(sorted(dims)),
        tau=tau,
        layers=(hit[0], hit[-1] + 1) if hit else (0, 0),
        levels=tuple((float(primary), float(secondary)) for primary, secondary in levels.tolist()),
    )


def _check_tau(tau: float, hidden_size: int) -> None:
    if not 0 < tau < hidden_size**0.5:
        raise OptionError(
            f"tau must be above 0 and below {hidden_size**0.5:.1f}, the square root of the hidden size {hidden_size}:"
            f" no token's phi exceeds it; got {tau:g}"
        )


def _surprise(dims: frozenset[int], tau: float, backbone: tuple[str, int, int, int]) -> str | None:
    """What to warn of in what was found: nothing, or other dimensions than are told of the language model."""
    if not dims:
        return (
            f"no sink dimensions: no dimension of the residual stream exceeds tau = {tau:g} in most layers and prompts;"
            " give a smaller tau, or more varied prompts"
        )
    told = {*SINK_DIMS.get(backbone, ()), *REPORTED_SINK_DIMS.get(backbone, ())}
    if not told or dims & told:
        return None
    where = "known" if backbone in SINK_DIMS else "reported by others"
    return (
        f"found sink dimensions {sorted(dims)}, where {sorted(told)} are {where} for this language model; these weights"
        " may be others: give the profile to the methods about sinks"
    )


class _Look:
    """What one forward shows of the residual stream.

    Attributes:
        massive: for each prompt and layer the dimensions in which some token exceeds tau.
        leading: those among the ``_TOP`` largest of such a token, with the largest |x_d| / RMS(x) of any.
    """

    def __init__(self, real: Tensor, layers: int, tau: float) -> None:
        self.real, self.tau = real, tau
        self.massive: list[list[set[int]]] = [[set() for _ in range(layers)] for _ in real]
        self.leading: list[list[dict[int, float]]] = [[{} for _ in range(layers)] for _ in real]
        self._first = real.int().argmax(1)
        self._norms: list[Tensor] = []
        self._near: list[Tensor] = []

    def enter(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the stream that enters a layer (a forward pre-hook)."""
        hidden = (args[0] if args else kwargs["hidden_states"]).float()
        self._find_massive(layer, hidden)
        first = self._follow(hidden)
        cos = torch.cosine_similarity(hidden, first[:, None], dim=-1).abs()
        near = (cos > LIKE_FIRST).cpu() & self.real
        near[torch.arange(len(near)), self._first] = False
        self._near.append(near)

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Look at what the decoder returns (a forward hook); it is normed, so a sink falls here at the latest."""
        self._follow(out[0].float())

    def _find_massive(self, layer: int, hidden: Tensor) -> None:
        phi = sink_values(hidden, ())
        row, token = ((phi > self.tau) & self.real.to(phi.device)).nonzero(as_tuple=True)
        fit = int(hidden.shape[-1] / self.tau**2)  # the squares of all ratios sum to the hidden size
        top = hidden[row, token].abs().topk(min(max(fit, 1), hidden.shape[-1]))
        ratios = phi[row, token][:, None] * top.values / top.values[:, :1]
        for number, dims, values in zip(row.tolist(), top.indices.tolist(), ratios.tolist(), strict=True):
            above = [(dim, ratio) for dim, ratio in zip(dims, values, strict=True) if ratio > self.tau]
            self.massive[number][layer].update(dim for dim, _ in above)
            leading = self.leading[number][layer]
            leading.update((dim, max(ratio, leading.get(dim, 0.0))) for dim, ratio in above[:_TOP])

    def _follow(self, hidden: Tensor) -> Tensor:
        first = hidden[torch.arange(len(hidden)), self._first.to(hidden.device)]
        self._norms.append(first.norm(dim=-1).cpu())
        return first

    def levels(self) -> Tensor:
        """Primary and secondary sinks of each layer ``[layers, 2]``, summed over the prompts."""
        kinds = split_levels(torch.stack(self._norms, 1), torch.stack(self._near))
        return torch.stack([kind.sum((1, 2)) for kind in kinds], -1).float()


def _look(model: PreTrainedModel, family: Family, batch: dict[str, Any], tau: float) -> _Look:
    mask = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"]) if mask is None else mask
    layers = family.layers(model)
    look = _Look((real != 0).cpu(), len(layers), tau)
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(partial(look.enter, number), with_kwargs=True)
            stack.callback(hook.remove)
        stack.callback(family.decoder(model).register_forward_hook(look.leave).remove)
        model(**batch, use_cache=False, logits_to_keep=1)
    return look


def _agreed(rows: list[list[dict[int, float]]], layers: int) -> frozenset[int]:
    """Dimensions with enough votes of the middle layers of all prompts, the largest ones."""
    middle = [n for n in range(layers) if _MIDDLE[0] * layers <= n <= _MIDDLE[1] * layers]
    votes: Counter[int] = Counter()
    sizes: dict[int, float] = defaultdict(float)
    for row in rows:
        for layer in middle:
            for dim, ratio in row[layer].items():
                votes[dim] += 1
                sizes[dim] += ratio
    agreed = [dim for dim, count in votes.items() if count >= _AGREE * len(rows) * len(middle)]
    return frozenset(sorted(agreed, key=lambda dim: -sizes[dim])[:_MOST])
