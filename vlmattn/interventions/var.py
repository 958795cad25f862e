"""VAR: visual attention redistribution (arXiv 2503.03321)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmattn.errors import OptionError
from vlmattn.files import beside
from vlmattn.interventions.base import Intervention
from vlmattn.interventions.profiles import SinkProfile
from vlmattn.interventions.registry import Sizes, option, register
from vlmattn.interventions.sinks import LIKE_FIRST, SINK_DIMS, UNVERIFIED_SINK_DIMS, sink_values
from vlmattn.kernels import AttentionEdit, GainPart, GainPlan, MassGate
from vlmattn.request import Scope, Slots

TEXT, TEXT_SINK, VISUAL, VISUAL_SINK = range(4)


@register(
    "var",
    paper="arXiv:2503.03321 (ICLR 2025)",
    code="github.com/seilk/VisAttnSink",
    faithful="golden",
    parts="groups + gain",
    cost="prefill: the rows after the image on flash segments by group; decode: group masses of one row",
    presets={
        "var": ("paper constants, hallucination tasks (rho = .5)", {}),
        "var_general": ("paper constants, general tasks (rho = .8)", {"max_sink": 0.2}),
        "var_vision": ("paper constants, vision-centric tasks (rho = .9)", {"max_sink": 0.1}),
        "var_official": (
            "released code: sinks keep .6, last layer included, nothing without a visual sink",
            {"keep": 0.6, "layers": "2:", "need_visual_sink": True},
        ),
    },
)
@dataclass(frozen=True, kw_only=True)
class VAR(Intervention):
    """Give the attention that sinks waste to the rest of the image, in heads that look at the image.

    A token is a sink of a layer when phi(x) = max_{d in dims} |x_d| / RMS(x) > tau for the residual stream x that
    enters it. With M_g the attention mass of a text row on text, text sinks, visual tokens and visual sinks (indices
    T, TS, V, VS), where M_V + M_VS >= min_visual and M_VS <= max_sink (M_V + M_VS):

        gamma_TS = gamma_VS = keep,   gamma_V = 1 + (1 - keep) (M_TS + M_VS) / M_V      (the row sum stays)

    Sinks are looked for while the prompt is read, anew for every request; with ``extend`` generated tokens are tested
    too. Rows edited: text rows after an image. Images and videos of a prompt are taken together. Counts sink tokens.

    Dimensions and threshold are ``dims`` and ``tau`` where they are given, else those of ``profile`` (measured by
    ``vlmattn.inspection.find_sinks``), else for known language models those of a table. Without any of these every
    dimension is tested, with a warning.
    ``sinks`` "cos" takes secondary sinks in (arXiv 2512.22213): tokens whose |cos| with the first token is above .9;
    "either" takes both kinds.

    The paper's p is 1 - ``keep`` (the fraction removed) and its rho is 1 - ``max_sink``.

    Raises:
        OptionError: an option out of range, a dimension outside the hidden size, tau at or above sqrt(hidden size) in a
            profile, a profile of another model.
    """

    files: ClassVar[Mapping[str, str]] = {"profile": SinkProfile.FILE_NAME}
    keep: float = option(0.4, 0, 1, "fraction of a sink's attention that stays", source="paper, p = .6 removed")
    max_sink: float = option(
        0.5, 0, 1, "largest share of visual attention on sinks in an image-centric head", source="paper, rho = .5"
    )
    min_visual: float = option(
        0.2, 0, 1, "least attention on the image in an image-centric head", source="paper and code"
    )
    tau: float = option(20.0, 0, 1e3, "sink threshold; phi never exceeds sqrt(hidden size)", source="paper and code")
    dims: tuple[int, ...] = option((), about="sink dimensions; empty: those of the profile or the table, else all")
    profile: str = option(
        "", about="SinkProfile file; empty: vlmattn_sinks.json beside an unknown model, if it is there"
    )
    sinks: str = option("phi", about="what makes a sink", source="paper: phi", choices=("phi", "cos", "either"))
    extend: bool = option(False, about="test generated tokens too", source="released code: no")
    need_visual_sink: bool = option(False, about="leave rows alone that see no visual sink", source="released code")
    layers: str = option("2:-1", about="decoder layers", source="paper: all but the last; sinks exist from layer 2 on")

    def bind(self, sizes: Sizes) -> VAR:
        bound = self._with_profile(sizes)
        known = SINK_DIMS.get(sizes.backbone, ())
        guessed = UNVERIFIED_SINK_DIMS.get(sizes.backbone, ())
        dims = bound.dims or known or guessed
        if any(not 0 <= d < sizes.hidden_size for d in dims):
            raise OptionError(f"var.dims must lie within 0..{sizes.hidden_size - 1}, got {list(dims)}")
        if bound.sinks != "cos" and bound.tau >= sizes.hidden_size**0.5:
            warnings.warn(
                f"var: no token can reach tau = {bound.tau:g} at hidden size {sizes.hidden_size} (phi is at most"
                f" {sizes.hidden_size**0.5:.1f}), so this edit cannot fire; give a smaller tau",
                stacklevel=2,
            )
        elif bound.sinks != "cos" and not bound.dims and not known:
            what = (
                f"{list(guessed)} are from notes that nobody checked" if guessed else "not known; every one is tested"
            )
            warnings.warn(
                f"var: the sink dimensions of this language model {sizes.backbone}: {what}; measure them with"
                " vlmattn.inspection.find_sinks and give profile=..., or give dims=(...)",
                stacklevel=2,
            )
        return replace(bound, dims=dims)

    def _with_profile(self, sizes: Sizes) -> VAR:
        """With what a profile says about this model, if there is one."""
        self.active_layers(sizes)
        path = self.profile
        if not path and not self.dims and sizes.backbone not in SINK_DIMS:
            path = str(beside(sizes.source, SinkProfile.FILE_NAME) or "")
        if not path:
            return self
        found = SinkProfile.load(path)
        found.check(sizes, "var.profile")
        if found.tau >= sizes.hidden_size**0.5:
            raise OptionError(
                f"var: {path} has tau = {found.tau:g}, which no token can reach at hidden size {sizes.hidden_size}"
            )
        layers = self.layers
        if self.sinks != "phi" and found.layers[0] < found.layers[1]:  # elsewhere the first token is not a sink yet
            inside = [layer for layer in self.active_layers(sizes) if found.layers[0] <= layer < found.layers[1]]
            layers = ",".join(map(str, inside)) or layers
        tau = found.tau if self.tau == type(self).tau else self.tau
        return replace(self, dims=self.dims or found.dims, tau=tau, layers=layers, profile=path)

    @property
    def observes_generated(self) -> bool:
        return self.extend

    def observe(self, scope: Scope, hidden: Tensor) -> None:
        sink = self._is_sink(scope, hidden)
        groups: Slots = scope.state(self, "groups", lambda: Slots(TEXT, torch.uint8))
        scope.count("var", sink.sum())
        if scope.step.start is None:  # one generated token, which is text
            assert scope.step.slot is not None
            groups.put(scope.step.slot, TEXT_SINK * sink[:, 0], scope.keys)
            return
        start = scope.keys - scope.queries
        visual = scope.visual[:, start:]
        groups.write(start, (VISUAL * visual + sink).to(torch.uint8))

    def _is_sink(self, scope: Scope, hidden: Tensor) -> Tensor:
        """bool ``[batch, query]``."""
        sink = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self.sinks != "cos":
            sink = sink_values(hidden, self.dims) > self.tau
        if self.sinks != "phi":
            first: Tensor = scope.state(self, "first", lambda: scope.first_token(hidden))
            sink = sink | (
                torch.cosine_similarity(hidden.float(), first[:, None].to(hidden.device), dim=-1).abs() > LIKE_FIRST
            )
        return sink

    def edit(self, scope: Scope) -> AttentionEdit:
        groups: Slots | None = scope.find(self, "groups")
        if groups is None or self.keep == 1:
            return AttentionEdit()
        runs = scope.request.runs((TEXT, TEXT_SINK), (VISUAL, VISUAL_SINK))
        plan = scope.request.state.setdefault((self, "plan"), self._plan())  # one for all layers and tokens
        part = GainPart(scope.read(groups), plan, scope.rows_after_image(), runs)
        return AttentionEdit(gain=(part,))

    def _plan(self) -> GainPlan:
        take = 1 - self.keep
        gates = [
            MassGate((0, 0, 1, 1), self.min_visual),
            MassGate((0, 0, self.max_sink, self.max_sink - 1), 0),
        ]
        if self.need_visual_sink:
            gates.append(MassGate((0, 0, 0, 1), 1e-30))
        return GainPlan(taken=(0, take, 0, take), given=(0, 0, 1, 0), gates=tuple(gates))
