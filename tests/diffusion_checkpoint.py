"""Checkpoints of Stable Diffusion's exact structure and configuration with random weights, at any width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_SD2: dict[str, Any] = {"use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)}
# What the releases say in unet/config.json besides the class's defaults, and in scheduler/scheduler_config.json.
UNETS: dict[str, dict[str, Any]] = {
    "1.5": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "2.0-base": {"cross_attention_dim": 1024, "sample_size": 64, **_SD2},
    "2.1": {"cross_attention_dim": 1024, "sample_size": 96, "upcast_attention": True, **_SD2},
}
SCHEDULERS: dict[str, Any] = {
    "1.5": PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **_SCHEDULE),
    "2.0-base": PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **_SCHEDULE),
    "2.1": DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **_SCHEDULE),
}
_NARROW: dict[str, dict[str, Any]] = {
    "1.5": {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 16, "attention_head_dim": 2},
    "2.0-base": {
        "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 16, "attention_head_dim": (1, 2, 4, 4),
    },
    "2.1": {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 16, "attention_head_dim": (1, 2, 4, 4)},
}  # fmt: skip
_WORDS = "a b c d e h k l n o q r s t u"


def narrow_unet(version: str) -> Any:
    """A U-Net of a release with narrow layers: everything else is as released."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**{**UNETS[version], **_NARROW[version]})


def write_checkpoint(directory: Path, version: str = "2.1", **saving: Any) -> Path:
    """Write all parts of a release with narrow layers, in the layout of its pipeline; returns ``directory``."""
    narrow_unet(version).save_pretrained(directory / "unet", **saving)
    SCHEDULERS[version].save_pretrained(directory / "scheduler")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=2, sample_size=768,
        )  # fmt: skip
        vae.save_pretrained(directory / "vae", **saving)
        write_text(directory)
    return directory


def write_text(directory: Path, vocab_size: int | None = None) -> None:
    """Write a CLIP text encoder and its tokenizer, of letters; ``vocab_size`` may make them disagree."""
    letters = _WORDS.split()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)
    tokenizer.save_pretrained(directory / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=vocab_size or len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(directory / "text_encoder")
