"""Runs the registered attention function without a model: a request, the plan that acts on it, and the forward that carries both."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import AttentionInterface

from vlmattn.anatomy import Anatomy
from vlmattn.attention import FORWARD
from vlmattn.binding import bind
from vlmattn.recipe import Recipe
from vlmattn.request import Forward, Ledger, Part, Plan, Request, Step
from vlmattn.wrapping.registration import register

_PLANS: WeakKeyDictionary[Request, Plan] = WeakKeyDictionary()


def request_of(recipe: Any, anatomy: Anatomy) -> Request:
    """A request for a recipe on a model of these sizes."""
    plan = bind(Recipe.of(recipe), anatomy)
    request = Request(len(plan.by_layer), Ledger(), plan.drops)
    _PLANS[request] = plan
    return request


def plan_of(request: Request) -> Plan:
    """The plan that a request was made for."""
    return _PLANS[request]


def registered(step: Step | None, *states: Any, **kwargs: Any) -> Tensor:
    """Head outputs ``[batch, query, heads, dim]`` of the function that wrapped models call; None: nothing acts."""
    register("sdpa")
    passing = {} if step is None else {FORWARD: Forward((Part(step=step, plan=_PLANS[step.request]),))}
    out: Tensor = AttentionInterface()["vlmattn"](*states, **kwargs, **passing)[0]
    return out
