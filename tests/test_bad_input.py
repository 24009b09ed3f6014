"""Bad input ends with exit code 2 and one clear sentence, and leaves no output behind (issue A, acceptance 7)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import grail
from grail.cli import app
from tests.tiny import tiny_calibration, tiny_checkpoint

ROOT = Path(__file__).parents[1]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FAMILY = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "seed_oss")


class Bench:
    """A tiny checkpoint and calibration file to spoil, and the command to give them to."""

    def __init__(self, folder: Path, checkpoint: Path):
        self.folder = folder
        self.model = Path(shutil.copytree(checkpoint, folder / "model"))
        self.calibration = tiny_calibration(folder / "calibration.safetensors")
        self.output = folder / "out"

    def command(self, *more: str, **options: object) -> list[str]:
        """`grail compress` with the defaults of these tests; an option given as None is left out."""
        given = {
            "model": self.model,
            "method": "wanda-sp",
            "ratio": 0.3,
            "calibration": self.calibration,
            "output": self.output,
        } | options
        flags = [("--" + name.replace("_", "-"), str(value)) for name, value in given.items() if value is not None]
        return ["compress", "--quiet", *(word for flag in flags for word in flag), *more]

    def refuse(self, *more: str, **options: object) -> str:
        """Run in this process; check the form of the refusal and that nothing was left; the sentence."""
        before = listing(self.folder)
        result = CliRunner().invoke(app, self.command(*more, **options))
        assert result.exit_code == 2, f"{result.exit_code}: {result.stderr or result.output}"
        message = one_sentence(result.stderr)
        assert not result.stdout
        assert listing(self.folder) == before, "something was left behind or changed"
        return message

    def refuse_in_python(self, **options: object) -> str:
        before = listing(self.folder)
        given = {"model": self.model, "calibration": str(self.calibration), "output": str(self.output)} | options
        with pytest.raises(grail.GrailError) as refusal:
            grail.compress(given.pop("model"), **given)
        assert listing(self.folder) == before
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    def config(self, **changes: object) -> None:
        file = self.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def edit(self, change) -> None:
        """Change the weights in place: `change` gets the dictionary of tensors."""
        tensors = load_file(self.model / WEIGHTS)
        change(tensors)
        save_file(tensors, self.model / WEIGHTS, metadata={"format": "pt"})

    def shard(self) -> list[Path]:
        """Rewrite the checkpoint as two shards with an index; the shards."""
        tensors = load_file(self.model / WEIGHTS)
        (self.model / WEIGHTS).unlink()
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, held in parts.items():
            save_file({name: tensors[name] for name in held}, self.model / file, metadata={"format": "pt"})
        weight_map = {name: file for file, held in parts.items() for name in held}
        (self.model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return [self.model / file for file in parts]

    def reindex(self, change) -> None:
        index = json.loads((self.model / INDEX).read_text())
        change(index["weight_map"])
        (self.model / INDEX).write_text(json.dumps(index))

    def add_tokenizer(self) -> None:
        """Words w0 ... w60 and the special tokens, 64 in all."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(self.model)

    def text(self, name: str, content: str | bytes) -> Path:
        """A text file beside a model that has a tokenizer."""
        self.add_tokenizer()
        file = self.folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in sorted(folder.rglob("*"))}


