"""A pytest plugin for the model tests of transformers: seeds every test, wraps models as they are made, notes outcomes.

``run.py`` starts pytest with it, once bare and once wrapped; ``PEERS_RECIPE`` (empty: bare) and ``PEERS_REPORT`` say how.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

import vlmattn
from vlmattn.interventions.base import Intervention
from vlmattn.kernels import AttentionEdit, HeadPart, LogitPart
from vlmattn.models import find_family
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext
from vlmattn.wrapping import record_of
from vlmattn.wrapping.registration import NAMES

WAYS = ("pass", "gain", "kernel")
_HOME = str(Path(vlmattn.__file__).parent)


@register("peer", paper="", code="", faithful="", parts="none", cost="none", presets={})
@dataclass(frozen=True, kw_only=True)
class Peer(Intervention):
    """Changes nothing, by going further and further into the engine: no edit, gains of 1, scores plus 0."""

    needs_images: ClassVar[bool] = False
    way: str = option("pass", about="how nothing is changed", choices=WAYS)

    def edit(self, context: LayerContext) -> AttentionEdit:
        if self.way == "gain":
            return AttentionEdit(head_gain=(HeadPart(torch.ones(1, context.heads, device=context.device)),))
        if self.way == "kernel":
            return AttentionEdit(logit=(LogitPart(bias=torch.zeros_like(context.visual, dtype=torch.float32)),))
        return AttentionEdit()


def recipe_of(name: str) -> Any:
    """``none`` short-circuits; each of ``WAYS`` has a step made in every forward; else what ``wrap`` takes."""
    return [Peer(way=name)] if name in WAYS else name


class Wrapper:
    """Wraps every supported model right after it is made, or loaded."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe_of(recipe)
        self.loading = self.setting = 0
        self.models: weakref.WeakSet[Any] = weakref.WeakSet()
        self.begin()

    def begin(self) -> None:
        self.records: list[Any] = []
        self.refused: Counter[str] = Counter()
        self.rewrapped = 0

    def wrap(self, model: Any) -> None:
        """Wrap a model that is accepted; anything but a refusal is for the test to see."""
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            return
        try:
            with self.apart():
                if record_of(model) is not None:  # a class that goes on after the constructor of its parent
                    vlmattn.unwrap(model)
                find_family(model)
                vlmattn.wrap(model, self.recipe)
        except vlmattn.UnsupportedError as error:
            self.refused[str(error)] += 1
            return
        self.records.append(record_of(model))
        self.models.add(model)

    def rewrap(self) -> None:
        """What the error says: after another attention implementation was set, unwrap the model and wrap it again."""
        for model in list(self.models):
            found = model.config.get_text_config()._attn_implementation
            if record_of(model) is not None and found not in NAMES.values():
                self.rewrapped += 1
                self.wrap(model)

    @contextmanager
    def set_by_test(self) -> Iterator[None]:
        """The outermost setting of an attention implementation that is not by ``wrap`` itself."""
        self.setting += 1
        try:
            yield
        finally:
            self.setting -= 1
        if not self.setting:
            self.rewrap()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What we do to a model is no setting by the test."""
        self.setting += 1
        try:
            yield
        finally:
            self.setting -= 1

    def install(self) -> None:
        post_init, load = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__

        @functools.wraps(post_init)
        def after(model: PreTrainedModel) -> None:
            post_init(model)
            if not self.loading:
                self.wrap(model)

        @functools.wraps(load)
        def loaded(cls: type, *args: Any, **kwargs: Any) -> Any:
            self.loading += 1
            try:
                found = load(cls, *args, **kwargs)
            finally:
                self.loading -= 1
            if not self.loading:
                self.wrap(found[0] if isinstance(found, tuple) else found)
            return found

        set_implementation, written = PreTrainedModel.set_attn_implementation, PreTrainedConfig._attn_implementation

        @functools.wraps(set_implementation)
        def set_on_model(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
            self.models.add(model)  # a deep copy is not known yet
            with self.set_by_test():
                set_implementation(model, *args, **kwargs)

        def set_on_config(config: PreTrainedConfig, value: Any) -> None:
            with self.set_by_test():
                written.fset(config, value)

        PreTrainedModel.post_init = after
        PreTrainedModel.from_pretrained = classmethod(loaded)
        PreTrainedModel.set_attn_implementation = set_on_model
        PreTrainedConfig._attn_implementation = property(written.fget, set_on_config)

    def facts(self) -> dict[str, Any]:
        """How many models were wrapped (again), attention calls that the engine answered, why models were left bare."""
        calls = sum(sum(record.now.ledger.read("calls").values()) for record in self.records)
        refused = dict(self.refused)
        return {"wrapped": len(self.records), "rewrapped": self.rewrapped, "calls": calls, "refused": refused}


def _first_line(report: Any) -> tuple[str, str]:
    """Message of a failure, and the last line of ours it went through."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):  # where and why a test was skipped
        return str(longrepr[2]), ""
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(longrepr)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    entries = [entry for chain in getattr(longrepr, "chain", ()) for entry in chain[0].reprentries]
    places = [entry.reprfileloc for entry in entries if getattr(entry, "reprfileloc", None) is not None]
    ours = [f"{place.path}:{place.lineno}" for place in places if "vlmattn" in Path(place.path).parts]
    return line, ours[-1].replace(_HOME, "vlmattn") if ours else ""


