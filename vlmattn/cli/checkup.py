"""Wrapped answers of the bundled model, tried: what ``vlmattn doctor`` runs."""

from __future__ import annotations

import warnings

from vlmattn.errors import VlmattnError

# One of each kind: a pass beside the prompt, an edit of attention, dropped tokens, a branch.
TRIED = ("vhr", "pai", "fastv", "vcd")


def tried(presets: tuple[str, ...] = TRIED) -> dict[str, str]:
    """What went wrong when the bundled model answered under each preset; "" if nothing did.

    A preset is well if ``generate`` runs, the method fired, and ``unwrap`` gives back the bare model's logits bit for
    bit.
    """
    import torch

    from vlmattn.evals.loading import load
    from vlmattn.evals.prompts import encode
    from vlmattn.evals.suites import World
    from vlmattn.wrapping import applied

    model, processor = load("embedded", "float32", None)
    inputs = encode(model, processor, ["is there a cup?"], [[World("clear", count=1, seed=0).image(0)[0]]])
    found = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own renamed arguments; what never fired is looked at below
        bare = model(**inputs).logits
        for preset in presets:
            trouble = ""
            try:
                with applied(model, preset):
                    model.generate(**inputs, max_new_tokens=4, do_sample=False)
                    fired = model.vlmattn.report()["fired"]
                if not all(fired.values()):
                    trouble = "did not act"
                elif not torch.equal(model(**inputs).logits, bare):
                    trouble = "the unwrapped model is not what it was"
            except VlmattnError as error:
                trouble = str(error)
            except Exception as error:  # whatever a new release raises is the finding
                trouble = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            found[preset] = trouble
    return found
