from transformers import LlavaConfig, LlavaForConditionalGeneration

import vlmattn


class GlanceConfig(LlavaConfig):
    model_type = "glance_vlm"


class GlanceModel(LlavaForConditionalGeneration):
    config_class = GlanceConfig


@vlmattn.register_family
class GlanceFamily(vlmattn.Family):
    model_types = {"glance_vlm": "me/glance-7b"}  # noqa: RUF012
    even = True
