"""The two packages install as a wheel, and kernels/ shadows nobody (DESIGN section 4)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_both_packages_and_every_module(tmp_path):
    """Built from a copy: setuptools writes beside the sources, and takes up what an earlier build left there."""
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "results", "demo-output")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("grail_compress-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = [*ROOT.glob("grail/**/*.py"), *ROOT.glob("kernels/grail_kernels/**/*.py")]
    expected = {str(file.relative_to(ROOT)).removeprefix("kernels/") for file in modules}
    assert expected <= held
    assert {"grail/py.typed", "grail_kernels/metadata.json", "grail_kernels/py.typed"} <= held
    assert not any(name.startswith("kernels/") for name in held)
