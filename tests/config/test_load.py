from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpora import load_corpus
from digseg.config import Config, dump_config, load_config
from digseg.errors import DigSegError

MINIMAL = "data: {corpora: [{name: camvid}]}\ntraining: {steps: 10}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_both_demo_configs_are_valid(repository: Path) -> None:
    for name in ("demo", "demo_real"):
        config = load_config(repository / "configs" / f"{name}.yaml")
        assert config.run.name == name
        assert config.cluster.workers == 2
        assert config.training.zero_stage == 1


def test_config_for_a_cluster_names_corpora_and_classes_that_there_are(repository: Path, tmp_path: Path) -> None:
    config = load_config(repository / "configs" / "sd2.yaml")
    assert config.run.name == "sd2"
    assert (config.world_sizes[0], config.world_sizes[-1]) == (8, 32)
    for entry in [*config.data.corpora, *config.evaluation.corpora]:
        described = load_corpus(entry.name, tmp_path)
        assert entry.split in described.splits
        for name, wordings in config.data.queries.synonyms.get(entry.name, {}).items():
            assert name in described.vocabulary
            assert not {*wordings} & {*described.vocabulary}


def test_overrides_apply_in_order_and_reach_lists_and_new_sections(minimal: Path) -> None:
    overrides = ["training.steps=3", "training.steps=4", "data.corpora.0.weight=2.5", "training.deepspeed.a.b=[1, x]"]
    config = load_config(minimal, overrides)
    assert config.training.steps == 4
    assert config.data.corpora[0].weight == 2.5
    assert config.training.deepspeed == {"a": {"b": [1, "x"]}}


def test_the_environment_overrides_the_file_and_the_command_line_overrides_both(
    minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIGSEG_OVERRIDES", "training.steps=3 training.log_every=2")
    config = load_config(minimal, ["training.steps=4"])
    assert (config.training.steps, config.training.log_every) == (4, 2)


def test_numbers_in_scientific_notation_are_numbers(minimal: Path) -> None:
    assert load_config(minimal, ["training.learning_rate=3e-4"]).training.learning_rate == 3e-4


def test_a_file_extends_another_and_its_own_keys_win(minimal: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: run.yaml\ntraining: {learning_rate: 0.5}\n")
    config = load_config(child)
    assert (config.training.steps, config.training.learning_rate) == (10, 0.5)


def test_extending_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(DigSegError, match=r"circle \(a.yaml -> b.yaml -> a.yaml\)"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainng.steps=3", r"trainng: unknown key; did you mean 'training'\?"),
        ("training.stpes=3", r"training.stpes: unknown key; did you mean 'steps'\?"),
        ("data.corpora.0.wieght=3", r"data.corpora.0.wieght: unknown key; did you mean 'weight'\?"),
        ("training.steps=abc", r"training.steps: got 'abc'; .*integer"),
        ("training.steps=0", r"training.steps: got 0; .*greater than 0"),
        ("cluster.backend=mpi", r"cluster.backend: got 'mpi'; .*'ray' or 'local'"),
        ("cluster.workers=3", r"global_batch_size \(8\) does not divide over 3 workers.*\[1, 2, 4, 8\]"),
        ("data.crop_size=100", r"data.crop_size \(100\) must be a multiple of 32"),
        ("data.scale=[2, 1]", r"data: scale: got \[2.0, 1.0\]; the first bound must not exceed"),
        ("data.temperature=0", r"data.temperature: got 0; .*greater than 0"),
        ("data.shuffle_window=0", r"data.shuffle_window: got 0; .*greater than 0"),
        ("data.cache_dir=/fast", r"cache_dir is /fast, but .* is no URL.*drop cache_dir"),
        ("model.autoencoder.type=kl", "model.autoencoder: type kl needs path"),
        ("model.autoencoder.path=x", "type shuffle has no weights"),
        ("model.unet.attention=[true]", "attention has 1 entries, block_out_channels 4"),
        ("data.queries.palette_size=8", r"max_classes \(64\) exceeds palette_size \(8\)"),
        ("objective.diffusion.min_snr_gamma=5", "objective: diffusion is of the multi-step objective: set type"),
        ("run.name=../x", "run.name: use letters"),
        ("training.steps", "expected key.path=value"),
        ("data.corpora.7.name=x", "indexes a list of 1 entries"),
        ("training.steps.more=1", "training.steps is a value, not a section"),
    ],
)
def test_wrong_settings_say_which_key_what_and_what_is_allowed(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(DigSegError, match=message):
        load_config(minimal, [override])


def test_weights_and_temperature_exclude_each_other(minimal: Path) -> None:
    assert load_config(minimal, ["data.temperature=3"]).data.temperature == 3
    with pytest.raises(DigSegError, match=r"temperature is 3 and .*/train has weight 2: .*drop temperature or all"):
        load_config(minimal, ["data.temperature=3", "data.corpora.0.weight=2"])


def test_missing_files_and_wrong_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"none.yaml: cannot read the configuration: No such file"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(DigSegError, match=r"broken.yaml: not valid YAML"):
        load_config(broken)
    broken.write_text("- 1\n")
    with pytest.raises(DigSegError, match=r"expected 'key: value' pairs at the top, got list"):
        load_config(broken)


def test_relative_locations_start_at_digseg_home(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIGSEG_HOME", str(tmp_path / "home"))
    config = load_config(minimal, ["data.root=s3://bucket/shards", "prepare.root=corpora"])
    assert config.run.storage == str(tmp_path / "home" / "outputs" / "runs")
    assert config.prepare.root == str(tmp_path / "home" / "corpora")
    assert config.data.root == "s3://bucket/shards"


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-8, 1.0),
    stage=st.sampled_from([0, 1, 2, 3]),
    scale=st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 4.0)),
)
def test_a_dumped_config_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, steps: int, rate: float, stage: int, scale: tuple[float, float]
) -> None:
    config = Config.model_validate(
        {
            "run": {"storage": "/runs"},
            "data": {"root": "/shards", "corpora": [{"name": "a"}], "scale": scale},
            "training": {"steps": steps, "learning_rate": rate, "zero_stage": stage},
        }
    )
    path = tmp_path_factory.mktemp("config") / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
