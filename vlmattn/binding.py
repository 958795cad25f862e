"""A recipe and the sizes of a model make a plan: which method acts in which layer. What cannot be is refused here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, TypeVar

from vlmattn.anatomy import Anatomy
from vlmattn.decoding import Branch, ContrastiveDecoding, Gaze, Instead
from vlmattn.decoding.search import LastLook, Search
from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.interventions import Intervention
from vlmattn.interventions.pruning import KVPolicy, Pruning
from vlmattn.interventions.steering import Steering
from vlmattn.recipe import Recipe, method_name
from vlmattn.request import Looker, Plan

_M = TypeVar("_M", bound=Intervention | Pruning)
_P = TypeVar("_P", Pruning, KVPolicy)


def bind(recipe: Recipe, anatomy: Anatomy) -> Plan:
    """The recipe for one model: which method acts in which layer.

    Raises:
        OptionError: what does not fit the model; methods that conflict in some layer (named, with the reason).
        UnsupportedError: a method that the model's family cannot have.
    """
    search = recipe.decoding if isinstance(recipe.decoding, Search) else None
    contrast = _contrast(recipe, anatomy)
    looks = frozenset({anatomy.layers - 1}) if search else _watched(contrast, anatomy)
    _refuse_family(recipe, anatomy, contrast, bool(looks))
    if search is not None and anatomy.window:
        raise UnsupportedError(
            f"a search needs full attention in every layer, and {anatomy.family} has a sliding window of"
            f" {anatomy.window} tokens in some; use another decoding rule than '{method_name(search)}', or num_beams=5"
        )
    methods = tuple(method.bind(anatomy) for method in recipe.interventions)
    pruning = _pruning(recipe, anatomy, contrast)
    found = _Bound(recipe, anatomy, contrast, looks, methods, pruning)
    for (one, first), (other, second) in combinations(zip(methods, found.active, strict=True), 2):
        if first & second:
            _refuse_conflict(one, other)
    evicting = _evicting(found.policies, anatomy)
    if found.policies and _needs_whole_caches(recipe, contrast, evicting):
        raise OptionError(
            f"'{method_name(found.policies[0])}' and '{method_name(recipe.decoding)}' conflict: the decoding rule"
            " needs whole caches; use one of them"
        )
    return found.plan(evicting)


@dataclass(frozen=True)
class _Bound:
    """Methods bound to a model, and what follows from them.

    Attributes:
        contrast: branches and rule; looks: layers whose attention guides the decoding method.
        methods: the recipe's attention methods, bound; pruning: for each layer the method that chooses which rows reach
            it.
    """

    recipe: Recipe
    anatomy: Anatomy
    contrast: ContrastiveDecoding | None
    looks: frozenset[int]
    methods: tuple[Intervention, ...]
    pruning: tuple[Pruning | None, ...]

    @cached_property
    def active(self) -> tuple[frozenset[int], ...]:
        """Layers in which each method acts."""
        return tuple(frozenset(method.active_layers(self.anatomy)) for method in self.methods)

    @cached_property
    def policies(self) -> tuple[KVPolicy, ...]:
        return tuple(method for method in self.methods if isinstance(method, KVPolicy))

    @cached_property
    def pruners(self) -> tuple[Pruning, ...]:
        return tuple(found for found in dict.fromkeys(self.pruning) if found is not None)

    @cached_property
    def seeing(self) -> tuple[Intervention | Pruning, ...]:
        """Methods that look at the images' features."""
        methods: tuple[Intervention | Pruning, ...] = (*self.methods, *self.pruners)
        return tuple(m for m in methods if m.implements("on_image_features"))

    @cached_property
    def preparing(self) -> tuple[Intervention, ...]:
        return tuple(m for m in self.methods if m.implements("before_prefill"))

    @cached_property
    def observing(self) -> tuple[tuple[Intervention, ...], ...]:
        """For each layer the methods that look at its residual stream."""
        return self._by_layer("on_hidden_states")

    @cached_property
    def measuring(self) -> tuple[tuple[Intervention, ...], ...]:
        """For each layer the methods that look at its attention."""
        pairs = [(m, m.attention_layers(self.anatomy)) for m in self.methods if m.implements("on_attention")]
        return self._spread(pairs)

    def plan(self, evicting: tuple[KVPolicy | None, ...]) -> Plan:
        """All of it as the engine reads it."""
        rule, instead = self.recipe.decoding, self._instead()
        return Plan(
            self.recipe.name,
            by_layer=self._by_layer(),
            before_prefill=self.preparing,
            on_hidden_states=self.observing,
            on_attention=tuple((*found, *self._looking(layer)) for layer, found in enumerate(self.measuring)),
            on_image_features=self.seeing,
            extending=self._extending(),
            tower_layers=frozenset(layer for m in self.seeing for layer in m.tower_layers(self.anatomy)),
            turns=(*(m.info.name for m in self.methods if m.turns == "needed"), *instead),
            uses_turns=bool(instead) or any(m.turns != "unused" for m in self.methods),
            texts=self._texts(),
            text_first=self._text_first(),
            edits_text=self._edits_text(),
            decoding=self.contrast,
            search=rule if isinstance(rule, Search) else None,
            rule=method_name(rule) if rule is not None else "",
            branches=tuple(bind(_of_branch(self.recipe, branch), self.anatomy) for branch in self._branches),
            branch_names=_branch_names(self.recipe, self.anatomy),
            pruning=self.pruning,
            evicting=evicting,
            policies=self.policies,
            on_queries_keys=self._on_queries_keys(),
            cross=frozenset(self.anatomy.cross),
            image_keys=self.anatomy.image_keys,
            sources=self.anatomy.sources,
            steering=self._steering(),
        )

    @property
    def _branches(self) -> tuple[Branch, ...]:
        return self.contrast.branches if self.contrast else ()

    def _texts(self) -> bool:
        """Prompts without images are welcome."""
        return not any(m.needs_images for m in self.methods) and not self.pruners and not self.recipe.is_none

    def _text_first(self) -> bool:
        """So is text that images follow later."""
        return not self.preparing and not self.policies and not any(m.opens_text for m in self.methods)

    def _edits_text(self) -> bool:
        """Text that no image precedes is edited, or looked at while it is read."""
        looked_at = self.preparing or self.policies or any(self.observing) or any(self.measuring)
        return bool(looked_at) or any(m.edits_text for m in self.methods)

    def _extending(self) -> frozenset[int]:
        """Layers whose ``on_hidden_states`` methods also see generated tokens."""
        pairs = zip(self.methods, self.active, strict=True)
        return frozenset().union(*(layers for m, layers in pairs if m.follows_hidden_states))

    def _instead(self) -> tuple[str, ...]:
        """Who needs the chat template to write another prompt."""
        wanted = any(isinstance(branch.prompt, Instead) for branch in self._branches)
        return (method_name(self.recipe.decoding),) if wanted else ()

    def _on_queries_keys(self) -> tuple[tuple[KVPolicy | Pruning, ...], ...]:
        """For each layer who looks at its queries and keys; empty if nobody does."""
        found: list[tuple[KVPolicy | Pruning, Collection[int]]] = []
        found += [(m, m.active_layers(self.anatomy)) for m in self.policies if m.implements("on_queries_keys")]
        found += [(m, m.key_layers(self.anatomy)) for m in self.pruners if m.implements("on_queries_keys")]
        return self._spread(found) if found else ()

    def _by_layer(self, step: str = "edit") -> tuple[tuple[Intervention, ...], ...]:
        """For each layer the methods that act there and implement the step."""
        pairs = zip(self.methods, self.active, strict=True)
        return self._spread([(m, layers) for m, layers in pairs if m.implements(step)])

    def _steering(self) -> tuple[tuple[Steering, ...], ...]:
        """For each layer the methods that change its hidden states; empty if none does."""
        pairs = zip(self.methods, self.active, strict=True)
        found = [(m, layers) for m, layers in pairs if isinstance(m, Steering)]
        return self._spread(found) if found else ()

    def _spread(self, pairs: Sequence[tuple[_M, Collection[int]]]) -> tuple[tuple[_M, ...], ...]:
        """For each layer the methods that have it among their layers."""
        return tuple(tuple(m for m, layers in pairs if layer in layers) for layer in range(self.anatomy.layers))

    def _looking(self, layer: int) -> Iterator[Looker]:
        """Who else looks at the attention of a layer: methods that drop tokens, and what guides the decoding method."""
        yield from (pruner for pruner in self.pruners if layer in pruner.attention_layers(self.anatomy))
        if layer in self.looks:
            yield LastLook() if isinstance(self.recipe.decoding, Search) else Gaze()


