"""The machine code of every shipped configuration, without a GPU; and that the check would see what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from grail_kernels.aot import TARGETS, VARIANTS
from grail_kernels.configs import GRAM, GRAM_THREE_DOTS, INTERPRETER, target_of

PLANTED = """
import json, sys
from grail_kernels.aot import VARIANTS, check
from grail_kernels.configs import GramConfig
target, *numbers = json.loads(sys.argv[1])
print(json.dumps(check(target, VARIANTS[0], GramConfig(*numbers)).problems))
"""


def python(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env=environment)


def test_every_shipped_configuration_compiles_to_what_it_should():
    done = python("-m", "grail_kernels.aot", "--json")
    results = json.loads(done.stdout)
    assert {r["target"]: r["problems"] for r in results if r["problems"]} == {}
    assert done.returncode == 0
    assert len(results) == len(TARGETS) * len(VARIANTS) - 3 * sum(variant.descriptors for variant in VARIANTS)
    assert set(TARGETS) == (set(GRAM) | set(GRAM_THREE_DOTS)) - {INTERPRETER}


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


def test_the_table_says_what_is_wrong_with_its_exit_code(monkeypatch, capsys):
    from grail_kernels import aot

    good = aot.Compiled("sm_80", "gram bf16", 200, 0, 1000, 0, 64, 24, 0)
    bad = aot.Compiled("sm_90", "gram bf16", 255, 7, 1000, 0, 8, 24, 0, ["7 spills"])
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(sys, "argv", ["aot"])
    for results, code in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(aot, "check_all", lambda targets, results=results: results)
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
