"""Whether a model may take another's place: paired differences, domain by domain, against the bounds of a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from digseg.config import Gate
from digseg.evaluation.figures import paired_differences
from digseg.evaluation.metrics import Figures
from digseg.evaluation.tally import Tally

MEAN = "mean"  # the scope that is no domain


@dataclass(frozen=True)
class Requirement:
    """One line of a verdict: the `difference` in mIoU, and what it is at least with the gate's confidence (`bound`),
    which must not be below `limit`; for the mean it has to be above."""

    scope: str  # a domain, or MEAN
    corpora: tuple[str, ...]
    difference: float
    bound: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the requirement is met."""
        return self.bound > self.limit or (self.bound == self.limit and self.scope != MEAN)


@dataclass(frozen=True)
class Verdict:
    """What the gate says: all requirements have to be met."""

    requirements: tuple[Requirement, ...]

    @property
    def passed(self) -> bool:
        """Whether the model may take the place."""
        return all(requirement.passed for requirement in self.requirements)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        rows = [{**asdict(row), "corpora": list(row.corpora), "passed": row.passed} for row in self.requirements]
        return {"passed": self.passed, "requirements": rows}


def judge(
    gate: Gate, champion: Mapping[str, Tally], challenger: Mapping[str, Tally], domains: Mapping[str, str]
) -> Verdict:
    """The verdict on a challenger.

    Args:
        champion, challenger: counts of both models on the same corpora.
        domains: the domain of each corpus; a domain's figure is the mean of its corpora's.

    Raises:
        ValueError: the models were not evaluated on the same images.
    """
    pairs = paired_differences(champion, challenger)
    rows = []
    for domain in sorted(set(domains.values())):
        corpora = tuple(name for name in pairs if domains[name] == domain)
        rows.append(_requirement(gate, domain, {name: pairs[name] for name in corpora}, -gate.max_drop))
    return Verdict((*rows, _requirement(gate, MEAN, pairs, gate.min_gain)))


def _requirement(gate: Gate, scope: str, pairs: Mapping[str, tuple[float, Figures]], limit: float) -> Requirement:
    difference = sum(difference for difference, _ in pairs.values()) / len(pairs)
    draws = np.stack([draws for _, draws in pairs.values()]).mean(axis=0)
    bound = float(np.nanquantile(draws, 1 - gate.confidence))
    return Requirement(scope, tuple(pairs), difference, bound, limit)
