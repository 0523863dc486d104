import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus_files import digests, save, spoil_exif
from PIL import Image

from data_prep.shard import finish_split, plan_split, shard_corpus
from data_prep.shard_job import make_shard, plan_shards
from digseg.cli import main
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import index_name, load_manifest
from digseg.errors import DigSegError

CLASSES = "name: garden\nclasses: [path, grass, tree]\ndomain: natural\nlicence: CC0-1.0\nsplits: 5\n"


@pytest.fixture
def garden(tmp_path: Path) -> Path:
    """A folder corpus of ten images: eight of train, two of val."""
    root = tmp_path / "garden"
    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.yaml").write_text(CLASSES)
    for number in range(10):
        image = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        suffix = "jpg" if number % 2 else "png"
        Image.fromarray(image).save(root / "images" / f"plot{number}.{suffix}")
        mask = random.integers(0, 3, (24, 32)).astype(np.uint8)
        mask[0] = 255
        Image.fromarray(mask).save(root / "masks" / f"plot{number}.png")
    return root


def shard(garden: Path, out: Path, **options: int | str) -> None:
    plan = plan_split("folder", garden, "train", out, **{"samples_per_shard": 3, **options})  # type: ignore[arg-type]
    shard_corpus(plan)


def rejected(out: Path) -> dict[str, str]:
    lines = (out / "garden/train/rejected.jsonl").read_text().splitlines()
    return {record["key"]: record["reason"] for record in map(json.loads, lines)}


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "data_prep/shard.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def test_plan_holds_every_key_once_in_shards_of_nearly_equal_size() -> None:
    keys = [f"k{number}" for number in range(1001)]
    plan = plan_shards(keys, seed=0, samples_per_shard=100)
    assert sorted(key for shard_keys in plan for key in shard_keys) == sorted(keys)
    assert {len(shard_keys) for shard_keys in plan} == {91}
    assert all(shard_keys == sorted(shard_keys) for shard_keys in plan)


def test_plan_depends_on_the_keys_and_the_seed_alone() -> None:
    keys = [f"k{number}" for number in range(50)]
    assert plan_shards(keys, 1, 10) == plan_shards(keys[::-1], 1, 10)
    assert plan_shards(keys, 1, 10) != plan_shards(keys, 2, 10)


@pytest.mark.parametrize(("samples", "shards"), [(1, 1), (64, 1), (65, 2), (240, 4), (2000, 4), (5000, 10)])
def test_small_corpora_get_few_shards_by_default(samples: int, shards: int) -> None:
    assert len(plan_shards([f"{number}" for number in range(samples)], 0)) == shards


@pytest.mark.cluster
def test_shards_hold_the_corpus_as_its_adapter_reads_it(garden: Path, tmp_path: Path, ray_running: None) -> None:
    shard(garden, tmp_path / "out")
    corpus = ShardedCorpus(tmp_path / "out", "garden", "train")
    corpus.verify()
    assert corpus.manifest.vocabulary == ("path", "grass", "tree")
    assert (corpus.manifest.domain, corpus.manifest.licence) == ("natural", "CC0-1.0")
    assert len(corpus) == 8
    assert len(corpus.manifest.shards) == 3
    for number in range(8):
        sample = corpus.read(number)
        mask = np.asarray(Image.open(garden / "masks" / f"{sample.key}.png"))
        np.testing.assert_array_equal(sample.mask, mask)
        source = garden / sample.meta["source"]
        np.testing.assert_array_equal(sample.image, np.asarray(Image.open(source).convert("RGB")))
        assert (sample.meta["height"], sample.meta["width"]) == (24, 32)
    assert rejected(tmp_path / "out") == {}


def test_files_that_cannot_be_read_or_written_are_named(garden: Path, tmp_path: Path) -> None:
    """A folder in the place of each file."""
    folder = tmp_path / "out" / "garden" / "train"
    plan = plan_split("folder", garden, "train", tmp_path / "out", samples_per_shard=8)
    (job,) = plan.jobs
    (folder / "manifest.json").mkdir(parents=True)
    with pytest.raises(DigSegError, match=f"{tmp_path}/out cannot be read: .*directory"):
        plan_split("folder", garden, "train", tmp_path / "out")
    (folder / "manifest.json").rmdir()
    (folder / index_name(job.shard)).mkdir()
    with pytest.raises(DigSegError, match=f"{tmp_path}/out cannot be read: .*directory"):
        make_shard(job)
    (folder / index_name(job.shard)).rmdir()
    made = [make_shard(job)]
    (folder / "rejected.jsonl").mkdir()
    with pytest.raises(DigSegError, match=f"cannot write {folder}: .*directory"):
        finish_split(plan, made)


