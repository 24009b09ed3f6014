"""The machine code of every shipped configuration, without a GPU; and that the check would see what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from grail_kernels.aot import compiles
from grail_kernels.configs import GRAM, INTERPRETER, target_of
from grail_kernels.variants import MORE_TARGETS, TARGETS, VARIANTS

PLANTED = """
import json, sys
from grail_kernels.aot import check
from grail_kernels.configs import GramConfig
from grail_kernels.variants import VARIANTS
target, *numbers = json.loads(sys.argv[1])
print(json.dumps(check(target, VARIANTS[0], GramConfig(*numbers)).problems))
"""
DEMOTED = """
import dataclasses, json, sys
from grail_kernels import aot
from grail_kernels.variants import VARIANTS, specialise
target, name, lost = json.loads(sys.argv[1])
def careless(*args):
    asked = specialise(*args)
    return dataclasses.replace(asked, aligned=tuple(name for name in asked.aligned if name not in lost))
aot.specialise = careless
print(json.dumps(aot.check(target, next(v for v in VARIANTS if v.name == name)).problems))
"""
LAUNCHES = """
import itertools, json, os, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import jit
from grail_kernels import cholesky, inputs, launch, launch_packed, variants
from grail_kernels.packed import packed_size

TARGET = "sm_90"
backend = make_backend(GPUTarget("cuda", 90, 32))
def key(name, signature, constants, aligned):
    return json.dumps([name, signature, dict(sorted(constants.items())), sorted(aligned)])
compiled = set()
for variant in variants.VARIANTS:
    asked = variants.specialise(variant, "cuda", variant.config(TARGET))
    compiled.add(key(variant.kernel, asked.signature, asked.constants, asked.aligned))
asked_for = {}
def run(self, *args, grid, warmup, **kwargs):
    bind = jit.create_function_from_signature(self.signature, self.params, backend)
    names, specialisation, _ = bind(*args, **kwargs)
    signature = {n: kind for n, (kind, _) in zip(names, specialisation)}
    constants = {n: value for n, (kind, value) in zip(names, specialisation) if kind == "constexpr"}
    aligned = [n for n, (kind, value) in zip(names, specialisation) if kind != "constexpr" and "D" in str(value or "")]
    asked_for.setdefault(key(self.__name__, signature, constants, aligned), CASE)
jit.JITFunction.run = run
launch._target = lambda device: TARGET
launch.interpreted = lambda: False

def views(width, dtype):
    big = torch.zeros(4, 70, 3 * width + 40, dtype=dtype)
    yield "dense", torch.zeros(1, 50, width, dtype=dtype)
    yield "one row", torch.zeros(1, 1, width, dtype=dtype)
    yield "sites", torch.zeros(3, 50, width, dtype=dtype)
    yield "columns", big[:, :, 16 : 16 + width]
    yield "odd columns", big[:1, :, 1 : 1 + width]
    yield "odd rows", big[:1, 1::3, :width]
    yield "strided", big[:1, :, : 3 * width : 3]
    yield "transposed", torch.zeros(1, width, 70, dtype=dtype).mT
    yield "broadcast", torch.zeros(1, 1, width, dtype=dtype).expand(2, 50, width)

