"""Every type of transformers' image-text-to-text models has a verdict: a family serves it, or says why none can."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import parse
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES

from vlmattn.models import registered

INSTALLED = parse(parse(transformers.__version__).base_version)
PINNED, KNOWN = parse("5.23"), parse("5.25")  # of KNOWN on, types wait for families; the generic patcher takes them
REMEDY = "add a family, or a reason to vlmattn/models/unserved.py (docs/extend/family.md)"


@pytest.mark.skipif(INSTALLED >= KNOWN, reason="newer than what the families were made for")
def test_every_type_has_a_verdict():
    missing = sorted(set(TYPES) - set(registered()))
    assert not missing, f"no verdict on {', '.join(missing)}: {REMEDY}"


@pytest.mark.skipif(INSTALLED < PINNED, reason="knows fewer types")
def test_most_types_are_served():
    served = [name for name in TYPES if name in registered() and not registered()[name].unsupported]
    assert len(served) >= 80


def test_a_type_that_is_not_served_has_a_reason_with_a_way_out():
    for name in set(TYPES) & set(registered()):
        why = registered()[name].unsupported
        assert not why or "take" in why or "give" in why, name