def test_tiles_of_large_images_become_samples_of_shards(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    colours = np.array([(0, 0, 0), (0, 0, 63), (0, 100, 155)], np.uint8)  # background, ship, harbor
    counts = np.zeros(16, int)
    for name, size in (("P0000", (1000, 900)), ("P0001", (300, 400))):
        labels = random.integers(0, 3, size)
        counts[[0, 1, 15]] += np.bincount(labels.ravel())
        save(tmp_path / f"train/images/{name}.png", labels % 2 * 200)
        save(tmp_path / f"train/Semantic_masks/{name}_instance_color_RGB.png", colours[labels])
    plan = plan_split("isaid", tmp_path, "train", tmp_path / "out", samples_per_shard=3)
    manifest = finish_split(plan, [make_shard(job) for job in plan.jobs])
    corpus = ShardedCorpus(tmp_path / "out", "isaid", "train")
    samples = sorted((corpus.read(number) for number in range(len(corpus))), key=lambda sample: sample.key)
    assert [(sample.key, sample.mask.shape) for sample in samples] == [
        ("P0000_0", (500, 450)),
        ("P0000_1", (500, 450)),
        ("P0000_2", (500, 450)),
        ("P0000_3", (500, 450)),
        ("P0001_0", (300, 400)),
    ]
    assert manifest.statistics.class_pixels == tuple(counts)
    assert all(not make_shard(job).written for job in plan.jobs)  # verified, not made again


@pytest.mark.cluster
def test_image_files_go_into_the_shards_as_they_are(garden: Path, tmp_path: Path, ray_running: None) -> None:
    shard(garden, tmp_path / "out")
    tars = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*.tar"))
    for name in ("plot1.jpg", "plot2.png"):
        assert (garden / "images" / name).read_bytes() in tars


@pytest.mark.cluster
def test_sharding_twice_gives_identical_files(garden: Path, tmp_path: Path, ray_running: None) -> None:
    shard(garden, tmp_path / "one")
    moved = garden.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*.png"):
        path.touch()
    shard(moved, tmp_path / "two")
    assert len(digests(tmp_path / "one")) == 11
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.cluster
def test_running_again_verifies_and_rewrites_nothing(
    garden: Path, tmp_path: Path, ray_running: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(garden, tmp_path / "out")
    shards = sorted((tmp_path / "out").rglob("*.tar"))
    before = [path.stat().st_ino for path in shards]
    capsys.readouterr()
    shard(garden, tmp_path / "out")
    assert [path.stat().st_ino for path in shards] == before
    assert "(0 written, 3 verified)" in capsys.readouterr().out


@pytest.mark.cluster
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "remove index", "flip index", "remove manifest"])
def test_running_again_mends_exactly_what_is_damaged(
    garden: Path, tmp_path: Path, ray_running: None, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    out = tmp_path / "out"
    shard(garden, out)
    sound = digests(out)
    victim = out / "garden/train/garden-train-000001"
    if "index" in damage:
        victim = victim.with_suffix(".idx")
    else:
        victim = victim.with_suffix(".tar") if "manifest" not in damage else victim.with_name("manifest.json")
    content = bytearray(victim.read_bytes())
    if "flip" in damage:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-512])
    else:
        victim.unlink()
    capsys.readouterr()
    shard(garden, out)
    assert digests(out) == sound
    written = 0 if "manifest" in damage else 1
    assert f"({written} written, {3 - written} verified)" in capsys.readouterr().out


@pytest.mark.cluster
def test_changed_source_changes_its_shard_and_the_digest(garden: Path, tmp_path: Path, ray_running: None) -> None:
    out = tmp_path / "out"
    shard(garden, out)
    before, files = load_manifest(out, "garden", "train"), digests(out)
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(garden / "masks" / "plot1.png")
    shard(garden, out)
    assert load_manifest(out, "garden", "train").digest != before.digest
    changed = {name for name, digest in digests(out).items() if files[name] != digest}
    assert len([name for name in changed if name.endswith(".tar")]) == 1


