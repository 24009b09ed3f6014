"""What was found in token files and GGUF files by looking for trouble once more."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

import grail
from grail.calibration.mixture import absolute
from grail.calibration.text import evaluation_windows, load_calibration
from grail.checkpoint.gguf import converted
from grail.distributed import Group
from grail.errors import GrailError
from grail.evaluate import evaluate
from grail.progress import Progress
from grail.recipe import Recipe
from grail.serving.gguf import export_gguf
from grail.session import Session
from tests.test_gguf_export import VOCABULARY, byte_level, with_tokenizer
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("reopen_here")
DRAWN = {"vocabulary": 64, "samples": 8, "seed": 0}


def no_tokenizer():
    pytest.fail("nothing is to be tokenised")


class TestTokenFiles:
    @pytest.fixture
    def two(self, tmp_path) -> str:
        """Of other lengths, joined."""
        lengths = {"a": 24, "b": 16}
        return "+".join(
            str(tiny_calibration(tmp_path / f"{name}.safetensors", windows=8, length=length))
            for name, length in lengths.items()
        )

    def test_that_are_joined_are_read_to_the_shortest_window(self, two):
        assert load_calibration(two, no_tokenizer, seq_len=None, **DRAWN).ids.shape == (8, 16)
        assert evaluation_windows(two, no_tokenizer, 64, seq_len=None).ids.shape == (16, 16)

    def test_longer_windows_than_text_has_are_not_cut(self, tmp_path):
        torch.manual_seed(0)
        for name in ("a", "b"):
            save_file({"input_ids": torch.randint(64, (4, 2100))}, tmp_path / f"{name}.safetensors")
        joined = f"{tmp_path / 'a.safetensors'}+{tmp_path / 'b.safetensors'}"
        assert load_calibration(joined, no_tokenizer, seq_len=None, **DRAWN).ids.shape == (8, 2100)

    def test_compress_and_eval_take_them_too(self, tmp_path, two):
        model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)
        one = two.partition("+")[0]
        report = grail.compress(model, calibration=one, eval=two, output=tmp_path / "out")
        assert report.evaluation["seq_len"] == 16
        assert evaluate(model, data=two)["seq_len"] == 16

    @pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
    def test_of_unsigned_integers(self, tmp_path, dtype):
        ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": ids.to(dtype)}, tmp_path / "t.safetensors")
        found = load_calibration(str(tmp_path / "t.safetensors"), no_tokenizer, seq_len=None, **DRAWN)
        assert torch.equal(found.ids, ids)

    def test_shorter_windows_than_asked_for_are_refused_in_python_too(self):
        with pytest.raises(GrailError, match="calibration holds windows of 16 tokens; --seq-len 32 is longer"):
            load_calibration(torch.ones(8, 16, dtype=torch.long), no_tokenizer, seq_len=32, **DRAWN)


class TestHeldOutText:
    @pytest.fixture
    def texts(self, tmp_path, monkeypatch) -> Path:
        """One and other, with words of their own; and a folder of a model that knows them."""
        tiny_tokenizer(tiny_checkpoint(tmp_path / "model", num_hidden_layers=1))
        for name, first in (("one", 3), ("other", 30)):
            (tmp_path / f"{name}.txt").write_text("\n".join(f"w{first + i % 9}" for i in range(2000)))
        tiny_calibration(tmp_path / "a.safetensors", windows=8, length=16)
        (tmp_path / "link.txt").symlink_to(tmp_path / "one.txt")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("calibration", "asked", "expected"),
        [
            ("one.txt+other.txt", "one.txt", True),
            ("one.txt", "one.txt+other.txt", True),
            ("one.txt+other.txt", "other.txt+one.txt", True),
            ("one.txt+builtin", "one.txt", True),
            ("link.txt", "one.txt", True),
            ("one.txt", "other.txt", False),
            ("builtin", "builtin", True),
            ("a.safetensors", "a.safetensors", False),
        ],
    )
    def test_what_calibration_reads_in_any_mixture_is_held_out(self, texts, calibration, asked, expected):
        given = {"samples": 4, "seq_len": 16, "output": "out"}
        recipe = Recipe("model", calibration=calibration, eval=asked, **given)
        assert Session(recipe, Progress(), Group()).held_out(absolute(asked)) is expected

    def test_an_evaluation_takes_the_last_tenth(self, texts):
        asked = {"calibration": "one.txt+other.txt", "samples": 8, "seq_len": 16, "output": texts / "out"}
        found = grail.compress("model", eval="one.txt", **asked).evaluation
        assert found["held_out"] and found["windows"] == len((texts / "one.txt").read_text().split()) // 10 // 16

    def test_token_ids_that_calibration_reads_are_evaluated_with_a_word(self, texts):
        ids = str(tiny_calibration(texts / "ids.safetensors", windows=8, length=16))
        said: list[str] = []

        class Heard(Progress):
            def warn(self, text):
                said.append(text)

        report = grail.compress("model", calibration=ids, eval=ids, output=texts / "out", progress=Heard())
        assert any("ids.safetensors is evaluated whole, and calibration reads it too" in text for text in said)
        assert report.evaluation["held_out"] is False


class TestGguf:
    @pytest.fixture
    def exported(self, tmp_path, monkeypatch):
        """The file of a folder of this name."""
        monkeypatch.setenv("GRAIL_CACHE", str(tmp_path / "cache"))

        def made(name: str):
            source = tiny_checkpoint(tmp_path / name, vocab_size=VOCABULARY, num_hidden_layers=1)
            with_tokenizer(source, byte_level())
            export_gguf(source, tmp_path / f"{name}.gguf")
            return source, tmp_path / f"{name}.gguf"

        return made

    def test_of_a_folder_that_is_called_mistral(self, exported):
        assert (converted(exported("mistral")[1]) / "config.json").is_file()

    def test_a_word_that_transformers_adds_and_the_network_does_not_know(self, exported):
        source, file = exported("model")
        text = "one <|endoftext|> two"
        found, wanted = (
            AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (converted(file), source)
        )
        assert max(found) < VOCABULARY and found == wanted

    def test_what_was_read_is_written_again(self, exported, tmp_path):
        _, file = exported("model")
        calibration = tiny_calibration(tmp_path / "c.safetensors", windows=4, length=16)
        grail.compress(file, calibration=str(calibration), eval="none", output=tmp_path / "out", store="disk")
        assert export_gguf(tmp_path / "out", tmp_path / "out.gguf")["tensors"] > 0

    def test_experts_have_a_place(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRAIL_CACHE", str(tmp_path / "cache"))
        module = mixture()
        write_mixture(tmp_path / "moe.gguf", module)
        ids = torch.arange(12)[None]
        with torch.no_grad():
            read = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "moe.gguf"), dtype=torch.float32)
            torch.testing.assert_close(read(ids).logits, module(ids).logits, rtol=1e-3, atol=1e-3)


def mixture() -> Qwen3MoeForCausalLM:
    """With experts as wide as by default: transformers reads no other width."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }  # experts of 768: transformers reads no other
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64, "norm_topk_prob": True}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)).eval()


