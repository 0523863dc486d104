"""Runs of the real trainer on a tiny model: resume, faults, results. One process, and two where it says so."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import STEPS, loss_curve, run_config, train_poisoned, train_until_killed
from safetensors.torch import load_file
from shard_writing import damage_samples
from small_world import write_squares

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.model.export import load_model
from digseg.training.engine import Engine
from digseg.training.logging import read_metrics
from digseg.training.run import check_continues, check_run, finished_result
from digseg.training.sample_log import samples_of_steps
from digseg.training.trainer import Trainer
from digseg.training.world import World


class Recorder:
    """A run logger that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, config: Mapping[str, Any], dataset_digests: Mapping[str, str], facts: Mapping[str, str]) -> None:
        assert {"device": "cpu", "attention_kernel": "math"}.items() <= facts.items()
        assert float(facts["gflops_per_image"]) > 0
        assert float(facts["peak_tflops"]) > 0
        self.calls.append(("start", config["run"]["name"], dict(dataset_digests)))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("metrics", step, dict(values)))

    def pictures(self, folder: Path) -> None:
        self.calls.append(("pictures", folder.name))

    def tags(self, values: Mapping[str, str]) -> None:
        self.calls.append(("tags", dict(values)))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and the run ``whole`` which nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    write_squares(folder / "shards", "train", 10)
    Trainer(run_config(folder, "whole"), World()).train()
    return folder


def test_result_tells_of_the_whole_run(folder: Path) -> None:
    result = finished_result(run_config(folder, "whole"))
    curve = loss_curve(folder, "whole")
    assert result is not None
    assert (result.steps, result.world_size, result.zero_stage) == (STEPS, 1, 1)
    assert [line["step"] for line in curve] == [1, 4, 8, 9]
    assert (result.first_loss, result.last_loss) == (curve[0]["loss"], curve[-1]["loss"])
    assert result.last_loss < result.first_loss
    assert result.images_per_second > 0
    assert Path(result.checkpoint_dir).name == "step-00000009"


def test_logged_loss_is_the_weighted_sum_of_its_parts_and_rates_are_there(folder: Path) -> None:
    objective = run_config(folder, "whole").objective
    for line in read_metrics(folder / "runs/whole/metrics.jsonl"):
        parts = (
            objective.class_score * line["class_score"]
            + objective.feedback * line["feedback"]
            + objective.reconstruction * line["reconstruction"]
        )
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
        assert line["images_per_second"] == pytest.approx(8 / line["step_time_s"], rel=1e-6)
        assert 0 < line["data_wait_share"] < 1
        assert line["gradient_norm"] > 0
        assert line["learning_rate"] > 0


