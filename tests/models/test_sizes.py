"""Sizes that configs tell in several ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers as hf
from zoo import ZOO

from vlmattn.models import find_family
from vlmattn.models.sizes import heads_of


@pytest.mark.parametrize("config", ["Gemma4TextConfig", "Gemma4UnifiedTextConfig"])
def test_layers_of_gemma4_have_heads_of_two_sizes(config):
    text = getattr(hf, config)()
    wanted = {"sliding_attention": 256, "full_attention": 512}
    assert [dim for _, dim in heads_of(text)] == [wanted[kind] for kind in text.layer_types]


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("gemma4_shared", ((2, 8), (2, 16)) * 3),
        ("gemma4_key_value", ((2, 8), *[(1, 16)] * 3)),
        ("gemma4", ()),
        ("llava", ()),
    ],
)
def test_an_anatomy_tells_layers_apart_where_they_differ(name, each):
    model = ZOO[name].build()
    family = find_family(model)
    anatomy = family.anatomy(model)
    assert anatomy.unlike == each
    for number, layer in enumerate(family.layers(model)):
        attention = family.attention(layer)
        heads, size = anatomy.heads_of(number)
        assert size == anatomy.query_size(number) == attention.head_dim
        assert heads * attention.num_key_value_groups == anatomy.heads


def test_profiles_belong_to_models_with_the_same_heads_in_each_layer():
    anatomy = find_family(model := ZOO["gemma4_shared"].build()).anatomy(model)
    assert anatomy.fingerprint != replace(anatomy, unlike=anatomy.unlike[::-1]).fingerprint
    assert anatomy.fingerprint != replace(anatomy, unlike=()).fingerprint
