"""Reads the prompts of a rule's branches one by one, so that they may differ in length, images and edits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from vlmattn import compat
from vlmattn.decoding import Branch, ContrastiveDecoding, Gaze, Instead
from vlmattn.errors import InputError, UnsupportedError
from vlmattn.models import OF_IMAGES, OF_TOKENS, Family
from vlmattn.request import TEXT, Plan
from vlmattn.wrapping.branch_cache import BranchCache, ReadPrompt
from vlmattn.wrapping.call import CALL, Call, TowerView
from vlmattn.wrapping.on_cache import report_original_lengths, ride

NOT_PASSED_ON = frozenset(
    (
        *("position_ids", "past_key_values", "cache", "inputs_embeds"),
        *("mm_encoder_outputs", "use_cache", "labels", "logits_to_keep"),
    )
)


class Branches:
    """The branches of one generate() call.

    Attributes:
        contrast: branches and rule; plans: the edits of each branch.
        inputs: what the call gave the model; given: what it gave to branches, by name.
        cache: of the main prompt while it is read; afterwards all is in the cache of the call.
        ropes: factors on the rotary base of each row group.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self.contrast: ContrastiveDecoding = plan.decoding
        self.plans, self.given = plan.branches, given
        names = set(inspect.signature(type(model).forward).parameters) - NOT_PASSED_ON
        self.inputs = {name: value for name, value in inputs.items() if name in names and value is not None}
        self.cache: DynamicCache | None = None
        self.ropes: tuple[float, ...] = (1.0,)
        self._target: Any = None

    def begin(self, model: PreTrainedModel, target: Any) -> DynamicCache | None:
        """A cache of its own for the main prompt; None once that was read."""
        if self._target is not None:
            return None
        if target is None:
            raise UnsupportedError("a decoding rule needs a cache; leave use_cache at True")
        self._target, self.cache = target, compat.new_cache(model)
        return self.cache

    def spread(self, call: Call, inputs: Mapping[str, Any], output: Any, early: Mapping[int, Tensor | None]) -> None:
        """After the main prompt: read those of the branches, merge the caches, combine the logits.

        Args:
            inputs: what the main forward got; output: what it returned, changed in place.
        """
        assert self.cache is not None
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        if positions is None:  # the model counts them itself
            positions = call.record.family.positions(call.model, {"attention_mask": torch.ones_like(ids), **inputs})
        prompt = call.prompt_length or ids.shape[1]
        if positions.shape[-2] == 1:  # one for all rows
            positions = positions.expand(*positions.shape[:-2], len(ids), -1)
        given = inputs.get("attention_mask")
        mask = torch.ones_like(ids[:, :prompt]) if given is None else given[:, :prompt]
        kept = 1 + ids.shape[1] - prompt
        main = ReadPrompt(self.cache, output.logits[:, -kept:], mask.bool(), positions[..., prompt - 1 : prompt])
        views = [main]
        for branch, plan in zip(self.contrast.branches, self.plans, strict=True):
            reader = _Reader(self, call, branch, plan, main, ids, positions, inputs.get("mm_encoder_outputs"))
            views.append(reader.beside() if branch.shares_prompt else reader.anew())
        on_cache = BranchCache(self.contrast, views, call, len(ids) == len(self.inputs["input_ids"]))
        on_cache.fill(self._target, views)
        if call.plan.drops and not on_cache.drops:
            assert main.request is not None
            ride(self._target, main.request, main.plan)
            report_original_lengths(self._target)
        t = torch.arange(1, kept + 1, device=ids.device)
        output.logits = on_cache.scores(call.model, [view.logits for view in views], early, t)
        compat.set_output_cache(output, self._target)
        self.cache, self.ropes = None, on_cache.ropes


