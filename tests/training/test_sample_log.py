from __future__ import annotations

from pathlib import Path

from digseg.training.sample_log import SampleLog, samples_of_steps
from digseg.training.world import World


def test_samples_of_a_step_are_those_of_all_ranks_in_the_last_attempt_at_it(tmp_path: Path) -> None:
    alone = SampleLog(tmp_path, World())
    for step, keys in enumerate([["b", "a"], ["c"], ["d"]]):
        alone.add(step, keys)
    again = SampleLog(tmp_path, World())  # goes on from a checkpoint after step 1
    again.add(1, ["c", "c"])
    assert samples_of_steps(tmp_path) == {0: ["a", "b"], 1: ["c", "c"], 2: ["d"]}


def test_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, World())
    log.add(0, ["a"])
    with (tmp_path / "rank-00000.jsonl").open("a") as file:
        file.write('{"attempt": 1, "st')
    assert samples_of_steps(tmp_path) == {0: ["a"]}