def _refuse_family(recipe: Recipe, anatomy: Anatomy, contrast: ContrastiveDecoding | None, looking: bool) -> None:
    """Raise ``UnsupportedError`` if the model's family cannot have one of the methods."""
    reasons = dict(anatomy.refused)

    def refuse(who: Any, kinds: dict[str, bool]) -> None:
        reason = next((reasons[kind] for kind, wanted in kinds.items() if wanted and kind in reasons), None)
        if reason is not None:
            raise UnsupportedError(f"'{method_name(who)}' does not run on {anatomy.family}: {reason}")

    for method in recipe.interventions:
        kinds = {method.kind: True, "opening": bool(method.opens()), "turns": method.turns == "needed"}
        steers = isinstance(method, Steering)
        kinds |= {"steering": steers, "mlp": steers and method.site == "mlp"}  # type: ignore[attr-defined]
        refuse(method, kinds | {"rows": method.acts_on == "image rows"})
    for pruner in recipe.pruning:
        refuse(pruner, {pruner.kind: True})
    branches = contrast.branches if contrast is not None else ()
    asked = {
        "decoding": contrast is not None or isinstance(recipe.decoding, Search),
        "looking": looking,
        "rotating": any(branch.rope != 1 for branch in branches),
        "dropping": any(branch.image == "drop" for branch in branches),
    }
    refuse(recipe.decoding, asked)


