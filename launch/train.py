"""Train a segmenter: on this machine, or on the Ray cluster that this process belongs to.

    python launch/train.py --config configs/demo.yaml training.steps=200
    python launch/train.py --config configs/demo.yaml --plan
    ray job submit --working-dir . -- python launch/train.py --config configs/demo.yaml run.name=first

A run is known by its name: started again, it goes on where it stopped. On SIGTERM it saves and ends with exit code 143.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

# Started as a file, Python looks for modules beside it; the project is the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from digseg.config import Config, load_config
from digseg.console import say
from digseg.errors import run_main

if TYPE_CHECKING:
    from digseg.training.run import TrainingResult


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML file of the run, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    planning = parser.add_argument_group("planning, which starts nothing and needs no GPU")
    planning.add_argument("--plan", action="store_true", help="say what the run would need, and how long it would take")
    planning.add_argument(
        "--plan-gpu", default="h100", help="kind of the GPUs (default: h100); cluster.workers of them"
    )
    planning.add_argument(
        "--plan-mfu", type=float, default=0.4, help="share of their peak that is reached (default: 0.4)"
    )
    planning.add_argument("--json", action="store_true", help="the plan as JSON")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    if options.plan:
        plan(config, options.plan_gpu, options.plan_mfu, options.json)
    else:
        train(config)


def plan(config: Config, gpu: str, mfu: float, as_json: bool) -> None:
    """Say what the run would need; see :func:`digseg.training.plan.make_plan`."""
    from digseg.model.text import text_dim
    from digseg.training.plan import make_plan
    from launch.plan import show_plan

    made = make_plan(config, text_dim(config.model), gpu, mfu)
    if as_json:
        print(json.dumps(made.as_json(), indent=1))
    else:
        show_plan(made)


def train(config: Config) -> None:
    """Make the shards that are missing, train, and say what came out."""
    # Ray, DeepSpeed and MLflow take seconds to import: a wrong configuration should be told at once.
    from digseg.training.ledger import ledger_summary
    from digseg.training.logging import read_metrics, throughput_summary
    from digseg.training.run import RunDirectory
    from launch.preparation import ensure_shards

    ensure_shards(config)
    result = run_backend(config)
    say(f"run directory:  {RunDirectory(config).path}")
    if config.tracking.enabled:
        from digseg.registry.tracking import MlflowRun

        run, directory = MlflowRun(config), RunDirectory(config)
        if run.settle(read_metrics(directory.metrics), directory.validation, directory.tags()):
            say(f"MLflow run:     {run.run_id} in {run.tracking_uri}")
        else:
            say(f"MLflow run:     {run.tracking_uri} is away; the same command again delivers what it lacks")
    say(f"model:          {result.model_dir}")
    say(f"loss:           {result.first_loss:.4f} at step 1, {result.last_loss:.4f} at step {result.steps}")
    if RunDirectory(config).ledger.exists():  # not of a run that an earlier version finished
        say(f"time:           {ledger_summary(RunDirectory(config).ledger)}")
    say(f"throughput:     {result.images_per_second:.1f} images/s, {result.world_size} workers")
    if summary := throughput_summary(read_metrics(RunDirectory(config).metrics)):
        say(f"                {summary}, attention {result.attention_kernel}")


def run_backend(config: Config) -> TrainingResult:
    """Train as ``cluster.backend`` says: with Ray workers, or in this process without importing Ray."""
    if config.cluster.backend == "local":
        from digseg.registry.tracked_training import train_tracked
        from digseg.training.locks import exclusive
        from digseg.training.preemption import Notice, listening
        from digseg.training.world import World

        world = World.from_environment()
        with exclusive(config) if world.is_main else nullcontext(), listening(Notice.END):
            return train_tracked(config, world)
    from digseg.cluster.train import run_training

    return run_training(config)


if __name__ == "__main__":
    run_main(main)
