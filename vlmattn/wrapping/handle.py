"""``model.vlmattn``: the recipe in force on one model, and what it did."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vlmattn import attention
from vlmattn.anatomy import Anatomy
from vlmattn.binding import bind
from vlmattn.errors import OptionError, StateError
from vlmattn.models import Family, Turns, marker_ids_of
from vlmattn.recipe import Recipe
from vlmattn.request import Ledger, Plan, Watcher
from vlmattn.wrapping.instead import Instead

_KEPT = 64  # plans of a model


@dataclass(eq=False)
class InForce:
    """A recipe in force, and what it did since. ``warned...``: what is said once was said."""

    recipe: Recipe
    plan: Plan
    enabled: bool = True
    ledger: Ledger = field(default_factory=Ledger)
    warned: set[str] = field(default_factory=set)

    @property
    def acting(self) -> Plan:
        return self.plan if self.enabled else Plan("none")

    def fired(self) -> dict[str, int]:
        """How often each method found something to do."""
        counts = {name: count for (name,), count in self.ledger.read("fired").items()}
        return dict.fromkeys(self.recipe.names, 0) | counts

    def warn_if_idle(self) -> None:
        """Say once if a method of the recipe has not found anything to do."""
        if not self.enabled or not self.first("idle"):  # one look: reading the counts waits for the device
            return
        idle = [name for name, count in self.fired().items() if not count]
        if idle:
            warnings.warn(
                f"vlmattn: {', '.join(idle)} never fired in this generate() call and had no part in the answer;"
                " see model.vlmattn.report()",
                stacklevel=4,
            )

    def warn_of_forward(self) -> None:
        """Say once that a decoding rule is not for single forwards."""
        if self.first("forward"):
            warnings.warn(
                f"vlmattn: the decoding rule of '{self.recipe.name}' acts in generate() only, and this forward was called"
                " directly: it has the model's own logits",
                stacklevel=2,
            )

    def first(self, what: str) -> bool:
        """Whether this was not said before."""
        known = what in self.warned
        self.warned.add(what)
        return not known


# What is in force on a model for this thread's block alone (``Handle.temporarily``): other threads go on as they were.
_LENT: ContextVar[Mapping[Handle, InForce]] = ContextVar("vlmattn_lent", default={})  # noqa: B039  never changed

#: The handles of all wrapped models: models may share a config object, and the last one out restores its setting.
WRAPPED: weakref.WeakSet[Handle] = weakref.WeakSet()
#: Held while a model is wrapped or unwrapped, and while WRAPPED is read.
WRAPPING = threading.RLock()


class Handle:
    """``model.vlmattn``: what is on the model, and what it did.

    Attributes:
        recipe: the recipe in force.
        anatomy: sizes of the decoder.
        turns: the chat template's markers, for recipes that need them.
    """

    def __init__(
        self, recipe: Recipe, anatomy: Anatomy, family: Family, base: str, text: Any, processor: Any = None
    ) -> None:
        self.anatomy, self._family, self._base = anatomy, family, base
        self._text, self._processor = text, processor  # the config that names the attention implementation
        self.turns: Turns | None = None
        self._marker_ids: dict[str, int] | None = None
        self._rotating = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._instead: list[Instead] = []
        self._begin()
        self._standing = InForce(recipe, self.plan_of(recipe))

    def _begin(self) -> None:
        """What a copy makes anew."""
        self._lock = threading.RLock()
        self._running: dict[threading.Thread, list[str]] = {}
        self._gone, self._guests = False, 0
        self._plans: dict[Recipe, Plan] = {}
        self._rotaries: dict[tuple[float, torch.device], nn.Module] = {}

    def __getstate__(self) -> dict[str, Any]:
        made_anew = ("_lock", "_running", "_gone", "_guests", "_plans", "_rotaries")
        return {key: value for key, value in self.__dict__.items() if key not in made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attention.register()  # this may be another process
        self.__dict__.update(state)
        self._begin()
        with WRAPPING:
            WRAPPED.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        found = memo[id(self)] = object.__new__(type(self))
        found.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._refuse_pickling()
        return super().__reduce_ex__(protocol)

    def _refuse_pickling(self) -> None:
        """Raise if the model could be written but not read again, or not be written."""
        for name, module in self._instead[0].owner.named_modules() if self._instead else ():
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                if "<locals>" in getattr(hook, "__qualname__", ""):
                    raise StateError(
                        f"the model cannot be pickled: {name or 'it'} has the hook {hook.__qualname__}, a local function"
                        " (transformers hangs such hooks on a model that runs, bare or wrapped); pickle it before it runs,"
                        " or use save_pretrained"
                    )
        try:
            pickle.loads(pickle.dumps((self._standing, self._processor, self.turns)))
        except Exception as error:
            raise StateError(
                f"the model cannot be pickled while it is wrapped with '{self._standing.recipe.name}', of which a part, or the"
                " processor, cannot be; unwrap it first, or use save_pretrained"
            ) from error

    @property
    def now(self) -> InForce:
        """What is in force, in this thread."""
        return _LENT.get().get(self, self._standing)

    @property
    def recipe(self) -> Recipe:
        return self.now.recipe

    def set(self, recipe: Any, **options: Any) -> None:
        """Put another recipe in force, from the next prompt on; ``report()`` starts anew."""
        chosen = Recipe.of(recipe, **options)
        found = InForce(chosen, self.plan_of(chosen), self.now.enabled)
        if self in (lent := _LENT.get()):
            _LENT.set({**lent, self: found})
        else:
            self._standing = found

    @contextmanager
    def temporarily(self, recipe: Any) -> Iterator[None]:
        """Another recipe in force for the block, in this thread; recipe, report and state of the model stay as they are."""
        chosen = Recipe.of(recipe)
        try:
            with self._for_block(InForce(chosen, self.plan_of(chosen))):
                yield
        finally:
            self._plans.pop(chosen, None)  # what measures keeps what it has seen

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Somebody sees every layer at work, under the recipe in force, within the block, in this thread."""
        now = self.now
        with self._for_block(InForce(now.recipe, replace(now.acting, watching=(watcher,)))):
            yield

    @contextmanager
    def _for_block(self, found: InForce) -> Iterator[None]:
        token = _LENT.set({**_LENT.get(), self: found})
        try:
            yield
        finally:
            _LENT.reset(token)

    def enter(self, what: str) -> bool:
        """Note that this thread runs the model, so that nobody unwraps it meanwhile. False: it was unwrapped already."""
        with self._lock:
            if not self._gone:
                self._running.setdefault(threading.current_thread(), []).append(what)
            return not self._gone

    def leave(self, what: str) -> None:
        """Note that this thread is done with that; nothing to do if it never began."""
        with self._lock:
            found = self._running.get(threading.current_thread(), [])
            if what in found:
                found.remove(what)
            if not found:
                self._running.pop(threading.current_thread(), None)

    def retire(self) -> None:
        """Let nobody begin from here on.

        Raises:
            StateError: the model is running.
        """
        with self._lock:
            here = threading.current_thread()
            for thread, found in self._running.items():
                # a forward of this thread that is still noted was interrupted
                if thread.is_alive() and (thread is not here or "generate" in found):
                    where = "this call" if thread is here else f"thread '{thread.name}'"
                    raise StateError(
                        f"the model is generating in {where}, and unwrapping would change its answer; unwrap it when that is done"
                    )
            self._gone = True

    def plan_of(self, recipe: Recipe) -> Plan:
        plan = self._plans.get(recipe)
        if plan is not None:
            return plan
        plan = bind(recipe, self.anatomy)
        with self._lock:
            if plan.uses_turns and self.turns is None:
                self.turns = _turns(self._processor, self.anatomy.source, plan.turns)
            if len(self._plans) >= _KEPT:  # recipes made anew for every call
                del self._plans[next(iter(self._plans))]
            return self._plans.setdefault(recipe, plan)

    @property
    def marker_ids(self) -> dict[str, int]:
        """Ids of tokens that tell images apart, from the processor or from the tokenizer in the model's folder."""
        if self._marker_ids is None:
            known = (
                self._processor
                if self._processor is not None or not self._family.marker_ids
                else _tokenizer(self.anatomy.source)
            )
            self._marker_ids = marker_ids_of(self._family, known)
        return self._marker_ids

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
        self.now.enabled = True

    def disable(self) -> None:
        """Let the bare model answer, from the next prompt on; hooks stay in place."""
        self.now.enabled = False

    @property
    def enabled(self) -> bool:
        return self.now.enabled

    @property
    def active_plan(self) -> Plan:
        return self.now.acting

    def report(self) -> dict[str, Any]:
        """What happened since the recipe was put in force.

        Returns:
            ``recipe``; ``fired``: how often each method found something to do (each method's docstring says what it
            counts); ``backends``: phase -> backend -> number of attention calls; ``layers``: phase -> backend
            -> the layers it ran in. ``base:`` names the model's own attention. With methods that drop tokens also
            ``image_tokens``: how many a sequence with images had in its prompt and in each layer, on average, and their mean
            over layers (``equivalent``), by which methods compare fairly.
        """
        now = self.now
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
        per_layer = [counts.get(str(layer), 0) / sequences for layer in range(self.anatomy.layers)]
        return {
            "prompt": counts.get("prompt", 0) / sequences,
            "per_layer": per_layer,
            "equivalent": sum(per_layer) / len(per_layer),
        }

    def __repr__(self) -> str:
        return f"<vlmattn '{self.recipe.name}' on {self.anatomy.family}, {'enabled' if self.enabled else 'disabled'}>"


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
