"""Methods that merge tokens, told again from the released algorithms: SparseVLM on a decoder run by hand, VisionZip on a shorter prompt."""

from __future__ import annotations

import pytest
import torch
from hand import causal, embedded
from numerics import near
from tiny import IMAGE_TOKEN, build, generate, left_padded, prompt
from transformers.models.llama.modeling_llama import rotate_half

import vlmattn
from vlmattn.errors import InputError, OptionError
from vlmattn.interventions import SparseVLM, VisionZip
from vlmattn.interventions.pruning.sparsevlm import cluster_means

NEW = 5
FAMILIES = ("llava", "qwen2_5_vl")


def answers(family, method, inputs, attn="sdpa", **options):
    model = vlmattn.wrap(build(family, attn), method)
    return generate(model, inputs, NEW, **options)


# SparseVLM


def released_sparsevlm(model, inputs, stages, keep, version, heads, recycle=0.3, size=10):
    """First logits of one prompt with one image; ``stages``: layers after which tokens go, ``keep``: how many stay."""
    decoder, hidden = model.model.language_model, embedded(model, inputs)
    begin = int((inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[0])
    count = int((inputs["input_ids"] == IMAGE_TOKEN).sum())
    text = begin + count
    likeness = (hidden[:, begin:text] @ hidden[:, text:].transpose(1, 2)).softmax(2).mean(1)[0]
    raters = (likeness > likeness.mean()).nonzero().flatten()
    positions = torch.arange(hidden.shape[1])[None]
    for index, layer in enumerate(decoder.layers):
        cos, sin = decoder.rotary_emb(hidden, positions)
        normed, attn = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (part(normed).view(1, hidden.shape[1], -1, attn.head_dim).transpose(1, 2) for part in (attn.q_proj, attn.k_proj, attn.v_proj))  # fmt: skip
        query, key = (part * cos[:, None] + rotate_half(part) * sin[:, None] for part in (query, key))
        repeat = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * attn.head_dim**-0.5
        weights = scores.masked_fill(~causal(*scores.shape[2:]), float("-inf")).softmax(-1)
        out = (weights @ value.repeat_interleave(repeat, 1)).transpose(1, 2).flatten(2)
        hidden = hidden + attn.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if index not in stages:
            continue
        attended = weights
        if version == "2":
            ones = torch.ones(1, 1, hidden.shape[1], attn.head_dim)
            turned = ones * cos[:, None] + rotate_half(ones) * sin[:, None]
            attended = attended / (turned @ turned.transpose(2, 3) * attn.head_dim**-0.5)
            total = attended[0, :, raters + text, begin:text].sum((1, 2))
            attended = attended[:, total.topk(heads).indices]
        s = attended.mean(1)[0, raters + text, begin:text].mean(0)
        best = s.topk(min(keep[stages.index(index)], count - 1)).indices
        stay = torch.zeros(count, dtype=torch.bool).index_fill_(0, best, True)
        image, dropped = hidden[0, begin:text], (~stay).nonzero().flatten()
        parts = [image[stay]]
        if version == "1" and len(dropped):
            taken = int(len(dropped) * recycle) + 1
            parts.append(cluster_means(image[dropped[s[dropped].topk(taken).indices]], int(taken / size) + 1))
        image = torch.cat(parts)
        whole = torch.cat(
            [torch.ones(begin, dtype=torch.bool), stay, torch.ones(hidden.shape[1] - text, dtype=torch.bool)]
        )
        hidden = torch.cat([hidden[:, :begin], image[None], hidden[:, text:]], 1)
        positions = positions[:, whole] if version == "2" else torch.arange(hidden.shape[1])[None]
        count = len(image)
        text = begin + count
    return model.lm_head(decoder.norm(hidden[:, -1:]))[0, 0]


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("words", [4, 9])
def test_sparsevlm_equals_the_released_algorithm(version, words):
    inputs, bare = prompt("llava", 1, words=words), build("llava")
    method = SparseVLM(
        layers="1,2,3", keep_ratios=(12 / 16, 8 / 16, 4 / 16), version=version, cluster_size=2, head_share=0.5
    )
    with torch.no_grad():
        expected = released_sparsevlm(bare, inputs, [0, 1, 2], [12, 8, 4], version, 2, size=2)
    near(answers("llava", method, inputs)[0, 0], expected)
    assert (generate(bare, inputs, 1)[0, 0] - expected).abs().max() > 0.05


def test_clusters_of_two_heaps():
    heaps = torch.cat([torch.randn(5, 8) * 0.01 + 3, torch.randn(7, 8) * 0.01 - 3])
    means = cluster_means(heaps, 2)
    expected = torch.stack([heaps[:5].mean(0), heaps[5:].mean(0)])
    order = means[:, 0].argsort(descending=True)
    torch.testing.assert_close(means[order], expected, rtol=0, atol=1e-4)
    assert torch.equal(cluster_means(heaps[:1], 1), cluster_means(heaps[:1], 1))


def test_counts_of_merged_tokens():
    method = SparseVLM(layers="1,2,3").bind(anatomy := find_anatomy())
    assert anatomy.layers == 4
    # 576: 300 stay, int(276 * .3) + 1 = 83 are merged into int(83 / 10) + 1 = 9
    assert method.kept(1, (576,), 576) == 309
    assert method.kept(2, (576,), 309) == 200 + 4  # 109 dropped, 33 merged into 4
    assert method.kept(3, (576,), 204) == 110 + 3
    assert SparseVLM(layers="1,2,3", version="2").kept(1, (576,), 576) == 300


def find_anatomy():
    from vlmattn.models import find_family

    model = build("llava")
    return find_family(model).anatomy(model)


# VisionZip


def released_visionzip(model, inputs, dominant, contextual):
    """Embeddings of the prompt with fewer image tokens, ``[1, tokens, hidden]``; CLIP tower, CLS among the dominant ones."""
    tower, ids = model.model.vision_tower, inputs["input_ids"][0]
    parts, table = [], model.get_input_embeddings()
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        attn = [module.self_attn for module in tower.modules() if hasattr(module, "self_attn")][-2]
        layer = [module for module in tower.modules() if hasattr(module, "self_attn")][-2]
        entering = layer.layer_norm1(hidden[-3])
        query, key = (
            part(entering).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (attn.q_proj, attn.k_proj)
        )
        received = (query[:, :, :1] @ key.transpose(2, 3) * attn.scale).softmax(-1)[:, :, 0, 1:].sum(1)
        metric = torch.nn.functional.normalize(key.mean(1), dim=-1)
        zipped = []
        for features, seen, keys in zip(hidden[-2], received, metric, strict=True):
            main = torch.cat([torch.tensor([0]), seen.topk(dominant - 1).indices + 1]).sort().values
            rest = torch.tensor([token for token in range(len(features)) if token not in main])
            targets = rest[:: max(1, len(rest) // contextual)][:contextual]
            merge = torch.tensor([token for token in rest.tolist() if token not in targets])
            joined = (keys[merge] @ keys[targets].T).argmax(1)
            means = torch.stack([
                features[merge[joined == number]].mean(0) if (joined == number).any() else torch.zeros(features.shape[-1])
                for number in range(len(targets))
            ])  # fmt: skip
            zipped.append(model.model.multi_modal_projector(torch.cat([features[main], features[targets] + means])))
        image = 0
        at = 0
        while at < len(ids):
            if ids[at] == IMAGE_TOKEN:
                parts.append(zipped[image])
                image, at = image + 1, at + 16
            else:
                parts.append(table(ids[at : at + 1]))
                at += 1
    return torch.cat(parts)[None]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_visionzip_equals_a_shorter_prompt(images, attn):
    inputs, bare = prompt("llava", images), build("llava", attn)
    embeds = released_visionzip(bare, inputs, 5, 3)
    expected = generate(
        bare, {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}, NEW
    )
    out = answers("llava", VisionZip(dominant=5 / 16, contextual=3 / 16), inputs, attn)
    near(out, expected)
    assert (generate(bare, inputs, NEW) - expected).abs().max() > 0.05


def test_the_whole_cache_is_shorter():
    model, inputs = vlmattn.wrap(build("llava"), VisionZip(dominant=0.25, contextual=0.25)), prompt("llava", 1)
    out = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    length = inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [length - 8 + 2] * 4
    assert out.past_key_values.get_seq_length() == length + 2, "the library counts all tokens"


METHODS = {
    "sparsevlm": ("llava", SparseVLM(layers="1,2,3", keep_ratios=(0.75, 0.5, 0.25), cluster_size=2)),
    "sparsevlm_plus": ("both", SparseVLM(layers="1,2,3", keep_ratios=(0.75, 0.5, 0.25), version="2")),
    "visionzip": ("llava", VisionZip(dominant=0.3, contextual=0.2)),
    "visionzip_positions": ("both", VisionZip(dominant=0.3, contextual=0.3, positions="original")),
}


@pytest.mark.parametrize(
    "ways",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static"],
)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_equals_hidden_and_padding_is_invisible(name, family, ways):
    where, method = METHODS[name]
    if where not in ("both", family):
        with pytest.raises(OptionError, match="counts positions anew, and tokens of this model have 3 positions each"):
            vlmattn.wrap(build(family), method)
        return
    images = 1 if "num_beams" in ways else 2  # transformers 5.17 mixes up several images under beams
    prompts = [prompt(family, images), prompt(family, 1, seed=3, words=7)]
    dropped = answers(family, method, left_padded(prompts), **ways)
    hidden = answers(family, type(method)(**{**method.options(), "mode": "mask"}), left_padded(prompts), **ways)
    near(dropped, hidden)
    if "num_beams" not in ways:
        for row, single in enumerate(prompts):
            near(dropped[row], answers(family, method, single, **ways)[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_second_turn_with_and_without_an_image(name):
    _, method = METHODS[name]
    found = []
    for mode in ("drop", "mask"):
        model = vlmattn.wrap(build("llava"), type(method)(**{**method.options(), "mode": mode}))
        inputs, later = prompt("llava", 1), prompt("llava", 1, seed=5)
        options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        first = model.generate(**inputs, **options)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
        second = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **options
        )
        ids = torch.cat([second.sequences, later["input_ids"]], 1)
        turn = dict(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=second.past_key_values)
        found.append(generate(model, {**turn, "pixel_values": later["pixel_values"]}, 3))
    near(*found)


def test_visionzip_wants_pixels():
    embeds = embedded(build("llava"), prompt("llava", 1))
    ids = prompt("llava", 1)["input_ids"]
    table = build("llava").get_input_embeddings()(ids)  # placeholders, with features nobody encoded
    with torch.no_grad(), pytest.raises(InputError, match="visionzip must see the vision tower at work"):
        vlmattn.wrap(build("llava"), "visionzip")(inputs_embeds=table)
    with torch.no_grad(), pytest.raises(InputError, match="no image tokens in the prompt"):
        vlmattn.wrap(build("llava"), "visionzip")(inputs_embeds=embeds)
