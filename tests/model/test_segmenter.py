from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import small_config
from two_tones import two_tone_batch

from digseg.model import Segmenter, build_segmenter
from digseg.model.palette import palette
from digseg.model.training_module import SegmenterLoss, resolve_precision


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return build_segmenter(small_config(tmp_path_factory.mktemp("segmenter"))).eval()


def test_shapes_and_the_estimates_composition(segmenter: Segmenter) -> None:
    images, text, mask, colours = _query(classes=3)
    output = segmenter(images, text, mask, colours)
    assert output.logits.shape == (2, 3, 32, 48)
    (feedback,) = output.feedback_logits
    assert feedback.shape == (2, 3, 8, 12)
    assert output.mask_latents.shape == (2, 48, 8, 12)


def test_padded_slots_change_nothing(segmenter: Segmenter) -> None:
    images, text, mask, colours = _query(classes=3)
    alone = segmenter(images, text, mask, colours).logits
    padding = (torch.randn(2, 2, 384), torch.zeros(2, 2, dtype=torch.bool), torch.randn(2, 2, 3))
    padded = segmenter(
        images, torch.cat([text, padding[0]], 1), torch.cat([mask, padding[1]], 1), torch.cat([colours, padding[2]], 1)
    ).logits
    assert torch.allclose(padded[:, :3], alone, atol=1e-4)
    assert (padded[:, 3:] < -1000).all()


def test_the_order_of_the_names_does_not_matter(segmenter: Segmenter) -> None:
    images, text, mask, colours = _query(classes=4)
    order = torch.tensor([2, 0, 3, 1])
    direct = segmenter(images, text, mask, colours).logits
    permuted = segmenter(images, text[:, order], mask, colours[:, order]).logits
    assert torch.allclose(permuted, direct[:, order], atol=1e-4)


def test_with_a_closed_gate_the_colours_do_not_reach_the_decoder_but_open_they_do(tmp_path: Path) -> None:
    images, text, mask, colours = _query(classes=3)
    changes = {}
    for gate in (0.0, 0.5):
        config = small_config(tmp_path, model={"pathway": {"dim": 16, "head_dim": 5, "gate": gate}})
        model = build_segmenter(config).eval()
        torch.nn.init.zeros_(model.pathway.tokens.colour.weight)  # tokens without their colours
        with torch.no_grad():
            before = model(images, text, mask, colours).logits
            model.pathway.scales[0].value.weight.add_(1.0)
            changes[gate] = (model(images, text, mask, colours).logits - before).abs().max().item()
    assert changes[0.0] == 0.0
    assert changes[0.5] > 1e-3


def test_without_feedback_the_scores_are_those_of_closed_gates(tmp_path: Path) -> None:
    query = _query(classes=3)
    closed, scoring = _with_pathway(tmp_path, gate=0.0), _with_pathway(tmp_path, feedback=False)
    report = scoring.load_state_dict(closed.state_dict(), strict=False)
    assert report.missing_keys == []
    assert {name.split(".")[3] for name in report.unexpected_keys} == {"gate", "value"}
    with torch.no_grad():
        expected, output = closed(*query), scoring(*query)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.feedback_logits[0], expected.feedback_logits[0])


def test_without_the_pathway_the_painted_mask_is_the_prediction(tmp_path: Path) -> None:
    images, text, mask, colours = _query(classes=3)
    mask[:, 2] = False
    segmenter = _with_pathway(tmp_path, enabled=False)
    with torch.no_grad():
        output = segmenter(images, text, mask, colours)
    painted = segmenter.autoencoder.decode(output.mask_latents)
    nearest = torch.cdist(painted.flatten(2).transpose(1, 2), colours[:, :2]).argmin(2).view(2, 32, 48)
    assert torch.equal(output.logits.argmax(1), nearest)
    assert output.feedback_logits == ()
    assert {name.split(".")[1] for name, _ in segmenter.pathway.named_parameters(prefix="pathway")} == {"tokens"}


@pytest.mark.parametrize("settings", [{"enabled": False}, {"feedback": False}, {"scales": 2}])
def test_every_weight_is_trained_whatever_is_switched_off(tmp_path: Path, settings: dict[str, Any]) -> None:
    segmenter = _with_pathway(tmp_path, **settings)
    config = small_config(tmp_path, training={"steps": 1, "precision": "fp32"})
    module = SegmenterLoss(segmenter, config, torch.randn(2, 384, generator=torch.Generator().manual_seed(0)))
    module(two_tone_batch(torch.Generator().manual_seed(1)))["loss"].backward()
    assert [name for name, weight in module.named_parameters() if weight.grad is None] == []


def test_building_is_seeded_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = build_segmenter(config), build_segmenter(config)
    assert torch.equal(torch.rand(1), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_a_few_steps_learn_to_tell_two_colours_by_name(tmp_path: Path) -> None:
    """The loss's parts fall together, and the prediction follows the names, not the slots or colours."""
    config = small_config(tmp_path, training={"steps": 1, "precision": "fp32"})
    text = torch.randn(2, 384, generator=torch.Generator().manual_seed(0))
    module = SegmenterLoss(build_segmenter(config), config, text)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        values = module(two_tone_batch(random))
        values["loss"].backward()
        optimizer.step()
        losses.append({name: value.item() for name, value in values.items()})
    for part in ("loss", "class_score", "feedback", "reconstruction"):
        assert losses[-1][part] < 0.5 * losses[0][part], part
    batch = two_tone_batch(random)
    mask = torch.ones(4, 2, dtype=torch.bool)
    with torch.no_grad():
        output = module.eval().segmenter(batch.images, text[batch.query_ids], mask, palette(8)[batch.colour_ids])
    assert (output.logits.argmax(1) == batch.labels).float().mean() > 0.9


def test_auto_precision_follows_the_device() -> None:
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    assert resolve_precision("auto", torch.device("cpu")) == ("bf16" if has_bf16 else "fp32")


def _with_pathway(folder: Path, **settings: Any) -> Segmenter:
    """A segmenter with three levels."""
    unet = {
        "block_out_channels": [16, 32, 32], "attention": [False, False, True], "cross_attention_dim": 32,
        "norm_num_groups": 16,
    }  # fmt: skip
    model = {"unet": unet, "pathway": {"dim": 16, "head_dim": 5, **settings}}
    return build_segmenter(small_config(folder, model=model)).eval()


def _query(classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 48, generator=random) * 2 - 1
    text = torch.randn(2, classes, 384, generator=random)
    return images, text, torch.ones(2, classes, dtype=torch.bool), palette(8)[:classes].expand(2, classes, 3)
