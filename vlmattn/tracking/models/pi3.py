"""pi^3 (arXiv 2507.13347), known by its public class's structure: every second block attends over all frames."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vlmattn.tracking.models.base import Adapter, Views, register_adapter


@register_adapter
class Pi3Adapter(Adapter):
    """``Pi3`` of github.com/yyfz/Pi3: ``decoder`` blocks, odd ones global; ``register_token``; three decoders."""

    name = "pi3"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.multiple, self.lead = self.model.patch_size, self.model.patch_start_idx

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        parts = ("encoder", "decoder", "register_token", "point_decoder", "conf_decoder", "camera_decoder")
        return all(hasattr(model, part) for part in parts) and hasattr(model, "patch_start_idx")

    def attentions(self) -> Sequence[nn.Module]:
        return [block.attn for block in self.model.decoder[1::2]]

    def forward(self, images: Tensor, reading: bool) -> Views:
        out = self.model(images)
        return Views(out["camera_poses"], out["local_points"], out["conf"][..., 0].sigmoid())