class Traces:
    """What a test does with models: how many it makes, and how often it generates. A test that looks at a wrapped model and
    leaves quietly what it would have tried on a bare one passes too; here it shows."""

    def __init__(self) -> None:
        self.models = self.generates = 0

    def install(self) -> None:
        post_init, generate = PreTrainedModel.post_init, GenerationMixin.generate

        @functools.wraps(post_init)
        def after(model: PreTrainedModel) -> None:
            self.models += 1
            post_init(model)

        @functools.wraps(generate)
        def generated(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            self.generates += 1
            return generate(model, *args, **kwargs)

        PreTrainedModel.post_init, GenerationMixin.generate = after, generated


_RANKS = ("passed", "skipped", "xfailed", "xpassed", "failed")


class Notes:
    """One line of JSON for each test, written as soon as the test is over."""

    def __init__(self, path: str, wrapper: Wrapper | None) -> None:
        self.path, self.wrapper, self.traces = path, wrapper, Traces()
        self.traces.install()
        self.found: dict[str, Any] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.found = {"test": item.nodeid, "outcome": "passed", "error": "", "place": "", "subtests": 0, "seconds": 0.0}
        _seed()
        self.traces.models = self.traces.generates = 0
        if self.wrapper is not None:
            self.wrapper.begin()
        result = yield
        facts = {} if self.wrapper is None else self.wrapper.facts()
        facts |= {"models": self.traces.models, "generates": self.traces.generates}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**self.found, **facts}) + "\n")
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        found, outcome = self.found, report.outcome
        found["seconds"] += getattr(report, "duration", 0.0)
        if "SubTest" in type(report).__name__ or "Subtest" in type(report).__name__:
            found["subtests"] += report.passed
            if not report.failed:
                return
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        if report.when != "call" and outcome == "passed":
            return
        if _RANKS.index(outcome) >= _RANKS.index(found["outcome"]):
            if outcome != found["outcome"] and report.longrepr:
                found["error"], found["place"] = _first_line(report)
            found["outcome"] = outcome


def _seed() -> None:
    """The same random numbers in both runs; the tests have a generator of their own."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    common = sys.modules.get("tests.test_modeling_common")
    if (own := getattr(common, "global_rng", None)) is not None:
        own.seed(0)


def _quiet(function: Callable[[int], None], *args: int) -> None:
    with contextlib.suppress(RuntimeError):  # set already
        function(*args)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    _quiet(torch.set_num_interop_threads, 1)
    recipe = os.environ.get("PEERS_RECIPE", "")
    wrapper = Wrapper(recipe) if recipe else None
    if wrapper is not None:
        wrapper.install()
    config.pluginmanager.register(Notes(os.environ["PEERS_REPORT"], wrapper), "peers_notes")
