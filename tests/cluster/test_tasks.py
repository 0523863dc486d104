import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from digseg.cluster.runtime import ray_session
from digseg.cluster.tasks import fan_out
from digseg.config import ClusterConfig
from digseg.errors import DigSegError

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def ray_running() -> Iterator[None]:
    with ray_session():
        yield


def test_results_come_in_the_order_of_the_items(ray_running: None) -> None:
    def slower_first(number: int) -> int:
        import time

        time.sleep(0.2 if number == 0 else 0)
        return number * number

    assert list(fan_out(slower_first, range(7), "squares")) == [n * n for n in range(7)]


def test_nothing_to_do_gives_nothing(ray_running: None) -> None:
    assert list(fan_out(str, [], "nothing")) == []


def test_tasks_run_in_other_processes(ray_running: None) -> None:
    assert os.getpid() not in set(fan_out(lambda _: os.getpid(), range(4), "processes"))


def test_users_mistake_in_a_task_is_raised_as_itself(ray_running: None) -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise DigSegError("item 3 is wrong: mend it")
        return number

    results = fan_out(fail, range(50), "failing")
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DigSegError, match=r"^item 3 is wrong: mend it$"):
        next(results)


def test_defect_in_a_task_is_raised_as_itself_with_the_remote_traceback(ray_running: None) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(fan_out(lambda number: 1 // number, [1, 0], "dividing"))
    assert "ray::" in str(caught.value.__cause__)


def test_only_a_bounded_number_of_tasks_is_in_flight(ray_running: None, tmp_path: Path) -> None:
    def touch(number: int) -> int:
        (tmp_path / str(number)).touch()
        return number

    results = fan_out(touch, range(10_000), "touching")
    for _ in range(5):
        next(results)
    limit = 2 * int(ray.cluster_resources()["CPU"])
    assert len(list(tmp_path.iterdir())) <= 5 + limit
    results.close()  # type: ignore[attr-defined]


def test_progress_counts_the_items(ray_running: None, capsys: pytest.CaptureFixture[str]) -> None:
    list(fan_out(str, range(5), "counting", unit="items"))
    assert "counting: 5/5 items" in capsys.readouterr().out


def test_progress_counts_what_the_items_hold(ray_running: None, capsys: pytest.CaptureFixture[str]) -> None:
    list(fan_out(sum, [[1], [2, 3], [4, 5, 6]], "adding", unit="numbers", size=len))
    assert "adding: 6/6 numbers" in capsys.readouterr().out


def test_tasks_see_the_environment_they_are_given_and_no_others_do(ray_running: None) -> None:
    def seen(_: int) -> str | None:
        import os

        return os.environ.get("SHARDS_ENDPOINT")

    assert list(fan_out(seen, range(3), "looking", environment={"SHARDS_ENDPOINT": "here"})) == ["here"] * 3
    assert list(fan_out(seen, range(3), "looking")) == [None] * 3


def test_session_inside_a_session_is_the_same_and_leaves_it_running(ray_running: None) -> None:
    node = ray.get_runtime_context().get_node_id()
    with ray_session(ClusterConfig(workers=64)):
        assert ray.get_runtime_context().get_node_id() == node
    assert ray.is_initialized()


PROGRAM = """
import os, signal, sys, time
from digseg.cluster.runtime import ray_session
from digseg.cluster.tasks import fan_out
from digseg.config import ClusterConfig
import ray

path = os.environ["PATH"]
with ray_session(ClusterConfig(workers=3)):
    assert ray.cluster_resources()["CPU"] >= 3
    print(list(fan_out(abs, [-1, -2], "absolute")))
    print("pids", *[w.pid for w in __import__("psutil").Process().children(recursive=True)])
    if "terminate" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
assert not ray.is_initialized()
assert os.environ["PATH"] == path
"""


def run_program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def left_behind(output: str) -> list[int]:
    """Processes of a program's session that still run a while after it ended."""
    import time

    import psutil

    pids = [int(pid) for line in output.splitlines() if line.startswith("pids") for pid in line.split()[1:]]
    assert pids
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(psutil.pid_exists, pids)):
        time.sleep(0.2)
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_local_session_is_quiet_and_leaves_no_process_behind() -> None:
    done = run_program()
    assert done.returncode == 0, done.stderr
    assert "[1, 2]" in done.stdout
    assert done.stderr == ""
    assert left_behind(done.stdout) == []


def test_terminated_program_leaves_no_ray_process_behind() -> None:
    done = run_program("terminate")
    assert done.returncode != 0
    assert left_behind(done.stdout) == []


def test_unreachable_cluster_is_a_clear_error() -> None:
    done = run_program(RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 1
    assert "DigSegError: cannot join the Ray cluster at '127.0.0.1:1'" in done.stderr
