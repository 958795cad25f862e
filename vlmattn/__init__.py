"""vlmattn: training-free attention interventions for Hugging Face vision-language models.

>>> import vlmattn
>>> model = vlmattn.wrap(model, "var")      # the same object; model.generate() works as ever
>>> vlmattn.unwrap(model)                   # bit for bit what it was
"""

from importlib.metadata import version as _version
from typing import Any

from vlmattn.errors import InputError, OptionError, StateError, UnknownNameError, UnsupportedError, VlmattnError
from vlmattn.interventions import PAI, VAR, VHR, Intervention
from vlmattn.interventions import all_presets as presets
from vlmattn.models import supported_families
from vlmattn.recipe import Recipe
from vlmattn.wrapping import applied, install, unwrap, wrap

__version__ = _version("vlmattn")


def load(name: str, **kwargs: Any) -> Any:
    """``load("embedded")``: the bundled model and its processor. See ``vlmattn.embedded.load``."""
    from vlmattn.embedded import load as load_embedded

    return load_embedded(name, **kwargs)


__all__ = [
    "PAI",
    "VAR",
    "VHR",
    "InputError",
    "Intervention",
    "OptionError",
    "Recipe",
    "StateError",
    "UnknownNameError",
    "UnsupportedError",
    "VlmattnError",
    "__version__",
    "applied",
    "install",
    "load",
    "presets",
    "supported_families",
    "unwrap",
    "wrap",
]
