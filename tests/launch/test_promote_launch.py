"""`digseg promote` on a real store, with models evaluated on a real cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from small_world import World, export_random_model

from digseg.cli import main
from digseg.cluster.evaluate import evaluate_models
from digseg.config import Config
from digseg.errors import DigSegError
from digseg.evaluation.stored import StoredTallies
from digseg.registry.models import ModelRef, set_alias
from digseg.registry.package import register_model
from launch import demo

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]

# A promoter that has compared, says so, and acts when it is told to.
PROMOTER = """
import sys, time
from pathlib import Path
from digseg.cluster.promote import assess
from digseg.config import Gate, load_section
from digseg.errors import run_main
from digseg.evaluation.stored import StoredTallies
from digseg.registry.promotion import carry_out

version, gate, kept, store, ready, go = sys.argv[1:]
gate, kept = load_section(gate, Gate), StoredTallies(Path(kept))
decision = assess("digseg", version, "champion", gate, kept, tracking_uri=store)
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.01)
run_main(lambda: carry_out(decision))
"""


@dataclass(frozen=True)
class Registry:
    """A store with digseg/1 and /2 (the same files; 2 is champion) and digseg/3, which has other weights."""

    store: str
    folder: Path
    better: int  # 2 or 3
    worse: int

    def promote(self, *extra: str, gate: str = "gate.yaml") -> None:
        paths = ["--gate", str(self.folder / gate), "--kept", str(self.folder / "kept")]
        main(["promote", "--tracking-uri", self.store, *paths, *extra])

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.store, self.store)

    @property
    def champion(self) -> int:
        return int(self.client.get_model_version_by_alias("digseg", "champion").version)

    def decisions(self) -> list[Run]:
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return list(self.client.search_runs(experiments, "tags.`digseg.kind` = 'promotion'"))


@pytest.fixture(scope="module")
def template(cluster: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(world.tracking_uri.removeprefix("sqlite:///"), folder / "mlflow.db")
    store = f"sqlite:///{folder}/mlflow.db"
    values = world.config.model_dump(mode="json")
    config = Config.model_validate({**values, "run": {**values["run"], "seed": 5}, "tracking": {"uri": store}})
    other = export_random_model(folder / "other" / "model", config)
    assert register_model(other, config, run_id=world.run_id).version == 3
    (folder / "gate.yaml").write_text(f"data: {world.shards}\nmin_gain: 0.0\nmax_drop: 0.02\n")
    (folder / "open.yaml").write_text(f"data: {world.shards}\nmin_gain: -1\nmax_drop: 1\nname: open\n")
    kept = StoredTallies(folder / "kept")
    first, second = evaluate_models([world.model_dir, other], world.shards, [("squares", "val")], kept=kept)
    better, worse = (2, 3) if first.result["mean_iou"] > second.result["mean_iou"] else (3, 2)
    return Registry(store, folder, better, worse)


@pytest.fixture
def registry(template: Registry, tmp_path: Path) -> Registry:
    """A copy of its own for each test."""
    shutil.copytree(template.folder, tmp_path, dirs_exist_ok=True)
    return Registry(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, template.better, template.worse)


def test_a_better_model_takes_the_place_and_the_evidence_stays(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    set_alias("digseg", registry.worse, "champion", registry.store)
    registry.promote("--from", str(registry.better), "--dry-run")
    assert "dry run" in capsys.readouterr().out
    assert registry.champion == registry.worse
    assert registry.decisions() == []

    registry.promote("--from", str(registry.better))
    shown = capsys.readouterr().out
    assert registry.champion == registry.better
    assert f"@champion is version {registry.better} now" in shown
    (decision,) = registry.decisions()
    assert decision.data.tags["outcome"] == "promoted"
    folder = registry.client.download_artifacts(decision.info.run_id, "decision.json", str(registry.folder))
    evidence = json.loads(Path(folder).read_text())
    rows = {row["scope"]: row for row in evidence["verdict"]["requirements"]}
    figures = [evidence["evaluations"][role]["mean_iou"] for role in ("challenger", "champion")]
    assert rows["mean"]["difference"] == pytest.approx(figures[0] - figures[1])
    assert f"{rows['mean']['difference']:+.3f}" in shown
    assert decision.data.metrics["bound.mean"] == rows["mean"]["bound"] > 0
    version = registry.client.get_model_version("digseg", str(registry.better))
    assert version.tags["promotion.champion.run_id"] == decision.info.run_id

    main(["models", "rollback", "--tracking-uri", registry.store])
    assert registry.champion == registry.worse
    assert {run.data.tags["outcome"] for run in registry.decisions()} == {"promoted", "rolled back"}


def test_a_model_that_does_not_pass_stays_where_it_is(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    set_alias("digseg", registry.better, "champion", registry.store)
    with pytest.raises(SystemExit) as stopped:
        registry.promote("--from", str(registry.worse))
    assert stopped.value.code == 1
    assert "FAILED" in capsys.readouterr().out
    assert registry.champion == registry.better
    (decision,) = registry.decisions()
    assert decision.data.tags["outcome"] == "refused"


def test_the_first_champion_has_no_one_to_beat_and_the_same_one_nothing_to_do(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.promote("--to", "best")
    assert "nothing is 'best' yet" in capsys.readouterr().out
    assert registry.client.get_registered_model("digseg").aliases["best"] == 1
    registry.promote("--to", "best")
    assert "is that version already" in capsys.readouterr().out
    assert len(registry.decisions()) == 1


def test_the_demo_promotes_by_the_gate_and_says_what_its_model_is_now(
    registry: Registry, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = {"corpora": [{"name": "squares", "split": "val"}]}
    values = {**world.config.model_dump(mode="json"), "evaluation": evaluation, "tracking": {"uri": registry.store}}
    config, kept = Config.model_validate(values), StoredTallies(registry.folder / "kept")
    set_alias("digseg", registry.better, "champion", registry.store)
    worse = ModelRef("digseg", registry.worse, None, world.run_id, registry.store)
    assert demo._promoted(config, worse, kept) == "challenger"
    assert "does not pass the gate" in capsys.readouterr().out
    assert registry.champion == registry.better
    registry.client.delete_registered_model_alias("digseg", "champion")
    assert demo._promoted(config, worse, kept) == "champion"
    assert "nothing is 'champion' yet" in capsys.readouterr().out
    assert registry.champion == registry.worse
    assert [run.data.tags["outcome"] for run in registry.decisions()] == ["promoted", "refused"]


def test_of_two_promoters_one_wins_and_the_other_is_told(registry: Registry) -> None:
    go = registry.folder / "go"
    promoters = {}
    for version in (1, 3):
        ready = registry.folder / f"ready-{version}"
        paths = [registry.folder / "open.yaml", registry.folder / "kept", registry.store, ready, go]
        command = [sys.executable, "-c", PROMOTER, str(version), *map(str, paths)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        promoters[version] = process, ready
    deadline = time.monotonic() + 240
    while not all(ready.exists() for _, ready in promoters.values()) and time.monotonic() < deadline:
        assert all(process.poll() is None for process, _ in promoters.values()), "a promoter ended before it acted"
        time.sleep(0.05)
    go.touch()
    said = {version: process.communicate(timeout=120)[1] for version, (process, _) in promoters.items()}
    codes = {version: process.returncode for version, (process, _) in promoters.items()}
    assert sorted(codes.values()) == [0, 2], said
    (winner,) = (version for version, code in codes.items() if code == 0)
    (loser,) = (version for version, code in codes.items() if code == 2)
    assert registry.champion == winner
    assert f"@champion is version {winner} now, but was version 2 when it was compared" in said[loser]
    outcomes = {run.data.tags["challenger"]: run.data.tags["outcome"] for run in registry.decisions()}
    assert outcomes == {str(winner): "promoted", str(loser): "overtaken"}


def test_wrong_gates_and_models_are_refused(registry: Registry) -> None:
    (registry.folder / "wrong.yaml").write_text("max_drp: 0.1\nconfidence: 2\n")
    for arguments, gate, message in (
        ((), "wrong.yaml", r"(?s)wrong\.yaml.*confidence.*max_drp: unknown key; did you mean 'max_drop'"),
        ((), "none.yaml", "none.yaml: cannot read"),
        (("--from", "chalenger"), "gate.yaml", "has no alias 'chalenger'"),
        (("--from", "9"), "gate.yaml", "no version 9"),
        (("--model", "other"), "gate.yaml", "no registered model 'other'"),
        (("--data", str(registry.folder)), "gate.yaml", "no shards below"),
    ):
        with pytest.raises(DigSegError, match=message):
            registry.promote(*arguments, gate=gate)
    assert registry.champion == 2
