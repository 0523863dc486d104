"""The diffusion segmenter: autoencoder, text, U-Net, aligned pathway, objective."""

from digseg.model.segmenter import Segmenter, SegmenterOutput, build_segmenter

__all__ = ["Segmenter", "SegmenterOutput", "build_segmenter"]
