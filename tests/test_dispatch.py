"""Which implementation runs and who decided; grail_kernels alone in the world; the folder kernels/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grail_kernels import GramAccumulator, backend, ridge_solve
from grail_kernels.inputs import device_of

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "GRAIL_KERNELS_BACKEND"
OPERATIONS = ("gram", "ridge")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def python(code: str, *, cwd: Path = ROOT, path: tuple[Path, ...] = ()) -> str:
    """Run code in a fresh interpreter; its standard output. Fails with its standard error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_default_on_cpu(operation):
    chosen = backend(operation, "cpu")
    assert chosen.name == "torch"
    assert "cpu" in chosen.reason


@pytest.mark.parametrize("operation", OPERATIONS)
def test_environment_overrides_the_default(operation, monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    chosen = backend(operation, "cpu")
    assert chosen.name == "reference"
    assert VARIABLE in chosen.reason


@pytest.mark.parametrize("operation", OPERATIONS)
def test_argument_overrides_the_environment(operation, monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    chosen = backend(operation, "cpu", "torch")
    assert chosen.name == "torch"
    assert VARIABLE not in chosen.reason


@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_environment_variable_is_no_choice(operation, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    assert backend(operation, "cpu").name == "torch"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_name_in_the_argument_raises(operation):
    with pytest.raises(ValueError, match="fastest"):
        backend(operation, "cpu", "fastest")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_name_in_the_environment_raises(operation, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fastest")
    with pytest.raises(ValueError, match=VARIABLE):
        backend(operation, "cpu")


def test_unknown_operation_raises():
    with pytest.raises(ValueError, match="cholesky"):
        backend("cholesky")


def test_accumulator_obeys_argument_and_environment(monkeypatch):
    assert GramAccumulator(4).backend.name == "torch"
    assert GramAccumulator(4, backend="reference").backend.name == "reference"
    monkeypatch.setenv(VARIABLE, "reference")
    assert GramAccumulator(4).backend.name == "reference"
    assert GramAccumulator(4, backend="torch").backend.name == "torch"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gpu_that_no_configuration_was_checked_for_runs_torch(operation, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    chosen = backend(operation, "cuda")
    assert chosen.name == "torch"
    assert "7.5" in chosen.reason
    with pytest.raises(ValueError, match=r"7\.5"):
        backend(operation, "cuda", "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend(operation, "cuda").name == "triton"


def test_index_zero_is_a_gpu_and_not_the_default():
    assert device_of(None).type == "cpu"
    try:
        assert device_of(0).type != "cpu"
    except RuntimeError as error:  # torch itself, on a machine without one
        assert "accelerator" in str(error) or "cuda" in str(error).lower()


def test_what_reads_a_padded_state_is_what_was_asked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    state = GramAccumulator(40).update(x).state_dict()
    assert state["padded"]
    loaded = GramAccumulator(40, backend="torch")
    loaded.load_state_dict(state)
    assert (loaded.packed.padded, loaded.packed.backend.name) == (True, "torch")
    assert torch.allclose(loaded.to_dense(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_public_operations_refuse_an_unknown_backend(monkeypatch):
    a, rhs = torch.eye(2), torch.ones(2, 1)
    with pytest.raises(ValueError, match="fastest"):
        GramAccumulator(4, backend="fastest")
    with pytest.raises(ValueError, match="fastest"):
        ridge_solve(a, rhs, 0.0, backend="fastest")
    monkeypatch.setenv(VARIABLE, "fastest")
    with pytest.raises(ValueError, match="fastest"):
        GramAccumulator(4)
    with pytest.raises(ValueError, match="fastest"):
        ridge_solve(a, rhs, 0.0)


def test_kernels_work_without_transformers_and_triton():
    code = """
import sys
sys.modules["transformers"] = sys.modules["triton"] = None
import torch, grail_kernels
gram = grail_kernels.GramAccumulator(3).update(torch.eye(3)).to_dense()
print(grail_kernels.ridge_solve(gram, torch.ones(3, 1), 1.0).solution.sum().item())
assert "grail" not in sys.modules
"""
    assert float(python(code, path=(ROOT / "kernels",))) == pytest.approx(1.5)


def test_kernels_import_does_not_load_transformers_or_triton():
    """Not loaded either, where they are installed: the import stays light."""
    code = """
import sys, torch
before = set(sys.modules)
import grail_kernels
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & {"transformers", "triton", "grail"}))
"""
    assert python(code, path=(ROOT / "kernels",)) == "[]"


def test_kernels_folder_loads_by_path_under_another_name(tmp_path):
    """As Hugging Face kernels does it: every import inside the package has to be relative."""
    folder = ROOT / "kernels" / "grail_kernels"
    code = f"""
import importlib.util, sys, torch
sys.modules["grail_kernels"] = None
spec = importlib.util.spec_from_file_location(
    "lent_kernel", {str(folder / "__init__.py")!r}, submodule_search_locations=[{str(folder)!r}])
module = sys.modules["lent_kernel"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.GramAccumulator(2).update(torch.ones(3, 2)).to_dense().sum().item())
"""
    assert float(python(code, cwd=tmp_path)) == 12.0


def test_metadata_for_hugging_face_kernels():
    metadata = json.loads((ROOT / "kernels" / "grail_kernels" / "metadata.json").read_text())
    assert metadata["id"].isidentifier()
    assert metadata["name"] == "grail-gram"
    assert metadata["python-depends"] == []
    assert metadata["backend"] == {"type": "cpu"}
    assert set(metadata) >= {"version", "license", "digest"}


def test_kernels_folder_has_no_init():
    """With one, `kernels` shadows Hugging Face's package of that name, which transformers imports (DESIGN 4)."""
    assert (ROOT / "kernels" / "grail_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root():
    """`import transformers` alone is lazy and proves nothing; a class has to be asked for."""
    assert python("from transformers import LlamaConfig; print(LlamaConfig().model_type)") == "llama"