@dataclass(eq=False)
class _Reader:
    """Reads the prompt of one branch.

    Attributes:
        ids: int64 ``[n, tokens]`` of the main prompt, drafts of assisted decoding included; positions: its position
            ids.
        encoded: images as the main prompt saw them, where generate() encodes them first.
    """

    branches: Branches
    call: Call
    branch: Branch
    plan: Plan
    main: ReadPrompt
    ids: Tensor
    positions: Tensor
    encoded: Any

    @property
    def prompt(self) -> int:
        return self.main.mask.shape[1]

    @property
    def times(self) -> int:
        """Rows for each prompt of the call."""
        return len(self.ids) // len(self.branches.inputs["input_ids"])

    def beside(self) -> ReadPrompt:
        """From the last prompt token on with hidden keys; everything before is the main prompt's."""
        prompt, drafts, hidden = self.prompt, self.ids.shape[1] - self.prompt, self._hidden()
        if 0 < self.call.record.anatomy.window <= prompt:
            raise UnsupportedError(
                f"branch '{self.branch.name}' goes on from the main prompt, of which the sliding window of"
                f" {self.call.record.anatomy.window} tokens has left a part behind; use shorter prompts, or a rule"
                " with other branches"
            )
        cache = compat.new_cache(self.call.model)
        for number, layer in enumerate(self.main.cache.layers):
            if layer.keys is None:  # a layer that reads the keys of another
                continue
            cache.update(layer.keys[..., : prompt - 1, :], layer.values[..., : prompt - 1, :], number)
        call = replace(self.call, plan=self.plan, prompt_length=prompt - 1, branches=None, token=object())
        if not self.plan.is_identity:
            assert self.main.request is not None
            request = self.main.request.moved(hidden=hidden)
            request.call, request.prompt_length = call.token, prompt - 1
            ride(cache, request, self.plan)
        mask = self.main.mask & ~hidden
        inputs = {"input_ids": self.ids[:, prompt - 1 :], "attention_mask": pad(mask.long(), (0, drafts), value=1)}
        logits = self._run(call, cache, inputs, self.positions[..., prompt - 1 :])
        return ReadPrompt(cache, logits, mask, self.main.last)

    def anew(self) -> ReadPrompt:
        """The whole prompt of the branch, once for each prompt of the call."""
        inputs = self._inputs()
        mask = inputs["attention_mask"].bool()
        positions = self.call.record.family.positions(self.call.model, inputs)
        last, drafts = positions[..., -1:], self.ids[:: self.times, self.prompt :]
        if count := drafts.shape[1]:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], drafts], 1)
            inputs["attention_mask"] = pad(inputs["attention_mask"], (0, count), value=1)
            positions = torch.cat([positions, last + torch.arange(1, count + 1, device=last.device)], -1)
            for name in inputs.keys() & set(OF_TOKENS):
                inputs[name] = pad(inputs[name], (0, count))
        blank = None if self.branch.tokens is None else pad(self._hidden()[:: self.times], (0, count))
        call = replace(
            self.call, plan=self.plan, prompt_length=mask.shape[1], plain_mask=True, branches=None, blank=blank,
            rope=self.branch.rope, token=object(), tower=TowerView(),
        )  # fmt: skip
        cache = compat.new_cache(self.call.model)
        logits = self._run(call, cache, inputs, positions)
        return ReadPrompt(cache, logits, mask, last, self.branch.rope).repeated(self.times)

    def _run(self, call: Call, cache: DynamicCache, inputs: dict[str, Any], positions: Tensor) -> Tensor:
        """Logits of the last prompt token, and of the drafts after it."""
        kept = 1 + self.ids.shape[1] - self.prompt
        out = run(call, cache, **inputs, position_ids=positions, logits_to_keep=kept)
        logits: Tensor = out.logits[:, -kept:]
        return logits

    def _hidden(self) -> Tensor:
        """bool ``[n, prompt]``: image tokens that the branch does not see."""
        tokens, request, sizes = self.branch.tokens, self.main.request, self.call.record.anatomy
        assert tokens is not None
        assert request is not None
        attention = Gaze.read(request, tokens.layers(sizes))[..., : self.prompt]
        types = request.types(self.prompt, attention.device)
        visual = (types != TEXT) & self.main.mask.to(attention.device)
        kept = tokens.choose(attention, visual)
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != visual.shape:
            raise InputError(
                f"branch '{self.branch.name}': choose() of its tokens must return a bool tensor {list(visual.shape)}"
            )
        return (visual & ~kept).to(self.ids.device)

    def _inputs(self) -> dict[str, Any]:
        """What the branch gives the model, on the device of the main prompt."""
        branch, device = self.branch, self.ids.device
        inputs = {name: to_device(value, device) for name, value in self.branches.inputs.items()}
        inputs["attention_mask"] = self.main.mask[:: self.times].long()
        given = self.branches.given.get(branch.name, {})
        inputs |= {name: to_device(value, device) for name, value in given.items()}
        if given:
            _check_prompts(
                self.call.record.family, self.call.model, branch, inputs, len(self.branches.inputs["input_ids"])
            )
        self._change_images(inputs)
        if branch.prompt != "same" or branch.image == "drop":
            self._change_prompt(inputs)
        if branch.image == "drop":
            return {name: value for name, value in inputs.items() if name not in OF_IMAGES}
        if not given and self._sees_the_same:
            inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}
            inputs["mm_encoder_outputs"] = self.encoded  # the vision tower need not run again
        return inputs

    @property
    def _sees_the_same(self) -> bool:
        """Images as the main prompt saw them will do."""
        found = self.encoded is not None and not self.plan.on_image_features
        return found and self.branch.image == "same" and self.times == 1

    def _change_images(self, inputs: dict[str, Any]) -> None:
        """Let the branch's function see the pixels of one row of the batch at a time, if it has one."""
        if not callable(self.branch.image) and self.branch.image != "blank":
            return
        change = self.branch.image if callable(self.branch.image) else torch.zeros_like
        found = self.call.record.family.pixels(self.call.model, inputs)
        if not found:
            raise InputError(
                f"the branch '{self.branch.name}' changes the image; give pixel_values, not encoded features"
            )
        family, model, before = self.call.record.family, self.call.model, dict(inputs)
        ahead = (slice(None),) * family.pixel_axis
        for name, counts in found.items():
            changed, first = before[name].clone(), 0
            for count in counts:
                rows = slice(first, first + count)
                own, first = (*ahead, rows, *family.unpadded(model, before, name, rows)), first + count
                if count:
                    pixels = before[name][own]
                    after = change(pixels)
                    if not isinstance(after, Tensor) or after.shape != pixels.shape:
                        got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
                        raise InputError(
                            f"branch '{self.branch.name}': its function must keep the shape of {name},"
                            f" {tuple(pixels.shape)}, got {got}"
                        )
                    changed[own] = after.to(changed)
            inputs[name] = changed

    def _checked(self, ids: Any) -> Tensor:
        """What a prompt function returned."""
        vocabulary = self.call.model.get_input_embeddings().weight.shape[0]
        whole = isinstance(ids, Tensor) and ids.ndim == 1 and ids.dtype in (torch.int64, torch.int32)
        if not whole or bool(((ids < 0) | (ids >= vocabulary)).any()):
            raise InputError(
                f"branch '{self.branch.name}': its prompt function must return token ids, an int64 tensor [tokens]"
                f" within 0..{vocabulary - 1}"
            )
        found: Tensor = ids.long()
        return found

    def _other_prompt(self, row: Tensor) -> Tensor:
        """What the branch's prompt is for token ids ``[tokens]`` of the main one."""
        branch, call = self.branch, self.call
        if isinstance(branch.prompt, Instead):
            assert call.record.turns is not None
            return call.record.turns.under(branch.prompt.system, row, call.record.family.token_types(call.model, row))
        return self._checked(branch.prompt(row)) if callable(branch.prompt) else row

    def _change_prompt(self, inputs: dict[str, Any]) -> None:
        """Other token ids, row by row, as a left-padded batch."""
        family, model, branch = self.call.record.family, self.call.model, self.branch
        real, device = inputs["attention_mask"].bool(), self.ids.device
        given = [ids[seen].cpu() for ids, seen in zip(inputs["input_ids"], real, strict=True)]
        rows = [self._other_prompt(row) for row in given]
        before, after = ([images_in(family.token_types(model, row)) for row in some] for some in (given, rows))
        if branch.image == "drop":
            marker_ids = torch.tensor(family.image_ids(model))
            rows = [row[~torch.isin(row, marker_ids)] for row in rows]
        elif before != after:
            raise InputError(
                f"branch '{branch.name}': its prompts must keep the image tokens, {before}, and have {after};"
                " image='drop' takes them away"
            )
        if any(not len(row) for row in rows):
            raise InputError(f"branch '{branch.name}': nothing is left of the prompt")
        longest = max(map(len, rows))
        inputs["input_ids"] = _left_padded(rows, longest, _padding_id(model)).to(device)
        inputs["attention_mask"] = _left_padded([torch.ones_like(row) for row in rows], longest, 0).to(device)
        inputs |= family.retyped(model, inputs)


