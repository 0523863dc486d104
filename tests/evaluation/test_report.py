"""The report of an evaluation, as a text and in a real browser."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_world import VOCABULARY, export_random_model, small_config, write_squares

from digseg.config import Config, PredictionConfig, Protocol
from digseg.data.corpus import ShardedCorpus
from digseg.evaluation import report
from digseg.evaluation.evaluate import count_samples
from digseg.evaluation.figures import compared, corpus_figures, mean_figures
from digseg.evaluation.inference import Predictor
from digseg.evaluation.protocol import ask
from digseg.evaluation.report import ReportedModel, mask_ceiling, report_page
from digseg.model.export import load_model

# Appended to the page: what a reader would see go wrong, in the page's title.
PROBE = """<script>
addEventListener("load", () => {
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.title = `images ${document.images.length} broken ${broken} wide ${wide}`;
});
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_squares(folder / "shards", "val", 5, seed=1)
    return folder


@pytest.fixture(scope="module")
def predictors(folder: Path) -> list[Predictor]:
    """Two models with different weights; neither knows the name "round hole"."""
    config = small_config(folder)
    values = config.model_dump(mode="json")
    other = Config.model_validate({**values, "run": {**values["run"], "seed": 5}})
    return [
        Predictor.load(export_random_model(folder / name / "model", config, VOCABULARY[:2]))
        for name, config in (("first", config), ("second", other))
    ]


@pytest.fixture(scope="module")
def page(folder: Path, predictors: list[Predictor]) -> str:
    return _page(folder, predictors)


def _page(folder: Path, predictors: list[Predictor]) -> str:
    corpus = ShardedCorpus(folder / "shards", "squares", "val")
    (split,) = ask(Protocol(), [corpus.manifest], [predictor.card for predictor in predictors])
    models = []
    for name, predictor in zip(("models:/digseg/1", "models:/digseg/2"), predictors, strict=True):
        tally = count_samples(predictor, corpus, range(5), split.questions[0])
        corpora = {"squares": corpus_figures(corpus.manifest, tally, predictor.card.names)}
        result = {
            "model": {"uri": name, "sha256": "ab" * 32, "run_id": None},
            "protocol": "all",
            "oracle": False,
            **mean_figures({"squares": tally}, corpora),
            "corpora": corpora,
            "synonyms": {"squares": {"square": {"box <b>": 0.25}}},
        }
        models.append(ReportedModel(predictor, result, {"squares": tally}))
    comparison = {"first": "models:/digseg/1", "second": "models:/digseg/2"}
    comparison |= compared(models[0].tallies, models[1].tallies)
    return report_page(models, {"squares": split}, [comparison], str(folder / "shards"))


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone_and_says_what_was_measured(page: str) -> None:
    parser = _Links()
    parser.feed(page)
    assert parser.links
    assert {link[:1] for link in parser.links} == {"#", "d"}
    assert all(link.startswith(("#", "data:image/")) for link in parser.links)
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))
    for said in (
        "models:/digseg/1",
        "models:/digseg/2",
        "round hole (never trained on)",
        "mIoU of models:/digseg/2 minus",
        "48 px, shorter side",
        "1 (one pass at the final timestep)",
        "{} ({} is the class name)",
    ):
        assert said in text
    assert "box &lt;b&gt;" in page  # names are text, never markup
    assert "Oracle" not in page
    # Image, ground truth, prediction and overlay of the best, the median and the worst image of both models.
    assert page.count("<img") == 4 * 3 * 2


def test_the_facts_of_a_multi_step_model_are_its_own(folder: Path, predictors: list[Predictor]) -> None:
    config = small_config(folder, objective={"type": "multi_step"})
    directory = export_random_model(folder / "multi" / "model", config)
    assert "in a few denoising steps of a diffusion U-Net" in (directory / "README.md").read_text()
    assert predictors[0].sampling is None
    assert "in one step of a diffusion U-Net" in (folder / "first" / "model" / "README.md").read_text()
    loaded = load_model(directory)
    calibrated = replace(loaded, card=replace(loaded.card, temperature=1.25))
    for settings, steps in (
        (PredictionConfig(), "10 (DDIM, seed 0)"),
        (PredictionConfig(steps=2, seed=3), "2 (DDIM, seed 3)"),
        (PredictionConfig(steps=2, seed=3, ensemble=4), "2 (DDIM, mean of 4 draws, seeds from 3 on)"),
    ):
        page = _page(folder, [Predictor(calibrated, settings=settings)] * 2)
        assert f">{steps}</dd>" in page
        assert ">1.25</dd>" in page
        assert "one pass at the final timestep" not in page


def test_large_vocabularies_have_a_list_of_confusions(
    folder: Path, predictors: list[Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_MATRIX_CLASSES", 2)
    page = _page(folder, predictors[:1] * 2)
    assert "Greatest confusions" in page
    listed = re.findall(r"<tr><td>([\w ]+)</td><td>([\w ]+)</td><td class=\"number\">([\d.]+) %</td></tr>", page)
    assert listed
    assert all(actual != taken for actual, taken, _ in listed)
    assert [float(share) for *_, share in listed[:2]] == sorted(
        (float(share) for *_, share in listed[:2]), reverse=True
    )


def test_the_examples_are_the_extremes(page: str) -> None:
    scores = [float(score) for score in re.findall(r"</strong>, mIoU ([\d.]+):", page)]
    assert scores[0] >= scores[1] >= scores[2]
    assert scores[3] >= scores[4] >= scores[5]


def test_the_ceiling_is_one_at_the_images_own_size_and_falls_with_the_working_size(
    folder: Path, predictors: list[Predictor]
) -> None:
    corpus = ShardedCorpus(folder / "shards", "squares", "val")
    ceilings = [
        mask_ceiling(Predictor.load(folder / "first" / "model", settings=PredictionConfig(short_side=side)), corpus)
        for side in (16, 48, 512)
    ]
    assert ceilings == sorted(ceilings)
    assert ceilings[0] < 0.9
    assert ceilings[2] == pytest.approx(1, abs=0.01)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1300, 500])
def test_a_browser_shows_all_pictures_within_its_window(page: str, browser: str, tmp_path: Path, width: int) -> None:
    file = tmp_path / "report.html"
    file.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "<title>images 24 broken 0 wide false</title>" in shown.stdout
