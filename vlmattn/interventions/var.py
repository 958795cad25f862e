"""VAR: visual attention redistribution (arXiv 2503.03321)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmattn.errors import OptionError
from vlmattn.interventions.base import Intervention, Sizes, option, register
from vlmattn.interventions.sinks import SINK_DIMS, sink_values
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

    Sinks are looked for while the prompt is read; generated tokens are never tested. Rows edited: text rows after an
    image. With several images their tokens are taken together.

    The paper's p is 1 - ``keep`` (the fraction removed) and its rho is 1 - ``max_sink``.

    Raises:
        OptionError: an option out of range, a dimension outside the hidden size.
    """

    keep: float = option(0.4, 0, 1, "fraction of a sink's attention that stays", source="paper, p = .6 removed")
    max_sink: float = option(
        0.5, 0, 1, "largest share of visual attention on sinks in an image-centric head", source="paper, rho = .5"
    )
    min_visual: float = option(
        0.2, 0, 1, "least attention on the image in an image-centric head", source="paper and code"
    )
    tau: float = option(20.0, 0, 1e3, "sink threshold; phi never exceeds sqrt(hidden size)", source="paper and code")
    dims: tuple[int, ...] = option((), about="sink dimensions; empty: the known ones of the language model, else all")
    need_visual_sink: bool = option(False, about="leave rows alone that see no visual sink", source="released code")
    layers: str = option("2:-1", about="decoder layers", source="paper: all but the last; sinks exist from layer 2 on")

    def bind(self, sizes: Sizes) -> VAR:
        self.active_layers(sizes)
        dims = self.dims or SINK_DIMS.get(sizes.backbone, ())
        if any(not 0 <= d < sizes.hidden_size for d in dims):
            raise OptionError(f"var.dims must lie within 0..{sizes.hidden_size - 1}, got {list(dims)}")
        if self.tau >= sizes.hidden_size**0.5:
            warnings.warn(
                f"var: no token can reach tau = {self.tau:g} at hidden size {sizes.hidden_size} (phi is at most"
                f" {sizes.hidden_size**0.5:.1f}), so this edit cannot fire; give a smaller tau",
                stacklevel=2,
            )
        elif not dims:
            warnings.warn(
                f"var: the sink dimensions of this language model {sizes.backbone} are not known; every dimension is"
                " tested, which may find more sinks than the paper's method; give dims=(...) if you know them",
                stacklevel=2,
            )
        return replace(self, dims=dims)

    def observe(self, scope: Scope, hidden: Tensor) -> None:
        sink = sink_values(hidden, self.dims) > self.tau
        visual = scope.visual[:, scope.keys - scope.queries :]
        groups = (2 * visual + sink).to(torch.uint8)
        scope.state(self, "groups", lambda: Slots(TEXT, torch.uint8)).write(scope.keys - scope.queries, groups)
        scope.count("var", sink.sum())

    def edit(self, scope: Scope) -> AttentionEdit:
        groups: Slots | None = scope.find(self, "groups")
        if groups is None:
            return AttentionEdit()
        take = 1 - self.keep
        gates = [
            MassGate((0, 0, 1, 1), self.min_visual),
            MassGate((0, 0, self.max_sink, self.max_sink - 1), 0),
        ]
        if self.need_visual_sink:
            gates.append(MassGate((0, 0, 0, 1), 1e-30))
        plan = GainPlan(taken=(0, take, 0, take), given=(0, 0, 1, 0), gates=tuple(gates))
        runs = scope.request.runs((TEXT, TEXT_SINK), (VISUAL, VISUAL_SINK))
        part = GainPart(groups.read(scope.keys, scope.device), plan, scope.rows_after_image(), runs)
        return AttentionEdit(gain=(part,))
