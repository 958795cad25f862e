"""``smol`` as one Hugging Face folder: language model and adapter merged, once, in the user's cache."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, suppress
from pathlib import Path
from uuid import uuid4

from vlmattn.embedded.smol.language import GGUF_SHA256, gguf_file, read_language_model
from vlmattn.errors import InputError
from vlmattn.files import file_sha256, write_whole

ADAPTER = Path(__file__).parents[1] / "smol-scenes" / "adapter.safetensors"
_VERSION = 2  # of what is made from the same sources; a higher one makes new folders
_MEASURED = ("vlmattn_heads.json", "vlmattn_directions.safetensors")  # beside the adapter: what some presets act on
_FILES = "files.json"


def cache() -> Path:
    """Where it is kept: ``$VLMATTN_CACHE``, else ``$XDG_CACHE_HOME/vlmattn``, else ``~/.cache/vlmattn``."""
    if own := os.environ.get("VLMATTN_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "vlmattn"


def folder_name(adapter: Path) -> str:
    """Of the sources: another adapter, or other measurements beside it, another folder.

    Raises:
        InputError: there is no adapter.
    """
    if not adapter.is_file():
        raise InputError(f"there is no adapter for 'smol' ({adapter} is missing); use 'embedded'")
    sources = " ".join([str(_VERSION), GGUF_SHA256, *map(file_sha256, (adapter, *_measured(adapter)))])
    return f"smol-{hashlib.sha256(sources.encode()).hexdigest()[:12]}"


def _measured(adapter: Path) -> list[Path]:
    return [path for name in _MEASURED if (path := adapter.with_name(name)).is_file()]


def model_folder(adapter: Path | None = None) -> Path:
    """The folder of the merged model; if it is not there, or damaged, it is made, which takes about a minute.

    Args:
        adapter: tower, projector and LoRA, as ``build.load_adapter`` reads them; None = the one that the package
            carries.

    Raises:
        InputError: no adapter; no language model, where it is needed; the cache cannot be written.
    """
    adapter = adapter or ADAPTER
    folder = cache() / folder_name(adapter)
    if not is_whole(folder):
        _make(folder, adapter)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether all files are there, byte for byte."""
    try:
        listed = json.loads((folder / _FILES).read_text())
        files = [(folder / name, file) for name, file in listed.items()]
        sizes = all(path.stat().st_size == file["bytes"] for path, file in files)
        return bool(files) and sizes and all(file_sha256(path) == file["sha256"] for path, file in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or none that can be read
        return False


def _make(folder: Path, adapter: Path) -> None:
    """Write the folder under another name and move it into place."""
    source = gguf_file()
    if folder.exists():
        print(f"note: {folder} is damaged and is made again", file=sys.stderr)
    print(f"note: the model 'smol' is made in {folder}, once; this takes about a minute", file=sys.stderr, flush=True)
    made = folder.with_name(f"{folder.name}.{uuid4().hex}.partial")
    try:
        made.mkdir(parents=True)
    except OSError as error:
        where = "set VLMATTN_CACHE to a folder with room for 280 MB"
        raise InputError(f"cannot write to {folder.parent} ({error.strerror}); {where}") from error
    try:
        _write(source, made, adapter)
        _place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(source: Path, target: Path, adapter: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from vlmattn.embedded.smol.build import build_llava, load_adapter, load_language_model
    from vlmattn.embedded.smol.text import IMAGE_TOKEN, build_processor
    from vlmattn.embedded.tower import save

    # Progress bars of what is read and written; and the model's random start must not move the caller's seed.
    with redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
        language, weights, tokenizer = read_language_model(source)
        processor = build_processor(tokenizer)
        llava = build_llava(language, processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        load_language_model(llava, weights)
        load_adapter(llava, load_file(adapter))
        save(llava, processor, target)
    for path in _measured(adapter):
        shutil.copy(path, target)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in target.iterdir()}
    write_whole(target / _FILES, json.dumps(files, indent=2, sort_keys=True) + "\n")


def _place(made: Path, folder: Path) -> None:
    """Give a finished folder its name; if another process was first, its folder stays."""
    if folder.exists() and not is_whole(folder):
        damaged = made.with_suffix(".damaged")
        with suppress(FileNotFoundError):  # another process has moved it away
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        made.rename(folder)
    except OSError:
        if not is_whole(folder):
            raise