def test_unreadable_samples_are_logged_and_stop_the_run_past_the_limit(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    damage_samples(tmp_path / "shards", "squares", (2, 8))
    train_until_killed(run_config(tmp_path, "borne"), 5)
    Trainer(run_config(tmp_path, "borne"), World()).train()
    assert [line["unreadable_samples"] for line in loss_curve(tmp_path, "borne")] == [2, 2, 2, 2]
    values = run_config(tmp_path, "refused").model_dump(mode="json")
    values["data"]["max_corrupt"] = 1
    with pytest.raises(DigSegError, match=r"2 samples could not be read \(data\.max_corrupt is 1\)"):
        Trainer(Config.model_validate(values), World()).train()


def test_exported_model_has_the_averaged_weights_of_the_last_checkpoint(folder: Path) -> None:
    result = finished_result(run_config(folder, "whole"))
    assert result is not None
    saved = torch.load(Path(result.checkpoint_dir) / "rank-00000.pt", weights_only=True)["weights"]
    assert saved["updates"] == STEPS
    exported = load_file(Path(result.model_dir) / "unet/diffusion_pytorch_model.safetensors")
    for name, weight in exported.items():
        average = saved["shares"][f"segmenter.unet.{name}"]["values"]
        assert torch.equal(weight, average.view(weight.shape))
    card = load_model(Path(result.model_dir)).card
    assert card.metadata["step"] == STEPS
    assert card.metadata["averaged_weights"] is True
    assert list(card.metadata["datasets"]) == ["squares/train"]


def test_same_configuration_gives_the_same_losses_bit_for_bit(folder: Path) -> None:
    Trainer(run_config(folder, "again"), World()).train()
    assert loss_curve(folder, "again") == loss_curve(folder, "whole")


@pytest.mark.parametrize("killed_after", [3, 5, 6])
def test_interrupted_run_ends_as_the_undisturbed_one_bit_for_bit(folder: Path, killed_after: int) -> None:
    name = f"killed{killed_after}"
    config = run_config(folder, name)
    train_until_killed(config, killed_after)
    Trainer(config, World()).train()
    _assert_same_end(folder, name, "whole")
    lost = json.loads((folder / "runs" / name / "ledger.json").read_bytes())["seconds"]["lost"]
    # Step 4 was logged, and taken again after the checkpoint of step 3.
    assert (lost > 0) == (killed_after == 5)


@pytest.mark.cluster
@pytest.mark.parametrize("world_size", [1, 2])
def test_interrupted_run_ends_as_its_undisturbed_one_bit_for_bit_in_every_stage(
    tmp_path: Path, world_size: int
) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    if world_size == 1:
        _train_whole_and_killed(World(), tmp_path)
    else:
        run_ranks(_train_whole_and_killed, world_size, tmp_path, tmp_path)
    for stage in range(4):
        _assert_same_end(tmp_path, f"killed{stage}", f"whole{stage}")


def _train_whole_and_killed(world: World, folder: Path) -> None:
    for stage in range(4):
        whole, killed = (
            run_config(folder, f"{name}{stage}", zero_stage=stage, steps=6) for name in ("whole", "killed")
        )
        Trainer(whole, world).train()
        train_until_killed(killed, 5, world=world)
        Trainer(killed, world).train()


def _assert_same_end(folder: Path, name: str, other: str) -> None:
    """The same losses and the same exported weights."""
    assert loss_curve(folder, name) == loss_curve(folder, other)
    for file in ("unet/diffusion_pytorch_model.safetensors", "pathway/diffusion_pytorch_model.safetensors"):
        weights, others = ((folder / "runs" / run / "model" / file).read_bytes() for run in (name, other))
        assert weights == others


def test_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(folder, "damaged")
    train_until_killed(config, 7)
    victim = folder / "runs/damaged/checkpoints/step-00000006/rank-00000.pt"
    victim.write_bytes(victim.read_bytes()[:-100])
    Trainer(config, World()).train()
    said = capsys.readouterr().out
    assert "checkpoint step-00000006 is damaged and put aside: rank-00000.pt has" in said
    assert "goes on after step 3" in said
    assert loss_curve(folder, "damaged") == loss_curve(folder, "whole")


def test_finished_run_says_so_and_trains_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    result = Trainer(run_config(folder, "whole"), World(), recorder).train()
    assert result == finished_result(run_config(folder, "whole"))
    assert "all 9 steps are taken" in capsys.readouterr().out
    assert recorder.calls == []


def test_finished_run_goes_on_when_more_steps_are_asked_for(folder: Path) -> None:
    shutil.copytree(folder / "runs/whole", folder / "runs/longer")
    result = Trainer(run_config(folder, "longer", steps=11), World()).train()
    assert result.steps == 11
    assert [line["step"] for line in loss_curve(folder, "longer")] == [1, 4, 8, 9, 11]


def test_run_that_took_more_steps_than_are_now_asked_for_ends_with_them(folder: Path) -> None:
    shutil.copytree(folder / "runs/whole", folder / "runs/shorter")
    (folder / "runs/shorter/result.json").unlink()
    config = run_config(folder, "shorter", steps=7)
    assert Trainer(config, World()).train().steps == STEPS
    assert loss_curve(folder, "shorter") == loss_curve(folder, "whole")
    assert finished_result(config) is not None


def test_window_whose_other_steps_are_all_passed_over_is_logged(folder: Path) -> None:
    config = run_config(folder, "untimed")
    train_until_killed(config, 3)
    (folder / "runs/untimed/skipped.json").write_text(json.dumps([{"step": 3, "keys": []}]))
    Trainer(config, World()).train()
    lines = {line["step"]: line for line in read_metrics(folder / "runs/untimed/metrics.jsonl")}
    assert (lines[4]["images_per_second"], lines[4]["step_time_s"]) == (0, 0)
    assert math.isfinite(lines[4]["loss"])


def test_logger_is_started_fed_and_finished(folder: Path) -> None:
    recorder = Recorder()
    Trainer(run_config(folder, "recorded", steps=4), World(), recorder).train()
    kinds = [call[0] for call in recorder.calls]
    assert kinds == ["start", "metrics", "metrics", "metrics", "finish"]
    assert recorder.calls[0][1] == "recorded"
    assert recorder.calls[-1] == ("finish", "finished")
    first, last, ledger = ({"step": call[1], **call[2]} for call in recorder.calls if call[0] == "metrics")
    assert [first, last | ledger] == read_metrics(folder / "runs/recorded/metrics.jsonl")
    assert last["step"] == ledger["step"] == 4
    assert not last.keys() & ledger.keys() - {"step"}


def test_logger_of_a_run_that_goes_on_gets_the_earlier_figures_first(folder: Path) -> None:
    config = run_config(folder, "told-again", log_every=1)
    train_until_killed(config, 5)
    recorder = Recorder()
    Trainer(config, World(), recorder).train()
    lines = read_metrics(folder / "runs/told-again/metrics.jsonl")
    *told, ledger = [{"step": call[1], **call[2]} for call in recorder.calls if call[0] == "metrics"]
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    assert [*told[:-1], told[-1] | ledger] == lines


def test_step_with_a_poisoned_sample_is_left_out_and_its_samples_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    key = train_poisoned(run_config(folder, "poisoned"), {4}, recorder)
    said = " ".join(capsys.readouterr().out.split())
    assert "step 5 was left out" in said
    assert key in said
    curve = {line["step"]: line for line in read_metrics(folder / "runs/poisoned/metrics.jsonl")}
    assert [line["steps_left_out"] for line in curve.values()] == [0, 0, 1, 0]
    assert [line["skipped_steps"] for line in curve.values()] == [0, 0, 1, 1]
    (skipped,) = _skipped(folder, "poisoned")
    assert (skipped["step"], skipped["passed_over"], len(skipped["keys"])) == (4, False, 8)
    assert key in skipped["keys"]
    assert ("tags", {"skipped_steps": "5"}) in recorder.calls
    assert all(math.isfinite(line["loss"]) for line in curve.values())
    # The mean is that of the three other steps of the window, whose weights the poisoned one did not touch.
    assert curve[4]["loss"] == loss_curve(folder, "whole")[1]["loss"]


def test_steps_that_were_left_out_are_noted_once_by_a_run_that_goes_on(folder: Path) -> None:
    train_poisoned(run_config(folder, "noted"), {4, 6})
    for name in ("noted-again", "noted-before"):
        # Lost after step 8, which notes both, it goes on after step 6, whose checkpoint has step 5's verdict unread.
        train_until_killed(run_config(folder, name), 8, poisoned={4, 6})
        assert _skipped(folder, name) == _skipped(folder, "noted")
    train_poisoned(run_config(folder, "noted-again"), {4, 6})
    assert _skipped(folder, "noted-again") == _skipped(folder, "noted")
    assert loss_curve(folder, "noted-again") == loss_curve(folder, "noted")
    # Taken again, step 7 is well.
    Trainer(run_config(folder, "noted-before"), World()).train()
    assert _skipped(folder, "noted-before") == _skipped(folder, "noted")[:1]
    assert [line["skipped_steps"] for line in loss_curve(folder, "noted-before")] == [0, 0, 1, 1]


def test_run_goes_back_to_before_several_bad_steps_and_passes_over_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(folder, "went-back", log_samples=True)
    key = train_poisoned(config, {4, 5, 6})
    assert "going back to step 3; steps 5 to 7 will be passed over" in " ".join(capsys.readouterr().out.split())
    skipped = _skipped(folder, "went-back")
    assert [(entry["step"], entry["passed_over"]) for entry in skipped] == [(4, True), (5, True), (6, True)]
    assert key in skipped[0]["keys"]
    lines = read_metrics(folder / "runs/went-back/metrics.jsonl")
    assert [(line["step"], line["steps_left_out"]) for line in lines] == [(1, 0), (4, 0), (8, 0), (9, 0)]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 3, 3]
    assert finished_result(config) is not None
    # Steps 4 to 8 were taken twice but for those that were passed over; an audit finds each once.
    samples = folder / "runs/went-back/samples"
    entries = [json.loads(line) for line in (samples / "rank-00000.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [*range(8), 3, 7, 8]
    assert len({entry["attempt"] for entry in entries}) == 2
    assert {step: len(keys) for step, keys in samples_of_steps(samples).items()} == dict.fromkeys(range(STEPS), 8)


def test_verdict_on_a_step_before_the_checkpoint_is_not_lost_with_the_process(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"checkpoint_every": 1, "keep_checkpoints": 9, "guard": {"bad_steps": 2}}
    train_poisoned(run_config(folder, "two-bad", **settings), {4, 6})
    killed = run_config(folder, "two-bad-killed", **settings)
    train_until_killed(killed, 6, poisoned={4})
    capsys.readouterr()
    train_poisoned(killed, {4, 6})
    said = " ".join(capsys.readouterr().out.split())
    assert "goes on after step 6" in said
    assert "step 5 was left out" in said
    assert "going back to step 4; steps 5 to 7 will be passed over" in said
    assert loss_curve(folder, "two-bad-killed") == loss_curve(folder, "two-bad")


def test_run_whose_samples_are_all_bad_ends_with_an_explanation(folder: Path) -> None:
    recorder = Recorder()
    with pytest.raises(DigSegError, match=r"1 steps from 1 to 1 .*there is no checkpoint from before"):
        train_poisoned(run_config(folder, "spoiled"), set(range(STEPS)), recorder)
    assert recorder.calls[-1] == ("finish", "failed")
    limited = run_config(folder, "limited", log_every=1, checkpoint_every=1, guard={"max_rollbacks": 2})
    with pytest.raises(DigSegError, match=r"going back 2 times was in vain; lower training\.learning_rate .*squares/"):
        train_poisoned(limited, {3, 4, 5})


def test_loss_far_above_its_mean_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_backward, calls = Engine.forward_backward, []

    def leaping(engine: Engine, batch: Any) -> dict[str, torch.Tensor]:
        calls.append(batch)
        factor = 60.0 if len(calls) in (11, 12) else 1.0  # both micro-batches of step 6
        return {name: loss * factor for name, loss in forward_backward(engine, batch).items()}

    monkeypatch.setattr(Engine, "forward_backward", leaping)
    Trainer(run_config(folder, "leaping", guard={"settle_steps": 3}), World()).train()
    lines = read_metrics(folder / "runs/leaping/metrics.jsonl")
    assert [(line["step"], line["steps_left_out"]) for line in lines] == [(1, 0), (4, 0), (8, 1), (9, 0)]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"pathway": {"dim": 8, "head_dim": 5}}, r"model\.pathway\.dim was 16 and is 8"),
        ("run", {"seed": 1}, r"run\.seed was 0 and is 1"),
        ("training", {"global_batch_size": 4}, r"training\.global_batch_size was 8 and is 4"),
        ("data", {"crop_size": 16}, r"data\.crop_size was 32 and is 16"),
    ],
)
def test_run_cannot_be_continued_as_another_run(
    folder: Path, section: str, change: dict[str, Any], message: str
) -> None:
    values = run_config(folder, "whole").model_dump(mode="json")
    values[section] |= change
    with pytest.raises(DigSegError, match=message + r".*Choose another run\.name"):
        finished_result(Config.model_validate(values))


