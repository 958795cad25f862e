"""Every type of transformers' image-text-to-text models has a verdict: a family serves it, or says why none can."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import parse
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES

from vlmattn.models import registered

KNOWN = parse("5.24")  # types that a newer transformers brings wait for their families; the generic patcher takes them
REMEDY = "add a family, or a reason to vlmattn/models/unserved.py (docs/extend/family.md)"


@pytest.mark.skipif(parse(transformers.__version__) >= KNOWN, reason="newer than what the families were made for")
def test_every_type_has_a_verdict():
    missing = sorted(set(TYPES) - set(registered()))
    assert not missing, f"no verdict on {', '.join(missing)}: {REMEDY}"


def test_a_type_that_is_not_served_has_a_reason_with_a_way_out():
    families = registered()
    served = [name for name in TYPES if name in families and not families[name].unsupported]
    assert len(served) >= (80 if parse(transformers.__version__) >= parse("5.23") else 70)
    for name in set(TYPES) & set(families) - set(served):
        assert "take" in families[name].unsupported or "give" in families[name].unsupported, name
