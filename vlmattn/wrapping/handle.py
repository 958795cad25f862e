"""``model.vlmattn``: what users see of a wrapped model."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmattn.pages import filled
from vlmattn.recipe import Recipe
from vlmattn.request import Ledger
from vlmattn.wrapping.record import Record


class Handle:
    """``model.vlmattn``: the recipe in force on a model, and what it did.

    Attributes:
        recipe: the recipe in force; enabled: it acts.
    """

    def __init__(self, record: Record) -> None:
        self._record = record

    @property
    def recipe(self) -> Recipe:
        return self._record.now.recipe

    @property
    def enabled(self) -> bool:
        return self._record.now.enabled

    def set(self, recipe: Any, **options: Any) -> None:
        """Put another recipe in force, from the next prompt on; ``report()`` starts anew."""
        self._record.set(recipe, **options)

    def enable(self) -> None:
        """Let the recipe act again, from the next prompt on."""
        self._record.now.enabled = True

    def disable(self) -> None:
        """Let the bare model answer, from the next prompt on; hooks stay in place."""
        self._record.now.enabled = False

    def report(self) -> dict[str, Any]:
        """What happened since the recipe was put in force.

        Returns:
            ``recipe``; ``fired``: how often each method found something to do (each method's docstring says what it
            counts); ``backends``: phase -> backend -> number of attention calls; ``layers``: phase -> backend
            -> the layers it ran in. ``base:`` names the model's own attention. With methods that drop tokens also
            ``image_tokens``: how many a sequence with images had in its prompt and in each layer, on average, and their
            mean over layers (``equivalent``), by which methods compare fairly.
        """
        now = self._record.now
        backends: dict[str, dict[str, int]] = {}
        layers: dict[str, dict[str, list[int]]] = {}
        for (phase, backend, layer), count in now.ledger.read("calls").items():
            row = backends.setdefault(phase, {})
            row[backend] = row.get(backend, 0) + count
            layers.setdefault(phase, {}).setdefault(backend, []).append(int(layer))
        for row_of_layers in layers.values():
            for found in row_of_layers.values():
                found.sort()
        report = {
            "recipe": now.recipe.record(),
            "enabled": now.enabled,
            "fired": now.fired(),
            "backends": backends,
            "layers": layers,
        }
        return report | {"image_tokens": self._image_tokens(now.ledger)} if now.recipe.pruning else report

    def _image_tokens(self, ledger: Ledger) -> dict[str, Any]:
        """Image tokens of a sequence, on average, in the prompt and in each layer."""
        counts = {name: count for (name,), count in ledger.read("image tokens").items()}
        sequences = max(ledger.read("prompts with images").get((), 0), 1)
        per_layer = [counts.get(str(layer), 0) / sequences for layer in range(self._record.anatomy.layers)]
        return {
            "prompt": counts.get("prompt", 0) / sequences,
            "per_layer": per_layer,
            "equivalent": sum(per_layer) / len(per_layer),
        }

    def __repr__(self) -> str:
        return f"<vlmattn '{self.recipe.name}' on {self._record.anatomy.family}, {self._state}>"

    @property
    def _state(self) -> str:
        return "enabled" if self.enabled else "disabled"

    def _repr_html_(self) -> str:
        """What notebooks show: the recipe, what its methods did, and who computed the attention."""
        report = self.report()
        rows = [
            ("recipe", f"{self.recipe.name} on {self._record.anatomy.family}, {self._state}"),
            *((f"fired: {name}", f"{count:,}") for name, count in report["fired"].items()),
            *(
                (phase, ", ".join(f"{name} {count:,}" for name, count in backends.items()))
                for phase, backends in report["backends"].items()
            ),
        ]
        cells = (
            filled("<tr><th style='text-align:left'>{{a}}</th><td>{{b}}</td></tr>", {"a": a, "b": b}) for a, b in rows
        )
        return f"<table>{''.join(cells)}</table>"


def handle_of(model: nn.Module) -> Handle | None:
    """What users see of a wrapped model; None if it is not wrapped."""
    handle = model.__dict__.get("vlmattn")
    return handle if isinstance(handle, Handle) else None


def record_of(model: nn.Module) -> Record | None:
    """What the engine knows of a wrapped model; None if it is not wrapped."""
    handle = handle_of(model)
    return None if handle is None else handle._record


def within_peft(model: Any) -> Any:
    """The model within a PEFT model; else the model."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
