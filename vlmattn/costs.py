"""What a prompt costs under a recipe, told before it is run: operations and bytes of the language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.anatomy import Anatomy
from vlmattn.binding import bind
from vlmattn.errors import InputError, OptionError, UnsupportedError
from vlmattn.interventions.pruning import Pruning
from vlmattn.models import Family, find_family
from vlmattn.recipe import Recipe
from vlmattn.request import Plan, Request
from vlmattn.wrapping import borrowed, handle_of
from vlmattn.wrapping.pruning import check_prompt


@dataclass(frozen=True)
class Load:
    """What one batch of prompts costs the language model. Operations are floating-point ones, two for a multiply-add.

    Attributes:
        rows: rows of each sequence in each layer, padding and fillers included.
        slots, read: slots of a layer's cache after the prompt, and slots that a step reads, mean over KV heads and
            sequences.
        image_tokens: of a sequence with images, on average, in each layer.
        linear_flops, attention_flops: prefill, of the layers' matrices and of attention.
        score_flops: prefill, of what methods look at to choose tokens.
        head_flops: logits of the last row of each sequence.
        kv_bytes: the cache after the prompt and the new tokens. kv_read: what a step reads of it.
        weight_bytes: weights that a decode step reads.
        measured_flops, measured_kv_bytes: of one real prefill; None if it was not run.
    """

    rows: tuple[int, ...]
    slots: tuple[float, ...]
    read: tuple[float, ...]
    image_tokens: tuple[float, ...]
    linear_flops: int
    attention_flops: int
    score_flops: int
    head_flops: int
    kv_bytes: int
    kv_read: int
    weight_bytes: int
    measured_flops: int | None = None
    measured_kv_bytes: int | None = None

    @property
    def prefill_flops(self) -> int:
        return self.linear_flops + self.attention_flops + self.score_flops + self.head_flops

    @property
    def decode_bytes(self) -> int:
        """What a decode step reads: weights and cache."""
        return self.weight_bytes + self.kv_read

    @property
    def equivalent(self) -> float:
        """Image tokens of a sequence, mean over layers: the budget by which methods compare fairly."""
        return sum(self.image_tokens) / len(self.image_tokens)


@dataclass(frozen=True)
class Cost:
    """What a batch of prompts costs without and with a recipe. ``print`` shows a table.

    Attributes:
        recipe: its name; sequences, tokens: of the batch, padding included; new_tokens: of each sequence in the cache.
        bare, edited: the model alone and under the recipe.
    """

    recipe: str
    sequences: int
    tokens: int
    new_tokens: int
    bare: Load
    edited: Load

    @property
    def prefill_ratio(self) -> float:
        return self.edited.prefill_flops / self.bare.prefill_flops

    @property
    def kv_ratio(self) -> float:
        return self.edited.kv_bytes / self.bare.kv_bytes

    @property
    def decode_ratio(self) -> float:
        return self.edited.decode_bytes / self.bare.decode_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data: all fields, sums and ratios."""
        found = asdict(self)
        for name, load in (("bare", self.bare), ("edited", self.edited)):
            found[name] |= {key: list(found[name][key]) for key in ("rows", "slots", "read", "image_tokens")}
            found[name] |= {key: getattr(load, key) for key in ("prefill_flops", "decode_bytes", "equivalent")}
        return found | {key: getattr(self, key) for key in ("prefill_ratio", "kv_ratio", "decode_ratio")}

    def __str__(self) -> str:
        lines = [
            ("prefill", "prefill_flops", _operations),
            ("  measured", "measured_flops", _operations),
            (f"KV cache, {self.new_tokens} new", "kv_bytes", _bytes),
            ("  measured, 0 new", "measured_kv_bytes", _bytes),
            ("a decode step reads", "decode_bytes", _bytes),
            ("image tokens a layer", "equivalent", "{:.1f}".format),
        ]
        many = "1 sequence" if self.sequences == 1 else f"{self.sequences} sequences"
        table = [f"{f'{many} of {self.tokens} tokens':27}{'none':>12}{self.recipe:>14}   ratio"]
        for what, name, shown in lines:
            before, after = getattr(self.bare, name), getattr(self.edited, name)
            if before is not None:
                ratio = f"{after / before:8.3f}" if before else ""
                table.append(f"{what:27}{shown(before):>12}{shown(after):>14}{ratio}")
        return "\n".join([*table, "Language model only; the vision tower is not counted."])


