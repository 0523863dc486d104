from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusion_checkpoint import write_text
from transformers import CLIPTokenizer

from digseg.config import ModelConfig
from digseg.errors import DigSegError
from digseg.model.text import TextEncoder, build_text_table, load_text_encoder, minilm_directory, standardise


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder(ModelConfig())


def test_minilm_knows_synonyms(minilm: TextEncoder) -> None:
    names = ["car", "automobile", "banana", "cell nucleus", "nuclei"]
    vectors = minilm.encode(names)
    assert vectors.shape == (5, minilm.dim)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5), atol=1e-5)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2
    assert similarity[3, 4] > similarity[3, 2] + 0.2


def test_a_name_embeds_alike_alone_and_among_longer_ones(minilm: TextEncoder) -> None:
    together = minilm.encode(["car", "a very long description of a rusty bicycle"])[0]
    assert torch.allclose(minilm.encode(["car"])[0], together, atol=1e-5)


def test_the_table_is_centred_and_of_unit_variance(minilm: TextEncoder) -> None:
    table = build_text_table(["car", "road", "sky"], minilm)
    assert torch.allclose(table.embeddings.square().mean(1), torch.ones(3), atol=1e-5)
    assert torch.allclose(standardise(minilm.encode(["road"]), table.mean)[0], table.embeddings[1], atol=1e-4)


def test_names_in_templates_follow_the_bare_ones_and_are_centred_as_at_prediction(minilm: TextEncoder) -> None:
    bare, table = (build_text_table(["car", "sky"], minilm, templates) for templates in ([], ["a {}", "one {} here"]))
    assert table.names == ("car", "sky")
    assert torch.allclose(table.mean, bare.mean, atol=1e-6)
    texts = ["car", "sky", "a car", "a sky", "one car here", "one sky here"]
    assert torch.allclose(table.embeddings, standardise(minilm.encode(texts), bare.mean), atol=1e-4)


def test_changed_minilm_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(minilm_directory(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DigSegError, match=r"model.safetensors: sha256 \w+... is not all-MiniLM-L6-v2's"):
        load_text_encoder(ModelConfig(text={"path": str(tmp_path / "model")}))


def test_clip_reads_a_checkpoints_encoder_and_whole_vocabulary(tmp_path: Path) -> None:
    write_text(tmp_path)
    encoder = load_text_encoder(_clip(tmp_path))
    vectors = encoder.encode(["ab", "ba"])
    assert vectors.shape == (2, 16)
    assert not torch.allclose(vectors[0], vectors[1])


def test_clip_asks_its_model_where_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path)
    encoder = load_text_encoder(_clip(tmp_path))
    model, devices = encoder.modules["text_encoder"].to("meta"), []

    def noted(**tokens: torch.Tensor) -> SimpleNamespace:
        devices.extend(part.device.type for part in tokens.values())
        return SimpleNamespace(pooler_output=torch.ones(1, 16))

    monkeypatch.setattr(model, "forward", noted)
    assert encoder.encode(["ab"]).device.type == "cpu"
    assert devices == ["meta", "meta"]


def test_a_clip_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path, vocab_size=34)
    with pytest.raises(DigSegError, match="tokenizer has 32 tokens but the text encoder expects 34"):
        load_text_encoder(_clip(tmp_path))


def test_a_clip_tokenizer_is_read_from_its_files_and_not_made_of_two_tokens(tmp_path: Path) -> None:
    """Since transformers 5, the constructor takes the files' names and reads none of them."""
    write_text(tmp_path)
    files = tmp_path / "tokenizer"
    vocabulary = CLIPTokenizer.from_pretrained(files).get_vocab()
    (files / "tokenizer.json").unlink()  # as in the releases
    (files / "vocab.json").write_text(json.dumps(vocabulary))
    (files / "merges.txt").write_text("#version: 0.2\n")
    assert len(CLIPTokenizer(vocab_file=str(files / "vocab.json"), merges_file=str(files / "merges.txt"))) == 2
    encoder = load_text_encoder(_clip(tmp_path))
    assert not torch.allclose(*encoder.encode(["a", "b"]))


def test_a_name_that_the_encoder_would_cut_is_refused(minilm: TextEncoder, tmp_path: Path) -> None:
    write_text(tmp_path)
    clip = load_text_encoder(_clip(tmp_path))
    clip.encode(["a" * 75])
    with pytest.raises(DigSegError, match=r"the class name 'aaaa.*' has 78 tokens, but the text encoder reads 77"):
        clip.encode(["b", "a" * 76])
    with pytest.raises(DigSegError, match=r"has 602 tokens, but the text encoder reads 512; shorten it"):
        minilm.encode(["car " * 600])


def test_a_missing_clip_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"model.text.path '.*none': there is no such folder; give"):
        load_text_encoder(_clip(tmp_path / "none"))


def _clip(directory: Path) -> ModelConfig:
    return ModelConfig.model_validate({"text": {"type": "clip", "path": str(directory)}})
