"""The kernels outside GRAIL: through Hugging Face kernels, as an example script, and over processes."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from grail_kernels import CrossAccumulator, GramAccumulator

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

UNEQUAL_RANKS = """
import sys, torch, torch.distributed as dist
from grail_kernels import CrossAccumulator, GramAccumulator
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
x = torch.randn(90, 2, 300, generator=torch.Generator().manual_seed(0))
x[:40] += 1000.0
x[40:] -= 500.0
mine = (x[:40], x[:0], x[40:])[rank]
for centred in (False, True):
    for sites in (None, 2):
        part = mine[:, 0] if sites is None else mine.transpose(0, 1)
        gram = GramAccumulator(300, centred=centred, sites=sites).update(part)
        if rank == 0:
            gram.to_dense()
        gram.all_reduce()
        whole = x[:, :1].double() if sites is None else x.double()
        if centred:
            whole = whole - whole.mean(0)
        expected = torch.einsum("tsh,tsk->shk", whole, whole)
        found = gram.to_dense().view(-1, 300, 300)
        assert torch.equal(found, found.mT), "symmetric"
        error = ((found.double() - expected).norm() / expected.norm()).item()
        assert error < 1e-6, (centred, sites, error)
        gap = (gram.mean.view(-1, 300) - x.double().mean(0)[: sites or 1]).abs().max().item()
        assert gap < 1e-6 * 1000, (centred, sites, gap)  # float32 sums of rows of that size
        assert gram.count == (90 if sites is None else [90, 90])
cross = CrossAccumulator(300, 5, sites=2).update(mine.transpose(0, 1), mine.transpose(0, 1)[..., :5]).all_reduce()
expected = torch.einsum("tsh,tsk->shk", x.double(), x[..., :5].double())
assert ((cross.value.double() - expected).norm() / expected.norm()).item() < 1e-6 and cross.count == [90, 90]
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


@pytest.mark.parametrize(("script", "ranks"), [(RANK, 2), (UNEQUAL_RANKS, 3)], ids=["alike", "empty and read ranks"])
def test_processes_sum_to_one(tmp_path, script, ranks):
    command = [sys.executable, "-c", script]
    running = [
        subprocess.Popen([*command, str(rank), tmp_path / "store"], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    said = [(process.communicate()[1], process.returncode) for process in running]
    assert [code for _, code in said] == [0] * ranks, "\n".join(text for text, _ in said)


KINDS = {
    "gram": lambda: GramAccumulator(30, precise=True, tile=7),
    "centred": lambda: GramAccumulator(30, centred=True),
    "sites": lambda: GramAccumulator(30, sites=1),
    "cross": lambda: CrossAccumulator(30, 30),
    "cross of sites": lambda: CrossAccumulator(30, 30, sites=1),
}


@pytest.mark.parametrize("copy", [lambda a: pickle.loads(pickle.dumps(a)), deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_continues_alone(kind, copy):
    x = torch.randn(1, 80, 30, generator=torch.Generator().manual_seed(0)) + 3
    original = KINDS[kind]()
    arguments = 2 if "cross" in kind else 1
    shaped = x if "sites" in kind else x[0]
    original.update(*[shaped] * arguments)
    copied = copy(original)
    assert copied.count == original.count and copied.precise == original.precise
    before = read(original).clone()
    copied.update(*[shaped] * arguments)
    assert torch.equal(read(original), before), "the original does not move"
    original.update(*[shaped] * arguments)
    assert torch.allclose(read(copied), read(original), rtol=1e-6, atol=1e-5)
    assert not torch.equal(read(copied), before)


def read(accumulator):
    return accumulator.value if isinstance(accumulator, CrossAccumulator) else accumulator.to_dense()


@pytest.mark.parametrize("kind", KINDS)
def test_made_in_inference_mode_used_outside_and_the_other_way_round(kind):
    x = torch.randn(1, 80, 30, generator=torch.Generator().manual_seed(0))
    arguments = [x if "sites" in kind else x[0]] * (2 if "cross" in kind else 1)
    with torch.inference_mode():
        made = KINDS[kind]().update(*arguments)
        inside = x + 1
    made.update(*arguments)
    outside = KINDS[kind]().update(*arguments)
    with torch.inference_mode():
        outside.update(*arguments)
        read(outside)
        made.load_state_dict(outside.state_dict())
    made.update(*(inside if "sites" in kind else inside[0] for _ in arguments))
    outside.update(*(inside if "sites" in kind else inside[0] for _ in arguments))
    assert torch.allclose(read(outside), read(made), rtol=1e-6, atol=1e-5)
