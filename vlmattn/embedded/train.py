"""How the bundled model was trained. One CPU core, about two hours; every batch follows from seed and step.

    python -m vlmattn.embedded.train --out runs/embedded            # train (resumes from its last checkpoint)
    python -m vlmattn.embedded.train --out runs/embedded --export vlmattn/embedded/tiny-scenes

Stage 1 (vision): every image patch is classified through the projector and the rows of the language model's embedding
table that name the categories and colours, so that projected patches land where their words are.
Stage 2 (instruction): caption and questions; the turns about one image share its prefix and do not see each other.
Stage 3 (several images): the same with 2 to 8 images in three of four prompts; the vision tower and the projector stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmattn.embedded.scenes import CATEGORIES, COLOURS, IMAGE_SIZE, PATCH_SIZE, Scene, make_scene, patch_labels
from vlmattn.embedded.text import IMAGE_TOKENS, build_processor, build_tokenizer, multi_image_turns, turns

SEED = 2026
BATCH = 16
VISION_STEPS = 9_000
TEXT_STEPS = 3_600
MANY_STEPS = 4_500
MULTI_IMAGE_FROM = 800  # steps of stage 2: single-image yes/no is learned by then
_BROKEN_SHARE = 0.15
_EMBEDDING_NORM = 8.0  # of the size of a projected patch: smaller rows are drowned by the image
_IGNORE_POSITION = -1


def build_model() -> LlavaForConditionalGeneration:
    """LLaVA-1.5 in small: a CLIP tower (last-but-one layer, without its CLS token), two-layer projector, Llama decoder."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


