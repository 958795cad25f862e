"""How the bundled model was trained. One CPU core, about two hours; every batch follows from seed and step.

    python -m tools.bundled.train_tiny --out runs/embedded            # train (resumes from its last checkpoint)
    python -m tools.bundled.train_tiny --out runs/embedded --export vlmattn/embedded/tiny-scenes

Stage 1 (vision): every image patch is classified through the projector and the rows of the language model's embedding
table that name the categories and colours, so that projected patches land where their words are.
Stage 2 (instruction): caption and questions; the turns about one image share its prefix and do not see each other.
Stage 3 (several images): the same with 2 to 8 images in three of four prompts; the vision tower and the projector stay
as they are.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tools.bundled.language import build_processor, build_tokenizer, multi_image_turns, turns
from tools.bundled.packing import Row, Turn, answers, pack
from tools.bundled.training import (
    Batch,
    Stage,
    checkpoint,
    last_stage,
    load_stage,
    read_log,
    run_stage,
    scene_batch,
    write_log,
)
from vlmattn.embedded.scenes import CATEGORIES, COLOURS, Scene
from vlmattn.embedded.tower import IMAGE_TOKENS, save, tower_config

SEED = 2026
BATCH = 16
VISION_STEPS = 9_000
TEXT_STEPS = 3_600
MANY_STEPS = 4_500
MULTI_IMAGE_FROM = 800  # steps of stage 2: single-image yes/no is learned by then
_EMBEDDING_NORM = 8.0  # of the size of a projected patch: smaller rows are drowned by the image


def build_model() -> LlavaForConditionalGeneration:
    """LLaVA-1.5 in small: CLIP tower (last-but-one layer, no CLS token), two-layer projector, Llama decoder."""
    tokenizer = build_tokenizer()
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
        vision_config=tower_config(),
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


def _scenes(stage: int, step: int, count: int) -> tuple[list[Scene], Batch]:
    return scene_batch(SEED * 10 + stage, step, count)


def vision_batch(step: int) -> Batch:
    return _scenes(1, step, BATCH)[1]


@lru_cache(maxsize=1)
def _encoder() -> Any:
    return lru_cache(maxsize=None)(build_tokenizer().encode)


def _encode(text: str) -> list[int]:
    return list(_encoder()(text, add_special_tokens=False))


def _prefix(images: int) -> list[int]:
    """Token ids of a prompt up to its question."""
    ids = _encode("<s> USER:")
    for i in range(images):
        ids += (_encode(f"image {i + 1} :") if images > 1 else []) + _encode("<image>") * IMAGE_TOKENS
    return ids


def _turn(question: str, answer: str) -> Turn:
    """A turn with the weights of its answer: a single word counts for more than each word of a caption."""
    reply = _encode(f"{answer} </s>")
    return Turn(_encode(f"{question} ASSISTANT:"), reply, [2.5, 0.05] if len(reply) == 2 else [0.9] * len(reply))


def text_batch(step: int) -> Batch:
    several = step >= MULTI_IMAGE_FROM and step % 4 == 0
    images = 2 + step // 4 % 3 if several else 1
    return _dialogues(2, step, images, {1: BATCH, 2: 8, 3: 5, 4: 4}[images], 9)


def many_batch(step: int) -> Batch:
    images = 1 if step % 4 == 0 else 2 + (step - step // 4) % 7
    return _dialogues(3, step, images, {1: 8, 2: 6, 3: 4, 4: 4, 5: 3, 6: 3, 7: 2, 8: 2}[images], 12)


def _dialogues(stage: int, step: int, images: int, rows: int, questions: int) -> Batch:
    """``rows`` prompts of so many images; ``questions`` turns about several."""
    rng = np.random.default_rng([SEED, stage + 1, step])
    scenes, batch = _scenes(stage, step, rows * images)
    groups = [scenes[i * images : (i + 1) * images] for i in range(rows)]
    dialogues = [turns(group[0], rng) if images == 1 else multi_image_turns(group, rng, questions) for group in groups]
    packed = [Row.of(_prefix(images), [_turn(*said) for said in dialogue]) for dialogue in dialogues]
    return batch | pack(packed) | {"images": torch.tensor(images)}


def _text_loss(trainee: Trainee, batch: Batch, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits, target, weight = answers(trainee.llava, batch, patches)
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


def _loss(trainee: Trainee, stage: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
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


def train_stage(trainee: Trainee, stage: int, steps: int, folder: Path, workers: int, every: int = 200) -> None:
    """Train one stage to its end, from its checkpoint if there is one, otherwise from the weights as they are."""
    if stage == 2 and not checkpoint(folder, stage).exists():
        trainee.start_text_stage()
    if stage == 3:
        # From the weights as they would be stored; the rotary frequencies are rounded too, now and after a resumption.
        trainee.llava.half().float()
    made = Stage(
        number=stage,
        steps=steps,
        every=every,
        batch={1: vision_batch, 2: text_batch, 3: many_batch}[stage],
        loss=lambda batch: _loss(trainee, stage, batch),
        rate=lambda step: _learning_rate(stage, step),
    )
    run_stage(trainee, _optimizer(trainee, stage), made, folder, workers)


def export(folder: Path, target: Path) -> None:
    """Write the last checkpoint as a Hugging Face folder (float16 safetensors, processor, chat template)."""
    trainee = Trainee()
    load_stage(trainee, folder, 3)
    model = trainee.llava
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=48)
    save(model, build_processor(), target)
    write_log(read_log(folder), target / "training_log.json")


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
    for stage in range(last_stage(options.out, 3), 4):
        train_stage(trainee, stage, stages[stage], options.out, options.workers, every=500 if stage == 1 else 200)


if __name__ == "__main__":
    main()
