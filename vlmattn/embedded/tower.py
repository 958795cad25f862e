"""The vision tower that the bundled models have."""

from __future__ import annotations

from transformers import CLIPVisionConfig

from vlmattn.embedded.scenes import IMAGE_SIZE, PATCH_SIZE


def tower_config() -> CLIPVisionConfig:
    """CLIP in small: 4 layers, 160 wide, 49 patches of a scene and a CLS token."""
    return CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=160,
    )