def one_sentence(stderr: str) -> str:
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("grail: "), stderr
    assert "bug in grail" not in stderr
    return lines[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def bench(tmp_path, checkpoint) -> Bench:
    return Bench(tmp_path, checkpoint)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr(socket.socket, "connect", fails)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


class TestInAProcessOfItsOwn:
    """What a person sees, without the test runner between."""

    def run(self, bench: Bench, tmp_path_factory, *more: str, **options) -> str:
        home = tmp_path_factory.mktemp("home")
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        environment.pop("HF_HUB_OFFLINE", None)
        environment |= {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        before = listing(bench.folder)
        command = [sys.executable, "-m", "grail", *bench.command(*more, **options)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, timeout=120)
        assert done.returncode == 2, done.stderr
        assert not done.stdout
        assert listing(bench.folder) == before
        return one_sentence(done.stderr)

    def test_a_hub_name_that_cannot_be_reached(self, bench, tmp_path_factory):
        message = self.run(bench, tmp_path_factory, model="grail-nobody/no-such-model")
        assert "grail-nobody/no-such-model" in message and "--model PATH" in message

    def test_nan_in_a_weight(self, bench, tmp_path_factory):
        name = "model.layers.1.mlp.up_proj.weight"
        bench.edit(lambda tensors: tensors[name][3, 4:5].fill_(float("nan")))
        assert name in self.run(bench, tmp_path_factory)


class TestNames:
    @pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "a/b/c", "../x"])
    def test_unknown_model(self, bench, monkeypatch, name):
        monkeypatch.chdir(bench.folder)
        message = bench.refuse(model=name)
        assert f"grail: {name}: no such folder" in message and "smollm2-135m" in message

    @pytest.mark.parametrize("name", ["wandas", "WANDA-SP", "no-such-method", ""])
    def test_unknown_method_lists_the_known(self, bench, name):
        message = bench.refuse(method=name)
        assert f"--method {name}" in message
        assert all(known in message for known in ("mag-sp", "wanda-sp", "random"))

    @pytest.mark.parametrize("name", ["grail-nobody/no-such-model", "llama-2-7b"])
    def test_hub_name_without_network(self, bench, no_network, name):
        start = time.perf_counter()
        message = bench.refuse(model=name)
        assert time.perf_counter() - start < 60
        assert {"llama-2-7b": "meta-llama/Llama-2-7b-hf"}.get(name, name) in message and "--model PATH" in message

    def test_gated_model(self, bench, monkeypatch):
        from types import SimpleNamespace

        def gated(*args, **kwargs):
            response = SimpleNamespace(status_code=403, headers={}, request=None)
            raise huggingface_hub.errors.GatedRepoError("403 Client Error.\nAccess is restricted", response=response)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gated)
        message = bench.refuse(model="llama-2-7b")
        assert "https://huggingface.co/meta-llama/Llama-2-7b-hf" in message
        assert "hf auth login" in message and "--model PATH" in message

    @pytest.mark.parametrize("setting", ["power", "power:2", ""])
    def test_set_without_equals_sign(self, bench, setting):
        message = bench.refuse("--set", setting)
        assert f"--set {setting}" in message and "key=value" in message

    @pytest.mark.parametrize("method", ["wanda-sp", "mag-sp", "random"])
    def test_set_with_an_unknown_key(self, bench, method):
        message = bench.refuse("--set", "no_such_key=1", method=method)
        assert "no_such_key" in message and method in message


class TestNumbers:
    @pytest.mark.parametrize("option", ["ratio", "attn_ratio", "mlp_ratio"])
    @pytest.mark.parametrize("value", ["-1", "-0.01", "1", "1.5", "nan", "inf", "-inf"])
    def test_ratio(self, bench, option, value):
        message = bench.refuse(**{option: value})
        assert "--" + option.replace("_", "-") in message and "1" in message

    @pytest.mark.parametrize("option", ["ratio", "ridge", "samples", "seed"])
    def test_not_a_number(self, bench, option):
        assert f"--{option}" in bench.refuse(**{option: "abc"})

    @pytest.mark.parametrize("value", ["-1", "-1e-9", "nan", "inf"])
    def test_ridge(self, bench, value):
        assert "--ridge" in bench.refuse(ridge=value)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("samples", 0),
            ("samples", -1),
            ("seq_len", 1),
            ("seq_len", 0),
            ("seed", -1),
            ("seed", 2**63),
            ("round_to", 0),
            ("head_multiple", 0),
            ("head_multiple", 7),
        ],
    )
    def test_whole_numbers(self, bench, option, value):
        assert "--" + option.replace("_", "-") in bench.refuse(**{option: value})

    @pytest.mark.parametrize("option", ["ridge_form", "gqa", "dtype", "output_dtype", "device"])
    def test_choices(self, bench, option):
        message = bench.refuse(**{option: "nonsense"})
        assert "--" + option.replace("_", "-") in message and "nonsense" in message

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
    def test_a_gpu_that_is_not_there(self, bench):
        assert "cuda" in bench.refuse(device="cuda")


