"""Where the autoencoder of a model lies, however the model is named."""

from __future__ import annotations

from pathlib import Path

from digseg.config import AutoencoderConfig
from digseg.errors import DigSegError
from digseg.model.export import is_export, read_card

_KINDS = (
    "give an exported model of this project, a diffusers directory with a 'vae' folder, an AutoencoderKL folder, or "
    "the id of a model on the Hugging Face hub"
)


def autoencoder_of(model: str) -> AutoencoderConfig:
    """The autoencoder of an exported model, of a diffusers directory, or of a model on the Hugging Face hub.

    Of a hub id (``owner/name``) the ``vae`` folder is fetched into the hub's cache on this machine.

    Raises:
        DigSegError: there is no such model, or it has no autoencoder.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return _in_directory(directory.absolute())
    if directory.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise DigSegError(f"--model {model!r}: there is no such folder; {_KINDS}")
    return _in_directory(_fetched(model))


def _in_directory(directory: Path) -> AutoencoderConfig:
    if is_export(directory):
        return read_card(directory).model.autoencoder
    for folder in (directory / "vae", directory):
        if (folder / "config.json").is_file():
            return AutoencoderConfig(type="kl", path=str(folder))
    raise DigSegError(f"--model {directory}: neither digseg.json nor vae/config.json is there; {_KINDS}")


def _fetched(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["vae/*.json", "vae/*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DigSegError(
            f"--model {model!r} is no folder here, and cannot be fetched from the Hugging Face hub ({reason}); {_KINDS}"
        ) from None
