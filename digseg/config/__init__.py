"""The one typed configuration of a run."""

from digseg.config.gate import Gate
from digseg.config.load import base_directory, dump_config, load_config, load_section, section_of_options
from digseg.config.model import AutoencoderConfig, LoraConfig, ModelConfig, PathwayConfig, TextConfig, UNetConfig
from digseg.config.prediction import PredictionConfig
from digseg.config.protocol import Protocol
from digseg.config.schema import (
    ClusterConfig,
    Config,
    CorpusSplit,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    MixtureEntry,
    ObjectiveConfig,
    PrepareConfig,
    PrepareCorpus,
    QueriesConfig,
    RunConfig,
    SampleCorporaConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AutoencoderConfig",
    "ClusterConfig",
    "Config",
    "CorpusSplit",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "Gate",
    "LoraConfig",
    "MixtureEntry",
    "ModelConfig",
    "ObjectiveConfig",
    "PathwayConfig",
    "PredictionConfig",
    "PrepareConfig",
    "PrepareCorpus",
    "Protocol",
    "QueriesConfig",
    "RunConfig",
    "SampleCorporaConfig",
    "TextConfig",
    "TrackingConfig",
    "TrainingConfig",
    "UNetConfig",
    "base_directory",
    "dump_config",
    "load_config",
    "load_section",
    "section_of_options",
]
