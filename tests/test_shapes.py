"""Random checkpoints of real shapes, and the watching of a process's memory that they are made for."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import bench_memory
from benchmarks.bench_memory import Case, usage_of
from benchmarks.shapes import CALIBRATION, SHAPES, write_checkpoint
from grail.checkpoint.reader import SafetensorsFolder
from grail.errors import GrailError
from grail.families import open_family


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint("tiny", tmp_path_factory.mktemp("shapes") / "tiny", layers=3, windows=4, seq_len=32)


def tensors(folder):
    source = SafetensorsFolder(folder)
    return {name: source.get(name) for name in source.names()}


def test_it_opens_in_transformers_with_finite_logits(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == SHAPES["tiny"].parameters(3)
    with torch.no_grad():
        logits = model(load_file(tiny / CALIBRATION)["input_ids"]).logits.float()
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


def test_a_deep_stream_stays_finite(tmp_path):
    folder = write_checkpoint("tiny", tmp_path / "deep", layers=100)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(64)[None]).logits).all()


def test_channels_differ_in_size(tiny):
    block, ids = open_family(tiny).block(1), load_file(tiny / CALIBRATION)["input_ids"]
    hidden = block.hidden("mlp", open_family(tiny).embed(ids), {})
    sizes = hidden.flatten(0, 1).square().mean(0).sqrt()
    low, high = sizes.quantile(torch.tensor([0.1, 0.9])).tolist()
    assert high > 3 * low > 0


def test_rows_are_cuts_that_do_not_repeat(tiny):
    for name, weight in tensors(tiny).items():
        if weight.dim() == 2:
            unit = torch.nn.functional.normalize(weight.double(), dim=1)
            cosines = (unit @ unit.mT).fill_diagonal_(0)
            assert cosines.abs().max() < 0.8, name


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tiny, tmp_path):
    options = {"layers": 3, "windows": 4, "seq_len": 32}
    again = write_checkpoint("tiny", tmp_path / "again", **options)
    other = write_checkpoint("tiny", tmp_path / "other", seed=1, **options)
    files = sorted(file.name for file in tiny.iterdir())
    assert files == sorted(file.name for file in again.iterdir())
    assert all((tiny / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert all((tiny / name).read_bytes() != (other / name).read_bytes() for name in files if name.endswith("ensors"))


def test_a_deeper_network_begins_with_the_layers_of_a_shallower_one(tiny, tmp_path):
    shallow = tensors(write_checkpoint("tiny", tmp_path / "shallow", layers=1))
    deep = tensors(tiny)
    assert all(torch.equal(weight, deep[name]) for name, weight in shallow.items())
    first, second = (deep[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_a_shard_for_each_layer_and_one_for_the_rest(tiny):
    index = json.loads((tiny / "model.safetensors.index.json").read_text())["weight_map"]
    of_layers = {name.split(".")[2]: file for name, file in index.items() if name.startswith("model.layers.")}
    assert len(set(of_layers.values())) == 3
    rest = {file for name, file in index.items() if not name.startswith("model.layers.")}
    assert len(rest) == 1 and not rest & set(of_layers.values())


@pytest.mark.parametrize("windows,length", [(1, 2), (3, 63)])
def test_calibration_ids(tmp_path, windows, length):
    folder = write_checkpoint("tiny", tmp_path / "out", layers=1, windows=windows, seq_len=length)
    ids = load_file(folder / CALIBRATION)["input_ids"]
    assert (ids.dtype, ids.shape) == (torch.int64, (windows, length))
    assert ids.min() >= 0 and ids.max() < SHAPES["tiny"].vocabulary
    assert not (write_checkpoint("tiny", folder, layers=1, overwrite=True) / CALIBRATION).exists()


REAL = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", REAL)
def test_as_many_parameters_as_the_published_network(name):
    assert SHAPES[name].parameters(SHAPES[name].layers) == REAL[name]


@pytest.mark.parametrize("name", SHAPES)
def test_the_tensors_are_those_its_config_asks_for(tmp_path, name):
    shape = SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(shape.config(1)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_theta"] == shape.theta
    assert config.num_attention_heads // config.num_key_value_heads == shape.heads // shape.kv_heads
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert shape.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    if shape.tied:
        del wanted["lm_head.weight"]
    assert shape.layer_shapes(0) | shape.other_shapes() == wanted


@pytest.mark.parametrize(
    "options,sentence",
    [
        ({"shape": "llama-9b"}, "choose one of tiny"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"windows": 2}, "go together"),
        ({"seq_len": 2}, "go together"),
        ({"windows": 0, "seq_len": 32}, "--windows of 1"),
        ({"windows": 1, "seq_len": 1}, "--seq-len of 2"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, options, sentence):
    with pytest.raises(GrailError, match=sentence):
        write_checkpoint(**{"shape": "tiny", "output": tmp_path / "out"} | options)
    assert not list(tmp_path.iterdir())


ALLOCATES = "import sys, time; held = bytearray(int(sys.argv[1])); held[::4096] = b'x' * len(held[::4096]); "
STARTS = "import subprocess; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[3]], check=True); "
MB = 10**6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("own,child", [(60, 180), (180, 60)], ids=["child-larger", "child-smaller"])
def test_a_process_and_its_child_are_measured_apart(tmp_path, own, child):
    wait = "time.sleep(0.3)"
    command = [sys.executable, "-c", ALLOCATES + STARTS, str(own * MB), ALLOCATES + wait, str(child * MB)]
    used = usage_of(command, tmp_path / "log")
    assert used.returncode == 0, (tmp_path / "log").read_text()
    assert own * MB <= used.peak <= (own + 40) * MB
    assert child * MB <= used.child_peak <= (child + 40) * MB
    assert used.rusage >= max(own, child) * MB
    assert used.seconds >= 0.3


def test_a_failed_process_tells_its_exit_code_and_what_it_said(tmp_path):
    used = usage_of([sys.executable, "-c", "import sys; sys.exit('no room')"], tmp_path / "log")
    assert (used.returncode, (tmp_path / "log").read_text()) == (1, "no room\n")


def test_tokens_become_whole_windows():
    cases = [Case("tiny", 2, tokens, seq_len=2048) for tokens in (512, 2048, 16384, 5000)]
    assert [(case.windows, case.window) for case in cases] == [(1, 512), (1, 2048), (8, 2048), (2, 2048)]


def test_an_interrupted_measurement_leaves_no_process(tmp_path, monkeypatch):
    seen = []

    def interrupted(pid):
        seen.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_memory, "_peak", interrupted)
    with pytest.raises(KeyboardInterrupt):
        usage_of([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)
