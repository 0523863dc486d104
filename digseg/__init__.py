"""DigSeg: distributed training of a generalist, text-conditioned diffusion segmenter."""

__version__ = "0.1.0"
