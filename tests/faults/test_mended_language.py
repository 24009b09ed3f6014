"""What a close look at language models found: each fault by itself, small enough to be made in a moment."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from grail.checkpoint.gguf import converted
from grail.errors import GrailError
from grail.families.gguf import Entry
from grail.serving import gguf as export_room
from grail.serving.gguf import export_gguf
from tests.test_gguf_export import VOCABULARY, byte_level, with_tokenizer
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here")
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@torch.no_grad()
def logits(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(90)[None] * 7 % VOCABULARY).logits


class TestGgufIn:
    """A GGUF file is the network that it says, or it is refused."""

    @pytest.fixture
    def exported(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRAIL_CACHE", str(tmp_path / "cache"))

        def make(model_type="llama", *, fields=None, entries=(), **settings):
            settings = {"num_hidden_layers": 1, "vocab_size": VOCABULARY} | settings
            source = with_tokenizer(tiny_checkpoint(tmp_path / "dense", model_type, **settings), byte_level())
            honest = export_room.described

            def described(model):
                held, tensors = honest(model)
                return held | (fields or {}), [*tensors, *entries]

            monkeypatch.setattr(export_room, "described", described)
            export_gguf(source, tmp_path / "m.gguf")
            return source, tmp_path / "m.gguf"

        return make

    @pytest.mark.parametrize(
        ("model_type", "settings"),
        [
            ("llama", {"attention_bias": True, "mlp_bias": True}),
            ("qwen2", {}),
            ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
            ("llama", {"rope_parameters": STRETCHED, "head_dim": 64, "max_position_embeddings": 131072}),
            ("llama", {"rope_parameters": STRETCHED | {"factor": 8.0, "original_max_position_embeddings": 64}}),
        ],
        ids=["biases", "some biases", "linear", "llama3", "llama3 of another length"],
    )
    def test_biases_and_stretched_rotations_are_carried_over(self, exported, capfd, model_type, settings):
        source, file = exported(model_type, **settings)
        assert torch.equal(logits(converted(file)), logits(source))
        assert "MISSING" not in capfd.readouterr().err

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rope.scaling.type", "yarn"),
            ("rope.scaling.attn_factor", 2.0),
            ("rope.dimension_count", 4),
            ("rope.scaling.factor", float("inf")),
        ],
    )
    def test_a_rotary_embedding_that_cannot_be_is_refused_by_its_key(self, exported, key, value):
        _, file = exported("qwen2" if key == "rope.dimension_count" else "llama", fields={key: value})
        if key == "rope.dimension_count":  # of llama the reader makes it the size of a head
            file.write_bytes(file.read_bytes().replace(b"llama", b"qwen2"))
        with pytest.raises(GrailError, match=rf"m\.gguf: \w+\.{key}"):
            converted(file)

    def test_keys_that_stretch_nothing_are_taken(self, exported):
        nothing = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 9}
        ones = Entry("rope_freqs.weight", (4,), lambda: torch.ones(4))
        source, file = exported(fields=nothing, entries=[ones])
        assert torch.equal(logits(converted(file)), logits(source))

    @pytest.mark.parametrize(
        ("name", "size"), [("rope_freqs.weight", 4), ("rope_freqs.weight", 3), ("blk.0.attn_q_norm.weight", 8)]
    )
    def test_a_tensor_without_a_place_is_refused_by_its_name(self, exported, name, size):
        entry = Entry(name, (size,), lambda: torch.linspace(1, 3, size) + 0.5)
        _, file = exported(entries=[entry])
        with pytest.raises(GrailError, match=rf"m\.gguf: .*{name}"):
            converted(file)
        assert not list((file.parent / "cache").iterdir())

    def test_what_the_version_before_has_converted_is_not_taken(self, exported, monkeypatch):
        _, file = exported("qwen2")
        monkeypatch.setattr("grail.checkpoint.gguf.CONVERSION", b"")
        old = converted(file)
        (old / "config.json").write_text(json.dumps(json.loads((old / "config.json").read_text()) | {"mark": 1}))
        monkeypatch.undo()
        monkeypatch.setenv("GRAIL_CACHE", str(file.parent / "cache"))
        assert "mark" not in json.loads((converted(file) / "config.json").read_text())
