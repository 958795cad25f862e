"""What every attention head does: whether it depends on the image, looks at it, copies from the prompt, decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vlmattn.errors import InputError, OptionError
from vlmattn.inspection.measuring import Inputs, bare, only, prepared, prepared_one
from vlmattn.interventions import VHR, Intervention, MethodInfo
from vlmattn.interventions.profiles import HeadProfile
from vlmattn.interventions.registry import Sizes, option
from vlmattn.kernels import AttentionEdit, HeadPart
from vlmattn.models import Anatomy, Family, find_family
from vlmattn.request import TEXT, Scope, Weights

_INFO = MethodInfo("inspection", paper="", code="", faithful="", parts="none", cost="")


@dataclass(frozen=True, eq=False)
class Conflict:
    """A prompt whose image says one thing and whose text says another.

    Attributes:
        inputs: what the processor returns for this one prompt.
        a: first token id of the answer that follows the image.
        b: first token id of the answer that follows the text.
    """

    inputs: Inputs
    a: int
    b: int


@torch.no_grad()
def score_heads(
    model: PreTrainedModel,
    inputs: Sequence[Inputs],
    *,
    answer_tokens: int = 8,
    seed: int = 0,
    prompts: Sequence[str] = (),
) -> HeadProfile:
    """Score every head on prompts with images. With A and a a head's output and attention at the last prompt row:

        vhd        mean over prompts of ||A - B||, B the output without the image tokens       (arXiv 2412.13949)
        visual     mean over prompts of sum_{j in image} a_j
        retrieval  share of the tokens of the greedy answers that stand at argmax_{j in prompt text} a_j of the row
                   that predicts them, over all prompts                          (copying, after arXiv 2404.15574)

    A and B are those of the unedited model (VHR itself reinforces the layers below); edits of a wrapped model do not
    act meanwhile. An answer ends before the end-of-sequence token.

    Args:
        inputs: processor outputs, one prompt or one padded batch each.
        answer_tokens: longest answer that is looked at.
        seed: recorded in the profile; nothing here is random.
        prompts: recorded in the profile.

    Returns:
        A profile with the three scores, and the means of A.

    Raises:
        OptionError: fewer than one answer token.
        InputError: no inputs, inputs without token ids or without an image.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    if answer_tokens < 1:
        raise OptionError(f"answer_tokens must be at least 1, got {answer_tokens}")
    family = find_family(model)
    anatomy, batches = family.anatomy(model), prepared(model, inputs)
    outputs, gaze = _Outputs(), _Gaze()
    with only(model, outputs, gaze):
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)
    vhd, means = outputs.means(anatomy.layers)
    copied, steps = torch.zeros(anatomy.layers, anatomy.heads), 0
    for batch in batches:
        answer = _answer(model, family, batch, answer_tokens)
        copies = _Copies(answer=answer, prompt=batch["input_ids"].shape[1])
        with only(model, copies):
            model(**_extended(batch, answer), use_cache=False, logits_to_keep=1)
        copied += torch.stack([copies.hits[layer] for layer in range(anatomy.layers)])
        steps += int((answer >= 0).sum())
    visual = torch.stack([gaze.mass[layer] for layer in range(anatomy.layers)])
    scores = {"vhd": vhd, "visual": visual / sum(len(batch["input_ids"]) for batch in batches)}
    return _profile(anatomy, {**scores, "retrieval": copied / max(steps, 1)}, means, seed, prompts)


