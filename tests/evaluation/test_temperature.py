"""The temperature against samples whose temperature is known, and in an exported model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from shard_writing import write_split
from small_world import VOCABULARY, export_random_model, small_config, write_squares

from digseg.data.corpus import ShardedCorpus
from digseg.errors import DigSegError
from digseg.evaluation.inference import Predictor, tempered
from digseg.evaluation.temperature import ScoredPixels, calibrate_model, fit_temperature
from digseg.model.card import read_card


def _pixels(temperature: float, number: int, classes: int, seed: int = 0) -> ScoredPixels:
    """Pixels whose true probabilities are those of the scores at a temperature."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (number, classes))
    truth = softmax(logits / temperature, axis=1)
    labels = (truth.cumsum(1) < random.random((number, 1))).sum(1).clip(max=classes - 1)
    return ScoredPixels(log_softmax(logits, axis=1), labels)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_found_and_the_model_becomes_as_sure_as_it_is_right(temperature: float) -> None:
    corpora = [_pixels(temperature, 6_000, 4), _pixels(temperature, 3_000, 11, seed=1)]
    found = fit_temperature(corpora)
    assert found == pytest.approx(temperature, rel=0.08)
    for pixels in corpora:
        assert pixels.expected_error(found) < 0.03
        if temperature != 1.0:
            assert pixels.expected_error(1.0) > 0.05
    grid = np.exp(np.linspace(math.log(0.2), math.log(5), 60))
    losses = [sum(pixels.negative_log_likelihood(t) for pixels in corpora) for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.06)


def test_likelihood_by_hand() -> None:
    # Odds 9 : 1 for the right class, at temperature 2 odds 3 : 1.
    pixels = ScoredPixels(np.log([[0.9, 0.1]]), np.array([0]))
    assert pixels.negative_log_likelihood(1.0) == pytest.approx(-math.log(0.9))
    assert pixels.negative_log_likelihood(2.0) == pytest.approx(-math.log(0.75))


@settings(deadline=None)
@given(st.floats(0.05, 20), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_the_most_probable_class_stays(temperature: float, classes: int, seed: int) -> None:
    probabilities = (torch.randn(classes, 5, 6, generator=torch.Generator().manual_seed(seed)) * 8).softmax(0)
    changed = tempered(probabilities, temperature)
    torch.testing.assert_close(changed.sum(0), torch.ones(5, 6))
    top = probabilities.argmax(0, keepdim=True)
    assert (changed.gather(0, top)[0] >= changed.max(0).values - 1e-6).all()


def test_a_model_is_calibrated_in_place_and_segments_as_before(tmp_path: Path) -> None:
    plain, folder = export_random_model(tmp_path / "plain", small_config(tmp_path)), tmp_path / "model"
    shutil.copytree(plain, folder)
    write_squares(tmp_path / "shards", "val", 5)
    corpus = ShardedCorpus(tmp_path / "shards", "squares", "val")
    found = calibrate_model(folder, [corpus])
    assert found.negative_log_likelihood[1] < found.negative_log_likelihood[0]
    card = read_card(folder)
    assert card.temperature == found.temperature != 1.0
    assert card.metadata["calibration"]["calibration_error"] == list(found.calibration_error)

    image = corpus.must_read(0).image
    before, after = (Predictor.load(path).predict(image, VOCABULARY) for path in (plain, folder))
    np.testing.assert_array_equal(after.mask, before.mask)
    expected = softmax(np.log(before.probabilities.astype(np.float64)) / found.temperature, axis=0)
    np.testing.assert_allclose(after.probabilities, expected, atol=1e-5)
    # Calibrated once more, it is that of the scores again, not a correction of a correction.
    assert calibrate_model(folder, [corpus]).temperature == pytest.approx(found.temperature, rel=1e-3)


def test_without_labels_nothing_is_calibrated(tmp_path: Path) -> None:
    folder = export_random_model(tmp_path / "model", small_config(tmp_path))
    write_split(tmp_path, "void", {"a": (np.zeros((9, 9, 3), np.uint8), np.full((9, 9), 255, np.uint8))}, VOCABULARY)
    card = read_card(folder)
    with pytest.raises(DigSegError, match="no corpus to calibrate on"):
        calibrate_model(folder, [])
    with pytest.raises(DigSegError, match="void/train: no labelled pixel"):
        calibrate_model(folder, [ShardedCorpus(tmp_path, "void", "train")])
    assert read_card(folder) == card
