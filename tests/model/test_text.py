from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from digseg.config import TextConfig
from digseg.errors import DigSegError
from digseg.model.text import TextEncoder, build_text_table, load_text_encoder, minilm_directory, standardise


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder(TextConfig())


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


def test_changed_minilm_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(minilm_directory(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DigSegError, match=r"model.safetensors: sha256 \w+... is not all-MiniLM-L6-v2's"):
        load_text_encoder(TextConfig(path=str(tmp_path / "model")))


def test_clip_reads_a_checkpoints_encoder_and_whole_vocabulary(tmp_path: Path) -> None:
    _write_clip(tmp_path, vocab_size=10)
    encoder = load_text_encoder(TextConfig(type="clip", path=str(tmp_path)))
    vectors = encoder.encode(["ab", "ba"])
    assert vectors.shape == (2, 16)
    assert not torch.allclose(vectors[0], vectors[1])


def test_a_clip_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    _write_clip(tmp_path, vocab_size=12)
    with pytest.raises(DigSegError, match="tokenizer has 10 tokens but the text encoder expects 12"):
        load_text_encoder(TextConfig(type="clip", path=str(tmp_path)))


def test_a_missing_clip_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"model.text.path: cannot read the text encoder's weights .*none"):
        load_text_encoder(TextConfig(type="clip", path=str(tmp_path / "none")))


def _write_clip(directory: Path, vocab_size: int) -> None:
    """A checkpoint of Stable Diffusion's layout with a vocabulary of ten tokens."""
    words = ["a", "b", "a</w>", "b</w>", "ab</w>", "ba</w>", "c", "c</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[("a", "b</w>"), ("b", "a</w>")]
    )
    tokenizer.save_pretrained(directory / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=8, eos_token_id=9, pad_token_id=9,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(directory / "text_encoder")
