"""Attention sinks by massive activations: which hidden dimensions give them away, and the test for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.files import beside
from vlmattn.interventions.base import Intervention
from vlmattn.interventions.profiles import SinkProfile
from vlmattn.options import option
from vlmattn.request import LayerContext

if TYPE_CHECKING:
    from typing_extensions import Self

# (language model type, hidden size, layers, MLP width) -> sink dimensions. They belong to the language model and its
# weights, not to the vision-language model built on it. For other models: vlmattn.inspection.find_sinks. Where no
# release is named, several codes that do not stem from each other have the same dimensions.
SINK_DIMS: dict[tuple[str, int, int, int], tuple[int, ...]] = {
    ("llama", 4096, 32, 11008): (1415, 2533),  # LLaMA-2-7B, Vicuna-7B: released code of VAR
    ("llama", 5120, 40, 13824): (2100, 4743),  # LLaMA-2-13B, Vicuna-13B: released code of VAR
    ("llama", 576, 30, 1536): (507,),  # SmolLM2-135M: measured by find_sinks on smol, see its card
    ("llama", 4096, 32, 14336): (788, 1384, 4062),  # LLaMA-3-8B: six codes
    ("qwen2", 3584, 28, 18944): (
        458,
        2570,
    ),  # Qwen2-7B, Qwen2.5-7B: six codes (some add a dimension that is nearly one)
    ("qwen2_vl_text", 3584, 28, 18944): (458, 2570),
    ("qwen2_5_vl_text", 3584, 28, 18944): (458, 2570),
    ("mistral", 4096, 32, 14336): (2070,),  # Mistral-7B: two codes
}

# Reported by others, in one place only: used with a warning, and ``find_sinks`` says where it finds others.
REPORTED_SINK_DIMS: dict[tuple[str, int, int, int], tuple[int, ...]] = {
    ("internlm2", 4096, 32, 14336): (3584,),  # InternLM2.5-7B
    ("qwen2_vl_text", 1536, 28, 8960): (534, 940, 1073),  # Qwen2-VL-2B
    ("qwen2_5_vl_text", 2048, 36, 11008): (318, 1819, 1874),  # Qwen2.5-VL-3B
    ("qwen2_5_vl_text", 5120, 64, 27648): (3094, 4675),  # Qwen2.5-VL-32B
    ("qwen3_vl_text", 2048, 28, 6144): (1401, 1793, 1999),  # Qwen3-VL-2B
    ("qwen3_vl_text", 2560, 36, 9728): (0,),  # Qwen3-VL-4B
    ("qwen3_vl_text", 4096, 36, 12288): (1838,),  # Qwen3-VL-8B
    ("qwen3", 1024, 28, 3072): (13, 35),  # InternVL3.5-1B
    ("qwen3", 4096, 36, 12288): (233, 2276),  # InternVL3.5-8B
}

#: |cos| with the first token that makes a secondary sink (released code of arXiv 2512.22213).
LIKE_FIRST = 0.9


def sink_values(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """phi(x) = max_{d in dims} |x_d| / RMS(x) in float32, ``[batch, tokens]``; over all dimensions when dims is empty.

    Never more than sqrt(hidden size).
    """
    hidden = hidden.float()
    rms = hidden.square().mean(-1).add(1e-6).sqrt()
    chosen = hidden[..., list(dims)] if dims else hidden
    return chosen.abs().amax(-1) / rms


@dataclass(frozen=True, kw_only=True)
class SinkTest(Intervention):
    """What methods about sinks share: which tokens that enter a layer are sinks, and the options for it."""

    acts_on: ClassVar[str] = "image keys"
    files: ClassVar[Mapping[str, str]] = {"profile": SinkProfile.FILE_NAME}
    tau: float = option(20.0, 0, 1e3, "sink threshold; phi never exceeds sqrt(hidden size)", source="paper and code")
    dims: tuple[int, ...] = option((), about="sink dimensions; empty: those of the profile or the table, else all")
    profile: str = option("", about="SinkProfile file; empty: vlmattn_sinks.json beside an unknown model")
    sinks: str = option("phi", about="what makes a sink", source="paper: phi", choices=("phi", "cos", "either"))
    layers: str = option("2:-1", about="decoder layers", source="paper: all but the last; sinks exist from layer 2 on")

    def bind(self, anatomy: Anatomy) -> Self:
        name, bound = self.info.name, self._with_profile(anatomy)
        known = SINK_DIMS.get(anatomy.backbone, ())
        reported = REPORTED_SINK_DIMS.get(anatomy.backbone, ())
        dims = bound.dims or known or reported
        if any(not 0 <= d < anatomy.hidden_size for d in dims):
            raise OptionError(f"{name}.dims must lie within 0..{anatomy.hidden_size - 1}, got {list(dims)}")
        if bound.sinks != "cos" and bound.tau >= anatomy.hidden_size**0.5:
            warnings.warn(
                f"{name}: no token can reach tau = {bound.tau:g} at hidden size {anatomy.hidden_size} (phi is at most"
                f" {anatomy.hidden_size**0.5:.1f}), so this edit cannot fire; give a smaller tau",
                stacklevel=2,
            )
        elif bound.sinks != "cos" and not bound.dims and not known:
            what = (
                f"{list(reported)} are reported by others and not confirmed"
                if reported
                else "not known; every one is tested"
            )
            warnings.warn(
                f"{name}: the sink dimensions of this language model {anatomy.backbone}: {what}; measure them with"
                " vlmattn.inspection.find_sinks and give profile=..., or give dims=(...)",
                stacklevel=2,
            )
        return replace(bound, dims=dims)

    def _with_profile(self, anatomy: Anatomy) -> Self:
        """With what a profile says about this model, if there is one."""
        self.active_layers(anatomy)
        path = self.profile
        if not path and not self.dims and anatomy.backbone not in SINK_DIMS:
            path = str(beside(anatomy.source, SinkProfile.FILE_NAME) or "")
        if not path:
            return self
        found = SinkProfile.load(path)
        found.check(anatomy, f"{self.info.name}.profile")
        if found.tau >= anatomy.hidden_size**0.5:
            raise OptionError(
                f"{self.info.name}: {path} has tau = {found.tau:g}, which no token can reach at hidden size"
                f" {anatomy.hidden_size}"
            )
        layers = self.layers
        if self.sinks != "phi" and found.layers[0] < found.layers[1]:  # elsewhere the first token is not a sink yet
            inside = [layer for layer in self.active_layers(anatomy) if found.layers[0] <= layer < found.layers[1]]
            layers = ",".join(map(str, inside)) or layers
        tau = found.tau if self.tau == type(self).tau else self.tau
        return replace(self, dims=self.dims or found.dims, tau=tau, layers=layers, profile=path)

    def is_sink(self, context: LayerContext, hidden: Tensor) -> Tensor:
        """bool ``[batch, query]``; for images of cross-attention all dimensions count, as ``dims`` are of tokens."""
        sink = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self.sinks != "cos":
            sink = sink_values(hidden, () if context.crosses else self.dims) > self.tau
        if self.sinks != "phi":
            rows = context.store(self).rows
            if "first" not in rows:
                rows["first"] = context.first_token(hidden)
            first = rows["first"][:, None].to(hidden.device)
            sink = sink | (torch.cosine_similarity(hidden.float(), first, dim=-1).abs() > LIKE_FIRST)
        return sink