@pytest.mark.cluster
def test_smaller_corpus_leaves_no_old_shards_behind(garden: Path, tmp_path: Path, ray_running: None) -> None:
    shard(garden, tmp_path / "out", samples_per_shard=1)
    shard(garden, tmp_path / "out", samples_per_shard=8)
    shard(garden, tmp_path / "fresh", samples_per_shard=8)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.cluster
def test_name_of_the_sharded_corpus_can_be_chosen(garden: Path, tmp_path: Path, ray_running: None) -> None:
    shard(garden, tmp_path / "out", name="my-plot")
    assert load_manifest(tmp_path / "out", "my-plot", "train").shards[0].name == "my-plot-train-000000.tar"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_SAMPLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "mask without image": (lambda root: (root / "images/plot1.jpg").unlink(), r"no image images/plot1\.\*"),
    "image without mask": (lambda root: (root / "masks/plot1.png").unlink(), r"no mask masks/plot1\.\*"),
    "mask of another size": (
        lambda root: Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "masks/plot1.png"),
        "mask plot1.png is 9 x 9 pixels, the image 32 x 24",
    ),
    "class id outside the vocabulary": (
        lambda root: Image.fromarray(np.full((24, 32), 3, np.uint8)).save(root / "masks/plot1.png"),
        r"mask plot1.png has class id 3, outside the vocabulary \(first at row 0, column 0, 768 in all\)",
    ),
    "truncated PNG": (lambda root: cut(root / "masks/plot1.png"), "mask plot1.png is damaged or truncated"),
    "truncated JPEG": (lambda root: cut(root / "images/plot1.jpg"), "image plot1.jpg is damaged or truncated"),
    "damaged EXIF": (
        lambda root: spoil_exif(root / "images/plot1.jpg", b"not a TIFF"),
        "image plot1.jpg has damaged EXIF data",
    ),
}


@pytest.mark.cluster
@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_bad_sample_is_rejected_with_its_reason_and_the_job_goes_on(
    garden: Path, tmp_path: Path, ray_running: None, kind: str
) -> None:
    spoil, reason = BAD_SAMPLES[kind]
    spoil(garden)
    out = tmp_path / "out"
    shard(garden, out)
    found = rejected(out)
    assert set(found) == {"plot1"}
    assert re.match(reason, found["plot1"]), found
    assert str(tmp_path) not in found["plot1"]
    corpus = ShardedCorpus(out, "garden", "train")
    corpus.verify()
    assert len(corpus) == 7
    assert corpus.manifest.rejected == 1
    assert "plot1" not in {corpus.key(number) for number in range(7)}


