"""Counting samples of a sharded split, and the figures made of it, with predictors whose answers are known."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shard_writing import noise_samples, write_split
from torchmetrics.classification import MulticlassCalibrationError, MulticlassJaccardIndex

from digseg.data.corpus import ShardedCorpus
from digseg.errors import DigSegError
from digseg.evaluation.bootstrap import resampled
from digseg.evaluation.calibration import NUM_BINS
from digseg.evaluation.evaluate import Question, count_samples, renamed
from digseg.evaluation.figures import compared, corpus_figures
from digseg.evaluation.inference import Prediction
from digseg.evaluation.metrics import mean_iou
from digseg.evaluation.tally import Tally

VOCABULARY = ("water", "forest", "road", "glacier")


class ByBrightness:
    """Answers with the quartile of the red channel (the last class asked for, above it); notes what it is asked."""

    def __init__(self, shift: int = 0) -> None:
        self.queries: list[tuple[str, ...]] = []
        self.shift = shift

    def predict(self, image: NDArray[np.uint8], classes: Sequence[str], background: bool = False) -> Prediction:
        assert not background
        self.queries.append(tuple(classes))
        mask = np.clip((image[..., 0].astype(int) + self.shift) // 64, 0, len(classes) - 1).astype(np.uint8)
        sure = (image[..., 1] / np.float32(512) + np.float32(0.5)).astype(np.float32)
        rest = (1 - sure) / max(1, len(classes) - 1)
        probabilities = np.where(np.arange(len(classes))[:, None, None] == mask, sure, rest)
        return Prediction(mask, probabilities.astype(np.float32), tuple(classes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ShardedCorpus:
    root = tmp_path_factory.mktemp("shards")
    samples = noise_samples(9, 3)  # the last class of the vocabulary is nowhere in the ground truth
    write_split(root, "land", samples, VOCABULARY, split="val")
    return ShardedCorpus(root, "land", "val")


def tally(corpus: ShardedCorpus, predictor: ByBrightness, names: tuple[str, ...] = VOCABULARY) -> Tally:
    return count_samples(predictor, corpus, range(len(corpus)), Question(names))


def test_figures_are_those_of_torchmetrics_over_all_pixels(corpus: ShardedCorpus) -> None:
    predictor = ByBrightness()
    result = corpus_figures(corpus.manifest, tally(corpus, predictor), VOCABULARY)
    jaccard = MulticlassJaccardIndex(4, average="none", ignore_index=255)
    calibration = MulticlassCalibrationError(4, n_bins=NUM_BINS, norm="l1", ignore_index=255)
    for index in range(len(corpus)):
        sample = corpus.read(index)
        prediction = ByBrightness().predict(sample.image, VOCABULARY)
        truth = torch.from_numpy(sample.mask.astype(np.int64))
        jaccard.update(torch.from_numpy(prediction.mask.astype(np.int64)), truth)
        calibration.update(torch.from_numpy(prediction.probabilities).reshape(1, 4, -1), truth.reshape(1, -1))
    expected = jaccard.compute().numpy()
    assert list(result["classes"]) == list(VOCABULARY)
    np.testing.assert_allclose(list(result["classes"].values()), expected, rtol=1e-6)
    assert result["miou"] == pytest.approx(expected.mean())
    assert result["calibration_error"] == pytest.approx(float(calibration.compute()), abs=1e-6)
    assert (result["split"], result["samples"], result["digest"]) == ("val", 9, corpus.manifest.digest)
    low, high = result["interval"]["miou"]
    assert low < result["miou"] < high
    assert set(predictor.queries) == {VOCABULARY}


def test_a_class_that_occurs_nowhere_has_no_iou_and_does_not_count(corpus: ShardedCorpus) -> None:
    result = corpus_figures(corpus.manifest, tally(corpus, ByBrightness(shift=-64)), VOCABULARY)
    assert result["classes"]["glacier"] is None
    assert result["per_class"]["glacier"]["boundary_f1"] is None
    present = [iou for iou in result["classes"].values() if iou is not None]
    assert result["miou"] == pytest.approx(sum(present) / 3)


def test_seen_and_unseen_names_are_told_apart(corpus: ShardedCorpus) -> None:
    counted = tally(corpus, ByBrightness())
    result = corpus_figures(corpus.manifest, counted, ["Water", "road", "car"])
    iou = result["classes"]
    seen, unseen = (iou["water"] + iou["road"]) / 2, (iou["forest"] + iou["glacier"]) / 2
    assert result["seen_unseen"] == {
        "seen": pytest.approx(seen),
        "unseen": pytest.approx(unseen),
        "harmonic_mean": pytest.approx(2 / (1 / seen + 1 / unseen)),
    }
    assert [row["seen"] for row in result["per_class"].values()] == [True, False, True, False]
    assert corpus_figures(corpus.manifest, counted, VOCABULARY)["seen_unseen"] is None


def test_an_oracle_is_asked_for_the_present_classes_only(corpus: ShardedCorpus) -> None:
    predictor = ByBrightness()
    counted = count_samples(predictor, corpus, range(9), Question(VOCABULARY, oracle=True))
    assert set(predictor.queries) == {("water", "forest", "road")}
    assert counted.confusion[:, 3].sum() == 0
    assert counted.confusion.sum() == tally(corpus, ByBrightness()).confusion.sum()


def test_other_wordings_are_asked_for_but_counted_under_the_own_names(corpus: ShardedCorpus) -> None:
    predictor = ByBrightness()
    tally(corpus, predictor, renamed(VOCABULARY, "road", "street"))
    assert set(predictor.queries) == {("water", "forest", "street", "glacier")}


def test_differences_of_two_models_are_paired(corpus: ShardedCorpus) -> None:
    first, second = tally(corpus, ByBrightness()), tally(corpus, ByBrightness(shift=-10))
    figures = [corpus_figures(corpus.manifest, counted, VOCABULARY)["miou"] for counted in (first, second)]
    difference = compared({"land": first}, {"land": second})
    assert difference["mean"] == difference["corpora"]["land"]
    assert difference["mean"]["difference"] == pytest.approx(figures[1] - figures[0])
    same = compared({"land": first}, {"land": first})["mean"]
    assert (same["difference"], same["interval"], same["better"]) == (0, [0, 0], 0.5)
    draws = [resampled(part.images, 4, mean_iou, seed=(zlib.crc32(b"land"),)) for part in (first, second)]
    assert difference["mean"]["interval"] == list(np.quantile(draws[1] - draws[0], [0.025, 0.975]))
    with pytest.raises(ValueError, match="different images"):
        compared({"land": first}, {"land": count_samples(ByBrightness(), corpus, range(3), Question(VOCABULARY))})


def test_wrong_wordings_are_refused(corpus: ShardedCorpus) -> None:
    with pytest.raises(DigSegError, match=r"no class 'raod'; did you mean 'road'"):
        renamed(VOCABULARY, "raod", "street")
    with pytest.raises(DigSegError, match="'forest', a wording of 'road', is itself a class"):
        renamed(VOCABULARY, "road", "forest")
    with pytest.raises(DigSegError, match="has 4 classes, but 1 names"):
        tally(corpus, ByBrightness(), ("water",))


def test_a_damaged_sample_stops_the_evaluation_with_its_place(tmp_path: Path) -> None:
    write_split(tmp_path, "land", noise_samples(2, 3), VOCABULARY, split="val")
    shard = tmp_path / "land" / "val" / "land-val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DigSegError, match=r"k000.*land-val-000000.tar.*shard.py again"):
        tally(ShardedCorpus(tmp_path, "land", "val"), ByBrightness())
