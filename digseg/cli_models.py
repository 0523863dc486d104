"""The commands of `digseg` that look at the model registry and move its aliases."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from digseg.console import say

if TYPE_CHECKING:  # takes seconds to import
    from rich.table import Table

    from digseg.config import Gate
    from digseg.evaluation.stored import StoredTallies
    from digseg.registry.promotion import Decision

TRACKING_URI_HELP = "MLflow store (default: $MLFLOW_TRACKING_URI, else the database in outputs/runs)"
_URI_HELP = "models:/NAME@ALIAS or models:/NAME/VERSION"
_KEPT = "outputs/evaluations"
_SHOWN_RUN_ID = 12  # characters in a list: enough to tell runs apart, and the table fits a terminal


def add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`digseg models`."""
    parser = commands.add_parser("models", help="look at the model registry, and take a promotion back")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="registered versions, their aliases and figures")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="one version: figures, data, settings, source")
    show.add_argument("uri", metavar="MODEL", help=_URI_HELP)
    show.set_defaults(run=_show)
    diff = actions.add_parser("diff", help="what differs between two versions")
    diff.add_argument("first", metavar="MODEL", help=_URI_HELP)
    diff.add_argument("second", metavar="MODEL", help=_URI_HELP)
    diff.set_defaults(run=_diff)
    lineage = actions.add_parser(
        "lineage", help="from a prediction or version back to run, checkpoint, data and source"
    )
    lineage.add_argument("source", metavar="LEGEND|MODEL", help=f"a STEM.legend.json of digseg predict, or {_URI_HELP}")
    lineage.set_defaults(run=_lineage)
    rollback = actions.add_parser("rollback", help="let an alias mean the version that it meant before")
    rollback.add_argument("--model", default="digseg", help="name of the registered model (default: digseg)")
    rollback.add_argument("--alias", default="champion", help="default: champion")
    rollback.set_defaults(run=_roll_back)
    for action in (listing, show, diff, lineage, rollback):
        action.add_argument("--tracking-uri", help=TRACKING_URI_HELP)


