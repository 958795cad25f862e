"""Contrastive decoding as data: which other views of the prompt come along, and the rule that combines their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.noise import Noise
from vlmattn.decoding.rules import Contrast, Rule
from vlmattn.errors import OptionError, quoted
from vlmattn.interventions import Intervention
from vlmattn.options import Options
from vlmattn.request import LayerContext, Request, Weights

IMAGES = ("same", "blank", "drop", "given")


@dataclass(frozen=True)
class Instead:
    """Another system message than the prompt's, written with the model's chat template."""

    system: str


class TokenChoice(Protocol):
    """Chooses image tokens by the attention that the row before the first new token pays them in the main prompt."""

    @property
    def blank(self) -> bool:
        """Features of the others are zeroed and the prompt is read again; else their keys are hidden from the last
        prompt token on, and everything before is shared with the main prompt."""
        ...

    def layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Layers that are looked at."""
        ...

    def choose(self, attention: Tensor, visual: Tensor) -> Tensor:
        """Image tokens that stay, bool ``[batch, key]``.

        Args:
            attention: float32 ``[layer, batch, key]``, mean over heads; rows sum to 1.
            visual: bool ``[batch, key]``, image tokens.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Another view of the prompt, whose logits come along with every token.

    Attributes:
        name: for errors, and for ``generate(..., branch_inputs={name: {...}})``.
        image: "same"; a ``Noise``; "blank" (zeros after preprocessing, the mean colour); "drop" (a prompt without the
            image tokens); "given" (``branch_inputs`` with every call); or a function of one row's pixel tensor.
        prompt: "same"; ``Instead(system=...)``; "given" (``input_ids`` and ``attention_mask`` in ``branch_inputs``);
            or a function of one row's ids int64 ``[tokens]`` (without padding) that returns other ids.
        tokens: image tokens that the branch sees; None = all.
        edits: attention edits of the recipe: "inherit", "off", or the branch's own methods.
        rope: factor on the base of the rotary position embedding.

    Raises:
        OptionError: a value out of range, or two that exclude each other.
    """

    name: str
    image: str | Noise | Callable[[Tensor], Tensor] = "same"
    prompt: str | Instead | Callable[[Tensor], Tensor] = "same"
    tokens: TokenChoice | None = None
    edits: Literal["inherit", "off"] | tuple[Intervention, ...] = "inherit"
    rope: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.edits, list):
            object.__setattr__(self, "edits", tuple(self.edits))
        if not (isinstance(self.name, str) and self.name):
            raise OptionError(f"a branch needs a name, some text, got {quoted(self.name)}")
        if (wrong := self._wrong_field() or self._wrong_together()) is not None:
            raise OptionError(f"branch '{self.name}': {wrong}")

    def _wrong_field(self) -> str | None:
        """What is wrong with one of the fields by itself."""
        image = callable(self.image) or self.image in IMAGES
        if not image or isinstance(self.image, type):
            return f"image must be one of {', '.join(IMAGES)}, a Noise or a function, got {_short(self.image)}"
        prompt = callable(self.prompt) or isinstance(self.prompt, Instead) or self.prompt in ("same", "given")
        if not prompt or isinstance(self.prompt, type):
            return f"prompt must be same, given, Instead(...) or a function, got {quoted(self.prompt)}"
        methods = isinstance(self.edits, tuple) and all(isinstance(method, Intervention) for method in self.edits)
        if not methods and self.edits not in ("inherit", "off"):
            return f"edits must be inherit, off or a list of methods, got {quoted(self.edits)}"
        if not isinstance(self.rope, (int, float)) or not 0 < self.rope < float("inf"):
            return f"rope must be a positive factor, got {quoted(self.rope)}"
        return None

    def _wrong_together(self) -> str | None:
        """What is wrong with a choice of image tokens, beside the other fields."""
        if self.tokens is None:
            return None
        if not all(hasattr(self.tokens, name) for name in ("blank", "layers", "choose")):
            return f"tokens must be a TokenChoice, as TopAttended is one, got {quoted(self.tokens)}"
        if self.image != "same" or self.prompt != "same" or self.rope != 1:
            return "image tokens are chosen in the main prompt; image, prompt and rope must stay"
        if self.shares_prompt and isinstance(self.edits, tuple):
            return "it shares the main prompt as it was read; its edits must be inherit or off"
        return None

    @property
    def shares_prompt(self) -> bool:
        """Keys are hidden, and nothing else: the prompt is read once, for both."""
        return self.tokens is not None and not self.tokens.blank

    @property
    def needs(self) -> tuple[str, ...]:
        """What ``branch_inputs`` must bring with every call."""
        found = ("input_ids", "attention_mask") if self.prompt == "given" else ()
        return (*found, "pixel_values") if self.image == "given" else found

    @property
    def sees(self) -> bool:
        """Without an image in the prompt the branch would be no other view."""
        return self.image != "same" or self.tokens is not None


