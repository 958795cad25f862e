"""What we know of the inside of transformers, and every difference between its versions, one function each.

Nothing else in the engine imports from its submodules, knows a private name of it, or a version.

From 5.24 on the key-value cache is called ``cache`` where it was ``past_key_values``: as an argument of models,
decoders and layers, and in their outputs. The old name is still taken at the door, and code that is not transformers'
own goes on with it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, cache_utils
from transformers import __version__ as INSTALLED
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput as SearchOutput
from transformers.generation.utils import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from vlmattn.bases import base_attention

__all__ = ["INSTALLED", "DynamicLayer", "DynamicSlidingWindowLayer", "SearchOutput"]

TESTED = ("5.17", "5.24")  # the oldest and the newest release that the suite is run on
_NAMES = ("cache", "past_key_values")


@functools.cache
def cache_name() -> str:
    """The name that this version of transformers gives the key-value cache."""
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in _NAMES if name in parameters), _NAMES[0])


def _names() -> tuple[str, ...]:
    """Names of a cache, the version's own first; before 5.24 ``cache`` was that of continuous batching alone."""
    return _NAMES if cache_name() == _NAMES[0] else _NAMES[1:]


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model, a decoder or a layer; None without one, or in continuous batching."""
    found = next((inputs[name] for name in _names() if inputs.get(name) is not None), None)
    return None if _is_paged(found) else found


def with_cache(inputs: Mapping[str, Any], cache: Any, module: nn.Module | None = None) -> dict[str, Any]:
    """The arguments with another cache (or None), under the name they had or that ``module`` takes."""
    given = next((name for name in _names() if name in inputs), None) or _name_of(module)
    return {**{name: value for name, value in inputs.items() if name not in _names()}, given: cache}


def _name_of(module: nn.Module | None) -> str:
    if module is not None:
        parameters = inspect.signature(type(module).forward).parameters
        if found := [name for name in _names() if name in parameters]:
            return found[0]
    return cache_name()


def output_cache(output: Any) -> Any:
    """The key-value cache in the output of a forward; None without one."""
    return getattr(output, cache_name(), None)


def set_output_cache(output: Any, cache: Any) -> None:
    """Another key-value cache in the output of a forward."""
    setattr(output, cache_name(), cache)


def paged(inputs: Mapping[str, Any]) -> bool:
    """Whether these arguments come from continuous batching, whose sequences share one row and one cache."""
    return any(_is_paged(inputs.get(name)) for name in _NAMES)


def _is_paged(cache: Any) -> bool:
    return any(kind.__name__ == "PagedAttentionCache" for kind in type(cache).__mro__)


def untested() -> str | None:
    """One line if the installed transformers is newer than any that the library was tested with, else None."""
    if _numbers(INSTALLED) <= _numbers(TESTED[1]):
        return None
    return (
        f"transformers {INSTALLED} is newer than {TESTED[1]}, the newest that this vlmattn was tested with;"
        " 'vlmattn doctor' tries wrapped answers"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@functools.cache
def warn_if_untested() -> None:
    """Say once in a process that transformers is newer than any that was tested."""
    if (text := untested()) is not None:
        warnings.warn(f"vlmattn: {text}", stacklevel=4)


def attention_function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of an implementation, for masks as ``register_attention`` has them made.

    "eager" is beside a module's class.
    """
    if name == "sdpa":
        return cast("Callable[..., Any]", sdpa_attention_forward)
    if name == "eager":
        return cast("Callable[..., Any]", sys.modules[type(module).__module__].eager_attention_forward)
    return base_attention(name, AttentionInterface()[name], mask_kind(name))


def mask_kind(name: str | None) -> str | None:
    """Whose masks an attention implementation takes: "sdpa", "eager", "flash" or "flex"; None: not known."""
    if name == "eager":
        return name
    known = AttentionMaskInterface()
    if name not in known or name not in AttentionInterface():
        return None
    kinds = {sdpa_mask: "sdpa", eager_mask: "eager", flash_attention_mask: "flash", flex_attention_mask: "flex"}
    return kinds.get(known[name])