@pytest.mark.cluster
def test_job_without_a_single_intact_sample_stops_before_it_writes(
    garden: Path, tmp_path: Path, ray_running: None
) -> None:
    for path in (garden / "masks").iterdir():
        cut(path)
    with pytest.raises(DigSegError, match=r"none of 8 samples can be used: .*mask"):
        shard(garden, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.cluster
def test_command_line_shards_reports_and_counts_rejected_samples(garden: Path, tmp_path: Path) -> None:
    (garden / "masks/plot1.png").unlink()
    done = cli("--corpus", "folder", "--root", garden, "--split", "train", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "garden/train: 7 samples in 1 shards (1 written, 0 verified)" in done.stdout
    assert "1 samples rejected" in done.stdout
    assert "plot1: no mask" in done.stdout
    assert len(ShardedCorpus(tmp_path / "out", "garden", "train")) == 7


def no_masks(garden: Path) -> None:
    shutil.rmtree(garden / "masks")
    (garden / "masks").mkdir()


def no_images_or_masks(garden: Path) -> None:
    for folder in ("images", "masks"):
        shutil.rmtree(garden / folder)
        (garden / folder).mkdir()


BAD_JOBS: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "missing root": (shutil.rmtree, {}, "does not exist"),
    "empty split": (no_images_or_masks, {}, "'train' is empty"),
    "unknown split": (lambda root: None, {"--split": "trian"}, "did you mean 'train'"),
    "unknown corpus": (lambda root: None, {"--corpus": "camvit"}, "did you mean 'camvid'"),
    "no mask at all": (no_masks, {}, "none of 8 samples can be used"),
    "bad name": (lambda root: None, {"--name": "a/b"}, "use letters, digits"),
    "no samples in a shard": (lambda root: None, {"--samples-per-shard": "0"}, "must be at least 1"),
    "out cannot be made": (lambda root: None, {"--out": "/proc/shards"}, "/proc/shards cannot be written"),
    "out is a file": (lambda root: (root.parent / "file").touch(), {"--out": "file/out"}, "cannot be written"),
}


@pytest.mark.parametrize("kind", BAD_JOBS)
def test_bad_job_stops_with_its_message_and_exit_code_2_before_it_writes(
    garden: Path, tmp_path: Path, kind: str
) -> None:
    spoil, changes, message = BAD_JOBS[kind]
    spoil(garden)
    before = sorted(tmp_path.iterdir())
    options = {"--corpus": "folder", "--root": str(garden), "--split": "train", "--out": "out", **changes}
    options["--out"] = str(tmp_path / options["--out"])
    done = cli(*(part for option in options.items() for part in option))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_disk_that_takes_no_more_is_a_clear_error_and_keeps_no_half_shard(garden: Path, tmp_path: Path) -> None:
    plan = plan_split("folder", garden, "train", tmp_path / "out", samples_per_shard=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(DigSegError, match=r"^cannot write .*garden-train-000000\.tar: .*File too large"):
            make_shard(plan.jobs[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


PEAK_OF_A_SHARD = """
import resource, sys
from data_prep.shard import plan_split
from data_prep.shard_job import make_shard

root, samples, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
(job,) = plan_split("folder", root, "train", out, samples_per_shard=samples).jobs
assert make_shard(job).entry.samples == samples
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_images_of_a_shard(tmp_path: Path) -> None:
    peaks = {}
    for images in (2, 40):
        root = tmp_path / f"noise{images}"
        for folder in ("images", "masks"):
            (root / folder / "train").mkdir(parents=True)
        (root / "classes.yaml").write_text(CLASSES.replace("splits: 5\n", ""))
        first = root / "images/train/0.jpg", root / "masks/train/0.png"
        noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(first[0], quality=100)
        Image.fromarray(noise[:, :, 0] % 3).save(first[1])
        for number in range(1, images):
            for path in first:
                path.with_stem(str(number)).hardlink_to(path)
        arguments = [str(root), str(images), str(tmp_path / f"out{images}")]
        done = subprocess.run(
            [sys.executable, "-c", PEAK_OF_A_SHARD, *arguments], capture_output=True, text=True, check=True
        )
        peaks[images] = int(done.stdout) * 1024
    shard_bytes = sum(path.stat().st_size for path in (tmp_path / "out40").rglob("*.tar"))
    assert shard_bytes > 100 << 20
    assert peaks[40] - peaks[2] < shard_bytes / 5


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "corpus", "samples"),
    [
        ("camvid", "camvid", {"train": 60, "val": 20, "test": 36}),
        ("cwfid", "cwfid", {"train": 39, "test": 21}),
        ("dsb2018", "dsb2018", {"train": 51, "val": 13}),
        ("fair_kampala_buildings", "fair_kampala_buildings", {"train": 118, "val": 29}),
        ("isbi_em_membrane", "isbi_em_membrane", {"train": 24, "val": 6}),
        ("isic2017_lesion", "isic2017_lesion", {"train": 56, "val": 14}),
        ("loveda_mini", "loveda", {"train": 9, "val": 3}),
    ],
)
def test_real_samples_are_sharded_whole_and_pass_strictly(
    real_corpora: Path, tmp_path: Path, folder: str, corpus: str, samples: dict[str, int]
) -> None:
    for split, number in samples.items():
        plan = plan_split(corpus, real_corpora / folder, split, tmp_path)
        manifest = finish_split(plan, [make_shard(job) for job in plan.jobs])
        assert (manifest.samples, manifest.rejected) == (number, 0)
    main(["shards", "lint", str(tmp_path), "--strict"])


def test_tasks_that_only_shard_do_not_load_torch(repository: Path) -> None:
    """It would take each of them 150 MB and seconds."""
    code = "import sys, data_prep.shard_job, digseg.cluster.tasks, digseg.data.lint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0
