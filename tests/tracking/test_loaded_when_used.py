"""Tracking, and what only some commands need, is loaded when it is used and not before."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import contextlib, io, json, sys

LAZY = {"vlmattn.tracking", "av", "datasets", "matplotlib", "networkx", "pycocoevalcap", "peft"}
found = {}

def note(what):
    found[what] = sorted(LAZY & set(sys.modules))

def command(*arguments):
    sys.argv = ["vlmattn", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main()
    assert out.getvalue()
    note(" ".join(arguments))

import vlmattn
note("import")
import vlmattn.cli as cli
command("--help")
command("track", "--help")
command("presets", "var")
from vlmattn.embedded.scenes import make_scene
model, processor = vlmattn.load("embedded")
vlmattn.wrap(model, "var+vhr")
inputs = processor(text="USER: <image> is there a dog in the image ? ASSISTANT:", images=make_scene(12, 0)[1], return_tensors="pt")
model.generate(**inputs, max_new_tokens=2)
note("generate")
assert vlmattn.Tracker
note("Tracker")
print(json.dumps(found))
"""


def test_tracking_is_loaded_when_it_is_used():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("Tracker") == ["vlmattn.tracking"]
    assert found == {what: [] for what in ("import", "--help", "track --help", "presets var", "generate")}
