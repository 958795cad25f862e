"""Kinds of methods, and why some families refuse some."""

from __future__ import annotations

#: Kinds of methods, as families support or refuse them.
KINDS = ("edits", "masks", "pruning", "decoding")

#: Why families with several residual streams refuse to have them steered.
STREAMS = (
    "its residual stream is several streams side by side, which no direction is measured for; take an attention edit"
)

NO_MLP = {"mlp": "some of its layers have no module that is their MLP; take one that acts behind layers, like steer"}

#: Why families with layers without attention refuse methods.
_STATE = "some of its layers have no attention but a state of all tokens before"
HYBRID = {
    "looking": f"{_STATE}, which show no attention and take no token back; take a rule that needs neither, like vcd",
}
