"""``model.vlmattn``: the recipe in force on one model, and what it did."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlmattn.errors import OptionError
from vlmattn.models import Anatomy, Family, Turns, marks_of
from vlmattn.recipe import Recipe
from vlmattn.request import Ledger, Plan, Watcher

_KEPT = 64  # plans of a model


class Handle:
    """``model.vlmattn``: what is on the model, and what it did.

    Attributes:
        recipe: the recipe in force.
        anatomy: sizes of the decoder.
        turns: the chat template's markers, for recipes that need them.
    """

    def __init__(self, recipe: Recipe, anatomy: Anatomy, family: Family, base: str, processor: Any = None) -> None:
        self.anatomy, self._family, self._base = anatomy, family, base
        self._processor = processor
        self.turns: Turns | None = None
        self._marks: dict[str, int] | None = None
        self._enabled, self._rotating = True, False
        self._rotaries: dict[tuple[float, torch.device], nn.Module] = {}
        self._plans: dict[Recipe, Plan] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._originals: dict[str, Any] = {}
        self.set(recipe)

    def set(self, recipe: Any, **options: Any) -> None:
        """Put another recipe in force, from the next prompt on; ``report()`` starts anew."""
        chosen = Recipe.of(recipe, **options)
        self._plan, self.recipe = self.plan_of(chosen), chosen
        self._ledger, self._warned, self._warned_of_forward = Ledger(), False, False

    @contextmanager
    def lent(self, recipe: Any) -> Iterator[None]:
        """Another recipe in force for the block; after it recipe, report and state are as before."""
        before = (self.recipe, self._plan, self._ledger, self._warned, self._enabled)
        self.set(recipe)
        lent, self._enabled = self.recipe, True
        try:
            yield
        finally:
            self._plans.pop(lent, None)  # what measures keeps what it has seen
            self.recipe, self._plan, self._ledger, self._warned, self._enabled = before

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Somebody sees every layer at work, under the recipe in force, within the block."""
        before = self._plan
        self._plan = replace(self.active_plan, watching=(watcher,))
        enabled, self._enabled = self._enabled, True
        try:
            yield
        finally:
            self._plan, self._enabled = before, enabled

    def plan_of(self, recipe: Recipe) -> Plan:
        if recipe not in self._plans:
            plan = recipe.bind(self.anatomy)
            if plan.uses_turns and self.turns is None:
                self.turns = _turns(self._processor, self.anatomy.source, plan.turns)
            self._plans[recipe] = plan
            if len(self._plans) > _KEPT:  # recipes made anew for every call
                del self._plans[next(iter(self._plans))]
        return self._plans[recipe]

    @property
    def marks(self) -> dict[str, int]:
        """Ids of tokens that tell images apart, from the processor or from the tokenizer in the model's folder."""
        if self._marks is None:
            known = (
                self._processor
                if self._processor is not None or not self._family.marks
                else _tokenizer(self.anatomy.source)
            )
            self._marks = marks_of(self._family, known)
        return self._marks

    def rotary(self, module: Any, factor: float) -> nn.Module:
        """A module like the model's rotary embedding, with ``factor`` times its base."""
        key = (factor, module.inv_freq.device)
        if key not in self._rotaries:
            config = copy.deepcopy(module.config)
            config.rope_parameters["rope_theta"] *= factor
            self._rotaries[key] = type(module)(config).to(module.inv_freq.device)
        return self._rotaries[key]

    def enable(self) -> None:
        """Let the recipe act again, from the next prompt on."""
        self._enabled = True

    def disable(self) -> None:
        """Let the bare model answer, from the next prompt on; hooks stay in place."""
        self._enabled = False

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def active_plan(self) -> Plan:
        return self._plan if self._enabled else Plan("none")

    def report(self) -> dict[str, Any]:
        """What happened since the recipe was put in force.

        Returns:
            ``recipe``; ``fired``: how often each method found something to do (each method's docstring says what it
            counts); ``backends``: phase -> backend -> number of attention calls; ``layers``: phase -> backend
            -> the layers it ran in. ``base:`` names the model's own attention. With methods that drop tokens also
            ``image_tokens``: how many a sequence with images had in its prompt and in each layer, on average, and their mean
            over layers (``equivalent``), by which methods compare fairly.
        """
        backends: dict[str, dict[str, int]] = {}
        layers: dict[str, dict[str, list[int]]] = {}
        for (phase, backend, layer), count in self._ledger.read("calls").items():
            row = backends.setdefault(phase, {})
            row[backend] = row.get(backend, 0) + count
            layers.setdefault(phase, {}).setdefault(backend, []).append(int(layer))
        for row_of_layers in layers.values():
            for found in row_of_layers.values():
                found.sort()
        report = {
            "recipe": self.recipe.record(),
            "enabled": self._enabled,
            "fired": self._fired(),
            "backends": backends,
            "layers": layers,
        }
        return report | {"image_tokens": self._image_tokens()} if self.recipe.pruning else report

    def _image_tokens(self) -> dict[str, Any]:
        """Image tokens of a sequence, on average, in the prompt and in each layer."""
        counts = {name: count for (name,), count in self._ledger.read("image tokens").items()}
        sequences = max(self._ledger.read("prompts with images").get((), 0), 1)
        per_layer = [counts.get(str(layer), 0) / sequences for layer in range(self.anatomy.layers)]
        return {
            "prompt": counts.get("prompt", 0) / sequences,
            "per_layer": per_layer,
            "equivalent": sum(per_layer) / len(per_layer),
        }

    def _fired(self) -> dict[str, int]:
        counts = {name: count for (name,), count in self._ledger.read("fired").items()}
        return dict.fromkeys(self.recipe.names, 0) | counts

    def warn_if_idle(self) -> None:
        """Say once if a method of the recipe has not found anything to do."""
        if self._warned or not self._enabled:
            return
        self._warned = True  # one look: reading the counts waits for the device
        idle = [name for name, count in self._fired().items() if not count]
        if idle:
            warnings.warn(
                f"vlmattn: {', '.join(idle)} never fired in this generate() call and had no part in the answer;"
                " see model.vlmattn.report()",
                stacklevel=3,
            )

    def warn_of_forward(self) -> None:
        """Say once that a decoding rule is not for single forwards."""
        if not self._warned_of_forward:
            self._warned_of_forward = True
            warnings.warn(
                f"vlmattn: the decoding rule of '{self.recipe.name}' acts in generate() only, and this forward was called"
                " directly: it has the model's own logits",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"<vlmattn '{self.recipe.name}' on {self.anatomy.family}, {'enabled' if self._enabled else 'disabled'}>"


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a wrapped model, else None."""
    handle = model.__dict__.get("vlmattn")
    return handle if isinstance(handle, Handle) else None


def _turns(processor: Any, source: str, needed_by: tuple[str, ...]) -> Turns | None:
    """Markers from the processor that was given, else from the one in the folder that the model came from.

    Without either None, or an error if a method needs them.
    """
    if processor is not None:
        return Turns.of(processor)
    from transformers import AutoProcessor

    names = ", ".join(needed_by)
    try:
        return Turns.of(AutoProcessor.from_pretrained(source, local_files_only=True))
    except Exception as error:  # no folder, no processor in it, one that cannot be read: the remedy is the same
        if not needed_by:
            return None
        raise OptionError(
            f"{names} must know where the user's turn ends; give the processor: wrap(model, ..., processor=processor)"
        ) from error


def _tokenizer(source: str) -> Any:
    """The tokenizer in the folder that the model came from, or None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception:  # no folder, or none in it
        return None
