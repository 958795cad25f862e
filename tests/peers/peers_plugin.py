"""A pytest plugin for the model tests of transformers: seeds every test, wraps models as they are made, notes outcomes.

``run.py`` starts pytest with it, once bare and once wrapped; ``PEERS_RECIPE`` (empty: bare) and ``PEERS_REPORT`` say how.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import vlmattn
from vlmattn.interventions.base import Intervention
from vlmattn.interventions.registry import option, register
from vlmattn.kernels import AttentionEdit, HeadPart, LogitPart
from vlmattn.models import find_family
from vlmattn.request import Scope
from vlmattn.wrapping import handle_of

WAYS = ("pass", "gain", "kernel")
_HOME = str(Path(vlmattn.__file__).parent)


@register("peer", paper="", code="", faithful="", parts="none", cost="none", presets={})
@dataclass(frozen=True, kw_only=True)
class Peer(Intervention):
    """Changes nothing, by going further and further into the engine: no edit, gains of 1, scores plus 0."""

    needs_images: ClassVar[bool] = False
    way: str = option("pass", about="how nothing is changed", choices=WAYS)

    def edit(self, scope: Scope) -> AttentionEdit:
        if self.way == "gain":
            return AttentionEdit(head_gain=(HeadPart(torch.ones(1, scope.heads, device=scope.device)),))
        if self.way == "kernel":
            return AttentionEdit(logit=(LogitPart(bias=torch.zeros_like(scope.visual, dtype=torch.float32)),))
        return AttentionEdit()


def recipe_of(name: str) -> Any:
    """``none`` short-circuits; each of ``WAYS`` has a step made in every forward; else what ``wrap`` takes."""
    return [Peer(way=name)] if name in WAYS else name


class Wrapper:
    """Wraps every supported model right after it is made, or loaded."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe_of(recipe)
        self.loading = 0
        self.handles: list[Any] = []
        self.refused: Counter[str] = Counter()

    def wrap(self, model: Any) -> None:
        """Wrap a model that is accepted; anything but a refusal is for the test to see."""
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            return
        if handle_of(model) is not None:  # a class that goes on after the constructor of its parent
            vlmattn.unwrap(model)
        try:
            find_family(model)
            vlmattn.wrap(model, self.recipe)
        except vlmattn.UnsupportedError as error:
            self.refused[str(error)] += 1
            return
        self.handles.append(handle_of(model))

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

        PreTrainedModel.post_init = after
        PreTrainedModel.from_pretrained = classmethod(loaded)

    def begin(self) -> None:
        self.handles, self.refused = [], Counter()

    def facts(self) -> dict[str, Any]:
        """How many models were wrapped, attention calls the engine answered, and why models were left bare."""
        calls = sum(sum(handle._ledger.read("calls").values()) for handle in self.handles)
        return {"wrapped": len(self.handles), "calls": calls, "refused": dict(self.refused)}


def _first_line(report: Any) -> tuple[str, str]:
    """Message of a failure, and the last line of ours it went through."""
    longrepr = report.longrepr
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(longrepr)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    entries = [entry for chain in getattr(longrepr, "chain", ()) for entry in chain[0].reprentries]
    places = [entry.reprfileloc for entry in entries if getattr(entry, "reprfileloc", None) is not None]
    ours = [f"{place.path}:{place.lineno}" for place in places if "vlmattn" in Path(place.path).parts]
    return line, ours[-1].replace(_HOME, "vlmattn") if ours else ""


_RANKS = ("passed", "skipped", "xfailed", "xpassed", "failed")


class Notes:
    """One line of JSON for each test, written as soon as the test is over."""

    def __init__(self, path: str, wrapper: Wrapper | None) -> None:
        self.path, self.wrapper = path, wrapper
        self.found: dict[str, Any] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.found = {"test": item.nodeid, "outcome": "passed", "error": "", "place": "", "subtests": 0, "seconds": 0.0}
        _seed()
        if self.wrapper is not None:
            self.wrapper.begin()
        result = yield
        facts = {} if self.wrapper is None else self.wrapper.facts()
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
    try:
        function(*args)
    except RuntimeError:  # set already
        pass


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    _quiet(torch.set_num_interop_threads, 1)
    recipe = os.environ.get("PEERS_RECIPE", "")
    wrapper = Wrapper(recipe) if recipe else None
    if wrapper is not None:
        wrapper.install()
    config.pluginmanager.register(Notes(os.environ["PEERS_REPORT"], wrapper), "peers_notes")
