"""`grail eval` beyond perplexity of our own families: tasks of lm-eval, other models of transformers, speed, memory."""

from __future__ import annotations

import json
import math
import random
import shutil
from unittest.mock import Mock

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from grail.cli import app
from grail.errors import GrailError
from grail.evaluate import evaluate
from grail.evaluation.footprint import footprint
from grail.evaluation.tasks import Tasks
from tests.tiny import VOCABULARY, tiny_calibration, tiny_checkpoint, tiny_tokenizer

runner = CliRunner()
QUESTIONS = [
    {"question": f"w{a} w{b} w{c}", "choices": [f"w{d}", f"w{d + 1} w{a}", f"w{b}"], "answer": (a + b) % 3}
    for a, b, c, d in [(3, 9, 11, 20), (4, 8, 12, 21), (5, 7, 13, 22), (6, 3, 14, 23), (9, 9, 15, 24), (33, 5, 16, 25)]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of a type that no family of ours knows."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=1, eos_token_id=2
        )
    ).save_pretrained(path)
    return tiny_tokenizer(path)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder with a task of our own: three choices, from a local file."""
    pytest.importorskip("lm_eval")
    path = tmp_path_factory.mktemp("tasks")
    (path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (path / "choices.yaml").write_text(
        "task: three_choices\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {path / 'data.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return path


@torch.no_grad()
def right_by_hand(path, count: int = len(QUESTIONS)) -> float:
    """Share of questions whose right choice is the likeliest, computed without lm-eval."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    right = 0
    for entry in QUESTIONS[:count]:
        start = tokenizer(entry["question"], add_special_tokens=False).input_ids
        found = []
        for choice in entry["choices"]:
            ids = start + tokenizer(choice, add_special_tokens=False).input_ids
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(sum(logs[n - 1, ids[n]].item() for n in range(len(start), len(ids))))
        right += max(range(3), key=found.__getitem__) == entry["answer"]
    return right / count


