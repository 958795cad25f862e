"""What a trace says in numbers: each function reads one row after another, and returns tensors with named axes.

Step k is the row that predicts answer token k: the last row of the prompt for k = 0, then that of the answer token
before. The last key that it sees is that token. The axis "layer" counts within ``trace.layers``, if not said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlmattn.errors import InputError, OptionError
from vlmattn.inspection.levels import split_levels
from vlmattn.inspection.named import Named
from vlmattn.inspection.trace import GROUPS, Trace
from vlmattn.interventions.sinks import LIKE_FIRST


def _steps(trace: Trace) -> Iterator[tuple[int, Tensor]]:
    """Each row that predicts an answer token, and its attention ``[layer, head, token]``."""
    for row in trace.answer_rows:
        yield row, trace.attention(row).values


def image_maps(trace: Trace, image: int, step: int) -> tuple[Named, ...]:
    """Attention on an image, where it lies in the picture: for each of its pieces ``[layer, head, row, column]``.

    ``trace.pieces[image]`` says in which rectangle; nothing for an image whose tokens have no known place.

    Args:
        image: its number in the prompt, from 0.
        step: answer token that the looking row predicts (from 0; from the end below 0).

    Raises:
        InputError: no such image or answer token.
    """
    if not 0 <= image < len(trace.pieces):
        raise InputError(
            f"image {image} is out of range: the prompt has {len(trace.pieces)} (0 to {len(trace.pieces) - 1})"
        )
    own = trace.attention(trace.row_of(step)).values[..., trace.keys_of("image", image)]
    return tuple(Named(own[..., piece.tokens], ("layer", "head", "row", "column")) for piece in trace.pieces[image])


def group_masses(trace: Trace) -> Named:
    """Attention mass on each kind of token, ``[step, layer, head, group]``.

        M_g = sum_{j in g} a_j   for g in ``GROUPS``: system, image, question, answer

    The masses of a row sum to 1, or to less where a head has a sink of its own (gpt-oss), or to something else under
    gains that change the sum.
    """
    member = torch.stack([trace.keys_of(group) for group in GROUPS], -1).float()
    return Named(
        torch.stack([attention @ member for _, attention in _steps(trace)]), ("step", "layer", "head", "group")
    )


def entropy(trace: Trace, image: bool = False, normalised: bool = False) -> Named:
    """How spread attention is, in nats, ``[step, layer, head]``.

        H = -sum_j p_j log p_j,   p_j = a_j / sum a over the n keys that count;   0 to log n

    0 also for a row that sees none of these keys.

    Args:
        image: only image tokens count; else all tokens up to the row, those too that a window or a recipe hides.
        normalised: divide by log n, so that 1 is uniform (nan for n = 1).
    """
    visual, found = trace.keys_of("image"), []
    for row, attention in _steps(trace):
        keys = attention[..., visual] if image else attention[..., : row + 1]
        share = (keys / keys.sum(-1, keepdim=True)).nan_to_num(0.0)
        value = torch.special.entr(share).sum(-1)
        found.append(value / torch.tensor(float(keys.shape[-1])).log() if normalised else value)
    return Named(torch.stack(found), ("step", "layer", "head"))


def head_distances(trace: Trace) -> Named:
    """How far back each head looks on average, in tokens, ``[layer, head]`` (arXiv 2510.13554).

        d = mean over rows t of sum_s a_ts (t - s)

    Rows are those that predict the answer; the paper takes the rows of the answer's own tokens, which are one later.
    """
    total: Tensor | float = 0.0
    for row, attention in _steps(trace):
        total = total + attention @ (row - torch.arange(attention.shape[-1])).clamp_min(0).float()
    return Named(torch.as_tensor(total) / len(trace.answer), ("layer", "head"))


def split_heads(trace: Trace, share: float = 0.3) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Local and global heads as (layer, head): those that look the least, and the farthest, back (arXiv 2510.13554).

    Args:
        share: of all heads in each of the two, by ``head_distances``; at least one head (paper: 0.3).

    Raises:
        OptionError: a share that is not within 0..0.5.
    """
    if not 0 < share <= 0.5:
        raise OptionError(f"share must be above 0 and at most 0.5, got {share:g}")
    distance = head_distances(trace).values
    order = distance.flatten().argsort(stable=True).tolist()
    count, heads = max(1, int(share * len(order) + 1e-6)), distance.shape[1]
    places = [divmod(place, heads) for place in order]
    return places[:count], places[-count:]


