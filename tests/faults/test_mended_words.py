"""What a close look at words found: calibration and evaluation data, tokenizers, what is told of a model."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

import grail
from grail.calibration import load_calibration
from grail.calibration.mixture import parts_of
from grail.calibration.sources import documents
from grail.cli import app
from grail.convert import convert
from grail.errors import GrailError
from grail.evaluate import evaluate
from grail.evaluation.whole import WholeModel
from grail.families import open_family
from grail.progress import Progress
from grail.recipe import Recipe
from grail.serving.vocabulary import vocabulary
from tests.faults.test_mended_language import change, command, flags  # noqa: F401 - a fixture
from tests.test_gguf_export import VOCABULARY, byte_level, sentencepiece, with_tokenizer
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("reopen_here")


@pytest.fixture
def model(tmp_path):
    return tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)


class TestWeightsOfTokens:
    """A file of token ids means the same where it calibrates and where it is evaluated on."""

    @staticmethod
    def data(file, **more):
        ids = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(3))
        save_file({"input_ids": ids, **more}, file)
        return str(file)

    @staticmethod
    def perplexity(model, ids, counts) -> float:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        return math.exp((losses * counts[:, 1:].flatten()).sum() / counts[:, 1:].sum())

    def test_a_perplexity_counts_what_the_mask_and_the_weights_say(self, model, tmp_path):
        mask, weights = torch.ones(6, 16, dtype=torch.int64), torch.rand(6, 16)
        mask[:, 9:] = 0
        data = self.data(tmp_path / "ids.safetensors", attention_mask=mask, weights=weights)
        found = evaluate(str(model), data=data)["models"][str(model)]["perplexity"]
        ids = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(3))
        assert found == pytest.approx(self.perplexity(model, ids, mask * weights), rel=1e-4)
        whole = WholeModel(model, torch.device("cpu"), None)
        assert whole.perplexity(ids, mask * weights) == pytest.approx(found, rel=1e-4)

    def test_compress_evaluates_as_eval_does(self, model, tmp_path, flags):  # noqa: F811
        mask = (torch.arange(16) < 5).expand(6, 16).contiguous()
        data = self.data(tmp_path / "ids.safetensors", attention_mask=mask)
        grail.compress(model, output=tmp_path / "out", **flags | {"eval": data})
        told = json.loads((tmp_path / "out" / "grail.json").read_text())["evaluation"]["perplexity"]["compressed"]
        assert evaluate(str(tmp_path / "out"))["models"][str(tmp_path / "out")]["perplexity"] == pytest.approx(told)

    def test_a_mask_that_hides_everything_is_refused(self, model, tmp_path):
        data = self.data(tmp_path / "ids.safetensors", attention_mask=torch.zeros(6, 16, dtype=torch.int64))
        with pytest.raises(GrailError, match=r"ids\.safetensors: weights must be .* not all 0"):
            evaluate(str(model), data=data)

    def test_joined_texts_have_none(self, model, tmp_path):
        data = self.data(tmp_path / "ids.safetensors", weights=torch.rand(6, 16))
        with pytest.raises(GrailError, match="joined cannot have weights"):
            evaluate(str(model), data=f"{data}+{data}", seq_len=16)

    @pytest.mark.parametrize("name", ["weights", "attention_mask"])
    @pytest.mark.parametrize("shape", [(7, 16), (6, 17), (1, 16)])
    def test_of_another_shape_are_refused(self, tmp_path, name, shape):
        data = self.data(tmp_path / "ids.safetensors", **{name: torch.ones(shape)})
        options = {"samples": 2, "seq_len": 8, "seed": 0}
        said = rf"{name} \[{shape[0]}, {shape[1]}\] do not fit input_ids \[6, 16\]"
        with pytest.raises(GrailError, match=rf"ids\.safetensors: {said}"):
            load_calibration(data, lambda: None, 64, **options)
        with pytest.raises(GrailError, match=said):
            ids = torch.zeros(6, 16, dtype=torch.int64)
            load_calibration({"input_ids": ids, name: torch.ones(shape)}, lambda: None, 64, **options)


class TestSentences:
    def test_a_text_of_which_the_tokenizer_makes_nothing(self, tmp_path):
        (tmp_path / "t.txt").write_text("words")

        class Deaf:
            eos_token_id = None

            def __call__(self, text, **options):
                self.input_ids = []
                return self

        with pytest.raises(GrailError, match=r"t\.txt is empty, or nothing that the tokenizer makes tokens of"):
            load_calibration(str(tmp_path / "t.txt"), Deaf, 64, samples=1, seq_len=4, seed=0)

    @pytest.mark.parametrize(("encoding", "advised"), [("utf-16", "UTF-16"), ("latin1", "LATIN1")])
    def test_a_text_in_another_encoding(self, tmp_path, encoding, advised):
        (tmp_path / "t.txt").write_text("été", encoding=encoding)
        with pytest.raises(GrailError, match=f"iconv -f {advised} "):
            documents(str(tmp_path / "t.txt"), "all")

    @pytest.mark.parametrize(("name", "text"), [("t.jsonl", '{"text": "a"}'), ("t.txt", "a")])
    def test_a_byte_order_mark_is_no_text(self, tmp_path, name, text):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(documents(str(tmp_path / name), "all")) == ["a"]

    def test_the_class_that_opens_a_result_is_not_the_one_that_config_json_names(self, model, tmp_path, flags):  # noqa: F811
        change(model, architectures=["LlamaForSequenceClassification"])
        report = grail.compress(model, output=tmp_path / "out", **flags)
        assert report.loads_with == "transformers LlamaForCausalLM"

    @pytest.mark.parametrize("option", ["model", "output", "calibration", "eval"])
    def test_a_path_longer_than_any(self, option):
        asked = {"model": "m", "calibration": "a+b", option: "x+" + "y" * 100_000}
        with pytest.raises(GrailError, match=rf"^--{option} x\+yyy.* \.\.\.: 100,000 characters, and no path has more"):
            Recipe(**asked)

    def test_many_paths_that_are_joined_may_be_longer_together(self):
        assert Recipe("m", calibration="+".join(["y" * 1000] * 9)).samples == 128

    @pytest.mark.parametrize("source", ["+", "a.txt+", "+a.txt", "a.txt++b.txt"])
    def test_a_text_without_a_name_in_a_mixture(self, source):
        with pytest.raises(GrailError, match=rf"^'{re.escape(source)}' joins a text without a name"):
            parts_of(source)

    @pytest.mark.parametrize("window", ["llama", 0, -1, True, 2.5])
    def test_a_sliding_window_of_no_length(self, tmp_path, window):
        folder = tiny_checkpoint(tmp_path / "model")
        change(folder, sliding_window=window)
        with pytest.raises(GrailError, match=r"config\.json: sliding_window must be"):
            open_family(folder)

    @pytest.mark.parametrize(
        ("asked", "why"),
        [({"eval": "none"}, "nothing is evaluated"), ({"compensate": False}, "without repair")],
        ids=["no evaluation", "no repair"],
    )
    def test_nothing_to_compare_is_told(self, model, tmp_path, flags, asked, why):  # noqa: F811
        calibration = str(tiny_calibration(tmp_path / "ids.safetensors", windows=8, length=16))
        heard: list[str] = []

        class Heard(Progress):
            def say(self, text):
                heard.append(text)

        asked = flags | {"calibration": calibration, "eval": calibration, "compare_pruned": True} | asked
        grail.compress(model, output=tmp_path / "out", progress=Heard(), **asked)
        assert any(f"--compare-pruned compares nothing: {why}" in text for text in heard)

    def test_a_network_that_returns_tuples(self, model):
        change(model, return_dict=False)
        with pytest.raises(GrailError, match=r"config\.json: .*return_dict false; take it out"):
            open_family(model)


class TestGenerationConfig:
    @pytest.mark.parametrize("text", ["[]", '{"cache_implementation": "nonsense"}', '{"watermarking_config": 3}', "{"])
    def test_that_no_class_takes_is_refused_before_work(self, model, tmp_path, flags, text):  # noqa: F811
        (model / "generation_config.json").write_text(text)
        work = ({"model": model, "output": tmp_path / "out", **flags},)
        for words, options in (
            (("compress",), work[0]),
            (("convert", model), {"to": "padded", "output": tmp_path / "o"}),
        ):
            done = CliRunner().invoke(app, command(*words, **options))
            assert done.exit_code == 2 and "generation_config.json" in done.stderr and "bug" not in done.stderr
        assert not list(tmp_path.glob("o*"))

    def test_that_is_only_warned_of_is_carried_over(self, model, tmp_path):
        (model / "generation_config.json").write_text('{"temperature": 0.9}')
        convert(model, tmp_path / "out", to="grail")
        assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature": 0.9}'


class TestModels:
    """grail.compress of a module names the module."""

    @staticmethod
    def refuse(module, said: str) -> None:
        with pytest.raises(GrailError, match=said) as refusal:
            grail.compress(module, calibration=torch.arange(64).view(4, 16), method="mag-sp", target="hidden")
        assert "/grail-" not in str(refusal.value) and "\n" not in str(refusal.value)

    def test_with_layers_that_share_weights(self):
        module = tiny_model()
        one, other = (layer.self_attn.q_proj for layer in module.model.layers)
        one.weight = other.weight
        self.refuse(module, "LlamaForCausalLM cannot be saved .*layers.0.self_attn.q_proj.weight")

    def test_without_data(self):
        self.refuse(tiny_model().to("meta"), "holds no data")

    @pytest.mark.parametrize("kind", [AutoModel.from_config, LlamaForSequenceClassification])
    def test_without_a_head(self, kind):
        module = kind(tiny_model().config)
        self.refuse(module, f"{type(module).__name__} predicts no tokens; give the model with its head")

    def test_that_are_not_what_their_configuration_says(self):
        module = tiny_model()
        module.model.layers = module.model.layers[:1]
        self.refuse(module, "^LlamaForCausalLM holds no tensor model.layers.1.* its config.json asks for")


class TestPlan:
    def plan(self, model, flags, *more):  # noqa: F811
        shown = CliRunner().invoke(app, command("plan", *more, model=model, **flags))
        told = json.loads(CliRunner().invoke(app, command("plan", "--json", *more, model=model, **flags)).stdout)
        return shown.stdout, told

    @pytest.mark.parametrize("allocation", ["global", "error", "uniform"])
    def test_stand_in_widths_are_told_as_such(self, model, flags, allocation):  # noqa: F811
        shown, told = self.plan(model, flags, "--allocation", allocation)
        settled = allocation == "uniform"
        assert told["widths_settled"] is settled
        assert shown.count("(before the network is scored)") == (0 if settled else 3)

    def test_biases_of_producers_go_with_their_rows(self, tmp_path, flags):  # noqa: F811
        source = tiny_checkpoint(tmp_path / "biased", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
        options = {"method": "mag-sp", "target": "hidden", **flags}
        _, told = self.plan(source, options, "--ratio", "0.5")
        report = grail.compress(source, output=tmp_path / "out", ratio=0.5, **options)
        assert told["parameters"]["after"] == report.to_json()["parameters"]["after"]


class TestVocabularies:
    def test_a_class_that_splits_otherwise_than_its_file_is_followed(self, tmp_path):
        tokenizer = byte_level()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's split
        folder = with_tokenizer(tiny_checkpoint(tmp_path / "m", "qwen2", vocab_size=VOCABULARY), tokenizer)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
        assert vocabulary(folder, VOCABULARY).pre == "qwen2"

    """A tokenizer that llama.cpp would not follow is not written for it."""

    @staticmethod
    def words(folder, tokenizer, **changed):
        file = with_tokenizer(folder, tokenizer) / "tokenizer.json"
        described = json.loads(file.read_text())
        described["model"] |= changed
        file.write_text(json.dumps(described))
        return vocabulary(folder, VOCABULARY)

    @pytest.mark.parametrize(
        "step",
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Metaspace(split=True),
            pre_tokenizers.Metaspace(replacement="_", split=False),
            pre_tokenizers.Sequence([pre_tokenizers.Metaspace(split=False), pre_tokenizers.Digits()]),
        ],
        ids=["bytes", "digits", "words", "another space", "two"],
    )
    def test_sentencepiece_splits_nothing_before(self, tmp_path, step):
        tokenizer = sentencepiece()
        tokenizer.pre_tokenizer = step
        with pytest.raises(GrailError, match=r"tokenizer\.json: llama\.cpp merges text with byte_fallback as a whole"):
            self.words(tmp_path, tokenizer)

    def test_sentencepiece_has_a_space_in_front_and_nothing_else(self, tmp_path):
        tokenizer = sentencepiece()
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("X"), normalizers.Replace(" ", "▁")])
        with pytest.raises(GrailError, match="as Prepend does"):
            self.words(tmp_path, tokenizer)

    def test_merges_are_not_ignored(self, tmp_path):
        for number, tokenizer in enumerate((sentencepiece(), byte_level())):
            with pytest.raises(GrailError, match="ignore_merges"):
                self.words(tmp_path / str(number), tokenizer, ignore_merges=True)

    @pytest.mark.parametrize("scheme", ["first", "always", "never"])
    def test_both_forms_of_llama_s_words_are_taken(self, tmp_path, scheme):
        assert self.words(tmp_path / "old", sentencepiece()).space_prefix
        tokenizer = sentencepiece()
        tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizers.Metaspace("▁", scheme, False)
        assert self.words(tmp_path / "new", tokenizer).space_prefix == (scheme != "never")
