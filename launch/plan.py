"""A plan as tables, for a person."""

from __future__ import annotations

import json
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from digseg.training.plan import CONTEXT_BYTES, Memory, Plan


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what a run will need, and warnings last."""
    console = console or Console()
    for table in (_model(plan), _memory(plan), _run(plan)):
        console.print(table)
    console.print("DeepSpeed is started with", json.dumps(plan.deepspeed), soft_wrap=True, markup=False)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)


def _model(plan: Plan) -> Table:
    table = _table("Model")
    table.add_row("trained parameters", _scaled(plan.trainable_parameters, ""))
    table.add_row("frozen parameters, on each GPU too", _scaled(plan.frozen_parameters, ""))
    table.add_row("an image, forward", _scaled(plan.forward_flops, "FLOP"))
    table.add_row("an image, forward and backward", _scaled(plan.training_flops, "FLOP"))
    table.add_row(f"a step of {plan.global_batch_size} images", _scaled(plan.step_flops, "FLOP"))
    return table


def _memory(plan: Plan) -> Table:
    table = Table(title=f"Memory of each of {plan.num_gpus} GPUs", title_justify="left")
    table.add_column("")
    for stage in plan.memory:
        style = "bold" if stage == plan.zero_stage else None
        table.add_column(f"ZeRO {stage}", justify="right", style=style, header_style=style)
    for part in fields(Memory):
        table.add_row(part.name, *(_scaled(getattr(memory, part.name), "B") for memory in plan.memory.values()))
    table.add_section()
    table.add_row("total", *(_scaled(memory.total, "B") for memory in plan.memory.values()))
    room = plan.gpu.memory_bytes - CONTEXT_BYTES
    fits = ("fits" if memory.total <= room else "too much" for memory in plan.memory.values())
    table.add_row(f"of {_scaled(room, 'B')} that are free", *fits)
    return table


def _run(plan: Plan) -> Table:
    table = _table(f"{plan.num_gpus} x {plan.gpu.name} at an MFU of {plan.mfu:g}")
    table.add_row("throughput", f"{plan.images_per_second:,.0f} images/s")
    table.add_row(f"{plan.steps:,} steps", _duration(plan.seconds))
    if plan.images is not None:
        epochs = plan.steps * plan.global_batch_size / plan.images
        table.add_row(f"{plan.images:,} images", f"{epochs:,.1f} epochs")
    table.add_row("micro-batch of a GPU", f"{plan.micro_batch_size} images, {plan.micro_batches} a step")
    if plan.offloaded_bytes:
        table.add_row("in the CPU's memory, for each GPU", _scaled(plan.offloaded_bytes, "B"))
    kept = plan.kept_checkpoints
    table.add_row(f"{kept} checkpoints, and one being written", _scaled((kept + 1) * plan.checkpoint_bytes, "B"))
    if plan.latent_bytes is not None:
        table.add_row("latents of one view of each image", f"{_scaled(plan.latent_bytes, 'B')}, beside its pixels")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table


def _scaled(number: float, unit: str) -> str:
    """``1.5 TB``."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= scale:
            return (
                f"{number / scale:.3g} {prefix}{unit}"
                if number < 1e3 * scale
                else f"{number / scale:,.0f} {prefix}{unit}"
            )
    return f"{number / 1e6:.3g} M{unit}"


def _duration(seconds: float) -> str:
    if seconds >= 86_400:
        return f"{seconds / 86_400:,.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
