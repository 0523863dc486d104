"""Vocabularies of any size: how the classes are asked in passes, and how the passes' scores become one answer.

A pass holds as many classes as there are colours. Several passes share an *anchor*, the background: of pass p it takes
every pixel that shows none of the classes S_p. Taken as independent witnesses of the same pixel, of which at most one
can have seen its class, the passes say

    P(k) ~ P_p(k) * prod_{q != p} P_q(anchor)   for k in S_p,        P(anchor) ~ prod_q P_q(anchor)

and, divided by the product over all q, every class has its odds against the anchor: the merged logit of a class is its
logit minus that of the anchor in its pass, and the anchor's is 0. If the scores of a class do not depend on what else
is asked, this is what a single pass with all classes would have said, as odds do not depend on the other choices
(Luce's choice axiom, 1959, which holds for a softmax over fixed scores). A model's scores do depend on it a little.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ANCHOR = -1  # in a pass: the background where it is none of the classes

Pass = tuple[int, ...]  # numbers of classes; the first is the anchor where there are several passes


def plan_passes(
    num_classes: int, background: int | None, max_classes: int, classes_per_pass: int | None = None
) -> tuple[Pass, ...]:
    """The passes that ask for each class once, as few and as evenly filled as can be.

    Args:
        background: the class that is the background; None: the anchor is none of the classes.
        max_classes: what one pass holds, the anchor included; at least 2.
        classes_per_pass: at most this many beside the background; None: as many as fit.
    """
    foreground = [number for number in range(num_classes) if number != background]
    if num_classes <= max_classes and (classes_per_pass is None or len(foreground) <= classes_per_pass):
        return (tuple(range(num_classes)),)
    held = min(max_classes - 1, classes_per_pass or max_classes)
    parts = np.array_split(foreground, -(-len(foreground) // held))
    anchor = ANCHOR if background is None else background
    return tuple((anchor, *part.tolist()) for part in parts)


def merge_passes(logits: Sequence[Tensor], passes: Sequence[Pass], num_classes: int) -> Tensor:
    """Logits ``[num_classes, H, W]`` over all classes from those of each pass ``[len(pass), H, W]``."""
    if len(passes) == 1:
        return logits[0]
    merged = torch.zeros(num_classes, *logits[0].shape[1:], dtype=logits[0].dtype, device=logits[0].device)
    for scores, (_anchor, *asked) in zip(logits, passes, strict=True):
        merged[asked] = scores[1:] - scores[0]
    return merged
