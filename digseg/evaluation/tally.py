"""All that is counted of a split, as whole numbers: parts add up to the same tally however the split was cut."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from digseg.evaluation.bootstrap import ImageTotals
from digseg.evaluation.boundary import band_totals, contour_counts
from digseg.evaluation.calibration import NUM_BINS, reliability_counts
from digseg.evaluation.metrics import ConfusionMatrix, Counts


@dataclass(frozen=True)
class Tally:
    """Counts of some images of a split, in order. Its size grows by the classes that occur in each image."""

    confusion: Counts  # [K, K], see `metrics.ConfusionMatrix`
    band: Counts  # [K, 3], see `boundary.band_totals`
    contour: Counts  # [K, 4], see `boundary.contour_counts`
    reliability: Counts  # [NUM_BINS, 3], see `calibration.reliability_counts`
    images: ImageTotals

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.confusion)

    @classmethod
    def empty(cls, num_classes: int) -> Tally:
        """Of no image."""
        return cls(
            confusion=np.zeros((num_classes, num_classes), np.int64),
            band=np.zeros((num_classes, 3), np.int64),
            contour=np.zeros((num_classes, 4), np.int64),
            reliability=np.zeros((NUM_BINS, 3), np.int64),
            images=ImageTotals.joined([]),
        )

    @classmethod
    def of_image(
        cls,
        labels: NDArray[np.integer],
        predictions: NDArray[np.integer],
        confidence: NDArray[np.float32],
        num_classes: int,
        ignore_id: int,
    ) -> Tally:
        """Of one image: class ids [H, W] of ground truth and prediction, and the probability of the latter [H, W]."""
        matrix = ConfusionMatrix(num_classes, ignore_id=ignore_id)
        matrix.update(labels, predictions)
        return cls(
            confusion=matrix.counts,
            band=band_totals(labels, predictions, num_classes, ignore_id),
            contour=contour_counts(labels, predictions, num_classes, ignore_id),
            reliability=reliability_counts(labels, predictions, confidence, ignore_id),
            images=ImageTotals.of_image(matrix.totals()),
        )

    @classmethod
    def joined(cls, parts: Iterable[Tally], num_classes: int) -> Tally:
        """The sum of all parts, their images one after another; no two parts need be in memory at once."""
        total, images = cls.empty(num_classes), []
        for part in parts:
            for summed, counts in zip(total._sums(), part._sums(), strict=True):
                summed += counts
            images.append(part.images)
        return replace(total, images=ImageTotals.joined(images))

    def _sums(self) -> tuple[Counts, ...]:
        return self.confusion, self.band, self.contour, self.reliability

    def to_bytes(self) -> bytes:
        """As the content of a NumPy `.npz` file (nothing pickled)."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            confusion=self.confusion,
            band=self.band,
            contour=self.contour,
            reliability=self.reliability,
            num_images=np.int64(self.images.num_images),
            image=self.images.image,
            label=self.images.label,
            totals=self.images.totals,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Tally:
        """Back from `to_bytes`.

        Raises:
            ValueError: damaged content.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                images = ImageTotals(int(stored["num_images"]), stored["image"], stored["label"], stored["totals"])
                return cls(stored["confusion"], stored["band"], stored["contour"], stored["reliability"], images)
        except (KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"not a stored tally ({error})") from error