def write_mixture(file: Path, module: Qwen3MoeForCausalLM) -> None:
    """As llama.cpp stores it: gates and ups of all experts in a tensor each."""
    config = module.config
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + number) for number in range(63)), '!"'])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    tensors = module.state_dict()
    places = get_gguf_hf_weights_map(module, TENSOR_PROCESSORS["qwen3moe"](config=config.to_dict()))
    for name, place in places.items():
        tensor = tensors[place]
        if "gate_exps" in name or "up_exps" in name:
            half = config.moe_intermediate_size
            tensor = tensor[:, :half] if "gate" in name else tensor[:, half:]
        writer.add_tensor(f"{name}.weight" if "_exps" in name else name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("given", ["tensor", "list", "loader"])
def test_an_own_network_may_read_tokens(given):
    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, ids):
            return self.down(torch.relu(self.up(self.embed(ids)))).mean(1)

    torch.manual_seed(0)
    ids = torch.randint(50, (24, 6))
    calibration = {"tensor": ids, "list": list(ids.split(8)), "loader": DataLoader(TensorDataset(ids), batch_size=8)}
    sites = [grail.channels("up", "down", width=16)]
    report = grail.compress(Texts(), sites=sites, calibration=calibration[given], method="wanda", ratio=0.5)
    (site,) = report.sites
    assert site["after"] == 8 and site["error_after"] < site["error_before"]
    assert report.calibration["images"] + report.calibration["trial_windows"] == 24


def test_a_vision_network_of_transformers_that_no_family_knows_may_be_described_by_hand():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    module = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=1, **sizes)).eval()
    name = next(name for name, _ in module.named_modules() if name.endswith("mlp.fc1"))
    sites = [grail.channels(name, f"{name[:-1]}2", width=24)]
    report = grail.compress(module, sites=sites, calibration=torch.randn(16, 3, 16, 16), ratio=0.5)
    assert report.ratio == {"channels": 0.5}
