"""`digseg shards show`: a page that stands alone and says what the shards hold."""

from __future__ import annotations

import base64
import io
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from latent_writing import write_latents
from PIL import Image
from shard_writing import damage_samples, data_config, noise_samples, write_split

from digseg.cli import main
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import REJECTED_NAME, Rejected
from digseg.errors import DigSegError
from digseg.evaluation.colours import class_colours, paint
from digseg.evaluation.shard_page import shard_page

VOCABULARY = ("sand", "sea <b>", "sky")


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href") and value]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path, "shore", noise_samples(10, 3), VOCABULARY, domain="remote_sensing")
    write_split(tmp_path, "shore", noise_samples(3, 3, seed=1), VOCABULARY, split="val")
    return tmp_path


def test_page_shows_evenly_spaced_samples_and_their_masks(root: Path) -> None:
    page = _Page(shard_page(root, samples_per_split=5))
    pictures = [link for link in page.links if link.startswith("data:image/")]
    assert len(pictures) == 2 * 5 + 2 * 3
    corpus = ShardedCorpus(root, "shore", "train")
    for number in range(5):
        sample = corpus.read(2 * number)
        drawn = Image.open(io.BytesIO(base64.b64decode(pictures[2 * number + 1].partition(",")[2])))
        np.testing.assert_array_equal(np.array(drawn), paint(sample.mask, VOCABULARY))


def test_page_stands_alone(root: Path) -> None:
    page = _Page(shard_page(root))
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_page_says_what_the_manifest_says(root: Path) -> None:
    record = Rejected(key="k<99>", image="a.png", masks=("b.png",), reason="no mask & no hope")
    (root / "shore/train" / REJECTED_NAME).write_text(record.model_dump_json() + "\n")
    html = shard_page(root)
    manifest = ShardedCorpus(root, "shore", "train").manifest
    for text in (
        "remote sensing",
        "CC0-1.0",
        manifest.digest,
        "10 in 3 shards",
        "56 x 40 px",
        "k&lt;99&gt;: no mask &amp;",
    ):
        assert text in html
    pixels = np.array(manifest.statistics.class_pixels)
    shares = re.findall(r'<td class="number">([\d.]+) %</td>', html)[:3]
    np.testing.assert_allclose([float(share) for share in shares], 100 * pixels / pixels.sum(), atol=0.006)


def test_page_shows_leaks_side_by_side(root: Path) -> None:
    assert "No image is in two splits or corpora" in shard_page(root)
    samples = noise_samples(10, 3)
    write_split(root, "coast", {"copy <1>": samples["k004"], **noise_samples(2, 3, seed=2)}, VOCABULARY)
    html = shard_page(root)
    assert "1 groups of the same or nearly the same image" in html
    assert "copy &lt;1&gt; of coast/train and k004 of shore/train (the same image)" in html
    listed = re.findall(r"<li>(.*?)</li>", html)
    assert [re.sub("<.*?>", "", line) for line in listed] == ["exact: copy &lt;1&gt; coast/train, k004 shore/train"]
    leak = html[html.index('class="leak"') :]
    left, right = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))), dtype=float)
        for picture in re.findall(r"data:image/jpeg;base64,([^\"]+)", leak)[:2]
    ]
    np.testing.assert_array_equal(left, right)
    distances = {key: np.abs(left - image).mean() for key, (image, _) in samples.items()}
    assert min(distances, key=distances.__getitem__) == "k004"


def test_damaged_sample_is_named_with_what_mends_it(root: Path) -> None:
    damage_samples(root, "shore", [4])
    with pytest.raises(DigSegError, match=r"'k004' in .*crc32 differs\); run data_prep/shard\.py again to mend it"):
        main(["shards", "show", str(root), "--out", str(root / "page.html")])
    assert not (root / "page.html").exists()


@pytest.mark.browser
def test_browser_draws_samples_masks_and_bars(root: Path, browser: str) -> None:
    (root / "page.html").write_text(shard_page(root), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]
    command += [f"--user-data-dir={root / 'profile'}", f"--screenshot={root / 'page.png'}", f"file://{root}/page.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    drawn = np.asarray(Image.open(root / "page.png").convert("RGB"))
    manifest = ShardedCorpus(root, "shore", "train").manifest
    for colour in class_colours(manifest.vocabulary):
        # Swatch and bar of each split, and a third of the pixels of 13 masks, enlarged.
        assert (drawn == colour).all(axis=2).sum() > 13 * 40 * 56 / 3


def test_names_are_text_not_markup(root: Path) -> None:
    html = shard_page(root)
    assert "sea &lt;b&gt;" in html
    assert "<b>" not in html


def test_command_writes_the_page(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shards", "show", str(root), "--out", str(root / "page.html"), "--samples", "2"])
    assert f"open {root / 'page.html'} in a browser" in capsys.readouterr().out
    assert (root / "page.html").read_text().count("<figure>") == 4


def test_file_that_cannot_be_written_is_named(root: Path) -> None:
    with pytest.raises(DigSegError, match="--out /dev/full cannot be written: No space left on device"):
        main(["shards", "show", str(root), "--out", "/dev/full"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "nowhere/page.html"], r"--out nowhere/page\.html: give the name of a file"),
        (["--out", "page.html", "--samples", "0"], "--samples is 0; it must be at least 1"),
        (["--out", "page.html"], "no shards below"),
    ],
)
def test_mistake_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DigSegError, match=said):
        main(["shards", "show", str(tmp_path), *arguments])
    assert not list(tmp_path.iterdir())


def test_page_of_latents_says_what_they_are(root: Path) -> None:
    write_latents(data_config(root, [{"name": "shore"}]), root / "latents", views=2)
    html = shard_page(root / "latents", samples_per_split=3)
    assert "2 views of each sample, 48 x 8 x 8 by autoencoder of factor 4, type shuffle" in html
    assert html.count("data:image/") == 6
    assert "autoencoder" not in shard_page(root, samples_per_split=3)
