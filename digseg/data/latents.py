"""What latents were made by, and how they are stored, so that training needs no autoencoder for its images.

They are those of views (:mod:`digseg.data.views`), each a sample of a shard like any other.
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from digseg.data.order import mix64, permuted_index
from digseg.data.transform_settings import TransformSettings

LATENTS_CODE = 2
"""Changes whenever the same samples and settings would give other views or other latents."""

Latents = npt.NDArray[np.float16]


class LatentRecipe(BaseModel):
    """What latents were made by. All but ``views`` and ``seed`` has to be what the run that trains on them says.

    ``autoencoder`` names what an encoding depends on, part by part: weights, scaling factor, ... ``latent_shape`` is
    [C, h, w].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: int = LATENTS_CODE
    autoencoder: dict[str, str]
    latent_shape: tuple[int, int, int]
    transform: TransformSettings
    views: int
    seed: int

    @property
    def resolution(self) -> int:
        """Pixels a side of a view."""
        return self.transform.crop_size

    @property
    def latent_bytes(self) -> int:
        """Of the latents of one view."""
        return 2 * math.prod(self.latent_shape)

    def problem(self, number: int, key: str, size: tuple[int, int], latents: Latents | None) -> str | None:
        """Why sample ``number`` of a shard, ``size`` its (height, width), is no view of this recipe, or None."""
        if latents is None:
            return "it has no latents"
        if not key.endswith(f"-v{number % self.views}"):
            return f"view {number % self.views} of a sample should lie here"
        if size != (self.resolution, self.resolution):
            return f"the view has {size[1]} x {size[0]} pixels, the manifest says {self.resolution}"
        if latents.shape != self.latent_shape:
            return f"its latents are {list(latents.shape)}, the manifest says {list(self.latent_shape)}"
        return None if np.isfinite(latents).all() else "its latents are not finite"

    def differences(self, run: LatentRecipe) -> list[str]:
        """Each part in which these latents are not what ``run`` needs, with both values."""
        parts = [("code version", str(self.code), str(run.code))]
        for name in sorted({*self.autoencoder, *run.autoencoder}):
            parts.append((f"autoencoder {name}", self.autoencoder.get(name, "-"), run.autoencoder.get(name, "-")))
        wanted = asdict(run.transform)
        for name, value in asdict(self.transform).items():
            parts.append((_KEYS.get(name, name), str(value), str(wanted[name])))
        return [f"{name} (latents {_short(has)}, run {_short(wants)})" for name, has, wants in parts if has != wants]


_KEYS = {
    "crop_size": "resolution, data.crop_size",
    "short_side": "data.short_side",
    "scale": "data.scale",
    "flip": "data.flip",
    "upright": "upright scenes",
    "colour_jitter": "data.colour_jitter",
}


def _short(value: str) -> str:
    """A value for a message; of a sha256 the beginning tells it apart."""
    return value[:12] if len(value) == 64 else value


def view_of(epoch: int, sample: int, views: int, seed: int) -> int:
    """The view that a sample shows in an epoch: in every ``views`` epochs each once, in an order of its own."""
    round_number, turn = divmod(epoch, views)
    return permuted_index(turn, views, mix64(seed, sample, round_number))


def pack_latents(latents: npt.NDArray[np.floating[Any]]) -> bytes:
    """The bytes of an npy file of float16 [C, h, w].

    Raises:
        ValueError: a value is not finite, or beyond what float16 holds.
    """
    with np.errstate(over="ignore"):
        stored = latents.astype(np.float16)
    if not np.isfinite(stored).all():
        raise ValueError("the latents are not finite in float16")
    buffer = io.BytesIO()
    np.save(buffer, stored)
    return buffer.getvalue()


def unpack_latents(content: bytes) -> Latents:
    """float16 [C, h, w] of what :func:`pack_latents` gave.

    Raises:
        ValueError: the bytes are something else.
    """
    latents = np.load(io.BytesIO(content), allow_pickle=False)
    if latents.dtype != np.float16 or latents.ndim != 3:
        raise ValueError(f"latents are {latents.dtype} with {latents.ndim} axes, not float16 [C, h, w]")
    return np.asarray(latents)