class Trainee(nn.Module):
    """The model and the heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.llava = build_model()
        hidden = self.llava.config.text_config.hidden_size
        self.background = nn.Parameter(torch.zeros(2, hidden))  # "no category here", "no colour here"
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.multi_label = nn.Linear(self.llava.config.vision_config.hidden_size, len(CATEGORIES))
        vocabulary = build_tokenizer().get_vocab()
        self.category_ids = torch.tensor([vocabulary[word] for word in CATEGORIES])
        self.colour_ids = torch.tensor([vocabulary[word] for word in COLOURS])
        with torch.no_grad():
            self.words.mul_(_EMBEDDING_NORM / self.words.norm(dim=-1).mean())

    @property
    def words(self) -> Tensor:
        table: Tensor = self.llava.model.language_model.embed_tokens.weight
        return table

    def start_text_stage(self) -> None:
        """Output rows along the input rows, and small residual updates: the question must not be drowned."""
        with torch.no_grad():
            scale = _EMBEDDING_NORM / self.words.norm(dim=-1).mean()
            self.words.mul_(scale)
            self.background.mul_(scale)
            self.log_scale.sub_(scale.log())
            self.llava.lm_head.weight.copy_(0.3 * F.normalize(self.words, dim=-1))
            for layer in self.llava.model.language_model.layers:
                layer.self_attn.o_proj.weight.mul_(0.3)
                layer.mlp.down_proj.weight.mul_(0.3)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Projected patches ``[images, 49, hidden]`` and the pooled CLS vector."""
        tower = self.llava.model.vision_tower(pixels, output_hidden_states=True)
        return self.llava.model.multi_modal_projector(tower.hidden_states[-2][:, 1:]), tower.pooler_output

    def dense_loss(self, patches: Tensor, category: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
        """Patch classification against word embeddings; also the share of foreground patches that is right."""
        loss = patches.new_zeros(())
        right = loss
        for ids, target, row, weight in ((self.category_ids, category, 0, 1.0), (self.colour_ids, colour, 1, 0.6)):
            rows = torch.cat([self.background[row : row + 1], self.words[ids]])
            logits = patches @ rows.T * self.log_scale.exp() / patches.shape[-1] ** 0.5
            class_weight = torch.ones(len(rows))
            class_weight[0] = 0.12  # most patches are background
            loss = loss + weight * F.cross_entropy(logits.transpose(1, 2), target, class_weight)
            if row == 0:
                right = (logits.argmax(-1) == target)[target > 0].float().mean()
        return loss, right


class _Batches(Dataset[dict[str, Tensor]]):
    """Batch ``i`` of a stage: a pure function of seed, stage and i, so a resumed run sees what it would have seen."""

    def __init__(self, stage: int, start: int, stop: int) -> None:
        self.stage, self.start, self.stop = stage, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step = self.start + index
        return vision_batch(step) if self.stage == 1 else text_batch(step) if self.stage == 2 else many_batch(step)


def _scenes(stage: int, step: int, count: int) -> tuple[list[Scene], dict[str, Tensor]]:
    drawn = [make_scene(SEED * 10 + stage, step * 64 + i, None, _BROKEN_SHARE) for i in range(count)]
    pixels = torch.from_numpy(np.stack([image for _, image in drawn])).permute(0, 3, 1, 2).float()
    labels = [patch_labels(scene) for scene, _ in drawn]
    return [scene for scene, _ in drawn], {
        "pixels": (pixels / 255 - 0.5) / 0.25,
        "category": torch.from_numpy(np.stack([a for a, _ in labels])),
        "colour": torch.from_numpy(np.stack([b for _, b in labels])),
    }


def vision_batch(step: int) -> dict[str, Tensor]:
    return _scenes(1, step, BATCH)[1]


@lru_cache(maxsize=1)
def _encoder() -> Any:
    return lru_cache(maxsize=None)(build_tokenizer().encode)


def _encode(text: str) -> list[int]:
    return list(_encoder()(text, add_special_tokens=False))


@dataclass
class _Sequence:
    """One image prefix and all its turns; ``turn`` 0 is the prefix, and every turn starts at the same position."""

    ids: list[int]
    position: list[int]
    turn: list[int]
    target: list[int]
    weight: list[float]

    @classmethod
    def of(cls, images: int, dialogue: list[tuple[str, str]]) -> _Sequence:
        prefix = _encode("<s> USER:")
        for i in range(images):
            prefix += (_encode(f"image {i + 1} :") if images > 1 else []) + _encode("<image>") * IMAGE_TOKENS
        start = len(prefix)
        out = cls(prefix, list(range(start)), [0] * start, [0] * start, [0.0] * start)
        for number, (question, answer) in enumerate(dialogue, start=1):
            ask, reply = _encode(f"{question} ASSISTANT:"), _encode(f"{answer} </s>")
            tokens = ask + reply
            out.ids += tokens
            out.position += range(start, start + len(tokens))
            out.turn += [number] * len(tokens)
            out.target += [*tokens[1:], 0]
            one_word = len(reply) == 2
            out.weight += [0.0] * (len(ask) - 1) + ([2.5, 0.05] if one_word else [0.9] * len(reply)) + [0.0]
        return out


def text_batch(step: int) -> dict[str, Tensor]:
    several = step >= MULTI_IMAGE_FROM and step % 4 == 0
    images = 2 + step // 4 % 3 if several else 1
    return _dialogues(2, step, images, {1: BATCH, 2: 8, 3: 5, 4: 4}[images], 9)


def many_batch(step: int) -> dict[str, Tensor]:
    images = 1 if step % 4 == 0 else 2 + (step - step // 4) % 7
    return _dialogues(3, step, images, {1: 8, 2: 6, 3: 4, 4: 4, 5: 3, 6: 3, 7: 2, 8: 2}[images], 12)


def _dialogues(stage: int, step: int, images: int, rows: int, questions: int) -> dict[str, Tensor]:
    """``rows`` prompts of so many images; ``questions`` turns about several."""
    rng = np.random.default_rng([SEED, stage + 1, step])
    scenes, batch = _scenes(stage, step, rows * images)
    groups = [scenes[i * images : (i + 1) * images] for i in range(rows)]
    dialogues = [turns(group[0], rng) if images == 1 else multi_image_turns(group, rng, questions) for group in groups]
    sequences = [_Sequence.of(images, dialogue) for dialogue in dialogues]
    length = max(len(sequence.ids) for sequence in sequences)

    def padded(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        values = [getattr(sequence, name) for sequence in sequences]
        return torch.tensor([row + [fill] * (length - len(row)) for row in values], dtype=dtype)

    turn = padded("turn", _IGNORE_POSITION, torch.long)
    same = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)
    visible = same & torch.ones(length, length, dtype=torch.bool).tril()
    batch |= {
        "ids": padded("ids", 0, torch.long),
        "position": padded("position", 0, torch.long),
        "mask": torch.zeros(rows, 1, length, length).masked_fill(~visible[:, None], -1e9),
        "target": padded("target", 0, torch.long),
        "weight": padded("weight", 0.0, torch.float),
        "images": torch.tensor(images),
    }
    return batch


def _text_loss(trainee: Trainee, batch: dict[str, Tensor], patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    llava = trainee.llava
    image_token = llava.config.image_token_id
    embeddings = llava.model.language_model.embed_tokens(batch["ids"])
    embeddings = embeddings.masked_scatter(
        (batch["ids"] == image_token)[..., None], patches.reshape(-1, patches.shape[-1])
    )
    hidden = llava.model.language_model(
        inputs_embeds=embeddings, attention_mask=batch["mask"], position_ids=batch["position"], use_cache=False
    ).last_hidden_state
    used = batch["weight"] > 0
    target, weight = batch["target"][used], batch["weight"][used]
    logits = llava.lm_head(hidden[used])
    losses = F.cross_entropy(logits, target, reduction="none")
    right = (logits.argmax(-1) == target).float()
    yes_no = torch.isin(target, torch.tensor(_encode("yes no")))
    kind = "one" if int(batch["images"]) == 1 else "many"
    figures = {
        f"yes_no_{kind}": right[yes_no & (weight > 2)].mean(),
        f"word_{kind}": right[~yes_no & (weight > 2)].mean(),
        "caption_loss": losses[weight == 0.9].mean(),
    }
    return (losses * weight).sum() / weight.sum(), figures


def _loss(trainee: Trainee, stage: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a stage makes small, and figures for its log."""
    with torch.set_grad_enabled(stage < 3):
        patches, pooled = trainee.see(batch["pixels"])
    if stage == 3:
        return _text_loss(trainee, batch, patches)
    seen, right = trainee.dense_loss(patches, batch["category"], batch["colour"])
    if stage == 2:
        said, figures = _text_loss(trainee, batch, patches)
        return said + 0.3 * seen, figures | {"patch_accuracy": right}
    present = torch.zeros(len(pooled), len(CATEGORIES) + 1).scatter_(1, batch["category"], 1.0)[:, 1:]
    labels = F.binary_cross_entropy_with_logits(trainee.multi_label(pooled), present)
    return seen + 0.5 * labels, {"patch_accuracy": right}


def _learning_rate(stage: int, step: int) -> float:
    if stage == 1:
        return 1.2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / VISION_STEPS)
    if stage == 3:
        return 8e-4 * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * (1 - step / MANY_STEPS))
    done = step / TEXT_STEPS
    return 1e-3 * min(1.0, (step + 1) / 100) * (1.0 if done < 0.4 else 0.03 + 0.97 * (1 - done) / 0.6)


def _optimizer(trainee: Trainee, stage: int) -> torch.optim.AdamW:
    llava = trainee.llava.model
    seeing = [*llava.vision_tower.parameters(), *llava.multi_modal_projector.parameters(), trainee.background]
    seeing += [trainee.log_scale, *trainee.multi_label.parameters()]
    if stage == 1:
        groups = [{"params": [*seeing, trainee.words], "share": 1.0, "weight_decay": 0.02}]
    else:
        known = {id(p) for p in seeing}
        rest = [p for p in trainee.parameters() if id(p) not in known]
        groups = [] if stage == 3 else [{"params": seeing, "share": 0.5, "weight_decay": 0.05}]
        groups += [
            {"params": [p for p in rest if p.ndim > 1], "share": 1.0, "weight_decay": 0.05},
            {"params": [p for p in rest if p.ndim < 2], "share": 1.0, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def run_stage(trainee: Trainee, stage: int, steps: int, folder: Path, workers: int, every: int = 200) -> None:
    """Train one stage to its end, continuing from its checkpoint if there is one; figures go to ``log.jsonl``."""
    path = folder / f"stage{stage}.pt"
    optimizer = _optimizer(trainee, stage)
    start, seconds = 0, 0.0
    if (
        stage == 3
    ):  # from the weights as they would be stored; the rotary frequencies are rounded too, now and after a resumption
        trainee.llava.half().float()
    if path.exists():
        state = torch.load(path, weights_only=True)
        trainee.load_state_dict(state["trainee"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
    elif stage == 2:
        trainee.start_text_stage()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loader = DataLoader(_Batches(stage, start, steps), batch_size=None, num_workers=workers)
    batches: Iterator[dict[str, Tensor]] = iter(loader)
    sums: dict[str, list[float]] = {}
    begun = time.monotonic() - seconds
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(stage, step) * group["share"]
        batch = next(batches)
        loss, figures = _loss(trainee, stage, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        for name, value in ({"loss": loss} | figures).items():
            if not value.isnan():  # a batch without such turns
                sums.setdefault(name, []).append(float(value.detach()))
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = time.monotonic() - begun
            line: dict[str, float] = {"stage": stage, "step": step + 1, "seconds": round(seconds)}
            line |= {name: round(float(np.mean(values)), 4) for name, values in sorted(sums.items())}
            sums = {}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            state = {"trainee": trainee.state_dict(), "optimizer": optimizer.state_dict()}
            _save(path, state | {"step": step + 1, "seconds": seconds})


def export(folder: Path, target: Path) -> None:
    """Write the last checkpoint as a Hugging Face folder (float16 safetensors, processor, chat template)."""
    trainee = Trainee()
    checkpoint = folder / "stage3.pt"
    trainee.load_state_dict(torch.load(checkpoint, weights_only=True)["trainee"])
    model = trainee.llava
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    if largest > 6e4:
        raise ValueError(f"a weight of {largest:g} does not fit in float16")
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=48)
    model.half().save_pretrained(target)
    build_processor().save_pretrained(target)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (target / "training_log.json").write_text("[\n" + ",\n".join(json.dumps(line) for line in log) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log.jsonl")
    parser.add_argument("--export", type=Path, help="write the trained model as a Hugging Face folder and stop")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS)
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS)
    parser.add_argument("--many-steps", type=int, default=MANY_STEPS)
    parser.add_argument("--threads", type=int, default=1, help="one thread keeps float32 sums in one order")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw the scenes")
    options = parser.parse_args()
    if options.export:
        export(options.out, options.export)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    trainee = Trainee()
    stages = {1: options.vision_steps, 2: options.text_steps, 3: options.many_steps}
    begun = [stage for stage in stages if (options.out / f"stage{stage}.pt").exists()]
    for stage in range(max(begun, default=1), 4):
        run_stage(trainee, stage, stages[stage], options.out, options.workers, every=500 if stage == 1 else 200)


if __name__ == "__main__":
    main()