def register_attention(name: str, base: str, function: Callable[..., Any]) -> None:
    """Make an attention function known under ``name``, with masks of four dimensions that say what ``base`` sees.

    They are additive for "eager", else bool. Without a mask function of the same name transformers drops every mask
    silently.
    """
    masks: dict[str | None, Callable[..., Any]] = {"eager": eager_mask, "flash": _padded_causal_mask}
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, masks.get(mask_kind(base), sdpa_mask))


def _padded_causal_mask(
    *args: Any, mask_function: Any = None, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """A mask for flash attention, which goes by padding alone; ``bases.seen_by_flash`` has what layers add."""
    return cast("Tensor | None", sdpa_mask(*args, mask_function=causal_mask_function, **kwargs))


def attention_name(config: Any) -> str | None:
    """The attention implementation that a text config names."""
    found: str | None = config._attn_implementation
    return found


def set_attention_name(model: PreTrainedModel, name: str, checked: bool = True) -> None:
    """Name the attention implementation of the text decoder; a config that is not nested is the text's itself.

    ``checked`` False: without a look at whether it is installed, which loads kernels and may take another in its place.
    """
    if not checked:
        model.config.get_text_config()._attn_implementation_internal = name
        return
    nested = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config" if nested else "": name})


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty dynamic cache for the text decoder."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def capacity(cache: Any) -> int:
    """Slots that a cache has room for; -1 for one that grows."""
    found: int = (getattr(cache, "get_max_length", None) or cache.get_max_cache_shape)()
    return found


def rotary_tables(decoder: Any) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None:
    """What makes rotary tables of the residual stream, positions and the number of a layer; None without such."""
    if (rotary := getattr(decoder, "rotary_emb", None)) is None:
        return None
    if "layer_type" not in inspect.signature(type(rotary).forward).parameters:
        return lambda hidden, positions, layer: rotary(hidden, positions)
    return lambda hidden, positions, layer: rotary(hidden, positions, layer_type=decoder.config.layer_types[layer])


def counting_layer(cache: Any, layer: int) -> int:
    """The layer whose length a cache says for ``layer``: layers that keep a state in place of keys have none."""
    if layer >= len(cache.layers) or hasattr(cache.layers[layer], "keys"):
        return layer
    return next((number for number, found in enumerate(cache.layers) if hasattr(found, "keys")), layer)


def growing_window(layer: Any) -> int:
    """The sliding window of a cache layer that grows up to it and then lets its oldest slots go; 0 = it has none."""
    return int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else 0


def keys_before(cache: Any, layer: int, start: int) -> Tensor:
    """Keys ``[batch, kv_heads, key, dim]`` that a layer sees beside those of a forward that begins at its slot
    ``start``."""
    keys: Tensor = cache.layers[layer].keys
    window = growing_window(cache.layers[layer])
    return keys[:, :, -(window - 1) :] if window else keys[:, :, :start]


def is_static(cache: Any) -> bool:
    """Whether a cache has slots of a fixed number, and does not tell on the host how many are filled."""
    return any(hasattr(layer, "max_cache_len") for layer in cache.layers)


def keeps_elsewhere(cache: Any) -> bool:
    """Whether keys and values are quantized or offloaded, so that no slots can be taken out."""
    quantized = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
    return bool(getattr(cache, "offloading", False)) or any(isinstance(layer, quantized) for layer in cache.layers)


def rings(cache: Any, window: int) -> bool:
    """Whether some layer is a full ring of slots in which the newest token takes the place of the oldest."""
    layers = getattr(cache, "layers", ())
    return any(getattr(layer, "is_sliding", False) and getattr(layer, "max_cache_len", 0) >= window for layer in layers)


def encoded_images(inputs: Mapping[str, Any]) -> list[Any]:
    """Features of images and of videos where generate() encoded them before the first forward, else None for each."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    return [getattr(encoded.get(kind), "pooler_output", None) for kind in ("image", "video")]


def setting_of(model: PreTrainedModel, kwargs: Mapping[str, Any], name: str) -> Any:
    """A generation setting as generate() will see it: of the call, its config, or the model's."""
    configs = (kwargs.get("generation_config"), model.generation_config)
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)


def end_tokens(config: Any) -> frozenset[int]:
    """Ids that end an answer, of a generation config that generate() has prepared."""
    found = config._eos_token_tensor
    return frozenset(() if found is None else found.flatten().tolist())


