"""Evaluation of a sharded split, with predictors whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shard_writing import noise_samples, write_split
from torchmetrics.classification import MulticlassJaccardIndex

from digseg.data.corpus import ShardedCorpus
from digseg.errors import DigSegError
from digseg.evaluation.evaluate import corpus_result, count_samples, evaluate_corpus, renamed
from digseg.evaluation.inference import Prediction

VOCABULARY = ("water", "forest", "road", "glacier")


class ByBrightness:
    """Answers with the quartile of the red channel; notes what it is asked."""

    def __init__(self) -> None:
        self.queries: list[tuple[str, ...]] = []

    def predict(self, image: NDArray[np.uint8], classes: Sequence[str], background: bool = False) -> Prediction:
        assert not background
        self.queries.append(tuple(classes))
        mask = (image[..., 0] // 64).astype(np.uint8)
        return Prediction(mask, np.zeros((len(classes), *mask.shape), np.float32), tuple(classes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ShardedCorpus:
    root = tmp_path_factory.mktemp("shards")
    samples = noise_samples(9, 3)  # the last class of the vocabulary is nowhere in the ground truth
    write_split(root, "land", samples, VOCABULARY, split="val")
    return ShardedCorpus(root, "land", "val")


def test_figures_are_those_of_torchmetrics_over_all_pixels(corpus: ShardedCorpus) -> None:
    predictor = ByBrightness()
    result = evaluate_corpus(predictor, corpus)
    reference = MulticlassJaccardIndex(4, average="none", ignore_index=255)
    for index in range(len(corpus)):
        sample = corpus.read(index)
        prediction = torch.from_numpy(sample.image[..., 0].astype(np.int64) // 64)
        reference.update(prediction, torch.from_numpy(sample.mask.astype(np.int64)))
    expected = reference.compute().numpy()
    assert list(result.classes) == list(VOCABULARY)
    np.testing.assert_allclose(list(result.classes.values()), expected, rtol=1e-6)
    assert result.miou == pytest.approx(expected.mean())
    assert (result.name, result.split, result.samples) == ("land", "val", 9)
    assert set(predictor.queries) == {VOCABULARY}


@pytest.mark.parametrize("chunk", [1, 2, 4, 9])
def test_the_result_does_not_depend_on_how_the_work_is_cut(corpus: ShardedCorpus, chunk: int) -> None:
    parts = [
        count_samples(ByBrightness(), corpus, range(start, min(start + chunk, 9)), [VOCABULARY])[0]
        for start in range(0, 9, chunk)
    ]
    total = parts[-1]
    for part in parts[:-1]:
        total = total + part
    assert corpus_result(corpus, total, 9) == evaluate_corpus(ByBrightness(), corpus)


def test_a_class_that_occurs_nowhere_has_no_iou_and_does_not_count(corpus: ShardedCorpus) -> None:
    class Never(ByBrightness):
        def predict(self, image: NDArray[np.uint8], classes: Sequence[str], background: bool = False) -> Prediction:
            prediction = super().predict(image, classes, background)
            return Prediction(prediction.mask.clip(max=2), prediction.probabilities, prediction.classes)

    result = evaluate_corpus(Never(), corpus)
    assert result.classes["glacier"] is None
    present = [iou for iou in result.classes.values() if iou is not None]
    assert result.miou == pytest.approx(sum(present) / 3)


def test_other_wordings_are_asked_for_but_reported_under_the_own_names(corpus: ShardedCorpus) -> None:
    predictor = ByBrightness()
    result = evaluate_corpus(predictor, corpus, renamed(VOCABULARY, "road", "street"), limit=2)
    assert set(predictor.queries) == {("water", "forest", "street", "glacier")}
    assert list(result.classes) == list(VOCABULARY)
    assert result.samples == len(predictor.queries) == 2


def test_wrong_wordings_are_refused(corpus: ShardedCorpus) -> None:
    with pytest.raises(DigSegError, match=r"no class 'raod'; did you mean 'road'"):
        renamed(VOCABULARY, "raod", "street")
    with pytest.raises(DigSegError, match="'forest', a wording of 'road', is itself a class"):
        renamed(VOCABULARY, "road", "forest")
    with pytest.raises(DigSegError, match="has 4 classes, but 1 names"):
        evaluate_corpus(ByBrightness(), corpus, ["water"])


def test_a_damaged_sample_stops_the_evaluation_with_its_place(tmp_path: Path) -> None:
    write_split(tmp_path, "land", noise_samples(2, 3), VOCABULARY, split="val")
    shard = tmp_path / "land" / "val" / "land-val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DigSegError, match=r"k000.*land-val-000000.tar.*shard.py again"):
        evaluate_corpus(ByBrightness(), ShardedCorpus(tmp_path, "land", "val"))
