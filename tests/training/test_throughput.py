"""Figures of speed against hand-made times and counts, and the traces of steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import STEPS, loss_curve, run_config
from small_world import VOCABULARY, write_squares

from digseg.training import throughput
from digseg.training.flops import image_flops
from digseg.training.gpus import GPUS, known_gpu
from digseg.training.logging import read_metrics, throughput_summary
from digseg.training.run import finished_result
from digseg.training.throughput import StepClock, Throughput, measured_peak
from digseg.training.trainer import Trainer
from digseg.training.world import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and the runs ``plain`` and ``traced``, which differ in nothing else."""
    folder = tmp_path_factory.mktemp("runs")
    write_squares(folder / "shards", "train", 10)
    Trainer(run_config(folder, "plain"), World()).train()
    Trainer(run_config(folder, "traced", profile={"steps": [2, 5]}), World()).train()
    return folder


def test_percentiles_are_those_of_the_steps_without_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    clock = StepClock(CPU)
    for seconds in range(1, 10):  # 1 to 9
        now += seconds
        clock.step()
    now += 1000  # a checkpoint
    clock.start()
    now += 10
    clock.step()
    now += 1000
    clock.start()
    assert clock.percentiles() == {"step_time_p50_s": 5.5, "step_time_p95_s": pytest.approx(9.55)}
    assert clock.percentiles() == {"step_time_p50_s": 0, "step_time_p95_s": 0}


def test_share_of_the_peak_is_that_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path, "any")
    monkeypatch.setattr(throughput, "measured_peak", lambda precision, device: 1e9)
    counted = image_flops(config, 384, 3).training
    found = Throughput(config, 384, 3, CPU, world_size=2).figures(images_per_second=10.0)
    assert found["tflops"] == pytest.approx(10 * counted / 1e12)
    assert found["mfu"] == pytest.approx(10 * counted / 2e9)
    assert 0.01 < found["memory_gb"] < 100


@pytest.mark.parametrize(
    ("driver_says", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),  # a slower card of the same name
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A10", None),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(driver_says: str, kind: str | None) -> None:
    assert known_gpu(driver_says) is (GPUS[kind] if kind else None)


def test_measured_peak_is_more_than_the_same_products_reach_in_pieces() -> None:
    small = torch.ones(16, 16)
    clock = StepClock(CPU)
    for _ in range(200):
        torch.mm(small, small)
        clock.step()
    assert measured_peak("fp32", CPU) > 2 * 16**3 / clock.percentiles()["step_time_p50_s"]


def test_every_window_of_a_run_has_its_speed_and_the_end_sums_it_up(folder: Path) -> None:
    config = run_config(folder, "plain")
    counted = image_flops(config, 384, len(VOCABULARY)).training
    lines = read_metrics(folder / "runs/plain/metrics.jsonl")
    for line in lines:
        assert 0 < line["step_time_p50_s"] <= line["step_time_p95_s"]
        assert line["tflops"] == pytest.approx(line["images_per_second"] * counted / 1e12)
        assert line["mfu"] > 0
    said = throughput_summary(lines)
    assert said.endswith("GB")
    assert f"{sorted(line['step_time_p50_s'] for line in lines[1:])[1]:.3f} s a step" in said
    assert throughput_summary([]) == ""
    result = finished_result(config)
    assert result is not None
    assert result.attention_kernel == "math"


def test_trace_of_a_step_has_its_operators_and_changes_no_loss(folder: Path) -> None:
    assert loss_curve(folder, "traced") == loss_curve(folder, "plain")
    traces = sorted((folder / "runs/traced/profile").iterdir())
    assert [path.name for path in traces] == ["step-00000002-rank-0.json", "step-00000005-rank-0.json"]
    for path in traces:
        names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
        assert {"aten::convolution", "aten::convolution_backward", "aten::_fused_adamw_"} <= set(names)
        # Of this step alone: each micro-batch of two has one forward pass, which encodes the names once.
        assert names.count("aten::_fused_adamw_") == 1
    assert not (folder / "runs/plain/profile").exists()
    assert STEPS >= 5