def _check_prompts(
    family: Family, model: PreTrainedModel, branch: Branch, inputs: Mapping[str, Any], batch: int
) -> None:
    """Prompts that the caller gave to a branch."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == batch and not ids.is_floating_point()
    if not whole or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise InputError(
            f"branch '{branch.name}': input_ids and attention_mask in branch_inputs must be int64 tensors [{batch},"
            " tokens]"
        )
    if branch.image != "drop" and "pixel_values" in inputs and not images_in(family.token_types(model, ids)):
        raise InputError(f"branch '{branch.name}': the input_ids in branch_inputs have no image tokens")


def run(call: Call, cache: DynamicCache, **inputs: Any) -> Any:
    """One forward of the model in a call of its own."""
    token = CALL.set(call)
    try:
        return call.model(**compat.with_cache(inputs, cache, call.model), use_cache=True, return_dict=True)
    finally:
        CALL.reset(token)


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor on a device; other things as they are."""
    return value.to(device) if isinstance(value, Tensor) else value


def images_in(types: Tensor) -> int:
    return int((types != TEXT).sum())


def _left_padded(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    return torch.stack([pad(row, (length - len(row), 0), value=value) for row in rows])


def _padding_id(model: PreTrainedModel) -> int:
    """Any id that is no image token: nobody sees it."""
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(found) if isinstance(found, int) and found >= 0 else 0
