"""docs/howto-pruning.md: a method written as it says is a whole method, with its cost."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[3] / "docs" / "howto-pruning.md").read_text()
(BLOCK,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "@register" in block]
BEFORE = """
import vlmattn
from vlmattn.embedded.scenes import make_scene

model, processor = vlmattn.load("embedded")
question = [{"type": "image"}, {"type": "text", "text": "Is there a dog in the image?"}]
text = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
inputs = processor(text=text, images=make_scene(12, 0, "faint")[1], return_tensors="pt", add_special_tokens=False)
"""
AFTER = """
vlmattn.wrap(model, "longest", keep_ratio=0.25)
model.generate(**inputs)
print(model.vlmattn.report()["image_tokens"]["per_layer"])
print(vlmattn.cost(model, inputs).edited.image_tokens)
"""


def test_the_method_of_the_page():
    program = BEFORE + BLOCK + AFTER
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[49.0, 49.0, 12.0, 12.0, 12.0, 12.0]", "(49.0, 49.0, 12.0, 12.0, 12.0, 12.0)"]
