"""The average of the weights against a loop over plain numbers, and the shares it is kept in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from digseg.errors import DigSegError
from digseg.training.ema import WeightAverage, merged_weights, shares_state
from digseg.training.shares import Share, merge_shares, whole_parameters


def test_average_follows_the_reference_loop_through_ramp_and_plateau() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=random)
    average = WeightAverage(_share(weight), decay=0.5)
    expected = weight.double()
    for update in range(12):
        weight = torch.randn(3, 4, generator=random)
        average.update(_share(weight))
        decay = min(0.5, (1 + update) / (10 + update))  # 0.1, 2/11, ... reaches 0.5 at update 8
        expected = decay * expected + (1 - decay) * weight.double()
    merged = merged_weights([average.state_dict()])["w"]
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)


def test_average_does_not_follow_the_weights_it_was_made_from() -> None:
    weight = torch.zeros(2)
    average = WeightAverage(_share(weight), decay=0.9)
    weight += 1
    assert merged_weights([average.state_dict()])["w"].tolist() == [0.0, 0.0]


def test_average_goes_on_from_its_saved_state_as_if_never_stopped() -> None:
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    undisturbed, before = (WeightAverage(_share(weights[0]), decay=0.9) for _ in range(2))
    for weight in weights[1:4]:
        undisturbed.update(_share(weight))
        before.update(_share(weight))
    after = WeightAverage(_share(torch.zeros(5)), decay=0.9)
    after.load_state_dict(before.state_dict())
    for weight in weights[4:]:
        undisturbed.update(_share(weight))
        after.update(_share(weight))
    assert torch.equal(merged_weights([after.state_dict()])["w"], merged_weights([undisturbed.state_dict()])["w"])


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    world_size=st.integers(1, 5),
)
def test_each_parameter_is_looked_after_by_exactly_one_rank(sizes: list[int], world_size: int) -> None:
    parameters = {f"p{number}": torch.randn(size) for number, size in enumerate(sizes)}
    parts = [whole_parameters(parameters, rank, world_size) for rank in range(world_size)]
    assert sorted(name for part in parts for name in part) == sorted(parameters)
    merged = merge_shares(parts)
    assert all(torch.equal(merged[name], value) for name, value in parameters.items())
    loads = [sum(share.values.numel() for share in part.values()) for part in parts]
    assert max(loads) - min(loads) <= max(sizes)


def test_pieces_of_a_parameter_are_put_together_in_their_places() -> None:
    whole = torch.arange(10.0).view(2, 5)
    pieces = [whole.view(-1)[:4], whole.view(-1)[4:8], whole.view(-1)[8:]]
    parts = [{"w": Share((2, 5), 4 * rank, piece)} for rank, piece in enumerate(pieces)]
    assert torch.equal(merged_weights(map(shares_state, reversed(parts)))["w"], whole)


def test_a_missing_rank_is_noticed() -> None:
    parts = [{"w": Share((4,), 0, torch.zeros(2))}]
    with pytest.raises(DigSegError, match=r"2 of the 4 entries of w .* a rank is missing"):
        merge_shares(parts)


def _share(weight: torch.Tensor) -> dict[str, Share]:
    return whole_parameters({"w": weight}, 0, 1)
