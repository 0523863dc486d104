"""A rank's share of the trainable parameters, whichever way the engine lays them out.

With ZeRO-3 a rank holds a flat piece of every parameter; below that it holds all parameters whole, and
looks after some of them. Both are flat ranges of named parameters, so that what is computed per share
(the average of the weights) costs each rank 1/N of the work and memory and needs no communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from digseg.errors import DigSegError
from digseg.training.world import World


@dataclass(frozen=True, slots=True)
class Share:
    """The range ``[offset, offset + len(values))`` of a parameter of ``shape``, flattened."""

    shape: tuple[int, ...]
    offset: int
    values: Tensor  # [n]


def whole_parameters(parameters: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Share]:
    """The parameters that ``rank`` looks after where every rank holds all of them.

    Largest first, each goes to the rank with the fewest entries so far: the same on every rank.
    """
    loads = [0] * world_size
    shares = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: (-item[1].numel(), item[0])):
        owner = loads.index(min(loads))
        loads[owner] += parameter.numel()
        if owner == rank:
            shares[name] = Share(tuple(parameter.shape), 0, parameter.detach().view(-1))
    return shares


def gather_shares(shares: Mapping[str, Share], world: World) -> dict[str, Tensor]:
    """Whole float32 parameters, on every rank, from the shares of all ranks (collective): views of one tensor."""
    shapes = {
        name: shape
        for part in world.gather({name: share.shape for name, share in shares.items()})
        for name, shape in part.items()
    }
    names = sorted(shapes)
    sizes = [math.prod(shapes[name]) for name in names]
    whole = torch.zeros(sum(sizes), device=world.device)
    pieces = dict(zip(names, torch.split(whole, sizes), strict=True))
    for name, share in shares.items():
        pieces[name][share.offset : share.offset + share.values.numel()] = share.values
    world.sum(whole)  # of which all but one are zero everywhere
    return {name: piece.view(shapes[name]) for name, piece in pieces.items()}


def merge_shares(parts: Iterable[Mapping[str, Share]]) -> dict[str, Tensor]:
    """Whole parameters from the shares of all ranks.

    Raises:
        DigSegError: the shares leave a gap in a parameter.
    """
    merged: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for part in parts:
        for name, share in part.items():
            if name not in merged:
                merged[name] = torch.empty(share.shape, dtype=share.values.dtype)
                filled[name] = 0
            size = share.values.numel()
            merged[name].view(-1)[share.offset : share.offset + size] = share.values.cpu()
            filled[name] += size
    for name, size in filled.items():
        if size != merged[name].numel():
            raise DigSegError(f"{size} of the {merged[name].numel()} entries of {name} are there; a rank is missing")
    return merged
