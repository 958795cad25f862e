"""The bundled network, ``MultiViewNetwork``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vlmattn.tracking.models.base import Adapter, Views, register_adapter
from vlmattn.tracking.network import MultiViewNetwork


@register_adapter
class RoomsAdapter(Adapter):
    """``vlmattn.tracking.MultiViewNetwork``."""

    name = "rooms"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.multiple, self.lead = self.model.config.patch_size, self.model.config.registers

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, MultiViewNetwork)

    def attentions(self) -> Sequence[nn.Module]:
        return [block.attn for block in self.model.global_blocks]

    def forward(self, images: Tensor, reading: bool) -> Views:
        out = self.model(images)
        return Views(out["camera_poses"], out["local_points"], out["conf"][..., 0].sigmoid())