def padding_token(config: Any) -> int:
    """The id behind answers that are over, of a generation config that generate() has prepared."""
    found = config._pad_token_tensor
    return 0 if found is None else int(found)


def is_drafting(kwargs: Mapping[str, Any]) -> bool:
    """Whether this generate() call is made by the loop of assisted decoding, for drafts that another model checks."""
    return bool(getattr(kwargs.get("generation_config"), "is_assistant", False))


def drafts_asked(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> list[str]:
    """Arguments and settings of a generate() call that ask for drafts."""
    asked = ["assistant_model"] if kwargs.get("assistant_model") is not None else []
    return asked + [name for name in _DRAFTING if setting_of(model, kwargs, name)]


_DRAFTING = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def file_beside(source: str, name: str) -> str | None:
    """A file of the repository that a model came from, downloaded where it must be; None if there is none."""
    found: str | None = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return found


def window_order(tower: Any, grid: Tensor) -> Tensor:
    """Position of each token in the prompt, in the order in which Qwen2.5-VL's tower has them, window by window."""
    try:
        from transformers.vision_utils import get_vision_window_index
    except ImportError:  # before 5.20 or so
        return torch.as_tensor(tower.get_window_index(grid)[0])
    order: Tensor = get_vision_window_index(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )[0]
    return order


def with_all_rows(kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward in which layers that share keys and values read all rows of a prompt.

    Gemma 4 leaves out rows that no logits are asked for, if these are asked for by their number, not by their places.
    """
    last, given = kwargs.get("logits_to_keep"), inputs.get("input_ids")
    given = inputs.get("inputs_embeds") if given is None else given
    if not isinstance(last, int) or not last or given is None:
        return kwargs
    rows = given.shape[1]
    return {**kwargs, "logits_to_keep": torch.arange(max(rows - last, 0), rows, device=given.device)}


def with_chosen_keys(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of a layer whose indexer chooses keys, which models put into it for "sdpa" and "eager" by name only.

    They take ``indices`` ``[batch, query, chosen]`` (sparse attention of DeepSeek) or ``block_indices`` (MiniMax M3).
    """
    chosen, blocks = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    if blocks is not None:
        places = kwargs.get("position_ids")
        if places is None:
            places = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
        places = (places if places.ndim > 1 else places[None]).expand(len(query), -1)
        arguments = (blocks, mask, key.shape[2], query.dtype, query.device, places)
        return module.indexer.build_block_mask(*arguments)  # type: ignore[no-any-return, union-attr, operator]
    if chosen is None or mask is None:
        return mask
    keep = torch.zeros(*chosen.shape[:2], key.shape[2], dtype=torch.bool, device=chosen.device)
    keep = keep.scatter(-1, chosen.long(), True)[:, None]
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, torch.finfo(query.dtype).min)


def keeps_state(layer: Any) -> bool:
    """Whether a cache layer has a state of all tokens in place of keys and values."""
    return hasattr(layer, "conv_states") and not hasattr(layer, "keys")


def with_states(layer: Any, make: Callable[[str, int], Tensor]) -> Any:
    """A copy of a cache layer that keeps states, each made anew: ``make(name, number)``."""
    found = copy.copy(layer)
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        setattr(found, name, {n: None if state is None else make(name, n) for n, state in states.items()})
    return found


def joined_states(layers: Sequence[Any]) -> Any:
    """A cache layer with the rows of all ``layers``, which keep states."""
    return with_states(layers[0], lambda name, n: torch.cat([getattr(layer, name)[n] for layer in layers]))


def repeat_rows(cache: Any, times: int) -> None:
    """Every row of a cache ``times`` times, one after another; layers that keep states cannot do that themselves."""
    for number, layer in enumerate(cache.layers):
        if keeps_state(layer):
            again = functools.partial(lambda of, name, n: getattr(of, name)[n].repeat_interleave(times, 0), layer)
            cache.layers[number] = with_states(layer, again)
        else:
            layer.batch_repeat_interleave(times)


def image_text_types() -> list[str]:
    """Model types of which transformers knows a model that reads pictures and text and writes text."""
    return list(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