class TestFolder:
    @pytest.mark.parametrize(
        ("content", "said"),
        [(None, "config.json"), ("{", "JSON"), ("[]", "object"), ("", "JSON"), ("null", "object"), ("{}", "supported")],
        ids=["missing", "cut", "a-list", "empty", "null", "no-model-type"],
    )
    def test_config(self, bench, content, said):
        (bench.model / "config.json").unlink()
        if content is not None:
            (bench.model / "config.json").write_text(content)
        message = bench.refuse()
        assert "config.json" in message and said in message

    @pytest.mark.parametrize(
        "model_type", ["gpt2", "olmo2", "mixtral", "deepseek_v3", "no-such-type", ["llama"], 7, None]
    )
    def test_model_type_that_is_not_supported_is_named_with_the_list(self, bench, model_type):
        bench.config(model_type=model_type)
        message = bench.refuse()
        assert repr(model_type) in message and all(known in message for known in FAMILY)

    def test_quantised_checkpoint(self, bench):
        bench.config(quantization_config={"quant_method": "gptq", "bits": 4})
        assert "quantised" in bench.refuse()

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": 64, "num_attention_heads": 8},
            {"intermediate_size": 41},
            {"num_attention_heads": 4},
            {"num_key_value_heads": 3},
            {"head_dim": 16},
            {"vocab_size": 65},
            {"num_hidden_layers": 3},
            {"attention_bias": True},
            {"mlp_bias": True},
        ],
        ids=lambda changes: "-".join(changes),
    )
    def test_config_that_disagrees_with_the_tensors(self, bench, changes):
        bench.config(**changes)
        assert "model." in bench.refuse()

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": "wide"},
            {"hidden_size": None},
            {"intermediate_size": -8},
            {"num_attention_heads": 0},
            {"num_key_value_heads": 0},
            {"num_key_value_heads": 4},
            {"num_hidden_layers": 0},
            {"num_hidden_layers": -1},
            {"hidden_act": "no-such-function"},
            {"rope_parameters": {"rope_type": "no-such-type", "rope_theta": 1e4}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            {"max_position_embeddings": 0},
        ],
        ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items())[:50],
    )
    def test_config_with_a_value_that_the_class_cannot_take(self, bench, changes):
        bench.config(**changes)
        assert "config.json" in bench.refuse()

    def test_code_in_the_folder_is_never_run(self, bench):
        (bench.model / "evil.py").write_text(f"open({str(bench.folder / 'mark')!r}, 'w')\nclass Config: pass\n")
        bench.config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}, model_type="evil")
        assert "evil" in bench.refuse()
        bench.config(model_type="llama", vocab_size=65)
        bench.refuse()

    def test_pickled_checkpoint_is_never_opened(self, bench):
        class Bomb:
            def __reduce__(self):
                return (Path.write_text, (bench.folder / "mark", "unpickled"))

        (bench.model / WEIGHTS).unlink()
        (bench.model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
        message = bench.refuse()
        assert "pytorch_model.bin" in message and "safetensors" in message

    def test_a_file_instead_of_its_folder(self, bench):
        assert "folder" in bench.refuse(model=bench.model / WEIGHTS)


class TestWeightFiles:
    @pytest.mark.parametrize(
        "keep", [0, 5, 50, 0.5, -1], ids=["nothing", "5-bytes", "half-a-header", "half", "last-byte"]
    )
    @pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
    def test_truncated(self, bench, keep, sharded):
        file = bench.shard()[1] if sharded else bench.model / WEIGHTS
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
        assert file.name in bench.refuse()

    @pytest.mark.parametrize(
        "header",
        [
            b"\xff" * 8 + b"{}",
            (10**6).to_bytes(8, "little") + b"{}",
            (8).to_bytes(8, "little") + b"not json",
            (2).to_bytes(8, "little") + b"[]",
        ],
        ids=["length-absurd", "length-past-the-end", "not-json", "a-list"],
    )
    def test_header(self, bench, header):
        (bench.model / WEIGHTS).write_bytes(header)
        assert WEIGHTS in bench.refuse()

    @pytest.mark.parametrize(
        "change",
        [
            {"data_offsets": [-4, 4]},
            {"data_offsets": [0, 4]},
            {"data_offsets": [8, 0]},
            {"dtype": "Q4"},
            {"shape": [-1]},
        ],
        ids=["offset-negative", "offsets-inconsistent", "offsets-reversed", "dtype-unknown", "shape-negative"],
    )
    def test_header_entry(self, bench, change):
        file, name = bench.model / WEIGHTS, "model.norm.weight"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[name] |= change
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        message = bench.refuse()
        assert WEIGHTS in message and name in message

    def test_shard_that_is_listed_and_missing(self, bench):
        shard = bench.shard()[1]
        shard.unlink()
        assert shard.name in bench.refuse()

    @pytest.mark.parametrize(
        "name",
        ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
    )
    def test_tensor_that_the_index_lacks(self, bench, name):
        bench.shard()
        bench.reindex(lambda weight_map: weight_map.pop(name))
        assert name in bench.refuse()

    def test_shard_that_the_index_lacks(self, bench):
        shard = bench.shard()[1]

        def forget(weight_map):
            for name in [name for name, file in weight_map.items() if file == shard.name]:
                del weight_map[name]

        bench.reindex(forget)
        assert "index" in bench.refuse()

    @pytest.mark.parametrize("target", ["../x.safetensors", "/etc/passwd", "", 7, None, ["x"]], ids=repr)
    def test_index_entry_that_is_not_a_plain_file_name(self, bench, target):
        bench.shard()
        bench.reindex(lambda weight_map: weight_map.update({"model.norm.weight": target}))
        message = bench.refuse()
        assert INDEX in message and "model.norm.weight" in message

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32], ids=str)
    def test_weights_that_are_not_floats(self, bench, dtype):
        name = "model.layers.1.mlp.down_proj.weight"
        bench.edit(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
        assert name in bench.refuse()


class TestNotFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    @pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"])
    def test_weight_of_a_layer(self, bench, part, value):
        name = f"model.layers.1.{part}.weight"
        bench.edit(lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
        assert name in bench.refuse()

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
    def test_weight_outside_the_layers(self, bench, name):
        bench.edit(lambda tensors: tensors[name].fill_(float("nan")))
        assert name in bench.refuse()

    @pytest.mark.parametrize("options", [{"method": "mag-sp"}, {"ratio": 0}, {"method": "random"}], ids=str)
    def test_weight_whatever_the_method(self, bench, options):
        name = "model.layers.1.mlp.gate_proj.weight"
        bench.edit(lambda tensors: tensors[name].fill_(float("nan")))
        assert name in bench.refuse(**options)

    def overflow(self, bench: Bench, *names: str) -> None:
        bench.edit(lambda tensors: [tensors[f"model.layers.{name}.weight"].mul_(1e30) for name in names])

    def test_activations_of_the_mlp(self, bench):
        self.overflow(bench, "1.mlp.gate_proj", "1.mlp.up_proj")
        assert "model.layers.1.mlp" in bench.refuse()

    def test_activations_of_the_attention(self, bench):
        self.overflow(bench, "1.self_attn.q_proj", "1.self_attn.k_proj")
        assert "model.layers.1.self_attn" in bench.refuse()

    def test_activations_in_the_first_layer_name_the_first_layer(self, bench):
        self.overflow(bench, "0.mlp.gate_proj", "0.mlp.up_proj")
        assert "model.layers.0" in bench.refuse()

    @pytest.mark.parametrize(
        ("more", "options"),
        [
            ((), {"ratio": 0}),
            (("--no-compensate",), {"method": "mag-sp"}),
            (("--no-compensate",), {"method": "wanda-sp"}),
            ((), {"mlp_ratio": 0}),
        ],
        ids=["ratio-0", "no-data-needed", "no-compensation", "only-heads"],
    )
    @pytest.mark.usefixtures("reopen_here")
    def test_activations_are_named_whatever_is_gathered(self, bench, more, options):
        self.overflow(bench, "1.mlp.gate_proj", "1.mlp.up_proj")
        assert "layers.1" in bench.refuse(*more, **options)

    @pytest.mark.usefixtures("reopen_here")
    @pytest.mark.parametrize(("more", "mlp_ratio"), [(("--no-compensate",), 0.3), ((), 0)], ids=["pruned", "untouched"])
    def test_output_of_the_last_layer(self, bench, more, mlp_ratio):
        """The hidden vectors are finite, what the last consumer makes of them is not."""

        def overflow(tensors):
            tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e3)
            tensors["model.layers.1.mlp.down_proj.weight"].fill_(1e38)

        bench.edit(overflow)
        assert "layers.1" in bench.refuse(*more, mlp_ratio=mlp_ratio)

    def test_repaired_weight_that_overflows_its_dtype(self, bench):
        bench.edit(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
        assert "model.layers.1.mlp.down_proj" in bench.refuse()

    def test_json_says_nothing_on_stdout(self, bench):
        bench.edit(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
        assert "model.norm.weight" in bench.refuse("--json")

    def test_the_sentence_comes_last_when_progress_is_shown(self, bench):
        name = "model.layers.1.mlp.up_proj.weight"
        bench.edit(lambda tensors: tensors[name].fill_(float("nan")))
        command = [word for word in bench.command() if word != "--quiet"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and not result.stdout
        assert name in one_sentence(result.stderr.splitlines()[-1])

    def test_activations_too_large_for_the_compute_dtype(self, bench):
        bench.edit(lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(1e6))
        message = bench.refuse(dtype="float16")
        assert "layers.0" in message and "--dtype float32" in message


class TestCalibration:
    @pytest.mark.parametrize("name", ["missing.safetensors", "missing.txt", "missing.jsonl", "no-such-source", ""])
    def test_missing(self, bench, monkeypatch, name):
        monkeypatch.chdir(bench.folder)
        bench.add_tokenizer()
        assert f"--calibration {name}" in bench.refuse(calibration=name)

    @pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
    @pytest.mark.parametrize("content", ["", "\n\n"], ids=["empty", "blank"])
    def test_empty_text(self, bench, name, content):
        file = bench.text(name, content)
        assert str(file) in bench.refuse(calibration=file)

    def test_text_shorter_than_one_window(self, bench):
        file = bench.text("text.txt", "w1 w2 w3")
        message = bench.refuse(calibration=file, seq_len=32)
        assert str(file) in message and "32" in message and "--seq-len" in message

    @pytest.mark.parametrize("line", ["{", '{"content": "w1"}', '{"text": 1}', "[]"])
    def test_bad_line(self, bench, line):
        file = bench.text("text.jsonl", f'{{"text": "w1 w2"}}\n{line}\n')
        message = bench.refuse(calibration=file)
        assert str(file) in message and "line 2" in message

    def test_text_that_is_not_utf8(self, bench):
        file = bench.text("text.txt", b"caf\xe9")
        message = bench.refuse(calibration=file)
        assert str(file) in message and "UTF-8" in message

    @pytest.mark.parametrize("bad", [64, -1])
    def test_token_ids_beyond_the_vocabulary(self, bench, bad):
        ids = torch.zeros(8, 32, dtype=torch.int64)
        ids[7, 31] = bad
        save_file({"input_ids": ids}, bench.calibration)
        message = bench.refuse()
        assert str(bench.calibration) in message and "64" in message

    def test_tokenizer_whose_ids_the_model_does_not_have(self, bench, tmp_path_factory):
        small = tiny_checkpoint(tmp_path_factory.mktemp("small") / "model", vocab_size=32)
        for name in ("config.json", WEIGHTS):
            shutil.copy(small / name, bench.model / name)
        file = bench.text("text.txt", "w50 " * 5000)
        assert "vocabulary" in bench.refuse(calibration=file, seq_len=32)

    def test_text_for_a_model_without_a_tokenizer(self, bench):
        message = bench.refuse(calibration="builtin")
        assert "tokenizer" in message and str(bench.model) in message and ".safetensors" in message

    @pytest.mark.parametrize("name", ["missing.txt", "missing.safetensors", "no-such-source"])
    def test_missing_evaluation_data_is_blamed_on_eval(self, bench, name):
        bench.add_tokenizer()
        message = bench.refuse(eval=name)
        assert name in message and "--eval" in message and "--calibration" not in message

    def test_evaluation_text_shorter_than_one_window(self, bench):
        file = bench.text("text.txt", "w1 w2 w3")
        message = bench.refuse(eval=file)
        assert "--eval" in message and str(file) in message


class TestOutput:
    def test_non_empty_folder_is_refused(self, bench):
        bench.output.mkdir()
        (bench.output / "mine.txt").write_text("mine")
        message = bench.refuse()
        assert str(bench.output) in message and "--overwrite" in message

    @pytest.mark.usefixtures("reopen_here")
    def test_non_empty_folder_is_replaced_with_overwrite(self, bench):
        bench.output.mkdir()
        (bench.output / "mine.txt").write_text("mine")
        (bench.output / "config.json").write_text("{}")
        result = CliRunner().invoke(app, bench.command("--overwrite"))
        assert result.exit_code == 0, result.output
        assert not (bench.output / "mine.txt").exists() and (bench.output / "config.json").exists()
        assert not bench.output.with_name("out.partial").exists()

    def test_overwrite_keeps_the_old_folder_when_the_run_fails(self, bench):
        bench.output.mkdir()
        (bench.output / "mine.txt").write_text("mine")
        (bench.output / "config.json").write_text("{}")
        bench.edit(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
        assert "up_proj" in bench.refuse("--overwrite")
        assert sorted(file.name for file in bench.output.iterdir()) == ["config.json", "mine.txt"]

    @pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["plain", "overwrite"])
    def test_a_file_is_refused(self, bench, more):
        bench.output.write_text("mine")
        assert str(bench.output) in bench.refuse(*more)

    def test_a_folder_that_cannot_be_made(self, bench):
        (bench.folder / "file").write_text("")
        assert str(bench.folder / "file") in bench.refuse(output=bench.folder / "file" / "out")

    def test_another_run_is_at_work_there(self, bench):
        from grail.checkpoint.writer import OutputFolder

        with OutputFolder(bench.output):
            assert "another run" in bench.refuse()


class TestEval:
    """`grail eval` holds to the same form."""

    def refuse(self, *words: object) -> str:
        result = CliRunner().invoke(app, ["eval", "--quiet", *map(str, words)])
        assert result.exit_code == 2, result.output
        return one_sentence(result.stderr)

    def test_missing_data_is_blamed_on_data(self, bench):
        message = self.refuse(bench.model, "--data", bench.folder / "missing.safetensors")
        assert "missing.safetensors" in message and "--calibration" not in message

    def test_unknown_model(self):
        assert "no-such-model" in self.refuse("no-such-model")

    def test_folder_without_a_tokenizer(self, bench):
        assert "tokenizer" in self.refuse(bench.model)

    @pytest.mark.parametrize("content", ["{", "[]", '{"evaluation": [1]}'])
    def test_damaged_record(self, bench, content):
        (bench.model / "grail.json").write_text(content)
        assert "grail.json" in self.refuse(bench.model)

    def test_nan_in_a_weight(self, bench):
        name = "model.layers.1.mlp.up_proj.weight"
        bench.edit(lambda tensors: tensors[name].fill_(float("nan")))
        assert name in self.refuse(bench.model, "--data", bench.calibration)

    def test_config_that_is_missing(self, bench):
        (bench.model / "config.json").unlink()
        assert "config.json" in self.refuse(bench.model, "--data", bench.calibration)


class TestPython:
    @pytest.mark.parametrize(
        "options",
        [
            {"model": "no-such-model"},
            {"method": "no-such-method"},
            {"calibration": "missing.safetensors"},
            {"calibration": Path("missing.safetensors")},
            {"calibration": [torch.zeros(32)]},
            {"calibration": torch.full((4, 32), 64)},
            {"eval": "missing.safetensors"},
            {"eval": Path("missing.safetensors")},
            {"ratio": -1},
            {"ratio": 1},
            {"ratio": float("nan")},
            {"ratio": "abc"},
            {"ratio": None},
            {"ridge": -1e-3},
            {"ridge": float("nan")},
            {"samples": 0},
            {"samples": 1.5},
            {"seq_len": 1},
            {"set": {"no_such_key": "1"}},
            {"output": None},
        ],
        ids=lambda options: "-".join(f"{key}={value!r}" for key, value in options.items())[:40].replace("\n", ""),
    )
    def test_grail_error(self, bench, options):
        assert bench.refuse_in_python(**options)

    @pytest.mark.parametrize("spoil", ["config", "pickle", "truncated", "shape", "nan", "occupied"])
    def test_grail_error_for_a_spoilt_folder(self, bench, spoil):
        if spoil == "config":
            bench.config(model_type="gpt2")
        elif spoil == "pickle":
            (bench.model / WEIGHTS).rename(bench.model / "pytorch_model.bin")
        elif spoil == "truncated":
            (bench.model / WEIGHTS).write_bytes((bench.model / WEIGHTS).read_bytes()[:-1])
        elif spoil == "shape":
            bench.config(intermediate_size=41)
        elif spoil == "nan":
            bench.edit(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
        else:
            bench.output.mkdir()
            (bench.output / "mine.txt").write_text("mine")
        assert bench.refuse_in_python()

    @pytest.mark.parametrize("bad", ["nan", "unsupported", "no-output-needed"])
    def test_a_module(self, bench, bad):
        from tests.tiny import tiny_model

        if bad == "unsupported":
            from transformers import AutoModelForCausalLM, GPT2Config

            module = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=64))
        else:
            module = tiny_model()
            with torch.no_grad():
                module.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
        options = {"output": None} if bad == "no-output-needed" else {}
        message = bench.refuse_in_python(model=module, **options)
        assert ("gpt2" if bad == "unsupported" else "model.layers.1.mlp.up_proj.weight") in message
