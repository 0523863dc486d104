from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus_files import digests
from kl_autoencoder import write_kl_autoencoder
from shard_writing import noise_samples, write_split
from small_world import write_squares

from data_prep.encode_latents import main
from digseg.config import AutoencoderConfig
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import LATENT_MEMBER, load_manifest
from digseg.data.latents import unpack_latents
from digseg.data.transforms import as_pixels
from digseg.data.views import draw_views
from digseg.errors import DigSegError
from digseg.model.autoencoder import build_autoencoder

SIZE, VIEWS = 32, 3


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Ten images in three shards, and a model with an autoencoder of factor 2 beside them."""
    write_squares(tmp_path / "shards", "train", 10)
    write_kl_autoencoder(tmp_path / "sd")
    return tmp_path / "shards"


def arguments(shards: Path, out: Path, **changes: object) -> list[str]:
    options = {"--data": shards, "--model": shards.parent / "sd", "--resolution": SIZE, "--out": out, "--views": VIEWS}
    options |= changes
    return [str(part) for option, value in options.items() if value is not None for part in (option, value)]


@pytest.mark.cluster
def test_latents_are_the_encoding_of_the_views_beside_them(shards: Path, tmp_path: Path, ray_running: None) -> None:
    out = tmp_path / "latents"
    main(arguments(shards, out))
    corpus, source = ShardedCorpus(out, "squares", "train"), ShardedCorpus(shards, "squares", "train")
    corpus.verify()
    assert len(corpus) == VIEWS * len(source) == 30
    recipe = corpus.manifest.latents
    assert recipe is not None
    assert (recipe.resolution, recipe.views, recipe.latent_shape) == (SIZE, VIEWS, (4, 16, 16))
    autoencoder = build_autoencoder(AutoencoderConfig(type="kl", path=str(tmp_path / "sd")))
    assert recipe.autoencoder == autoencoder.identity
    for number in range(len(source)):
        sample = source.read(number)
        drawn = draw_views(f"squares/train/{sample.key}", sample.image, sample.mask, 255, recipe)
        for place, view in enumerate(drawn):
            stored = corpus.stored(VIEWS * number + place)
            kept = corpus.read(VIEWS * number + place)
            assert stored.key == view.key
            np.testing.assert_array_equal(kept.image, view.image)
            np.testing.assert_array_equal(kept.mask, view.mask)
            with torch.no_grad():
                levels = torch.from_numpy(view.image.transpose(2, 0, 1).copy())
                encoded = autoencoder.encode(as_pixels(levels)[None])[0].numpy()
            np.testing.assert_allclose(unpack_latents(stored.member(LATENT_MEMBER)), encoded, rtol=2e-3, atol=1e-5)


@pytest.mark.cluster
def test_encoding_twice_gives_identical_files_and_the_second_time_writes_nothing(
    shards: Path, tmp_path: Path, ray_running: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(arguments(Path("shards"), Path("one")))
    main(arguments(shards, tmp_path / "two"))
    assert len(digests(tmp_path / "one")) == 11
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    capsys.readouterr()
    main(arguments(shards, tmp_path / "one"))
    assert "10 samples x 3 views in 3 shards (0 written, 3 verified)" in capsys.readouterr().out
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.cluster
def test_only_what_is_damaged_or_made_otherwise_is_encoded_again(
    shards: Path, tmp_path: Path, ray_running: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latents"
    main(arguments(shards, out))
    sound = digests(out)
    victim = out / "squares/train/squares-train-000001.tar"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    capsys.readouterr()
    main(arguments(shards, out))
    assert "(1 written, 2 verified)" in capsys.readouterr().out
    assert digests(out) == sound
    write_kl_autoencoder(tmp_path / "sd", seed=1)
    main(arguments(shards, out))
    assert "(3 written, 0 verified)" in capsys.readouterr().out
    changed = {name for name, digest in digests(out).items() if sound[name] != digest}
    assert {Path(name).suffix for name in changed} == {".tar", ".idx", ".json"}
    assert len(changed) == 3 + 3 + 1


@pytest.mark.cluster
def test_job_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    shards: Path, tmp_path: Path, ray_running: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(shards, "noise", noise_samples(60, 3, size=(96, 96)), ("a", "b", "c"), samples_per_shard=1)
    out, whole = tmp_path / "latents", tmp_path / "whole"
    command = [sys.executable, "data_prep/encode_latents.py", *arguments(shards, out)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True) as job:
        deadline = time.monotonic() + 300
        while not list(out.rglob("noise-train-*.tar")):
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGKILL)
    assert not (out / "noise/train/manifest.json").exists()
    capsys.readouterr()
    main(arguments(shards, out))
    assert "noise/train: 60 samples x 3 views in 60 shards (60 written" not in capsys.readouterr().out
    main(arguments(shards, whole))
    for corpus in ("noise", "squares"):
        digest = load_manifest(whole, corpus, "train").digest
        assert load_manifest(out, corpus, "train").digest == digest
        ShardedCorpus(out, corpus, "train").verify()


@pytest.mark.cluster
def test_splits_and_settings_are_those_of_the_run_that_is_named(
    shards: Path, tmp_path: Path, ray_running: None
) -> None:
    write_squares(shards, "val", 2)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{root: {shards}, corpora: [{{name: squares, short_side: 40}}], crop_size: 16, scale: [1.0, 1.25]}}\n"
        f"model: {{autoencoder: {{type: kl, path: {tmp_path}/sd/vae}}}}\ntraining: {{steps: 1}}\n"
    )
    main(["--config", str(config), "--out", str(tmp_path / "latents"), "--views", "1", "data.flip=false"])
    recipe = load_manifest(tmp_path / "latents", "squares", "train").latents
    assert recipe is not None
    transform = recipe.transform
    assert (transform.crop_size, transform.short_side, transform.scale, transform.flip) == (16, 40, (1.0, 1.25), False)
    assert not (tmp_path / "latents/squares/val").exists()


@pytest.mark.cluster
def test_damaged_image_stops_the_job_and_is_named(shards: Path, tmp_path: Path, ray_running: None) -> None:
    victim = shards / "squares/train/squares-train-000001.tar"
    content = bytearray(victim.read_bytes())
    content[3000] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DigSegError, match=r"squares-train-000001.tar.*crc32 differs.*run data_prep/shard.py again"):
        main(arguments(shards, tmp_path / "latents"))
    assert not (tmp_path / "latents/squares/train/manifest.json").exists()


def spoiled_weights(root: Path) -> None:
    (root / "sd/vae/diffusion_pytorch_model.safetensors").write_bytes(b"no weights")


def latents_as_data(root: Path) -> None:
    """What a person gives who mistakes the two roots."""
    path = root / "shards/squares/train/manifest.json"
    manifest = load_manifest(root / "shards", "squares", "train")
    autoencoder = {"type": "shuffle", "factor": "4"}
    transform = {
        "crop_size": 32, "short_side": 32, "scale": [1, 1], "flip": True, "upright": True, "colour_jitter": 0.0
    }  # fmt: skip
    recipe = {"autoencoder": autoencoder, "latent_shape": [48, 8, 8], "transform": transform, "views": 1, "seed": 0}
    latents = type(manifest).model_validate({**manifest.model_dump(), "latents": recipe})
    path.write_bytes(latents.with_digest().to_json())


def nothing(root: Path) -> None:
    """The shards and the model are as they should be."""


BAD_JOBS: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "no shards": (nothing, {"--data": "nowhere"}, "no shards below"),
    "latents for images": (latents_as_data, {}, "holds latents of squares/train, not images"),
    "images for latents": (nothing, {"--out": "shards"}, "holds the images of squares/train"),
    "no such split": (nothing, {"--split": "trian"}, "'trian': there is none below .*, but squares/train"),
    "no model": (nothing, {"--model": "/nowhere"}, "no such folder; .*; or give an exported model"),
    "no weights": (spoiled_weights, {}, "sd/vae: damaged weights"),
    "uneven resolution": (nothing, {"--resolution": 33}, "must be a multiple of 2"),
    "resolution not given": (nothing, {"--resolution": None}, "--resolution is missing"),
    "no views": (nothing, {"--views": 0}, "--views is 0; it must be at least 1"),
    "out is a file": (lambda root: (root / "file").touch(), {"--out": "file/out"}, "cannot be written"),
    "full disk": (nothing, {"--views": 10**9}, r"GB are needed, .* GB are free; .*fewer --views"),
}


@pytest.mark.parametrize("kind", BAD_JOBS)
def test_bad_job_stops_with_its_message_before_it_writes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spoil, changes, message = BAD_JOBS[kind]
    spoil(tmp_path)
    before = digests(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DigSegError, match=message):
        main(arguments(shards, Path("latents"), **changes))
    assert digests(tmp_path) == before


def test_mistake_ends_the_command_with_exit_code_2_and_no_traceback(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "data_prep/encode_latents.py", *arguments(shards, tmp_path / "out", **{"--split": "x"})]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --split 'x'")
