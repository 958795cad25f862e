from vlmattn.tracking import Adapter
from vlmattn.tracking.models import register_adapter


@register_adapter
class GlanceAdapter(Adapter):
    name, multiple, lead, reference_free = "glance", 4, 0, True

    @classmethod
    def fits(cls, model):
        return type(model).__name__ == "GlanceNetwork"

    def attentions(self):
        return []

    def forward(self, images, reading):
        raise NotImplementedError