def cost(
    model: PreTrainedModel, inputs: Mapping[str, Any], recipe: Any = None, new_tokens: int = 0, measure: bool = False
) -> Cost:
    """What exactly these inputs cost under a recipe and without it. The model does not run, unless to ``measure``.

    With B sequences, n_l rows and W_l weights in the matrices of layer l, h heads and h_kv key heads of width d, hidden
    size H, vocabulary V, b bytes for a number and t new tokens:

        prefill = B sum_l (2 W_l n_l + 4 h d n_l^2) + score + 2 B H V;   KV bytes = 2 b B h_kv d sum_l (n_l + t)

    A decode step reads all weights and the KV bytes. Policies change what is held and read (mean over steps; what is
    evicted while the answer is written is not counted). Of mixtures of experts the active ones count (in a decode step
    as many as the batch can ask for). n_l is the padded length of the prompt until tokens are dropped, then the longest
    sequence of the batch: real text and kept image tokens. Score is one row of attention for each layer that a method
    looks at (SparseVLM looks at one for each rater), queries, keys and values of a layer that it looks at in
    advance, and 2 H for each pair of image tokens that it compares (what the tower says of them counted as wide).

    Attention counts in full, also where a causal kernel skips half. Biases, norms, edits of attention weights, what
    rules do with logits, and the vision tower do not count: recipes without methods that drop tokens have ratio 1.

    Args:
        model: bare or wrapped; also on the meta device, with nothing allocated.
        inputs: as for the model: a prompt or a left-padded batch, from its beginning.
        recipe: see ``Recipe.of``. None: the one on the model, if it is wrapped.
        new_tokens: of each sequence in the cache, behind the prompt.
        measure: also run one prefill without and one with the recipe, and count operations (``FlopCounterMode``; flash
            attention in full as above) and bytes of the cache.

    Raises:
        InputError: a cache among the inputs, a mask that is not ``[batch, tokens]``, prompts whose tokens cannot be
            dropped (without images, padded on the right, ending in an image).
        OptionError: a recipe that does not fit the model; ``new_tokens`` below 0.
        UnsupportedError: another family; layers that are not all one kind of attention; methods that read other
            prompts too (branches of a decoding rule, beam search,
            preparation passes); policies that decide by the prompt.
    """
    if new_tokens < 0:
        raise OptionError(f"new_tokens must be 0 or more, got {new_tokens}")
    family, handle = find_family(model), handle_of(model)
    chosen = Recipe.of(recipe if recipe is not None else handle.recipe if handle is not None else "none")
    anatomy = family.anatomy(model)
    plan = bind(chosen, anatomy)
    _refuse(chosen.name, plan, anatomy)
    request = _read(family, model, inputs, plan)
    sizes = _Sizes.of(family, model, anatomy, request.batch or 1, new_tokens)
    bare = sizes.load(request, (None,) * anatomy.layers, ())
    edited = sizes.load(request, plan.pruning or (None,) * anatomy.layers, plan.policies)
    if measure:
        bare = _measured(family, model, inputs, Recipe.of("none"), bare)
        edited = bare if chosen.is_none else _measured(family, model, inputs, chosen, edited)
    return Cost(chosen.name, request.batch or 1, request.stop, new_tokens, bare, edited)


def _refuse(name: str, plan: Plan, anatomy: Anatomy) -> None:
    """Raise for what the model of costs does not hold for."""
    branches = plan.decoding is not None and plan.decoding.branches
    if branches or plan.search is not None or plan.before_prefill:
        raise UnsupportedError(
            f"'{name}' has the model read more than the prompt, which cost() does not know; leave that method out, or"
            " measure it with vlmattn bench"
        )
    odd = {
        "layers that are no attention": anatomy.attending is not None or bool(anatomy.cross),
        "sliding windows": bool(anatomy.window),
        "heads of several sizes": bool(anatomy.unlike),
        "latent attention": anatomy.latent,
    }
    if found := [what for what, there in odd.items() if there]:
        raise UnsupportedError(
            f"cost() does not know {' and '.join(found)}, which {anatomy.family} has; measure it with vlmattn bench"
        )