def add_promote(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`digseg promote`."""
    parser = commands.add_parser(
        "promote",
        help="let a model take another's place if it passes a gate",
        description="Evaluates both models where that was not done before, compares them on the same images, records "
        "the decision in MLflow, and moves the alias if the gate is passed. Exit code 1: it is not.",
    )
    parser.add_argument("--model", default="digseg", help="name of the registered model (default: digseg)")
    parser.add_argument(
        "--from", dest="source", default="challenger", metavar="ALIAS|VERSION", help="default: challenger"
    )
    parser.add_argument("--to", dest="target", default="champion", metavar="ALIAS", help="default: champion")
    parser.add_argument("--gate", required=True, type=Path, help="YAML, such as configs/gates/default.yaml")
    parser.add_argument("--data", help="the shards to compare on (default: data of the gate)")
    parser.add_argument("--kept", default=_KEPT, metavar="DIR", help=f"where counts are kept (default: {_KEPT})")
    parser.add_argument("--dry-run", action="store_true", help="judge only: record and move nothing")
    parser.add_argument("--num-gpus", type=float, default=0, help="share of a GPU for each task (default: CPUs)")
    parser.add_argument("--tracking-uri", help=TRACKING_URI_HELP)
    parser.set_defaults(run=_promote)


def _list(options: argparse.Namespace) -> None:
    from digseg.registry.models import list_versions
    from digseg.registry.store import default_tracking_uri

    store = options.tracking_uri or default_tracking_uri()
    versions = list_versions(store)
    if not versions:
        say(f"no model is registered in {store}")
        return
    rows = [
        (
            version.name,
            str(version.version),
            ", ".join(version.aliases),
            version.mean_iou or "-",
            _time(version.created_ms).partition(" ")[0],
            (version.run_id or "-")[:_SHOWN_RUN_ID],
        )
        for version in versions
    ]
    _print(_table(("model", "version", "aliases", "mean IoU", "created", "run"), rows))


def _show(options: argparse.Namespace) -> None:
    from digseg.registry.describe import describe

    version = describe(options.uri, options.tracking_uri)
    reference, card = version.reference, version.card
    shown = {"model_sha256", "run_id"} | version.figures.keys()
    rows = [
        ("aliases", ", ".join(version.aliases) or "-"),
        ("registered", _time(version.created_ms)),
        ("run", reference.run_id or "-"),
        ("sha256", reference.sha256 or "-"),
        ("classes", ", ".join(card.names)),
        ("working size", f"{card.short_side} px (shorter side)"),
        *version.figures.items(),
        *sorted((key, value) for key, value in version.tags.items() if key not in shown),
    ]
    _print(_table((reference.uri, ""), rows))


def _diff(options: argparse.Namespace) -> None:
    from digseg.registry.describe import describe, differences

    first, second = (describe(uri, options.tracking_uri) for uri in (options.first, options.second))
    rows = differences(first, second)
    if not rows:
        say(f"{first.reference.uri} and {second.reference.uri}: no difference")
        return
    _print(_table(("", first.reference.uri, second.reference.uri), rows))


def _lineage(options: argparse.Namespace) -> None:
    from digseg.registry.describe import trace

    facts = trace(options.source, options.tracking_uri)
    _print(_table(("", "", "check"), [(fact.what, fact.value, fact.check) for fact in facts]))


def _roll_back(options: argparse.Namespace) -> None:
    from digseg.registry.models import aliased_version
    from digseg.registry.promotion import undo
    from digseg.registry.store import default_tracking_uri

    store = options.tracking_uri or default_tracking_uri()
    aliased_version(options.model, options.alias, store)  # says what is wrong with a name
    before, now = undo(store, options.model, options.alias)
    say(f"models:/{options.model}@{options.alias} is version {now} again (it was {before})")


def _promote(options: argparse.Namespace) -> None:
    from digseg.config import Gate, base_directory, load_section

    gate = load_section(options.gate, Gate)
    if options.data:
        gate = gate.model_copy(update={"data": options.data})

    from digseg.evaluation.stored import StoredTallies

    passed = promote(
        options.model,
        options.source,
        options.target,
        gate,
        StoredTallies(base_directory() / options.kept),
        tracking_uri=options.tracking_uri,
        num_gpus=options.num_gpus,
        dry_run=options.dry_run,
    )
    if not passed:
        raise SystemExit(1)


def promote(
    model: str,
    source: str,
    target: str,
    gate: Gate,
    kept: StoredTallies,
    *,
    tracking_uri: str | None = None,
    num_gpus: float = 0,
    dry_run: bool = False,
) -> bool:
    """Compare, show, record and, if the gate is passed, move the alias `target` of a registered model.

    Args:
        source: an alias or a version.

    Returns:
        Whether `target` may mean what `source` means.

    Raises:
        DigSegError: as `digseg.cluster.promote.assess` and `digseg.registry.promotion.carry_out` say.
    """
    from digseg.cluster.promote import assess
    from digseg.registry.promotion import carry_out

    decision = assess(model, source, target, gate, kept, tracking_uri=tracking_uri, num_gpus=num_gpus)
    place = f"models:/{model}@{target}"
    if decision is None:
        say(f"{place} is that version already: nothing to compare")
        return True
    _print_decision(decision)
    if dry_run:
        say(f"dry run: nothing was recorded, and {place} stays as it is")
    else:
        run_id = carry_out(decision)
        say(f"recorded in MLflow run {run_id}")
        say(f"{place} {f'is version {decision.challenger.version} now' if decision.passed else 'stays as it is'}")
    return decision.passed


def _print_decision(decision: Decision) -> None:
    challenger, champion, gate = decision.challenger, decision.champion, decision.gate
    if decision.verdict is None or champion is None:
        say(f"nothing is {decision.alias!r} yet: {challenger.uri} has no one to beat")
        return
    rows = [
        (
            row.scope.replace("_", " "),
            "\n".join(row.corpora) if row.scope != "mean" else "",
            f"{row.difference:+.3f}",
            f"{row.bound:+.3f}",
            f"{row.limit:+.3f}",
            "passed" if row.passed else "FAILED",
        )
        for row in decision.verdict.requirements
    ]
    title = f"mIoU of {challenger.uri} minus that of {champion.uri}, gate {gate.name!r}"
    columns = ("domain", "corpora", "difference", f"at least\n({gate.confidence:.0%})", "needed", "")
    _print(_table(columns, rows, title))
    say(f"{challenger.uri} {'passes' if decision.passed else 'does not pass'} the gate")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).astimezone().strftime("%Y-%m-%d %H:%M")