def _short(value: object) -> str:
    return quoted(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class ContrastiveDecoding:
    """Branches and a rule: B rows for the caller, (1 + branches) B rows in the model, one forward per token.

    Attributes:
        branches: other views of the prompt.
        rule: combines the logits; see ``rules.Rule``.
        layers: the rule also gets the logits that the residual stream would give when it enters these layers (after the
            final norm and the head), after those of the branches. ``normed`` False leaves the norm out.

    Raises:
        OptionError: nothing to combine, two branches of one name, as many weights as branches are missing.
    """

    branches: tuple[Branch, ...]
    rule: Rule
    layers: tuple[int, ...] = ()
    normed: bool = True

    def __post_init__(self) -> None:
        for name in ("branches", "layers"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise OptionError(f"{name} must be a list, got {quoted(getattr(self, name))}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(isinstance(branch, Branch) for branch in self.branches):
            raise OptionError(f"branches must be Branch objects, got {quoted(self.branches)}")
        if not callable(self.rule):
            raise OptionError(f"rule must be a function of (main, others, t), got {quoted(self.rule)}")
        names = [branch.name for branch in self.branches]
        if len(set(names)) < len(names):
            raise OptionError(f"branches need names of their own, got {', '.join(names)}")
        if not all(isinstance(layer, int) for layer in self.layers):
            raise OptionError(f"layers must be whole numbers, got {quoted(self.layers)}")
        try:
            hash(self)  # recipes are looked up by what they are
        except TypeError as error:
            raise OptionError(f"rule and branches must be hashable, as @dataclass(frozen=True) is: {error}") from None
        others = len(self.branches) + len(self.layers)
        if isinstance(self.rule, Contrast) and len(self.rule.weights) != others:
            raise OptionError(f"the rule has {len(self.rule.weights)} weights for {others} branches and layers")

    @property
    def is_identity(self) -> bool:
        return isinstance(self.rule, Contrast) and self.rule.is_identity

    def without_idle(self) -> ContrastiveDecoding:
        """Without branches and layers that weigh nothing."""
        if not isinstance(self.rule, Contrast) or all(self.rule.weights):
            return self
        weigh = [bool(weight) for weight in self.rule.weights]
        at = len(self.branches)
        return ContrastiveDecoding(
            tuple(branch for branch, live in zip(self.branches, weigh[:at], strict=True) if live),
            replace(self.rule, weights=tuple(weight for weight in self.rule.weights if weight)),
            tuple(layer for layer, live in zip(self.layers, weigh[at:], strict=True) if live),
            self.normed,
        )


@dataclass(frozen=True, kw_only=True)
class Decoding(Options):
    """Base of decoding methods. Instances are immutable."""

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        """Branches and rule for a model of these sizes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gaze:
    """Notes how much the row before the first new token attends to each key, for branches that choose tokens by it."""

    follows_attention = False

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        row = context.request.prompt_length - 1
        context.store(Gaze).rows["gaze"] = weights(row, row + 1)[:, :, 0].mean(1)

    @staticmethod
    def read(request: Request, layers: tuple[int, ...]) -> Tensor:
        """Mean attention over heads, float32 ``[layer, batch, key]``."""
        seen = [request.store(Gaze, layer).rows["gaze"] for layer in layers]
        return torch.stack([one.to(seen[0].device) for one in seen])
