"""One whole layer with SmolLM2-135M's shapes and random weights: load, calibrate, select, compensate, write.

    pytest benchmarks/bench_block.py --benchmark-only

`against_forward` in extra_info: time of the layer over the time of its plain dense forward on the same tokens.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import grail
from benchmarks.timing import record, side_by_side
from grail.checkpoint import reopen
from grail.families import open_family

WINDOWS, LENGTH = 16, 512


def bench_layer(benchmark, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=512, head_dim=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    ids = torch.randint(512, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(reopen, "verify", lambda *args, **kwargs: None)
    model = open_family(tmp_path / "dense")
    block, streams = model.block(0), [model.embed(part) for part in ids.split(8)]

    def compress():
        return grail.compress(
            str(tmp_path / "dense"), output=str(tmp_path / "out"), overwrite=True, method="wanda-sp", target="hidden",
            calibration=ids,
        )  # fmt: skip

    times = side_by_side({"layer": compress, "forward": lambda: [block.run(x) for x in streams]})
    benchmark.pedantic(compress, rounds=1)
    record(
        benchmark,
        times,
        tokens=ids.numel(),
        against_forward=times["layer"]["p50"] / times["forward"]["p50"],
    )