def distances(trace: Trace, window: int = 10, share: float = 0.3) -> Named:
    """Windowed average attention distance of each step, in tokens, ``[step]``, 0 to ``window`` (arXiv 2510.13554).

        WAAD_t = sum_s A_ts min(t - s, window),   A the mean over local heads

    High where the model reaches far back, low where it goes on with a phrase. Row t is the one that predicts the token,
    so the paper's value of answer token k is step k + 1 here.

    Args:
        window: tokens, longest distance (paper: 10).
        share: of local heads, see ``split_heads``.

    Raises:
        OptionError: a window below 1, a share that is not within 0..0.5.
    """
    if window < 1:
        raise OptionError(f"window must be at least 1, got {window}")
    local, _ = split_heads(trace, share)
    found = []
    for row, attention in _steps(trace):
        back = (row - torch.arange(attention.shape[-1])).clamp(0, window).float()
        found.append(_mean_of(attention, local) @ back)
    return Named(torch.stack(found), ("step",))


def influence(trace: Trace, low: int = 10, high: int = 50, share: float = 0.3) -> Named:
    """Future attention influence of every token, ``[token]``: how much later rows look back at it (arXiv 2510.13554).

        FAI_s = mean over rows t with s + low <= t <= s + high of A_ts,   A the mean over global heads

    Rows are those that predict the answer, so tokens count from the beginning of the prompt and the last row is that of
    the last answer token but one. nan for tokens without such a row: too late ones, and early ones of a long prompt.

    Args:
        low, high: tokens (paper: 10 and 50, for long reasoning; short answers want a smaller ``low``).
        share: of global heads, see ``split_heads``.

    Raises:
        OptionError: not 0 <= low <= high, a share that is not within 0..0.5.
    """
    if not 0 <= low <= high:
        raise OptionError(f"low and high must be 0 <= low <= high, got {low} and {high}")
    _, far = split_heads(trace, share)
    token = torch.arange(len(trace.tokens))
    total, count = torch.zeros(2, len(token))
    for row, attention in _steps(trace):
        within = ((token + low <= row) & (row <= token + high)).float()
        total, count = total + within * _mean_of(attention, far), count + within
    return Named(total / count, ("token",))


def sink_scores(trace: Trace) -> Named:
    """Attention that each token draws from later rows, ``[layer, token]``, 0 to 1: sink score of arXiv 2410.10781.

        alpha_k = mean over heads and over rows i >= k of a_ik

    Rows are those that predict the answer (paper: all rows); nan for the last answer token, which no row sees. The
    massive activations that go with it are ``trace.phi``.
    """
    total: Tensor | float = 0.0
    for _, attention in _steps(trace):
        total = total + attention.mean(1)
    rows = torch.tensor(trace.answer_rows)
    count = (rows >= torch.arange(len(trace.tokens))[:, None]).sum(1).float()
    return Named(torch.as_tensor(total) / count, ("layer", "token"))


def sink_tokens(trace: Trace, tau: float = 20.0, dims: Sequence[int] = ()) -> Named:
    """Which tokens are massive as they enter a layer: bool ``[layer, token]`` (arXiv 2503.03321).

        phi = max_d abs(x_d) / RMS(x) > tau

    All decoder layers are there, those without attention too. The last answer token enters no layer and is left out;
    dropped tokens are False.

    Args:
        tau: paper: 20.
        dims: sink dimensions of the language model (``find_sinks``), of which the largest must be one; () = any.
    """
    found = trace.phi > tau
    if dims:
        found &= torch.isin(trace.dims, torch.tensor(list(dims)))
    return Named(found, ("layer", "token"))


def sink_levels(trace: Trace) -> Named:
    """Levels of sinks, int64 ``[layer, token]``: 2 primary, 1 secondary, 0 none (arXiv 2512.22213).

    A token is a sink of a layer when abs(cos(x, x_first)) > .9 and the layer lies between the largest rise and the
    largest fall of the first token's norm; primary when that holds in at least 60% of the layers, secondary in at least
    12%. The first token itself stays at 0. All decoder layers are there; the last answer token enters none and is left
    out. ``find_sinks`` counts the same over many prompts.
    """
    norms = torch.nn.functional.pad(trace.norms[:, 0], (0, 1)).nan_to_num()[None]  # the decoder's norm ends every sink
    near = (trace.likeness > LIKE_FIRST)[:, None]
    near[..., 0] = False
    primary, secondary = (kind[:, 0].long() for kind in split_levels(norms, near))
    return Named(2 * primary + secondary, ("layer", "token"))


def logit_difference(trace: Trace, other: Trace) -> Named:
    """By how much more likely each answer token is in ``trace`` than in ``other``, in nats, ``[step]``.

        log p(token) - log p_other(token)

    -inf or inf where a decoding rule of one rules the token out, nan where both do.

    Raises:
        InputError: the answers differ; ``look(..., answer=trace.answer)`` has a model say this one.
    """
    if trace.answer != other.answer:
        raise InputError(
            "the two traces have different answers; look(..., answer=trace.answer) says the same one again"
        )
    return Named(trace.logprobs - other.logprobs, ("step",))


def _mean_of(attention: Tensor, heads: Sequence[tuple[int, int]]) -> Tensor:
    """The mean ``[token]`` of some (layer, head) of ``[layer, head, token]``."""
    layer, head = torch.tensor(heads).T
    return attention[layer, head].mean(0)
