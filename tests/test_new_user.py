"""What somebody new to grail tried, and what they should be told or given."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import grail
from grail.calibration import load_calibration
from grail.calibration.tokens import pretokenised, stored_weights
from grail.errors import GrailError
from grail.evaluate import evaluate
from grail.modules.evaluate import evaluate_folders
from grail.modules.export import export_folder
from tests.test_calibration import Numbers, numbered_text
from tests.test_stream_target import off, tensors_of
from tests.tiny import VOCABULARY, tiny_checkpoint, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("reopen_here")
WORDS = [f"w{3 + n * n % 61}" for n in range(4000)]


@pytest.fixture
def reopened_here(monkeypatch):
    """The check of what was written, without a fresh process."""
    from grail.modules import run as of_run

    monkeypatch.setattr(
        of_run, "reopen", lambda folder, expected, examples: of_run.reopen_here(folder, expected, examples, None)
    )


class Heard(grail.Progress):
    """Every warning."""

    def __init__(self):
        self.warnings: list[str] = []

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def of(self, words: str) -> list[str]:
        return [line for line in self.warnings if words in line]


def text(file, words: int) -> str:
    file.write_text("\n".join(" ".join(WORDS[n : n + 10]) for n in range(0, words, 10)))
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("dense")))


def small(folder, tmp_path, **options) -> Heard:
    heard = Heard()
    options = {"ratio": 0.3, "output": tmp_path / "out", "seq_len": 16} | options
    grail.compress(folder, progress=heard, **options)
    return heard


class TestText:
    @pytest.mark.parametrize("words, samples", [(300, 4), (300, 60), (4000, 9)])
    def test_tokens_that_windows_cover_are_counted_once(self, tmp_path, words, samples):
        source = str(numbered_text(tmp_path / "a.txt", words))
        made = load_calibration(source, Numbers, 10_000, samples=samples, seq_len=16, seed=0)
        assert made.different == len(made.ids.unique()) <= made.tokens

    def test_windows_of_a_short_text_overlap_and_that_is_said(self, folder, tmp_path):
        short, long = (text(tmp_path / f"{n}.txt", n) for n in (300, 4000))
        heard = small(folder, tmp_path, calibration=short, samples=64)
        assert re.search(r"only 2\d\d tokens for windows of 1,024", heard.of("overlap")[0])
        told = json.loads((tmp_path / "out" / "grail.json").read_text())["calibration"]
        assert told["tokens"] == 1024 and told["distinct_tokens"] <= 280
        assert not small(folder, tmp_path, calibration=long, samples=64, overwrite=True).of("overlap")

    def test_a_text_shorter_than_the_width_is_singular_however_often_it_is_read(self, folder, tmp_path):
        heard = small(folder, tmp_path, calibration=text(tmp_path / "a.txt", 40), samples=64, eval="none")
        assert re.search(r"^[1-4]\d different calibration tokens for 48 channels", heard.of("singular")[0])

    def test_an_evaluation_that_cannot_be_is_missed_aloud(self, folder, tmp_path):
        heard = small(folder, tmp_path, calibration=text(tmp_path / "a.txt", 400), samples=8, seq_len=80)
        assert "holds less than one window of 80 tokens: no evaluation" in heard.of("held out")[0]

    def test_windows_that_are_given_and_not_used(self, folder, tmp_path):
        ids = torch.randint(VOCABULARY, (40, 16))
        assert "40 windows were given, samples=30" in small(folder, tmp_path, calibration=ids, samples=30).warnings[-1]
        assert not small(folder, tmp_path, calibration=ids, samples=40, overwrite=True).of("were given")


class TestBatches:
    def ids(self):
        ids = torch.randint(3, VOCABULARY, (12, 20), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[::3, 11:] = 0
        return ids, mask

    def test_what_a_mask_hides_does_not_count(self, folder, tmp_path):
        """As the weights that say the same; and whatever stands in its place."""
        ids, mask = self.ids()
        padded = ids.masked_fill(mask == 0, 0)
        given = {
            "mask": [{"input_ids": ids, "attention_mask": mask}],
            "padded": [
                {"input_ids": padded[:5], "attention_mask": mask[:5]},
                {"input_ids": padded[5:], "attention_mask": mask[5:]},
            ],
            "weights": [{"input_ids": ids, "weights": mask.float()}],
            "all": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}],
            "plain": ids,
        }
        found = {}
        for name, calibration in given.items():
            grail.compress(folder, ratio=0.3, calibration=calibration, output=tmp_path / name)
            found[name] = tensors_of(tmp_path / name)
        assert all(torch.equal(t, found["weights"][name]) for name, t in found["mask"].items())
        assert all(off(t, found["weights"][name]) < 1e-5 for name, t in found["padded"].items())
        assert all(torch.equal(t, found["plain"][name]) for name, t in found["all"].items())
        assert any(off(t, found["plain"][name]) > 1e-3 for name, t in found["mask"].items())

    def test_a_file_may_have_a_mask(self, tmp_path):
        ids, mask = self.ids()
        save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "ids.safetensors")
        assert torch.equal(stored_weights(tmp_path / "ids.safetensors"), mask.float())
        assert torch.equal(pretokenised(tmp_path / "ids.safetensors", VOCABULARY, "--calibration", None), ids)

    def test_padding_at_the_left_is_refused(self, folder, tmp_path):
        ids, mask = self.ids()
        with pytest.raises(GrailError, match="attention_mask hides tokens before others; pad at the right"):
            grail.compress(
                folder, calibration=[{"input_ids": ids, "attention_mask": mask.flip(1)}], output=tmp_path / "o"
            )

    def test_a_loader_of_a_tensor_data_set(self, folder, tmp_path):
        ids, _ = self.ids()
        for name, given in {"loader": DataLoader(TensorDataset(ids), batch_size=5), "tensor": ids}.items():
            grail.compress(folder, ratio=0.3, calibration=given, output=tmp_path / name)
        first, second = (tensors_of(tmp_path / name) for name in ("loader", "tensor"))
        assert all(torch.equal(t, second[name]) for name, t in first.items())


class TestInMemory:
    def test_a_model_with_its_tokenizer_reads_text_and_is_evaluated(self, folder, tmp_path):
        given = {"calibration": text(tmp_path / "a.txt", 4000), "samples": 20, "seq_len": 16, "ratio": 0.3}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        report = grail.compress(tiny_model(), tokenizer=tokenizer, output=tmp_path / "out", **given)
        other = grail.compress(folder, output=tmp_path / "other", **given)
        assert report.evaluation["perplexity"] == other.evaluation["perplexity"]
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()

    @pytest.mark.parametrize("calibration", ["builtin", "a.txt"])
    def test_without_one_it_says_what_to_give(self, tmp_path, monkeypatch, calibration):
        monkeypatch.chdir(tmp_path)
        text(tmp_path / "a.txt", 400)
        with pytest.raises(GrailError, match=r"LlamaForCausalLM given in Python knows no text: give tokenizer= along"):
            grail.compress(tiny_model(), calibration=calibration)

    def test_something_else_for_a_tokenizer(self):
        with pytest.raises(GrailError, match="tokenizer must be one of transformers; got int"):
            grail.compress(tiny_model(), tokenizer=3)

    def test_a_folder_has_its_own(self, folder, tmp_path):
        with pytest.raises(GrailError, match="no option tokenizer"):
            grail.compress(folder, tokenizer=3, output=tmp_path / "out")


class TestEvaluation:
    def other(self, path, vocabulary: int):
        config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=8, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(path)
        return str(path)

    def test_a_second_model_with_another_vocabulary(self, folder, tmp_path):
        asked = {"data": text(tmp_path / "a.txt", 400), "seq_len": 16}
        with pytest.raises(GrailError, match="few has 20 tokens and the text has token id 6"):
            evaluate(str(folder), against=self.other(tmp_path / "few", 20), **asked)
        with pytest.raises(GrailError, match=r"many has no tokenizer, and a vocabulary of 99 where .* one of 64"):
            evaluate(str(folder), against=self.other(tmp_path / "many", 99), **asked)
        evaluate(str(folder), against=self.other(tmp_path / "same", VOCABULARY), **asked)

    def test_a_language_model_for_a_vision_network(self, folder, tmp_path):
        small(folder, tmp_path, method="mag-sp", compensate=False, eval="none")
        with pytest.raises(GrailError, match="of a language model --to gguf"):
            export_folder(str(tmp_path / "out"), "onnx", str(tmp_path / "m.onnx"))


class TestVision:
    def mlp(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5))

    def sites(self):
        return [grail.channels("0", "2", width=40)]

    @pytest.mark.parametrize("targets", [False, True])
    def test_a_loader_of_vectors(self, targets):
        x = torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
        rows = TensorDataset(x, torch.arange(60)) if targets else x
        given = {"loader": DataLoader(rows, batch_size=7), "tensor": x}
        found = [
            grail.compress(self.mlp(), sites=self.sites(), calibration=c, ratio=0.5, samples=60).model.state_dict()
            for c in given.values()
        ]
        assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())

    @pytest.mark.parametrize("count, warned", [(8, True), (64, False)])
    def test_few_rows_are_said_to_be_few(self, count, warned):
        heard, x = Heard(), torch.randn(count, 12)
        grail.compress(self.mlp(), sites=self.sites(), calibration=x, ratio=0.5, progress=heard)
        assert bool(heard.of(f"{count} calibration inputs for 40 channels")) == warned

    def test_the_built_in_digits_of_a_network_that_knows_others(self, tmp_path, reopened_here):
        """Its card says what they are; that it cannot be judged by them stops nothing."""
        file, heard = tmp_path / "weights.safetensors", Heard()
        save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), file)
        options = {"weights": str(file), "model_options": {"num_classes": 3}, "samples": 8, "method": "mag-l1"}
        report = grail.compress("timm/test_resnet", output=tmp_path / "out", ratio=0.5, progress=heard, **options)
        assert report.evaluation is None and "labels run to 9" in heard.of("no evaluation")[0]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "Calibrated on scikit-learn's handwritten digits (built in): 8 images" in card
        assert "What it can do was not measured" in card and "--tasks" not in card and "pruned only" not in card
        with pytest.raises(GrailError, match="labels run to 9"):
            grail.compress("timm/test_resnet", output=tmp_path / "b", ratio=0.5, eval="builtin", **options)

    def test_a_folder_beside_the_named_network_that_it_was_made_from(self, tmp_path, reopened_here):
        file = tmp_path / "weights.safetensors"
        save_file(timm.create_model("test_resnet").state_dict(), file)
        options = {"weights": str(file), "samples": 8, "method": "mag-l1", "eval": "none"}
        grail.compress("timm/test_resnet", output=tmp_path / "out", ratio=0.5, **options)
        asked = {"data": None, "speed": False, "weights": str(file), "samples": 20}
        found = evaluate_folders(str(tmp_path / "out"), against="timm/test_resnet", **asked)
        assert len(found["models"]) == 2
        with pytest.raises(GrailError, match="leave out --weights"):
            evaluate_folders(str(tmp_path / "out"), against=None, **asked)
