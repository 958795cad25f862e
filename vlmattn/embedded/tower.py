"""What the bundled models share: the vision tower, its pixels, and the form in which they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmattn.embedded.scenes import IMAGE_SIZE, PATCH_SIZE

IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
_LARGEST = 6e4  # float16 ends at 65504


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


def build_image_processor() -> CLIPImageProcessorPil:
    """Pixels of a scene as CLIP's processor makes them (PIL backend: no torchvision)."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        do_convert_rgb=True,
    )


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write weights in float16, configuration, processor and chat template; the model is in float16 afterwards.

    Raises:
        ValueError: a weight does not fit in float16.
    """
    for name, weight in model.named_parameters():
        if not float(weight.detach().abs().max()) <= _LARGEST:  # nor if it is not a number
            raise ValueError(f"the weight {name} does not fit in float16")
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