for dtype, width in itertools.product((torch.bfloat16, torch.float16, torch.float32), (1, 7, 16, 35, 128, 1075, 8192)):
    tile = launch.tile_of(torch.device("cpu"))
    for name, x in views(width, dtype):
        for masked, shifted, splits, precise, tma in itertools.product(*[(0, 1)] * 2, (1, 2), (0, 1), launch.KERNELS):
            CASE = f"{dtype} {width} {name} masked={masked} shifted={shifted} splits={splits} precise={precise} {tma}"
            os.environ["GRAIL_KERNELS_GRAM"] = tma
            data = torch.zeros(len(x), packed_size(width, tile, padded=True))
            mask = torch.ones(x.shape[0], x.shape[1] + 1, dtype=torch.bool)[:, 1:] if masked else None
            shift = torch.zeros(len(x), width + 1)[:, 1:] if shifted else None
            launch.gram_add(data, x, mask, shift_SH=shift, splits=splits, precise=precise)
            for columns in (1, 33, 1072):
                y = torch.zeros(x.shape[1], columns + 3, dtype=dtype)[:, 3:]
                out = torch.zeros(width, -(-columns // 16) * 16)
                mask_T = None if mask is None else mask[0]
                launch.cross_add(out, x[0], y, mask_T, splits=splits, precise=precise)
for width, columns in itertools.product((1, 31, 128, 300), (1, 5, 64)):
    CASE = f"packed {width} {columns}"
    data, index = torch.zeros(packed_size(width, 128, padded=True)), torch.arange(width + 1)[1:]
    launch_packed.packed_gather(data, 128, index, index, torch.zeros(width, width + 3)[:, 3:])
    launch_packed.packed_scatter(data, 128, index, torch.zeros(width, width))
    launch_packed.packed_matmul(data, 128, torch.zeros(width + 1, columns)[1:])
for size, columns in itertools.product((1, 3, 16, 17, 64, 100, 128), (1, 32, 70)):
    CASE = f"small {size} {columns}"
    a = torch.zeros(3, size, size)
    launch_packed.factor_stack(a)
    launch_packed.solve_stack(a, torch.zeros(3, size, columns + 1)[..., 1:])
unknown = {case: key for key, case in asked_for.items() if key not in compiled}
print(json.dumps({"unknown": unknown, "launched": len(asked_for), "unused": len(compiled - set(asked_for))}))
"""


def python(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env=environment)


def test_every_shipped_configuration_compiles_to_what_it_should():
    done = python("-m", "grail_kernels.aot", "--json")
    results = json.loads(done.stdout)
    assert {r["target"]: r["problems"] for r in results if r["problems"]} == {}
    assert done.returncode == 0
    wanted = {(t, v.name) for t in TARGETS for v in VARIANTS if v.essential and compiles(t, v)}
    assert {(r["target"], r["variant"]) for r in results} == wanted
    assert set(TARGETS) == set(GRAM) - {INTERPRETER}


@pytest.mark.parametrize(
    ("target", "config", "complaint"),
    [
        ("sm_80", (256, 256, 32, 8, 4, 2, 1), "spills"),
        ("gfx942", (256, 256, 32, 8, 4, 2, 1), "spills"),
        ("sm_100", (256, 512, 64, 8, 8, 2, 4), "no matrix instruction"),
    ],
    ids=["spills on sm_80", "spills on gfx942", "trap on sm_100"],
)
def test_a_planted_bad_configuration_is_caught(target, config, complaint):
    done = python("-c", PLANTED, json.dumps([target, *config]))
    assert complaint in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("target", "variant", "lost"),
    [
        ("sm_80", "cross bf16", ["y_ptr"]),
        ("sm_90", "cross bf16", ["y_ptr"]),
        ("sm_90", "cross fp32", ["stride_yt"]),
        ("gfx942", "cross bf16", ["y_ptr"]),
        ("sm_100", "gram bf16", ["x_ptr"]),
    ],
    ids=str,
)
def test_an_operand_without_wide_copies_is_caught(target, variant, lost):
    done = python("-c", DEMOTED, json.dumps([target, variant, lost]))
    assert "narrower than 16 bytes" in done.stdout, done.stderr


def test_every_launch_is_a_specialisation_that_is_compiled():
    """Odd widths, unaligned, strided, transposed and broadcast operands included: no kernel runs that was not looked
    at. In a process without the interpreter, with launches recorded in place of run."""
    done = python("-c", LAUNCHES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["unknown"] == {}
    assert found["unused"] == 0, "variants that no launch asks for"


def test_the_devices_on_request_share_checked_configurations():
    assert {target.configuration for target in MORE_TARGETS.values()} <= set(GRAM)
    for name, target in MORE_TARGETS.items():
        assert target_of(divmod(int(name.removeprefix("sm_")), 10)) == target.configuration


def test_the_table_says_what_is_wrong_with_its_exit_code(monkeypatch, capsys):
    from grail_kernels import aot

    good = aot.Compiled("sm_80", "gram bf16", 200, 0, 1000, 0, 64, 24, 0)
    bad = aot.Compiled("sm_90", "gram bf16", 255, 7, 1000, 0, 8, 24, 0, ["7 spills"])
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(sys, "argv", ["aot"])
    for results, code in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(aot, "check_all", lambda *_, results=results, **__: results)
        assert aot.main() == code
    assert "7 spills" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_89"),
    ],
    ids=str,
)
def test_devices_find_their_configuration(capability, name):
    assert target_of(capability) == name


def test_a_device_without_a_checked_configuration_is_refused():
    with pytest.raises(RuntimeError, match=r"7\.5"):
        target_of((7, 5))
    with pytest.raises(RuntimeError, match="gfx90a"):
        target_of(None, "gfx90a:sramecc+")
    assert target_of(None, "gfx942:sramecc+:xnack-") == "gfx942"
