"""The text pathway: class names in, aligned class scores out, and language features fed back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Pathway(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """All of the segmenter that is trained besides the U-Net: class tokens, queries, alignment, and the head.

    Args:
        text_dim: size of a class name's embedding; ``token_dim``: of a cross-attention token of the U-Net.
        channels: of the decoder's features, the finest first: those of the head, then one for each aligned scale.
        factor: pixels to a side of a latent cell.
        groups: of the U-Net's group norms.
        enabled, feedback, dim, head_dim, query_layers, query_scale, gate: see :class:`digseg.config.PathwayConfig`.
    """

    text_mean: Tensor  # of the training vocabulary's raw embeddings, [text_dim]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        text_dim: int,
        token_dim: int,
        channels: list[int],
        factor: int,
        groups: int,
        enabled: bool,
        feedback: bool,
        dim: int,
        head_dim: int,
        query_layers: int,
        query_scale: float,
        gate: float,
    ) -> None:
        super().__init__()
        self.tokens = TokenEncoder(text_dim, token_dim)
        self.register_buffer("text_mean", torch.zeros(text_dim))
        if not enabled:
            return
        self.queries = QueryEncoder(text_dim, token_dim, query_layers)
        self.scales = nn.ModuleList(
            AlignedScale(size, token_dim, dim, groups, query_scale, gate if feedback else None) for size in channels[1:]
        )
        self.head = RefinedHead(channels[0], token_dim, head_dim, factor, groups, query_scale)


class TokenEncoder(nn.Module):
    """Class names bound to their colours: the tokens of cross-attention and feedback."""

    def __init__(self, text_dim: int, token_dim: int) -> None:
        super().__init__()
        self.name = nn.Linear(text_dim, token_dim)
        self.colour = nn.Linear(3, token_dim)

    def forward(self, text: Tensor, colours: Tensor) -> Tensor:
        """``text [B, K, D]``, ``colours [B, K, 3]`` -> tokens ``[B, K, T]``."""
        tokens: Tensor = self.name(text) + self.colour(colours)
        return tokens


class QueryEncoder(nn.Module):
    """Class names that know the other names of their set, but no colour: what features are scored against."""

    def __init__(self, text_dim: int, token_dim: int, num_layers: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_dim, token_dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                token_dim,
                nhead=4,
                dim_feedforward=2 * token_dim,
                dropout=0.0,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """``text [B, K, D]``, ``mask`` bool ``[B, K]`` (True = a class) -> queries ``[B, K, T]``."""
        queries = self.project(text)
        for layer in self.layers:
            queries = layer(queries, src_key_padding_mask=~mask)
        normed: Tensor = self.norm(queries)
        return normed


class Alignment(nn.Module):
    """Class scores of features: a scaled product with the normalised query, plus a bias from the text."""

    def __init__(self, query_dim: int, dim: int, log_scale: float) -> None:
        super().__init__()
        self.key = nn.Linear(query_dim, dim)
        self.bias = nn.Linear(query_dim, 1)
        self.log_scale = nn.Parameter(torch.tensor([log_scale]))  # DeepSpeed cannot take 0-dim ones

    def forward(self, features: Tensor, queries: Tensor, mask: Tensor) -> Tensor:
        """``features [B, dim, H, W]``, ``queries [B, K, T]``, ``mask [B, K]`` -> float32 logits ``[B, K, H, W]``.

        Slots outside the mask get a large negative score.
        """
        keys = self.log_scale.exp() * F.normalize(self.key(queries), dim=-1)
        scores = torch.einsum("bchw,bkc->bkhw", features, keys.to(features.dtype)).float()
        scores = scores + self.bias(queries).float()[..., None]
        masked: Tensor = scores.masked_fill(~mask[:, :, None, None], -1e4)
        return masked


class AlignedScale(nn.Module):
    """Scores a decoder scale against the classes and adds the attended class tokens back through a gate.

    With ``gate`` None it scores alone.
    """

    def __init__(
        self, channels: int, token_dim: int, dim: int, groups: int, log_scale: float, gate: float | None
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.project = nn.Conv2d(channels, dim, 1)
        self.align = Alignment(token_dim, dim, log_scale)
        if gate is not None:
            self.value = nn.Linear(token_dim, channels)
        self.gate = None if gate is None else nn.Parameter(torch.tensor([gate]))

    def forward(self, h: Tensor, tokens: Tensor, queries: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``h [B, C, H, W]`` -> ``h`` with language added, and float32 logits ``[B, K, H, W]``."""
        logits = self.align(self.project(F.silu(self.norm(h))), queries, mask)
        if self.gate is None:
            return h, logits
        values = self.value(tokens)
        attended = torch.einsum("bkhw,bkc->bchw", logits.softmax(1).to(values.dtype), values)
        return h + self.gate.to(h.dtype) * attended, logits


class RefinedHead(nn.Module):
    """Full-resolution class scores from the last decoder features and the image itself."""

    def __init__(
        self, channels: int, token_dim: int, head_dim: int, factor: int, groups: int, log_scale: float
    ) -> None:
        super().__init__()
        width = head_dim + 3
        self.factor = factor
        self.norm = nn.GroupNorm(groups, channels)
        self.expand = nn.Conv2d(channels, head_dim * factor * factor, 1)
        self.refine = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.align = Alignment(token_dim, width, log_scale)
        _equal_subpixels_(self.expand, factor)

    def forward(self, h: Tensor, images: Tensor, queries: Tensor, mask: Tensor) -> Tensor:
        """``h [B, C, H/f, W/f]``, ``images [B, 3, H, W]`` -> float32 logits ``[B, K, H, W]``."""
        z = F.pixel_shuffle(self.expand(F.silu(self.norm(h))), self.factor)
        z = torch.cat([z, images.to(z.dtype)], dim=1)
        z = z + self.refine(z)
        logits: Tensor = self.align(z, queries, mask)
        return logits


def _equal_subpixels_(conv: nn.Conv2d, factor: int) -> None:
    """Start a convolution before a pixel shuffle with equal sub-pixels, so it shows no checkerboard.

    Aitken et al., "Checkerboard artifact free sub-pixel convolution", arXiv 1707.02937.
    """
    repeats = factor * factor
    with torch.no_grad():
        conv.weight.copy_(conv.weight[::repeats].repeat_interleave(repeats, 0))
        assert conv.bias is not None
        conv.bias.copy_(conv.bias[::repeats].repeat_interleave(repeats, 0))
