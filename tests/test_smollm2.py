"""The main job on the real SmolLM2-135M (GGUF from PyPI): acceptance of issue A, with fewer windows."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from benchmarks.quality_smollm2 import measure

PLAIN = """
import sys
sys.modules["grail"] = sys.modules["grail_kernels"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
assert type(model).__name__ == "LlamaForCausalLM"
ids = tokenizer.apply_chat_template([{"role": "user", "content": "Say hello."}], return_tensors="pt",
                                    add_generation_prompt=True, return_dict=True)
out = model.generate(**ids, max_new_tokens=12, do_sample=False)
assert out.shape[1] > ids["input_ids"].shape[1]
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "out"
    command = ["compress", "--model", "smollm2-135m", "--method", "wanda-sp", "--ratio", "0.3"]
    command += ["--samples", "16", "--compare-pruned", "--json", "--output", str(out)]
    done = subprocess.run([sys.executable, "-m", "grail", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.mark.slow
def test_repair_takes_away_at_least_a_third_of_the_damage(compressed):
    found = compressed[1]["evaluation"]["perplexity"]
    assert math.log(found["compressed"] / found["dense"]) <= 2 / 3 * math.log(found["pruned"] / found["dense"])


@pytest.mark.slow
def test_plain_transformers_loads_and_generates(compressed):
    done = subprocess.run([sys.executable, "-c", PLAIN, compressed[0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_eval_repeats_the_printed_perplexity(compressed):
    out, document = compressed
    done = subprocess.run([sys.executable, "-m", "grail", "eval", out, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["models"].values()
    assert found["perplexity"] == pytest.approx(document["evaluation"]["perplexity"]["compressed"], rel=1e-4)


@pytest.mark.slow
def test_in_line_with_the_reference_in_the_publications_form(tmp_path):
    found = measure("multi-head-paper", tmp_path, "wanda-sp")
    config = json.loads((tmp_path / "multi-head-paper" / "config.json").read_text())
    assert (config["num_attention_heads"], config["intermediate_size"]) == (7, 1076)
    assert found["share"] <= 0.70