def test_settings_that_do_not_change_the_run_may_change(folder: Path) -> None:
    values = run_config(folder, "whole").model_dump(mode="json")
    values["data"] |= {"workers": 2, "prefetch": 7}
    values["training"] |= {"checkpoint_every": 2, "log_every": 3, "threads": None}
    assert finished_result(Config.model_validate(values)) is not None


def test_run_of_an_earlier_version_has_the_defaults_of_settings_that_have_come_since(tmp_path: Path) -> None:
    config = run_config(tmp_path, "earlier")
    saved = config.model_dump(mode="json")
    del saved["data"]["queries"]["synonym_p"]
    check_continues({"config": saved}, config)
    values = config.model_dump(mode="json")
    values["data"]["queries"]["synonym_p"] = 0.1
    with pytest.raises(DigSegError, match=r"data\.queries\.synonym_p was 0\.5 and is 0\.1"):
        check_continues({"config": saved}, Config.model_validate(values))
    saved["data"]["queries"]["shuffled"] = True  # a setting that is gone
    with pytest.raises(DigSegError, match=r"data\.queries\.shuffled was True and is None"):
        check_continues({"config": saved}, config)


def test_missing_shards_are_found_before_anything_is_started(folder: Path) -> None:
    values = run_config(folder, "nowhere").model_dump(mode="json")
    values["data"]["root"] = str(folder / "nowhere")
    with pytest.raises(DigSegError, match="nowhere"):
        check_run(Config.model_validate(values), 1)


def test_shards_that_changed_stop_a_run_that_is_to_go_on(folder: Path, tmp_path: Path) -> None:
    config = run_config(folder, "moved")
    train_until_killed(config, 4)
    write_squares(tmp_path / "shards", "train", 10, seed=7)
    values = config.model_dump(mode="json")
    values["data"]["root"] = str(tmp_path / "shards")
    with pytest.raises(DigSegError, match=r"the shards of squares/train .* changed"):
        Trainer(Config.model_validate(values), World()).train()


def test_run_without_averaging_exports_its_weights(folder: Path) -> None:
    result = Trainer(run_config(folder, "plain", steps=2, ema={"enabled": False}), World()).train()
    state = torch.load(Path(result.checkpoint_dir) / "deepspeed/mp_rank_00_model_states.pt", weights_only=False)
    exported = load_file(Path(result.model_dir) / "unet/diffusion_pytorch_model.safetensors")
    for name, weight in exported.items():
        assert torch.equal(weight, state["module"][f"segmenter.unet.{name}"])


def _skipped(folder: Path, name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "runs" / name / "skipped.json").read_bytes())
    return entries
