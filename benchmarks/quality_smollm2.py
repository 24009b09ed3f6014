"""Perplexity of SmolLM2-135M before and after compression, on held-out topics of the built-in text.

    python benchmarks/quality_smollm2.py --output /tmp/quality            # the README's four rows
    python benchmarks/quality_smollm2.py --rows multi-head-paper

Rows: the model as it is (3 key/value heads shared by 9 heads), by default (towards the residual stream) and with every
site repaired on its own, as in the publication; so also its multi-head form (keys and values repeated, an
identical network), and the setting of REFERENCE section 3 (16 windows x 512, 2 of 9 heads, 460 of 1536 channels,
the publication's ridge form with λ = 0). "share" is log(compressed / dense) over log(pruned / dense).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

from grail import compress
from grail.checkpoint.gguf import cache_folder
from grail.checkpoint.locate import SMOLLM2, locate
from grail.report import versions

ROWS = {
    "gqa-stream": {"ratio": 0.3, "target": "stream"},
    "gqa": {"ratio": 0.3, "target": "hidden"},
    "multi-head": {"ratio": 0.3, "target": "hidden"},
    "multi-head-paper": {
        "attn_ratio": 0.2222, "mlp_ratio": 0.2995, "samples": 16, "seq_len": 512, "ridge_form": "paper", "ridge": 0.0,
        "target": "hidden",
    },
}  # fmt: skip


def multi_head_form(folder: Path) -> Path:
    """A cached copy of a GQA checkpoint with each key/value head repeated: the same network, LLaMA-2 style."""
    import torch
    from transformers import AutoModelForCausalLM

    target = cache_folder() / f"{folder.name}-multi-head"
    if (target / "config.json").exists():
        return target
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    repeat = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.view(-1, config.head_dim, config.hidden_size)
            projection.weight = torch.nn.Parameter(heads.repeat_interleave(repeat, 0).flatten(0, 1))
    config.num_key_value_heads = config.num_attention_heads
    work = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        model.save_pretrained(work)
        for file in folder.glob("*token*"):
            shutil.copy(file, work)
        try:
            os.replace(work, target)
        except OSError:  # another process was first
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def measure(row: str, output: Path, method: str) -> dict:
    """Compress one row; its perplexities, figures and retries."""
    folder = locate(SMOLLM2).folder
    model = folder if row.startswith("gqa") else multi_head_form(folder)
    report = compress(model, method=method, output=str(output / row), overwrite=True, compare_pruned=True, **ROWS[row])
    found = report.evaluation["perplexity"]
    excess = {name: math.log(found[name] / found["dense"]) for name in ("pruned", "compressed")}
    return {
        "row": row,
        "method": method,
        **found,
        "share": excess["compressed"] / excess["pruned"],
        "sites_with_raised_lambda": sum(site["retries"] > 0 for site in report.sites),
        "seconds": report.phases,
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--method", default="wanda-sp")
    parser.add_argument("--output", type=Path, default=Path("quality-output"))
    asked = parser.parse_args()
    for row in asked.rows:
        json.dump(measure(row, asked.output, asked.method), sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
