"""Writing tiny corpora in their true layouts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from data_prep.corpora import Corpus


def save(path: Path, pixels: ArrayLike, mode: str | None = None, orientation: int | None = None) -> Path:
    """Write an image file; ``mode`` "1" or "P" converts, ``orientation`` sets the EXIF tag."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(pixels)
    image = Image.fromarray(array if array.dtype == np.uint16 else array.astype(np.uint8))
    if mode == "P":
        image.putpalette([255 - i // 3 for i in range(768)])
    elif mode is not None:
        image = image.convert(mode)
    options = {"quality": 95} if path.suffix in (".jpg", ".jpeg") else {}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, exif=exif, **options)
    else:
        image.save(path, **options)
    return path


def spoil_exif(path: Path, block: bytes) -> Path:
    """Write a JPEG anew whose EXIF block holds ``block``; its resolution stands in the JFIF header."""
    with Image.open(path) as image:
        image.save(path, "JPEG", quality=95, dpi=(72, 72), exif=b"Exif\0\0" + block)
    return path


def photo(height: int = 4, width: int = 6, seed: int = 0) -> np.ndarray:
    """Random RGB pixels uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(corpus: Corpus, split: str, key: str) -> list[list[int]]:
    """The mask of one sample as nested lists."""
    ref = next(ref for ref in corpus.list(split) if ref.key == key)
    return [[int(value) for value in row] for row in corpus.read(ref).mask]


def keys(corpus: Corpus, split: str) -> list[str]:
    """The keys of a split, in order."""
    return [ref.key for ref in corpus.list(split)]


def truncate(path: Path) -> None:
    """Keep the first 60 % of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])


def noise_corpus(root: Path, images: int, height: int = 24, width: int = 32) -> Path:
    """A folder corpus called garden, all of it ``train``: noise of two classes; the last image has no mask."""
    for number in range(images):
        pixels = photo(height, width, seed=number)
        save(root / f"images/train/plot{number}.jpg", pixels)
        save(root / f"masks/train/plot{number}.png", pixels[:, :, 0] % 2)
    (root / f"masks/train/plot{images - 1}.png").unlink()
    (root / "classes.yaml").write_text("name: garden\nclasses: [path, grass]\ndomain: natural\nlicence: CC0-1.0\n")
    return root


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, hidden ones too, by its path there."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
