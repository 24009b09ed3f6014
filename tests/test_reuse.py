"""The kernels outside GRAIL: through Hugging Face kernels, as an example script, and over processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RANK = """
import sys, torch, torch.distributed as dist
from grail_kernels import CrossAccumulator, GramAccumulator
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
x = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
mine = x[:25] if rank == 0 else x[25:]
gram = GramAccumulator(20).update(mine).all_reduce()
cross = CrossAccumulator(20, 20).update(mine, mine).all_reduce()
whole = GramAccumulator(20).update(x)
assert torch.allclose(gram.to_dense(), whole.to_dense(), rtol=1e-5, atol=1e-5)
assert torch.allclose(cross.value, whole.to_dense(), rtol=1e-5, atol=1e-5)
assert torch.allclose(gram.sum, whole.sum) and gram.count == cross.count == 60
dist.destroy_process_group()
"""


def test_hugging_face_kernels_loads_the_folder():
    kernels = pytest.importorskip("kernels")
    loaded = kernels.get_local_kernel(ROOT / "kernels" / "grail_kernels")
    x = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded.GramAccumulator(7).update(x).to_dense(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_the_example_prunes_with_less_damage():
    example = ROOT / "kernels" / "examples" / "obs_linear.py"
    assert len(example.read_text().splitlines()) < 30
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    pruned, updated = (float(value) for value in re.findall(r": (0\.\d+)", done.stdout))
    assert updated < 0.6 * pruned


def test_two_processes_sum_to_one(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), tmp_path / "store"], stderr=subprocess.PIPE) for rank in range(2)]
    assert [(r.communicate()[1], r.returncode)[1] for r in ranks] == [0, 0]
