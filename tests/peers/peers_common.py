"""The tests that all models of transformers share, on the small models of ``tests/zoo``: one class for each of them.

Collected by ``run.py`` only, in a folder whose package ``tests`` is that of transformers.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from tests.test_modeling_common import ModelTesterMixin
from zoo import ZOO, Tiny, padded


class Tester:
    """What the shared tests ask about a model."""

    is_training = True
    batch_size = 2

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.model_class, config = tiny.make()
        text = config.get_text_config()
        self.num_hidden_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size
        self.num_attention_heads = text.num_attention_heads
        self.seq_length = self.encoder_seq_length = self.prompts()["input_ids"].shape[1]

    def prompts(self) -> dict[str, torch.Tensor]:
        """Two prompts of the same length with an image each."""
        return padded(self.tiny, [self.tiny.prompt(1, 5, seed) for seed in (1, 2)])

    def get_config(self) -> Any:
        return self.tiny.make()[1]

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), self.prompts()


def _case(name: str, tiny: Tiny) -> type[unittest.TestCase]:
    def set_up(self: Any) -> None:
        self.model_tester = Tester(tiny)

    made = {
        "setUp": set_up,
        "all_model_classes": (tiny.make()[0],),
        "_is_composite": True,
        "test_resize_embeddings": False,
    }
    return type(f"Peer_{name}", (ModelTesterMixin, unittest.TestCase), {**made, "__module__": __name__})


globals().update({f"Peer_{name}": _case(name, tiny) for name, tiny in ZOO.items() if not tiny.unbuildable})
