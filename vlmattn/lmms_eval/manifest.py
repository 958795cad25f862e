"""What lmms-eval is told of us, by the entry point ``lmms_eval.models``."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """Our model by name; its module is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="vlmattn", chat_class_path="vlmattn.lmms_eval.model.Vlmattn")]
