"""The command `digseg`: what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_world import World, export_random_model, picture_bytes, small_config

from digseg.cli import main
from digseg.errors import DigSegError, run_main
from digseg.evaluation.images import read_image
from digseg.evaluation.inference import Predictor
from digseg.registry.lineage import directory_digest
from digseg.registry.package import register_model
from digseg.registry.tracking import MlflowRun

CHAMPION = "models:/digseg@champion"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    path.write_bytes(picture_bytes())
    return path


def _predict(world: World, out: Path, *images: Path, classes: str = "road, car", model: str = CHAMPION) -> list[str]:
    store = ["--tracking-uri", world.tracking_uri]
    return ["predict", "--model", model, "--classes", classes, "--out", str(out), *store, *map(str, images)]


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run as the console script does; the message of an exit with code 2."""
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main(arguments))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


def test_predict_writes_mask_legend_and_overlay(world: World, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "field.jpg"
    other.write_bytes(picture_bytes(40, 90, "JPEG", seed=1))
    out = tmp_path / "new" / "out"
    main([*_predict(world, out, picture, other), "--background"])
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(f"{s}.{k}" for s in ("street", "field") for k in ("mask.png", "legend.json", "overlay.png"))

    expected = Predictor.load(world.model_dir).predict(read_image(picture), ["road", "car"], background=True)
    with Image.open(out / "street.mask.png") as mask:
        assert mask.mode == "L"
        np.testing.assert_array_equal(np.array(mask), expected.mask)
    legend = json.loads((out / "street.legend.json").read_text())
    assert (legend["image"], legend["mask"]) == ("street.png", "street.mask.png")
    assert (legend["height"], legend["width"]) == expected.mask.shape
    assert [entry["name"] for entry in legend["classes"]] == ["background", "road", "car"]
    for entry in legend["classes"]:
        assert entry["pixels"] == (expected.mask == entry["id"]).sum()
        assert entry["share"] == pytest.approx(entry["pixels"] / expected.mask.size, abs=1e-6)
        assert re.fullmatch("#[0-9a-f]{6}", entry["colour"])
    assert legend["model"] == {
        "name": "digseg",
        "version": 2,
        "alias": "champion",
        "run_id": world.run_id,
        "sha256": directory_digest(world.model_dir),
        "uri": "models:/digseg/2",
    }
    with Image.open(out / "field.overlay.png") as overlay:
        assert overlay.width >= 900


def test_a_legend_with_synonyms_asks_the_same_again(world: World, picture: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    main([*_predict(world, first, picture, classes="road=street|lane, car, sky"), "--classes-per-pass", "1"])
    legend = json.loads((first / "street.legend.json").read_text())
    assert [entry["synonyms"] for entry in legend["classes"]] == [["street", "lane"], [], []]
    command = ["predict", "--model", str(world.model_dir), "--classes-file", str(first / "street.legend.json")]
    main([*command, "--classes-per-pass", "1", "--out", str(again), str(picture)])
    assert (again / "street.mask.png").read_bytes() == (first / "street.mask.png").read_bytes()


def test_wrong_settings_are_refused(
    world: World, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value, message in (
        ("--short-side", "5", "short_side: got 5"),
        ("--classes-per-pass", "8", "a pass of this model holds 8 classes"),
        ("--template", "a photo", "needs one {}"),
    ):
        assert message in _refused([*_predict(world, tmp_path / "out", picture), option, value], capsys)
    assert not (tmp_path / "out").exists()


def test_wrong_queries_are_refused(
    world: World, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for classes, message in (
        ("", "no classes given"),
        (" ", "no classes given"),
        ("road,,car", "class 2 of 3 is an empty name"),
        ("road, car, Road", "class names given twice: road"),
        ("road=, car", "class 'road' has an empty synonym"),
    ):
        assert message in _refused(_predict(world, out, picture, classes=classes), capsys)
    for model, message in (
        ("models:/digseg@nobody", "has no alias 'nobody'"),
        ("models:/other@champion", "no registered model 'other'"),
        ("models:/digseg/99", "has no version 99"),
        ("somewhere", "no model directory"),
    ):
        assert message in _refused(_predict(world, out, picture, model=model), capsys)
    assert not out.exists()


def test_one_unreadable_image_among_good_ones_writes_nothing(
    world: World, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, text, out = tmp_path / "cut.png", tmp_path / "text.png", tmp_path / "out"
    cut.write_bytes(picture_bytes()[:3000])
    text.write_text("not a picture")
    twin = tmp_path / "b" / "street.jpg"
    twin.parent.mkdir()
    twin.write_bytes(picture_bytes(file_format="JPEG"))
    for bad, message in (
        (cut, "cut.png: damaged image"),
        (text, "text.png: not an image"),
        (tmp_path / "gone.png", "gone.png: No such file"),
        (tmp_path, "Is a directory"),
        (twin, "results would share the name 'street'"),
    ):
        assert message in _refused(_predict(world, out, picture, bad), capsys)
    assert f"--out {text} is a file" in _refused(_predict(world, text, picture), capsys)
    assert not out.exists()


def test_a_failure_on_the_way_leaves_nothing_behind(
    world: World, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "field.png"
    other.write_bytes(picture_bytes(seed=1))
    real, calls = Predictor.predict_mask, []

    def failing(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise DigSegError("the second image cannot be segmented")
        return real(*arguments, **options)

    monkeypatch.setattr(Predictor, "predict_mask", failing)
    with pytest.raises(DigSegError, match="the second image"):
        main(_predict(world, tmp_path / "out", picture, other))
    assert not (tmp_path / "out").exists()


def test_models_list_shows_versions_and_aliases(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "list", "--tracking-uri", world.tracking_uri])
    lines = [line for line in capsys.readouterr().out.splitlines() if "digseg" in line]
    assert len(lines) == 2
    assert "champion" in lines[0]
    assert "challenger" in lines[1]


def _models(world: World, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `digseg models` says, without the breaks of its table."""
    main(["models", *arguments, "--tracking-uri", world.tracking_uri])
    return re.sub(r"\s+", " ", re.sub("[^\\w.:/@,=()+-]+", " ", capsys.readouterr().out))


def test_models_show_tells_what_a_version_is(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = _models(world, capsys, "show", CHAMPION)
    digest = json.loads((world.shards / "squares" / "train" / "manifest.json").read_text())["digest"]
    for fact in ("models:/digseg/2", "background, round hole, square", digest, directory_digest(world.model_dir)):
        assert fact in shown
    assert f"run {world.run_id}" in shown


def test_models_diff_shows_what_differs_only(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "no difference" in _models(world, capsys, "diff", "models:/digseg/1", "models:/digseg/1")
    shutil.copy(world.tracking_uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    config = small_config(
        tmp_path, run={"name": "other", "seed": 3}, tracking={"uri": store}, data={"root": str(world.shards)}
    )
    run = MlflowRun(config)
    run.start(config.model_dump(mode="json"), {"squares/train": "cd" * 32})
    run.finish("finished")
    register_model(export_random_model(tmp_path / "model", config, ["square", "tree"]), config, run_id=run.run_id)
    main(["models", "diff", "models:/digseg/2", "models:/digseg/3", "--tracking-uri", store])
    shown = capsys.readouterr().out
    for row in (r"classes .*background, round hole, square .* square, tree", "run.seed .* 0 .* 3", "model_sha256"):
        assert re.search(row, shown)
    assert "training.steps" not in shown


def test_lineage_leads_from_a_prediction_to_the_data(
    world: World,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(_predict(world, tmp_path / "out", picture))
    legend = tmp_path / "out" / "street.legend.json"
    capsys.readouterr()
    shown = _models(world, capsys, "lineage", str(legend))
    digest = json.loads((world.shards / "squares" / "train" / "manifest.json").read_text())["digest"]
    for step in (
        "model models:/digseg/2 ( @champion) ",
        f"files sha256 {directory_digest(world.model_dir)} as registered",
        f"run {world.run_id} (small) finished",
        "config.yaml of the run",
        "source git ",
        f"data squares/train, manifest {digest}",
    ):
        assert step in shown.replace("(@", "( @")

    other = json.loads(legend.read_text())
    other["model"]["sha256"] = "0" * 64
    legend.write_text(json.dumps(other))
    with pytest.raises(DigSegError, match="that is another registry"):
        main(["models", "lineage", str(legend), "--tracking-uri", world.tracking_uri])
    legend.write_text("{}")
    with pytest.raises(DigSegError, match="is not a legend of digseg predict"):
        main(["models", "lineage", str(legend), "--tracking-uri", world.tracking_uri])
    with pytest.raises(DigSegError, match="cannot be read: No such file"):
        main(["models", "lineage", str(tmp_path / "none.json"), "--tracking-uri", world.tracking_uri])


def test_the_same_image_and_version_give_the_same_bytes(world: World, picture: Path, tmp_path: Path) -> None:
    program = "import sys; from digseg.cli import main; main(sys.argv[1:])"
    main(_predict(world, tmp_path / "here", picture))
    command = [sys.executable, "-c", program, *_predict(world, tmp_path / "there", picture)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_a_store_that_is_not_there_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"sqlite:///{tmp_path}/none.db"
    assert "no MLflow database at" in _refused(["models", "list", "--tracking-uri", missing], capsys)


def test_a_wrong_query_is_refused_before_anything_heavy_is_loaded(picture: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom digseg.cli import main\nfrom digseg.errors import DigSegError\n"
        "try:\n    main(sys.argv[1:])\nexcept DigSegError:\n    pass\n"
        "print([name for name in ('torch', 'mlflow', 'diffusers') if name in sys.modules])"
    )
    arguments = ["predict", "--model", CHAMPION, "--classes", "", "--out", str(tmp_path / "out"), str(picture)]
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_console_script_exits_with_2_and_no_traceback(picture: Path, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("digseg")
    arguments = ["predict", "--model", CHAMPION, "--classes", "a, a", "--out", str(tmp_path / "out"), str(picture)]
    result = subprocess.run([str(script), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: class names given twice: a; name each class once\n"
    assert result.stdout == ""