class TestTasks:
    def test_accuracy_is_the_one_computed_by_hand(self, folder, other, questions):
        found = evaluate(
            str(folder), against=str(other), data="none", tasks="three_choices", tasks_folder=str(questions)
        )
        for path in (folder, other):
            scores = found["models"][str(path)]["tasks"]["three_choices"]
            assert scores["acc"] == pytest.approx(right_by_hand(path))
            assert scores["questions"] == len(QUESTIONS) and 0 <= scores["acc_stderr"] < 1
        assert "data" not in found and "perplexity" not in found["models"][str(folder)]

    def test_limit(self, folder, questions):
        found = evaluate(str(folder), data="none", tasks="three_choices", tasks_folder=str(questions), limit=2)
        scores = found["models"][str(folder)]["tasks"]["three_choices"]
        assert scores["questions"] == 2 and scores["acc"] == pytest.approx(right_by_hand(folder, 2))

    def test_a_pattern(self, folder, questions):
        found = evaluate(str(folder), data="none", tasks="three_ch*", tasks_folder=str(questions), limit=1)
        assert list(found["models"][str(folder)]["tasks"]) == ["three_choices"]

    def test_a_task_that_runs_what_the_model_writes(self, folder, questions, tmp_path):
        (tmp_path / "x.yaml").write_text((questions / "choices.yaml").read_text() + "unsafe_code: true\n")
        with pytest.raises(GrailError, match="which grail does not do"):
            evaluate(str(folder), data="none", tasks="three_choices", tasks_folder=str(tmp_path))

    def test_random_numbers_go_on_as_before(self, folder, questions):
        torch.manual_seed(5)
        numpy.random.seed(5)
        random.seed(5)
        evaluate(str(folder), data="none", tasks="three_choices", tasks_folder=str(questions), limit=1)
        drawn = torch.rand(1).item(), numpy.random.rand(), random.random()
        torch.manual_seed(5)
        numpy.random.seed(5)
        random.seed(5)
        assert drawn == (torch.rand(1).item(), numpy.random.rand(), random.random())

    def test_on_the_command_line(self, folder, questions):
        options = ["--data", "none", "--tasks", "three_choices", "--tasks-folder", str(questions)]
        told = runner.invoke(app, ["eval", str(folder), *options, "--quiet"])
        assert told.exit_code == 0 and "three_choices acc" in told.stdout and "±" in told.stdout
        assert "it/s" not in told.stderr
        document = json.loads(runner.invoke(app, ["eval", str(folder), *options, "--json"]).stdout)
        assert document["models"][str(folder)]["tasks"]["three_choices"]["acc"] == pytest.approx(right_by_hand(folder))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"tasks": "no_such_task"}, "no_such_task.*lm-eval"),
            ({"tasks": " , "}, "--tasks names no task"),
            ({"tasks": "three_choices", "tasks_folder": "/nowhere"}, "--tasks-folder /nowhere"),
            ({"tasks": "piqa"}, "--tasks piqa.*cannot be fetched"),
            ({"limit": 3}, "--limit goes with --tasks"),
            ({"tasks": "piqa", "limit": 0}, "--limit must be at least 1"),
            ({"tasks": "piqa", "shots": -1}, "--shots must be at least 0"),
        ],
    )
    def test_bad_input(self, folder, options, words):
        pytest.importorskip("lm_eval")
        with pytest.raises(GrailError, match=words):
            evaluate(str(folder), data="none", **options)

    def test_data_that_cannot_be_had_is_told_before_anything_is_measured(self, folder, monkeypatch):
        monkeypatch.setattr("grail.evaluate.perplexity", lambda *_, **__: pytest.fail("measured"))
        with pytest.raises(GrailError, match=r"--tasks piqa.*cannot be fetched"):
            evaluate(str(folder), tasks="piqa")

    @pytest.mark.filterwarnings("error:.*deprecated")
    def test_nothing_that_lm_eval_will_drop_is_called(self, folder, questions):
        tasks = Tasks("three_choices", folder=questions)
        tasks.fetch()
        assert tasks.names == ["three_choices"]

    def test_a_broken_description_is_told(self, folder, questions, tmp_path):
        broken = (questions / "choices.yaml").read_text().replace("{{answer}}", "{{nothing.there}}")
        (tmp_path / "broken.yaml").write_text(broken.replace("three_choices", "broken"))
        with pytest.raises(GrailError, match="--tasks broken: "):
            evaluate(str(folder), data="none", tasks="broken", tasks_folder=str(tmp_path))

    def test_without_lm_eval(self, folder, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
        with pytest.raises(GrailError, match=r"grail-compress\[eval\]"):
            evaluate(str(folder), data="none", tasks="piqa")


class TestOtherModels:
    def test_perplexity_is_that_of_transformers(self, other, tmp_path):
        data = tiny_calibration(tmp_path / "data.safetensors", windows=300, length=40)
        from safetensors.torch import load_file

        ids = load_file(data)["input_ids"]
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(other).eval()
            losses = torch.stack([model(row[None], labels=row[None]).loss for row in ids])
        found = evaluate(str(other), data=str(data))
        assert found["models"][str(other)]["perplexity"] == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
        assert found["models"][str(other)]["parameters"] == sum(p.numel() for p in model.parameters())

    def test_beside_one_of_ours(self, folder, other, tmp_path):
        data = tiny_calibration(tmp_path / "data.safetensors")
        found = evaluate(str(folder), against=str(other), data=str(data))["models"]
        assert found[str(folder)]["perplexity"] != found[str(other)]["perplexity"]

    def test_token_ids_it_does_not_have(self, other, tmp_path):
        data = tiny_calibration(tmp_path / "data.safetensors", vocab=1000)
        with pytest.raises(GrailError, match=r"data.safetensors"):
            evaluate(str(other), data=str(data))

    def test_no_model_of_text(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae"}))
        (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        with pytest.raises(GrailError, match="cannot be opened by transformers"):
            evaluate(str(tmp_path))

    def test_more_positions_than_it_knows(self, other, tmp_path):
        data = tiny_calibration(tmp_path / "data.safetensors", windows=2, length=600)
        with pytest.raises(GrailError, match="512 positions"):
            evaluate(str(other), data=str(data))

    def test_fewer_positions_than_speed_takes(self, tmp_path):
        config = GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        with pytest.raises(GrailError, match=r"--speed reads texts of 256 tokens, and .* knows 64 positions"):
            evaluate(str(tmp_path), data="none", speed=True)

    @pytest.mark.parametrize("option", ["tasks", "prompt"])
    def test_without_a_tokenizer_nothing_is_loaded(self, tmp_path, monkeypatch, option):
        monkeypatch.setattr("grail.evaluate.load_whole", lambda *_, **__: pytest.fail("loaded"))
        monkeypatch.setattr("grail.evaluate.Tasks", lambda *_, **__: Mock())
        with pytest.raises(GrailError, match=f"--{option}: .*bare has no tokenizer"):
            evaluate(str(tiny_checkpoint(tmp_path / "bare")), data="none", **{option: "a"})

    def test_other_tokens_are_not_compared(self, folder, tmp_path):
        (tmp_path / "text.txt").write_text(" ".join(f"w{3 + n % 60}" for n in range(500)))
        fewer = tiny_tokenizer(tiny_checkpoint(tmp_path / "fewer"), 32)
        asked = {"data": str(tmp_path / "text.txt"), "seq_len": 16}
        with pytest.raises(GrailError, match="other tokens"):
            evaluate(str(folder), against=str(fewer), **asked)
        evaluate(str(folder), against=str(tiny_tokenizer(tiny_checkpoint(tmp_path / "same"))), **asked)


@pytest.mark.parametrize(
    "wrong",
    [{"windows": True}, {"windows": 0}, {"windows": 2**40}, {"seq_len": 1}, {"seq_len": -2}, {"seq_len": 2**70}],
)
def test_a_record_that_cannot_be(folder, tmp_path, wrong):
    shutil.copytree(folder, tmp_path / "small")
    record = {"data": "builtin", "sha256": "x", "windows": 4, "seq_len": 16, "held_out": False, "dtype": "float32"}
    (tmp_path / "small" / "grail.json").write_text(json.dumps({"evaluation": record | wrong}))
    with pytest.raises(GrailError, match="cannot read"):
        evaluate(str(tmp_path / "small"))


def test_lengths_that_no_tensor_has(folder):
    with pytest.raises(GrailError, match="--seq-len must be"):
        evaluate(str(folder), seq_len=2**70)


class TestSpeedAndMemory:
    def test_no_code_of_the_folder_one_is_in(self, folder, tmp_path, monkeypatch):
        for name in ("transformers", "torch", "json", "grail"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the folder')")
        monkeypatch.chdir(tmp_path)
        assert footprint(folder, torch.float32, torch.device("cpu"))["memory peak"] > 0

    def test_libraries_are_not_counted(self, folder):
        assert footprint(folder, torch.float32, torch.device("cpu"))["memory peak"] < 64e6

    def test_a_process_that_is_killed_says_so(self, folder, monkeypatch):
        monkeypatch.setattr("grail.children.SCRIPT", "import os; os.kill(os.getpid(), 9)")
        with pytest.raises(GrailError, match="signal 9"):
            footprint(folder, None, torch.device("cpu"))

    def test_both_of_both(self, folder, other):
        found = evaluate(str(folder), against=str(other), data="none", speed=True)["models"]
        for path in (folder, other):
            entry = found[str(path)]
            assert entry["prefill tokens/s"] > 0 and entry["decode tokens/s"] > 0
            assert 0 < entry["memory peak"] < 2**31

    def test_memory_holds_the_weights(self, tmp_path):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=1024, n_layer=6, n_head=4, n_positions=512)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        found = evaluate(str(tmp_path), data="none", speed=True)["models"][str(tmp_path)]
        assert found["bytes"] > 300e6
        assert 0.9 * found["bytes"] < found["memory peak"] < 3 * found["bytes"]
