"""Where the autoencoder of a model lies, however the model is named."""

from __future__ import annotations

from pathlib import Path

from digseg.config import AutoencoderConfig
from digseg.errors import DigSegError
from digseg.model.card import is_export, read_card
from digseg.model.pretrained import VAE, locate


def autoencoder_of(model: str) -> AutoencoderConfig:
    """The autoencoder of an exported model, of a diffusers directory, or of a model on the Hugging Face hub.

    Of a hub id (``owner/name``) the ``vae`` folder is fetched into the hub's cache on this machine.

    Raises:
        DigSegError: there is no such model, or it has no autoencoder.
    """
    directory = Path(model).expanduser().absolute()
    if is_export(directory):
        trained_with = read_card(directory).model.autoencoder
        if trained_with.type == "shuffle":
            return trained_with
    source = str(directory) if directory.is_dir() else model
    try:
        return AutoencoderConfig(type="kl", path=str(locate(source, VAE, "--model")))
    except DigSegError as error:
        raise DigSegError(f"{error}; or give an exported model of this project") from None