def _read(family: Family, model: PreTrainedModel, inputs: Mapping[str, Any], plan: Plan) -> Request:
    """The prompt as the engine reads it."""
    if compat.cache_of(inputs) is not None:
        raise InputError("cost() is about prompts from their beginning; leave past_key_values out")
    types = family.types_of_call(model, inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != types.shape):
        raise InputError(f"attention_mask must be of shape [batch, tokens] = {list(types.shape)}; give the processor's")
    images = family.image_numbers(model, inputs, types)
    request = Request(len(plan.by_layer), counts=True)
    request.extend(0, types, images, None if mask is None else mask != 0, None, inputs.get("input_ids"))
    if any(plan.pruning):
        if not request.has_images:
            raise InputError(
                f"no image tokens in the prompt, and '{plan.name}' drops some; put the image placeholder into it"
                " (processor.apply_chat_template does)"
            )
        check_prompt(request, plan.name)
    return request


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a language model. ``weights``, ``projections``: of matrices of each layer, all and before attention."""

    anatomy: Anatomy
    batch: int
    new_tokens: int
    weights: tuple[int, ...]
    projections: tuple[int, ...]
    head: int
    read: int
    number: int

    @classmethod
    def of(cls, family: Family, model: PreTrainedModel, anatomy: Anatomy, batch: int, new_tokens: int) -> _Sizes:
        experts = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        layers, head = family.layers(model), model.get_output_embeddings()
        read = sum(_matrices(layer, experts and experts * batch)[1] for layer in layers) + _matrices(head, None)[1]
        return cls(
            anatomy=anatomy,
            batch=batch,
            new_tokens=new_tokens,
            weights=tuple(_matrices(layer, experts)[0] for layer in layers),
            projections=tuple(_looked(family.attention(layer)) for layer in layers),
            head=_matrices(head, None)[0],
            read=read,
            number=model.dtype.itemsize,
        )

    def load(self, request: Request, pruning: Sequence[Any], policies: Sequence[Any]) -> Load:
        """What a prompt costs if these methods choose its tokens, and these policies what is cached."""
        anatomy, given = self.anatomy, [images for images, _ in request.newest]
        left, length, score, compared = [sum(images) for images in given], request.stop, 0, 0
        width, rows, visual = anatomy.heads * anatomy.head_dim, [], []
        slots, read = [], []
        looking = [found for found in (*dict.fromkeys(pruning), *policies) if found is not None]
        looked = [layer for found in looking for layer in found.attention_layers(anatomy)]
        for layer, method in enumerate(pruning):
            if method is not None and any(left):
                if method.looks_ahead_at(layer):
                    score += (2 * self.projections[layer] + 2 * width) * length
                compared += sum(method.comparing(layer, images, anatomy.hidden_size) for images in given)
                left, length = self._after(method, layer, request, left, length)
            score += 2 * width * length * looked.count(layer)
            rows.append(length)
            held, seen = self._cached(request, policies, layer, left, length)
            slots.append(held)
            read.append(seen)
            visual.append(sum(left) / max(sum(map(bool, given)), 1))
        slot = 2 * self.number * self.batch * anatomy.kv_heads * anatomy.head_dim
        new = self.new_tokens * len(rows)
        return Load(
            rows=tuple(rows),
            slots=tuple(slots),
            read=tuple(read),
            image_tokens=tuple(visual),
            linear_flops=2 * self.batch * sum(n * weights for n, weights in zip(rows, self.weights, strict=True)),
            attention_flops=4 * self.batch * width * sum(n * n for n in rows),
            score_flops=self.batch * score + compared,
            head_flops=2 * self.batch * self.head,
            kv_bytes=round(slot * (sum(slots) + new)),
            kv_read=round(slot * (sum(read) + new)),
            weight_bytes=self.read,
        )

    def _cached(
        self, request: Request, policies: Sequence[Any], layer: int, left: list[int], length: int
    ) -> tuple[float, float]:
        """Slots that a layer holds after the prompt, and that a step reads.

        Raises:
            UnsupportedError: a policy that decides by the prompt.
        """
        held, read = float(length), float(length)
        for policy in (policy for policy in policies if layer in policy.active_layers(self.anatomy)):
            found = [
                policy.cached(layer, n, text, self.anatomy.kv_heads)
                for n, (_, text) in zip(left, request.newest, strict=True)
            ]
            if any(one is None for one in found):
                raise UnsupportedError(
                    f"what {policy.info.name} holds or reads is known only once the prompt is read; leave it out of"
                    " cost(), or measure it with vlmattn bench"
                )
            if policy.shrinks and policy.drops:
                held = max(one[0] for one in found)
            read = min(held, sum(one[1] for one in found) / len(found))
        return held, read

    def _after(
        self, method: Pruning, layer: int, request: Request, left: list[int], length: int
    ) -> tuple[list[int], int]:
        """Image tokens of each sequence and rows behind a stage."""
        kept = [min(method.kept(layer, images, n), n) for (images, _), n in zip(request.newest, left, strict=True)]
        if sum(kept) == sum(left) or not method.drops:
            return kept, length
        return kept, max(n + text for n, (_, text) in zip(kept, request.newest, strict=True))


def _looked(attention: nn.Module | None) -> int:
    """Weights of the matrices that a row meets before its layer attends: all but the last, which is the output's."""
    if attention is None:
        return 0
    *_, output = (part for part in attention.modules() if isinstance(part, nn.Linear))
    return _matrices(attention, None)[0] - _matrices(output, None)[0]


