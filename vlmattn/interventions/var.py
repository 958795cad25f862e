"""VAR: visual attention redistribution (arXiv 2503.03321)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.interventions.sinks import SinkTest
from vlmattn.kernels import AttentionEdit, GainPart, GainPlan, MassGate
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext

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
class VAR(SinkTest):
    """Give the attention that sinks waste to the rest of the image, in heads that look at the image.

    A token is a sink of a layer when phi(x) = max_{d in dims} |x_d| / RMS(x) > tau for the residual stream x that
    enters it. With M_g the attention mass of a text row on text, text sinks, visual tokens and visual sinks (indices
    T, TS, V, VS), where M_V + M_VS >= min_visual and M_VS <= max_sink (M_V + M_VS):

        gamma_TS = gamma_VS = keep,   gamma_V = 1 + (1 - keep) (M_TS + M_VS) / M_V      (the row sum stays)

    Sinks are looked for while the prompt is read, anew for every request; with ``extend`` generated tokens are tested
    too. Rows edited: text rows after an image. Images and videos of a prompt are taken together: a row between two of
    them has the masses, and for ``need_visual_sink`` (``var_official``) the sinks, of those that it sees. The released
    code knows one image in a prompt. Counts sink tokens.

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

    keep: float = option(0.4, 0, 1, "fraction of a sink's attention that stays", source="paper, p = .6 removed")
    max_sink: float = option(0.5, 0, 1, "largest share of a head's visual mass on sinks", source="paper, rho = .5")
    min_visual: float = option(0.2, 0, 1, "least attention of a head on the image", source="paper and code")
    extend: bool = option(False, about="test generated tokens too", source="released code: no")
    need_visual_sink: bool = option(False, about="leave rows alone that see no visual sink", source="released code")

    @property
    def follows_hidden_states(self) -> bool:
        return self.extend

    def on_hidden_states(self, context: LayerContext, hidden: Tensor) -> None:
        sink = self.is_sink(context, hidden)
        groups = context.store(self).by_slot("groups", TEXT, torch.uint8)
        context.count("var", sink.sum())
        if context.step.start is None:  # one generated token, which is text
            assert context.step.slot is not None
            groups.put(context.step.slot, TEXT_SINK * sink[:, 0], context.keys)
            return
        start = context.keys - context.queries
        visual = context.visual[:, start:]
        groups.write(start, (VISUAL * visual + sink).to(torch.uint8))

    def edit(self, context: LayerContext) -> AttentionEdit:
        groups = context.store(self).slots.get("groups")
        if groups is None or self.keep == 1:
            return AttentionEdit()
        runs = context.runs((TEXT, TEXT_SINK), (VISUAL, VISUAL_SINK))
        plan = context.request.store(self).once("plan", self._plan)  # it keeps its tables on the device
        part = GainPart(context.read(groups), plan, context.rows_after_image(), runs)
        return AttentionEdit(gain=(part,))

    def _plan(self) -> GainPlan:
        take = 1 - self.keep
        gates = [MassGate((0, 0, 1, 1), self.min_visual), MassGate((0, 0, self.max_sink, self.max_sink - 1), 0)]
        if self.need_visual_sink:
            gates.append(MassGate((0, 0, 0, 1), 1e-30))
        return GainPlan(taken=(0, take, 0, take), given=(0, 0, 1, 0), gates=tuple(gates))
