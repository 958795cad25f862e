"""Images on disk: found early, read late, errors that name the path."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmattn.errors import InputError


def check_image(folder: Path, name: str) -> Path:
    """Path of an image that exists."""
    path = folder / name
    if not path.is_file():
        raise InputError(f"image not found: {path}; give the folder that holds the images with --images")
    return path


def read_image(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError):  # Pillow raises any of them for a damaged file
        raise InputError(f"cannot read the image {path}; is it a picture file?") from None
