"""A challenger against the champion: both evaluated on the same shards, where that was not done before."""

from __future__ import annotations

from digseg.cluster.evaluate import evaluate_models
from digseg.config import Gate
from digseg.config.schema import ClusterConfig
from digseg.evaluation.gate import judge
from digseg.evaluation.protocol import choose_splits
from digseg.evaluation.stored import StoredTallies
from digseg.registry.models import aliased_version, resolve
from digseg.registry.promotion import Decision


def assess(
    name: str,
    challenger: str,
    alias: str,
    gate: Gate,
    kept: StoredTallies,
    *,
    tracking_uri: str | None = None,
    cluster: ClusterConfig | None = None,
    num_gpus: float = 0,
) -> Decision | None:
    """Evaluate and judge; changes nothing. None: the challenger is what the alias means already.

    Args:
        name: of the registered model.
        challenger: an alias or a version of it.
        alias: what the challenger is to become.
        kept: counts of earlier evaluations, which are not made again.

    Raises:
        DigSegError: no such model, alias or version, or as `evaluate_models` says.
    """
    uri = f"models:/{name}/{challenger}" if challenger.isdecimal() else f"models:/{name}@{challenger}"
    directory, reference = resolve(uri, tracking_uri)
    directories, champion = [directory], None
    before = aliased_version(name, alias, tracking_uri)
    if before is not None:
        champion_directory, champion = resolve(f"models:/{name}/{before}", tracking_uri)
        directories.append(champion_directory)
        if champion.version == reference.version:
            return None
    splits = choose_splits(gate.data, gate.split, gate.corpora)
    evaluations = evaluate_models(directories, gate.data, splits, kept=kept, cluster=cluster, num_gpus=num_gpus)
    results = {"challenger": evaluations[0].result}
    verdict = None
    if champion is not None:
        results["champion"] = evaluations[1].result
        domains = {corpus: figures["domain"] for corpus, figures in evaluations[0].result["corpora"].items()}
        verdict = judge(gate, evaluations[1].tallies, evaluations[0].tallies, domains)
    return Decision(reference, champion, alias, gate, verdict, results)
