"""Promotion: a decision with its evidence becomes an MLflow run, and, if it was favourable, an alias moves."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from digseg.config import Gate
from digseg.errors import DigSegError
from digseg.evaluation.gate import Verdict
from digseg.registry.aliases import AliasMovedError, move_alias, roll_back
from digseg.registry.models import ModelRef
from digseg.registry.store import connect, first_line
from digseg.registry.tracking import experiment_id, metric_name

_EXPERIMENT = "digseg"  # of decisions about models that no run of this store trained


@dataclass(frozen=True)
class Decision:
    """What was compared and what came of it. Without a champion (nothing has the alias yet) there is no verdict, and
    the challenger may take the place."""

    challenger: ModelRef
    champion: ModelRef | None
    alias: str  # that the challenger is to have
    gate: Gate
    verdict: Verdict | None
    evaluations: Mapping[str, Any]  # "challenger" and "champion": see digseg.cluster.evaluate.evaluate_models

    @property
    def passed(self) -> bool:
        """Whether the challenger may take the place."""
        return self.verdict is None or self.verdict.passed

    def as_json(self) -> dict[str, Any]:
        """Plain values for the record."""
        return {
            "challenger": self.challenger.as_json(),
            "champion": self.champion.as_json() if self.champion else None,
            "alias": self.alias,
            "gate": self.gate.model_dump(mode="json"),
            "passed": self.passed,
            "verdict": self.verdict.as_json() if self.verdict else None,
            "evaluations": dict(self.evaluations),
        }


def carry_out(decision: Decision) -> str:
    """Record a decision and, if the challenger passed, move the alias, provided that it still means what the
    challenger was compared with.

    Returns:
        The id of the MLflow run that holds the evidence.

    Raises:
        AliasMovedError: the alias means something else by now; that is recorded, the alias stays.
        DigSegError: the store cannot be reached, or refuses; it says whether the alias was moved.
    """
    challenger = decision.challenger
    assert challenger.version is not None
    assert challenger.tracking_uri is not None
    store = challenger.tracking_uri
    name = f"models:/{challenger.name}@{decision.alias}"
    if not decision.passed:
        with _recording(store, f"{name} was not moved"):
            return _record(store, decision, "refused")
    expected = decision.champion.version if decision.champion else None
    try:
        move_alias(store, challenger.name, decision.alias, challenger.version, expected)
    except AliasMovedError as error:
        with _recording(store, str(error)):
            _record(store, decision, "overtaken")
        raise
    with _recording(store, f"{name} is version {challenger.version} now"):
        return _record(store, decision, "promoted")


def undo(store: str, name: str, alias: str) -> tuple[int, int]:
    """Let an alias mean again what it meant before, and say so in MLflow.

    Returns:
        The version that it meant, and the one that it means now.

    Raises:
        DigSegError: see `digseg.registry.aliases.roll_back`.
    """
    before, now = roll_back(store, name, alias)
    tags = {"outcome": "rolled back", "alias": alias, "from_version": str(before), "to_version": str(now)}
    with _recording(store, f"models:/{name}@{alias} is version {now} again"):
        _run(connect(store), store, None, f"rollback: {name} {before} -> {now}", {"model": name, **tags})
    return before, now


@contextmanager
def _recording(store: str, done: str) -> Iterator[None]:
    """Say what was done before, where MLflow fails to keep the record of it."""
    try:
        yield
    except (MlflowException, DigSegError) as error:
        raise DigSegError(f"{done}; but MLflow at {store} lacks part of the record: {first_line(error)}") from error


def _record(store: str, decision: Decision, outcome: str) -> str:
    """The MLflow run of a decision, named by tags of the challenger's version."""
    client, challenger, champion = connect(store), decision.challenger, decision.champion
    against = f"version {champion.version}" if champion else "none"
    tags = {
        "outcome": outcome,
        "model": challenger.name,
        "alias": decision.alias,
        "challenger": str(challenger.version),
        "champion": str(champion.version) if champion else "none",
    }
    name = f"promotion: {challenger.name} {challenger.version} against {against}"
    run_id = _run(client, store, challenger.run_id, name, tags, decision)
    for key, value in ((f"promotion.{decision.alias}", outcome), (f"promotion.{decision.alias}.run_id", run_id)):
        client.set_model_version_tag(challenger.name, str(challenger.version), key, value)
    return run_id


def _run(
    client: MlflowClient,
    store: str,
    beside: str | None,
    name: str,
    tags: Mapping[str, str],
    decision: Decision | None = None,
) -> str:
    """A finished run in the experiment of the run `beside`, with a decision as its parameters, metrics and artifact."""
    run = client.create_run(
        _experiment_of(client, store, beside),
        run_name=name,
        tags={"digseg.kind": "promotion", "digseg.by": getpass.getuser(), **tags},
    )
    run_id = str(run.info.run_id)
    if decision is not None:
        _log(client, run_id, decision)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _log(client: MlflowClient, run_id: str, decision: Decision) -> None:
    gate = [Param(f"gate.{key}", str(value)) for key, value in decision.gate.model_dump(mode="json").items()]
    rows = decision.verdict.requirements if decision.verdict else ()
    started_ms = client.get_run(run_id).info.start_time
    metrics = [
        Metric(metric_name(f"{kind}.{row.scope}"), value, started_ms, 0)
        for row in rows
        for kind, value in (("difference", row.difference), ("bound", row.bound))
    ]
    client.log_batch(run_id, metrics=metrics, params=gate, tags=[RunTag("passed", str(decision.passed).lower())])
    client.log_dict(run_id, decision.as_json(), "decision.json")


def _experiment_of(client: MlflowClient, store: str, run_id: str | None) -> str:
    if run_id is not None:
        try:
            return str(client.get_run(run_id).info.experiment_id)
        except MlflowException:
            pass  # the run was deleted; the decision is kept all the same
    return experiment_id(client, store, _EXPERIMENT)
