"""The public surface as a type checker sees it: clean, complete, and of use to a script."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import grail
from grail.flags import Flags
from grail.modules.recipe import ModuleRecipe

ROOT = Path(__file__).parents[1]
CHECKED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
BESIDE = {"sites", "preprocessing", "tokenizer", "model_options"}
"""What compress takes for networks in memory beside the recipe."""


def test_mypy_is_content_with_the_public_surface_and_with_a_script_that_uses_it():
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_public_is_checked():
    homes = {f"grail/{home.replace('.', '/')}.py" for home in grail._HOME.values()}
    kernels = (ROOT / "kernels/grail_kernels/__init__.py").read_text()
    homes |= {f"kernels/grail_kernels/{home}.py" for home in re.findall(r"^from \.(\w+) import", kernels, re.MULTILINE)}
    assert homes <= set(CHECKED)
    assert set(grail._HOME) | {"GrailError"} == set(grail.__all__)
    assert all(getattr(grail, name).__module__.startswith("grail.") for name in grail.__all__)


def test_the_options_that_a_type_checker_knows_are_those_there_are():
    there = {field.name for field in fields(ModuleRecipe)} - {"model"}
    assert Flags.__optional_keys__ == there | BESIDE and not Flags.__required_keys__


@pytest.mark.parametrize("file", CHECKED)
def test_nothing_is_ignored_without_a_reason(file):
    for line in (ROOT / file).read_text().splitlines():
        if "# type: ignore" in line:
            assert re.search(r"# type: ignore\[[\w-]+\]  # \w", line), line


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "grail/py.typed").exists() and (ROOT / "kernels/grail_kernels/py.typed").exists()
