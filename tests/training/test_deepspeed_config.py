"""What DeepSpeed is told, and what a user may tell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_world import small_config

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.training.deepspeed_config import deepspeed_config, micro_batches


def test_micro_batch_and_accumulation_follow_from_the_world_size(tmp_path: Path) -> None:
    config = _config(tmp_path, global_batch_size=24, micro_batch_size=2)
    assert micro_batches(config, 1) == (2, 12)
    assert micro_batches(config, 3) == (2, 4)
    assert micro_batches(config, 12) == (2, 1)
    assert micro_batches(_config(tmp_path, global_batch_size=24), 4) == (6, 1)


def test_a_world_that_cannot_share_the_batch_is_told_the_sizes_that_can(tmp_path: Path) -> None:
    config = _config(tmp_path, global_batch_size=6)
    with pytest.raises(DigSegError, match=r"6 samples .* 4 processes; .* that can: 1, 2, 3, 6"):
        micro_batches(config, 4)


def test_micro_batch_is_the_largest_that_divides_and_is_allowed(tmp_path: Path) -> None:
    config = _config(tmp_path, global_batch_size=12, micro_batch_size=5)
    assert [micro_batches(config, world_size) for world_size in (1, 2, 3, 4)] == [(4, 3), (3, 2), (4, 1), (3, 1)]


def test_a_range_of_workers_holds_a_number_that_can_share_the_batch(tmp_path: Path) -> None:
    def config(workers: list[int]) -> Config:
        return small_config(tmp_path, cluster={"workers": workers}, training={"global_batch_size": 12})

    assert config([2, 7]).world_sizes == (2, 3, 4, 6)
    # 12 samples over 2, 3, 4 or 6 processes are 6, 4, 3 or 2 each: nothing but 1 divides them all.
    assert micro_batches(config([2, 7]), 3) == (1, 4)
    assert [micro_batches(config([1, 3]), world_size) for world_size in (1, 2, 3)] == [(2, 6), (2, 3), (2, 2)]
    with pytest.raises(ValueError, match=r"\(12\) does not divide over \(7, 11\) workers.*\[1, 2, 3, 4, 6, 12\]"):
        config([7, 11])
    with pytest.raises(ValueError, match=r"workers: got \[3, 2\]"):
        config([3, 2])


def test_expert_settings_are_merged_into_the_derived_ones(tmp_path: Path) -> None:
    config = _config(tmp_path, deepspeed={"zero_optimization": {"overlap_comm": True}, "dump_state": True})
    derived = deepspeed_config(config, 1, num_parameters=1000)
    assert derived["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 1000,
        "contiguous_gradients": False,
        "overlap_comm": True,
    }
    assert derived["dump_state"] is True
    assert derived["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"gradient_clipping": 2}, r"training\.deepspeed\.gradient_clipping: .* set training\.gradient_clipping"),
        ({"zero_optimization": {"stage": 3}}, r"deepspeed\.zero_optimization\.stage: .* training\.zero_stage"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer\.device: .* training\.offload_optimizer",
        ),
        ({"optimizer": {"type": "Adam"}}, r"deepspeed\.optimizer: .* training\.learning_rate"),
        ({"bf16": {"enabled": True}}, r"deepspeed\.bf16: .* training\.precision"),
    ],
)
def test_expert_settings_cannot_replace_what_is_derived(tmp_path: Path, expert: dict[str, Any], message: str) -> None:
    with pytest.raises(DigSegError, match=message):
        deepspeed_config(_config(tmp_path, deepspeed=expert), 1, num_parameters=1000)


def test_offloading_without_a_zero_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offload_optimizer needs zero_stage 1, 2 or 3"):
        _config(tmp_path, zero_stage=0, offload_optimizer=True)


def _config(folder: Path, **training: Any) -> Config:
    return small_config(folder, cluster={"workers": 1}, training=training)