def _pruning(recipe: Recipe, anatomy: Anatomy, contrast: ContrastiveDecoding | None) -> tuple[Pruning | None, ...]:
    """For each layer the method that chooses which rows reach it; empty if no method does.

    Raises:
        OptionError: two methods that choose before the same layer; a decoding rule that must see all tokens.
    """
    if not recipe.pruning:
        return ()
    _refuse_beside(recipe, anatomy, contrast)
    methods = [method.bind(anatomy) for method in recipe.pruning]
    found = _one_each(
        anatomy,
        [(method, method.stages(anatomy)) for method in methods],
        "choose tokens before layer {}; use one of them",
    )
    _check_seeing(found, anatomy)
    _check_sources(found, anatomy)
    return found


def _refuse_beside(recipe: Recipe, anatomy: Anatomy, contrast: ContrastiveDecoding | None) -> None:
    """Raise ``OptionError`` for tokens that are dropped beside a decoding rule that cannot do without them.

    The rows of all branches lie in one cache, whose layers hold as many keys as the branch with most of them: fine
    where nothing but logits is made of them.
    """
    names = f"'{method_name(recipe.pruning[0])}' and '{method_name(recipe.decoding)}'"
    if isinstance(recipe.decoding, Search):
        raise OptionError(f"{names} conflict: the decoding rule needs all image tokens in every layer; use one of them")
    if contrast is None or not contrast.branches:
        return
    branches, kept = contrast.branches, (anatomy.window, anatomy.cross, anatomy.sources, anatomy.attending or ())
    reasons = {
        "a branch chooses among all image tokens, or turns them; use one of them": any(
            branch.tokens is not None or branch.rope != 1 for branch in branches
        ),
        "beside them no attention edit can run; leave it out": any(
            (recipe.interventions, *(branch.edits for branch in branches if not isinstance(branch.edits, str)))
        ),
        "the branches share position ids; use positions='original'": any(method.compact for method in recipe.pruning),
        f"not every layer of {anatomy.family} holds all tokens; use one of them": any(kept),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise OptionError(f"{names} conflict: {reason}")


def _check_seeing(pruning: Sequence[Pruning | None], anatomy: Anatomy) -> None:
    """Raise ``OptionError`` for a method that chooses by attention where no layer has any since the choice before."""
    before = 0
    for layer, method in enumerate(pruning):
        if method is None:
            continue
        if not method.sees(anatomy, layer, before):
            where = f"in layer {layer}" if method.looks_ahead else f"between layers {before} and {layer}"
            raise OptionError(
                f"'{method.info.name}' chooses tokens by attention, and there is none {where}: of this model's layers"
                f" {list(anatomy.attending or ())} have attention; choose other layers"
            )
        before = layer


def _check_sources(pruning: Sequence[Pruning | None], anatomy: Anatomy) -> None:
    """Raise ``OptionError`` for tokens dropped between a layer and another that uses its keys and values again."""
    for layer, source in enumerate(anatomy.sources):
        between = [number for number in range(source + 1, layer + 1) if pruning and pruning[number]]
        if between:
            raise OptionError(
                f"'{pruning[between[0]].info.name}' drops tokens before layer {between[0]}, and layer {layer} uses the"  # type: ignore[union-attr]
                f" keys of layer {source}, which still has them; choose layers up to {min(anatomy.sources[layer:])}"
            )


def _one_each(anatomy: Anatomy, places: Iterable[tuple[_P, Iterable[int]]], what: str) -> tuple[_P | None, ...]:
    """For each layer the one method that has its place there.

    Raises:
        OptionError: two do; ``what`` they do there, and the remedy.
    """
    found: list[_P | None] = [None] * anatomy.layers
    for method, layers in places:
        for layer in layers:
            if (other := found[layer]) is not None:
                names = f"'{other.info.name}' and '{method.info.name}'"
                raise OptionError(f"{names} conflict: both {what.format(layer)}")
            found[layer] = method
    return tuple(found)


def _needs_whole_caches(recipe: Recipe, contrast: ContrastiveDecoding | None, evicting: Sequence[Any]) -> bool:
    """The decoding method does not run where a policy reads, or even takes away, a part of a cache."""
    return isinstance(recipe.decoding, Search) or (contrast is not None and bool(contrast.branches or evicting))


def _evicting(policies: Iterable[KVPolicy], anatomy: Anatomy) -> tuple[KVPolicy | None, ...]:
    """For each layer the policy that takes slots out of its cache; empty if none does.

    Raises:
        OptionError: two policies evict in the same layer.
    """
    takers = [policy for policy in policies if policy.implements("evict") or policy.implements("split")]
    found = _one_each(
        anatomy,
        [(policy, policy.active_layers(anatomy)) for policy in takers],
        "evict in layer {}; use one of them, or layer ranges that do not meet",
    )
    return found if any(found) else ()


def _rule(recipe: Recipe, anatomy: Anatomy) -> ContrastiveDecoding | None:
    """Branches and rule as the recipe has them for a model."""
    if recipe.decoding is None or isinstance(recipe.decoding, Search):
        return None
    return recipe.decoding if isinstance(recipe.decoding, ContrastiveDecoding) else recipe.decoding.contrast(anatomy)


def _contrast(recipe: Recipe, anatomy: Anatomy) -> ContrastiveDecoding | None:
    """Branches and rule for a model, without those that weigh nothing; None if the rest changes nothing."""
    rule = _rule(recipe, anatomy)
    if rule is None:
        return None
    rule = rule.without_idle()
    for layer in rule.layers:
        if not 0 <= layer < anatomy.layers:
            raise OptionError(f"the decoding rule names layer {layer}, but the decoder has 0..{anatomy.layers - 1}")
    return None if rule.is_identity else rule


def _branch_names(recipe: Recipe, anatomy: Anatomy) -> tuple[str, ...]:
    """Branches that calls may bring inputs for, also those that weigh nothing."""
    rule = _rule(recipe, anatomy)
    return tuple(branch.name for branch in rule.branches) if rule is not None else ()


def _of_branch(recipe: Recipe, branch: Branch) -> Recipe:
    """The edits that act in a branch."""
    name = f"{recipe.name}/{branch.name}"
    edits = recipe.interventions if branch.edits == "inherit" else branch.edits
    pruning = () if branch.image == "drop" else recipe.pruning
    if edits == "off":
        return Recipe(name, pruning=pruning)
    kept = tuple(edit for edit in edits if branch.image != "drop" or not edit.needs_images)
    return Recipe(name, kept, pruning=pruning)


def _watched(contrast: ContrastiveDecoding | None, anatomy: Anatomy) -> frozenset[int]:
    """Layers whose attention chooses the image tokens of branches."""
    watched: set[int] = set()
    for branch in contrast.branches if contrast else ():
        if branch.tokens is not None:
            layers = tuple(branch.tokens.layers(anatomy))
            if not layers or not set(layers) <= set(range(anatomy.layers)):
                raise OptionError(
                    f"branch '{branch.name}': its tokens look at the layers {layers}, but the decoder has"
                    f" 0..{anatomy.layers - 1}"
                )
            watched |= set(layers)
    return frozenset(watched)


def _refuse_conflict(one: Intervention, other: Intervention) -> None:
    """Raise if two methods that act in the same layer undo each other."""
    names, remedy = (
        f"'{one.info.name}' and '{other.info.name}' conflict",
        "use one of them, or layer ranges that do not meet",
    )
    if type(one) is type(other):
        raise OptionError(f"'{one.info.name}' is in the recipe twice for the same layers; {remedy}")
    for policy, method in ((one, other), (other, one)):
        if isinstance(policy, KVPolicy) and (policy.by_head or policy.implements("split")):
            raise OptionError(
                f"{names}: '{policy.info.name}' keeps the heads of a layer apart, where '{method.info.name}' cannot"
                f" act; {remedy}"
            )
    for opening, hiding in ((one, other), (other, one)):
        if shared := sorted(opening.opens() & hiding.hides()):
            raise OptionError(
                f"{names}: '{opening.info.name}' opens edges that '{hiding.info.name}' hides ({', '.join(shared)});"
                f" {remedy}"
            )