@torch.no_grad()
def find_heads(
    model: PreTrainedModel,
    samples: Sequence[Conflict],
    *,
    ablation: Literal["mean", "zero"] = "mean",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    prompts: Sequence[str] = (),
) -> HeadProfile:
    """Find the heads that decide whether the model believes the image or the text. For each (layer, head):

        causal = mean over samples of |D - D'|,   D = logit of a - logit of b at the last prompt row

    with D' from the model in which that head's output is replaced, in every row of the prompt, by its mean at the last
    rows of the samples, or by zero (ranking ours, after the question of arXiv 2602.03677). Costs one row of a forward
    for each head and sample. Edits of a wrapped model do not act meanwhile.

    Args:
        samples: prompts whose image and text disagree; 5% of the heads is a usual share to take from the result.
        ablation: what stands for the head's output.
        batch_size: copies of the prompt in a forward; each has another head ablated.
        seed: recorded in the profile; nothing here is random.
        progress: show a bar.
        prompts: recorded in the profile.

    Returns:
        A profile with the score "causal", and the means.

    Raises:
        OptionError: another ablation, batch_size below 1.
        InputError: no samples, one that is not a single prompt with an image, token ids that are equal or not in the
            vocabulary.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    if ablation not in ("mean", "zero"):
        raise OptionError(f"ablation must be 'mean' or 'zero', got {ablation!r}")
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}")
    if not samples:
        raise InputError("there is nothing to measure; give at least one Conflict")
    anatomy = find_family(model).anatomy(model)
    words = model.config.get_text_config().vocab_size
    for sample in samples:
        if sample.a == sample.b or not (0 <= sample.a < words and 0 <= sample.b < words):
            raise InputError(f"a and b must be two token ids below {words}, got {sample.a} and {sample.b}")
    batches = [prepared_one(model, sample.inputs) for sample in samples]
    outputs = _Outputs()
    with only(model, outputs):
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)
    _, means = outputs.means(anatomy.layers)
    instead = means if ablation == "mean" else torch.zeros_like(means)
    heads = [(layer, head) for layer in range(anatomy.layers) for head in range(anatomy.heads)]
    places: list[tuple[int, int] | None] = [None, *heads]  # the first is the unedited model
    places += [None] * (-len(places) % batch_size)  # batches of one shape round alike
    total = torch.zeros(anatomy.layers, anatomy.heads)
    with tqdm(total=len(places) * len(samples), desc="heads", unit="row", disable=not progress) as bar:
        for sample, batch in zip(samples, batches, strict=True):
            copies = {name: _repeated(value, batch_size) for name, value in batch.items()}
            found = []
            for start in range(0, len(places), batch_size):
                with only(model, _Ablation(places=tuple(places[start : start + batch_size]), instead=instead)):
                    logits = model(**copies, use_cache=False, logits_to_keep=1).logits[:, -1].float()
                found.append((logits[:, sample.a] - logits[:, sample.b]).cpu())
                bar.update(batch_size)
            margin = torch.cat(found)
            total += (margin[1 : len(heads) + 1] - margin[0]).abs().view_as(total)
    return _profile(anatomy, {"causal": total / len(samples)}, means, seed, prompts)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outputs(VHR):
    """Head outputs at the last prompt row with and without the image: VHR's pass, in which no head is reinforced."""

    layers: str = option("0:")
    distances: dict[int, Tensor] = field(default_factory=dict, repr=False)
    seen: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def edit(self, scope: Scope) -> AttentionEdit:
        return AttentionEdit()

    def gains(self, seeing: Tensor, blind: Tensor) -> Tensor:
        call = len(self.seen)
        self.seen[call], self.distances[call] = seeing.cpu(), (seeing - blind).norm(dim=-1).cpu()
        return torch.ones_like(seeing[..., 0])

    def means(self, layers: int) -> tuple[Tensor, Tensor]:
        """Over the prompts of all forwards: VHD ``[layers, heads]`` and the outputs ``[layers, heads, dim]``."""

        def mean(calls: dict[int, Tensor]) -> Tensor:  # the layers of one forward after those of another
            by_layer = [[calls[n] for n in range(layer, len(calls), layers)] for layer in range(layers)]
            return torch.stack([torch.cat(found).mean(0) for found in by_layer])

        return mean(self.distances), mean(self.seen)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measure(Intervention):
    """Looks at the attention of every layer and changes nothing."""

    info: ClassVar[MethodInfo] = _INFO

    def measured_layers(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(range(sizes.layers))

    def edit(self, scope: Scope) -> AttentionEdit:
        return AttentionEdit()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Gaze(_Measure):
    """Attention of the last row on the image, summed over prompts: layer -> ``[heads]``."""

    mass: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def measure(self, scope: Scope, weights: Weights) -> None:
        attention = weights(scope.queries - 1, scope.queries)[:, :, 0]
        mass = (attention * scope.visual[:, None]).sum((0, 2)).cpu()
        self.mass[scope.layer] = self.mass.get(scope.layer, 0) + mass


@dataclass(frozen=True, kw_only=True, eq=False)
class _Copies(_Measure):
    """How often a head's most attended text key of the prompt holds the token that comes next: layer -> ``[heads]``.

    Attributes:
        answer: ``[batch, steps]``, -1 after its end.
        prompt: slots of the prompt, padding included.
    """

    answer: Tensor
    prompt: int
    hits: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def measure(self, scope: Scope, weights: Weights) -> None:
        first, answer = self.prompt - 1, self.answer.to(scope.device)
        attention = weights(first, first + answer.shape[1])[..., : self.prompt]
        text = ~scope.visual if scope.real is None else ~scope.visual & scope.real
        best = attention.masked_fill(~text[:, None, None, : self.prompt], -1).argmax(-1)  # [batch, heads, steps]
        held = scope.ids[torch.arange(len(best), device=best.device)[:, None, None], best]
        self.hits[scope.layer] = (held == answer[:, None]).sum((0, 2)).cpu()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ablation(Intervention):
    """In row n of the batch the output of the head ``places[n]`` is ``instead`` ``[layers, heads, dim]``."""

    info: ClassVar[MethodInfo] = _INFO
    places: tuple[tuple[int, int] | None, ...]
    instead: Tensor

    def edit(self, scope: Scope) -> AttentionEdit:
        instead = self.instead[scope.layer].to(scope.device)
        gain = instead.new_ones(len(self.places), len(instead))
        offset = torch.zeros_like(instead).repeat(len(self.places), 1, 1)
        for row, place in enumerate(self.places):
            if place is not None and place[0] == scope.layer:
                gain[row, place[1]], offset[row, place[1]] = 0, instead[place[1]]
        return AttentionEdit() if bool((gain == 1).all()) else AttentionEdit(head_gain=(HeadPart(gain, None, offset),))


def _answer(model: PreTrainedModel, family: Family, batch: dict[str, Any], tokens: int) -> Tensor:
    """The greedy answer of the bare model ``[batch, steps]``, -1 from its end on."""
    with bare(model):
        out = model.generate(**batch, max_new_tokens=tokens, do_sample=False, num_beams=1)
    answer: Tensor = out[:, batch["input_ids"].shape[1] :]
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [-1 if stops is None else stops]
    last = torch.isin(answer, torch.tensor(stops, device=answer.device))
    last = last | (family.token_types(model, answer) != TEXT)  # a placeholder would ask for an image
    return answer.masked_fill(last.cumsum(1) > 0, -1)


def _extended(batch: dict[str, Any], answer: Tensor) -> dict[str, Any]:
    """The prompt and its answer as inputs of one forward."""
    ids = batch["input_ids"]
    fill = ids[:, -1:].expand_as(answer)  # what stands after the end of an answer is not looked at
    values = {"input_ids": torch.where(answer >= 0, answer, fill), "attention_mask": torch.ones_like(answer)}
    return {
        name: torch.cat([value, values.get(name, torch.zeros_like(answer)).to(value)], 1)
        if isinstance(value, Tensor) and value.shape == ids.shape
        else value
        for name, value in batch.items()
    }


def _repeated(value: Any, times: int) -> Any:
    """A processor output's value for copies of the prompt: rows and images both repeat as a whole."""
    return torch.cat([value] * times) if isinstance(value, Tensor) else value


def _profile(
    anatomy: Anatomy, scores: dict[str, Tensor], means: Tensor, seed: int, prompts: Sequence[str]
) -> HeadProfile:
    return HeadProfile(
        fingerprint=anatomy.fingerprint,
        source=anatomy.source,
        prompts=tuple(prompts),
        seed=seed,
        scores={name: tuple(map(tuple, table.tolist())) for name, table in scores.items()},
        means=tuple(tuple(map(tuple, layer)) for layer in means.tolist()),
    )