def _matrices(module: nn.Module, experts: int | None) -> tuple[int, int]:
    """Weights of a module's matrices that one row meets, and bytes of all its weights, with so many active experts."""
    size, held = 0.0, 0.0
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            numbers = weight.numel() if weight.ndim > 1 else 0
            if isinstance(part, nn.Linear) and weight is part.weight:  # if quantised, several share a byte
                numbers = part.in_features * part.out_features
            share = min(experts / len(weight), 1.0) if experts and weight.ndim == 3 else 1.0  # experts are stacked
            size, held = size + share * numbers, held + share * weight.nbytes
    return round(size), round(held)


def _measured(family: Family, model: PreTrainedModel, inputs: Mapping[str, Any], recipe: Recipe, load: Load) -> Load:
    """With what one prefill really takes."""
    aten, modules = torch.ops.aten, [family.decoder(model), model.get_output_embeddings()]
    names = [f"{type(model).__name__}.{name}" for name, module in model.named_modules() if module in modules]
    own = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention: _attention,
    }
    with torch.inference_mode(), _under(model, recipe), FlopCounterMode(display=False, custom_mapping=own) as counter:
        cache = compat.output_cache(model(**{**inputs, "use_cache": True, "logits_to_keep": 1}))
    held = sum(getattr(layer, "nbytes", 0) or layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return replace(
        load,
        measured_flops=sum(sum(counter.flop_counts[name].values()) for name in names),
        measured_kv_bytes=held,
    )


def _attention(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of attention, from shapes; key heads may be fewer."""
    batch, heads, rows, dim = query
    return 4 * batch * heads * rows * key[2] * dim


@contextmanager
def _under(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """The recipe in force in this thread, whether the model is wrapped or not; for others it is as before."""
    with borrowed(model) as handle, handle.temporarily(recipe):
        yield


def _operations(count: float) -> str:
    return _scaled(count, 1000, "FLOP", ("", "k", "M", "G", "T", "P"))


def _bytes(count: float) -> str:
    return _scaled(count, 1024, "B", ("", "Ki", "Mi", "Gi", "Ti"))


def _scaled(count: float, step: int, unit: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes[:-1]:
        if count < step:
            return f"{count:#.4g} {prefix}{unit}"
        count /= step
    return f"{count:#.4g} {prefixes[-1]}{unit}"
