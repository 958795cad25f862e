"""What the engine knows of a wrapped model: the recipe in force, its plans, and who runs the model."""

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

from vlmattn.anatomy import Anatomy
from vlmattn.binding import bind
from vlmattn.errors import OptionError, StateError
from vlmattn.models import Family, Turns, marker_ids_of
from vlmattn.recipe import Recipe
from vlmattn.request import NO_PLAN, Ledger, Plan, Watcher
from vlmattn.wrapping.instead import Instead
from vlmattn.wrapping.registration import register

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
        return self.plan if self.enabled else NO_PLAN

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
                f"vlmattn: the decoding rule of '{self.recipe.name}' acts in generate() only, and this forward was"
                " called directly: it has the model's own logits",
                stacklevel=2,
            )

    def warn_of_text(self, name: str) -> None:
        """Say once that a prompt without images has the bare model's answer."""
        if self.first("text"):
            warnings.warn(
                f"vlmattn: a prompt without image tokens: '{name}' is about images, so the bare model answers it, and"
                " all such prompts from here on",
                stacklevel=3,
            )

    def first(self, what: str) -> bool:
        """Whether this was not said before."""
        known = what in self.warned
        self.warned.add(what)
        return not known


# What is in force on a model for this thread's block alone (``Record.temporarily``): other threads go on as they were.
_TEMPORARY: ContextVar[Mapping[Record, InForce]] = ContextVar("vlmattn_temporary", default={})  # noqa: B039  never changed

#: All wrapped models: they may share a config object, and the last one out restores its setting.
WRAPPED: weakref.WeakSet[Record] = weakref.WeakSet()
#: Held while a model is wrapped or unwrapped, and while WRAPPED is read.
WRAPPING = threading.RLock()


class Record:
    """What the engine knows of one wrapped model.

    Attributes:
        anatomy: sizes of the decoder; family: its patcher.
        base: the attention implementation that the model had; text: the config that names it.
        turns: the chat template's markers, for recipes that need them.
        hooks, instead: what was put on the model; rotating: also on its rotary embedding.
        guests: who borrows the model, which nobody has wrapped.
    """

    def __init__(
        self, recipe: Recipe, anatomy: Anatomy, family: Family, base: str, text: Any, processor: Any = None
    ) -> None:
        self.anatomy, self.family, self.base = anatomy, family, base
        self.text, self._processor = text, processor
        self.turns: Turns | None = None
        self._marker_ids: dict[str, int] | None = None
        self.rotating = False
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.instead: list[Instead] = []
        self._begin()
        self._standing = InForce(recipe, self.plan_of(recipe))

    def _begin(self) -> None:
        """What a copy makes anew."""
        self.lock = threading.RLock()
        self._running: dict[threading.Thread, list[str]] = {}
        self._gone, self.guests = False, 0
        self._plans: dict[Recipe, Plan] = {}
        self._rotaries: dict[tuple[float, torch.device], nn.Module] = {}

    def __getstate__(self) -> dict[str, Any]:
        made_anew = ("lock", "_running", "_gone", "guests", "_plans", "_rotaries")
        return {key: value for key, value in self.__dict__.items() if key not in made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(self.base)  # this may be another process
        self._begin()
        with WRAPPING:
            WRAPPED.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        found = memo[id(self)] = object.__new__(type(self))
        found.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._refuse_pickling()
        return super().__reduce_ex__(protocol)

    def _refuse_pickling(self) -> None:
        """Raise if the model could be written but not read again, or not be written."""
        for name, module in self.instead[0].owner.named_modules() if self.instead else ():
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                if "<locals>" in getattr(hook, "__qualname__", ""):
                    raise StateError(
                        f"the model cannot be pickled: {name or 'it'} has the hook {hook.__qualname__}, a local"
                        " function (transformers hangs such hooks on a model that runs, bare or wrapped); pickle it"
                        " before it runs, or use save_pretrained"
                    )
        try:
            pickle.loads(pickle.dumps((self._standing, self._processor, self.turns)))
        except Exception as error:
            raise StateError(
                f"the model cannot be pickled while it is wrapped with '{self._standing.recipe.name}', of which a"
                " part, or the processor, cannot be; unwrap it first, or use save_pretrained"
            ) from error

    @property
    def now(self) -> InForce:
        """What is in force, in this thread."""
        return _TEMPORARY.get().get(self, self._standing)

    @property
    def measuring(self) -> bool:
        """What is in force is for a block of this thread, to look at prompts or to compare them."""
        return self in _TEMPORARY.get()

    def set(self, recipe: Any, **options: Any) -> None:
        """Put another recipe in force, from the next prompt on."""
        chosen = Recipe.of(recipe, **options)
        found = InForce(chosen, self.plan_of(chosen), self.now.enabled)
        if self.measuring:
            _TEMPORARY.set({**_TEMPORARY.get(), self: found})
        else:
            self._standing = found

    @contextmanager
    def temporarily(self, recipe: Any) -> Iterator[None]:
        """Another recipe in force for the block, in this thread; recipe, report and state of the model stay."""
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
        token = _TEMPORARY.set({**_TEMPORARY.get(), self: found})
        try:
            yield
        finally:
            _TEMPORARY.reset(token)

    def enter(self, what: str) -> bool:
        """Note that this thread runs the model, so that nobody unwraps it; False: it was unwrapped already."""
        with self.lock:
            if not self._gone:
                self._running.setdefault(threading.current_thread(), []).append(what)
            return not self._gone

    def leave(self, what: str) -> None:
        """Note that this thread is done with that; nothing to do if it never began."""
        with self.lock:
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
        with self.lock:
            here = threading.current_thread()
            for thread, found in self._running.items():
                # a forward of this thread that is still noted was interrupted
                if thread.is_alive() and (thread is not here or "generate" in found):
                    where = "this call" if thread is here else f"thread '{thread.name}'"
                    raise StateError(
                        f"the model is generating in {where}, and unwrapping would change its answer; unwrap it when"
                        " that is done"
                    )
            self._gone = True

    def plan_of(self, recipe: Recipe) -> Plan:
        plan = self._plans.get(recipe)
        if plan is not None:
            return plan
        plan = bind(recipe, self.anatomy)
        with self.lock:
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
                if self._processor is not None or not self.family.marker_ids
                else _tokenizer(self.anatomy.source)
            )
            self._marker_ids = marker_ids_of(self.family, known)
        return self._marker_ids

    def rotary(self, module: Any, factor: float) -> nn.Module:
        """A module like the model's rotary embedding, with ``factor`` times its base."""
        key = (factor, module.inv_freq.device)
        if key not in self._rotaries:
            config = copy.deepcopy(module.config)
            config.rope_parameters["rope_theta"] *= factor
            self._rotaries[key] = type(module)(config).to(module.inv_freq.device)
        return self._rotaries[key]


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
