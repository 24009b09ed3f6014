"""In the middle of somebody's script: nothing that the script has set changes, and nothing of it changes the result."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from torch import nn

import grail
from grail.checkpoint.gguf import converted
from grail.convert import convert
from grail.errors import GrailError, Interrupted
from grail.evaluate import evaluate
from grail.progress import Progress
from grail.soup.run import soup
from grail.surroundings import undisturbed
from tests.test_modules import MLP, ConvNet
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.tiny_hf import KINDS
from tests.tiny_hf import images as hf_images

pytestmark = pytest.mark.usefixtures("reopen_here")
ROOT = Path(__file__).parents[1]


def windows(count=8):
    return torch.randint(64, (count, 32), generator=torch.Generator().manual_seed(0))


# --- what a script sees of the process ---------------------------------------------------------------------------


def seen() -> dict:
    """Everything that a script could have set, as it is now."""
    backends = torch.backends
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "pools": [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()],
        "autocast": [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in ("cpu", "cuda")],
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        ),
        "precision": (torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "mkldnn": (backends.mkldnn.enabled, getattr(backends.mkldnn.matmul, "fp32_precision", None)),
        "torch": torch.default_generator.get_state().tolist(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "python": random.getstate(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "logging": (list(logging.root.handlers), logging.root.level, logging.root.disabled),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "folder": os.getcwd(),
        "path": list(sys.path),
    }  # fmt: skip


@contextmanager
def unchanged():
    before = seen()
    try:
        yield
    finally:
        after = seen()
        assert {name for name in before if before[name] != after[name]} == set()


# --- what a script may have set -----------------------------------------------------------------------------------


@contextmanager
def _calling(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


def _default_device(name):
    return _calling(torch.set_default_device, name, None)


def _default_dtype(dtype):
    return _calling(torch.set_default_dtype, dtype, torch.float32)


@contextmanager
def _seeded():
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    yield


def _deterministic():
    return _calling(torch.use_deterministic_algorithms, True, False)


def _products(precision):
    return _calling(torch.set_float32_matmul_precision, precision, "highest")


STATES = {
    "as-it-is": lambda: [],
    "everything": lambda: [
        _seeded(), torch.set_grad_enabled(False), _default_dtype(torch.float64), _default_device("meta"),
        torch.autocast("cpu", torch.bfloat16), _products("medium"), _deterministic(),
    ],
    "inference": lambda: [
        torch.inference_mode(), _default_dtype(torch.bfloat16), torch.device("meta"), _deterministic()
    ],
    "cpu-by-name": lambda: [torch.set_grad_enabled(True), _default_device("cpu"), _products("high")],
}  # fmt: skip
each_state = pytest.mark.parametrize("state", STATES)


@contextmanager
def entered(state):
    with ExitStack() as stack:
        for context in STATES[state]():
            stack.enter_context(context)
        with unchanged():
            yield


# --- what is done in it -------------------------------------------------------------------------------------------


def of_folder(folder: Path) -> dict:
    """All that is the same in equal runs."""
    names = [file.name for file in folder.iterdir() if file.name not in ("run.json", "report.html", "README.md")]
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def of_module(report) -> dict:
    tensors = report.model.state_dict()
    assert not any(tensor.is_inference() or tensor.is_meta for tensor in tensors.values())
    return tensors | {"sites": report.sites}


class Inputs:
    """Made once, in a plain state."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.source, self.ids = tiny_checkpoint(folder / "source"), windows()
        self.other = tiny_checkpoint(folder / "other", seed=1)
        self.file = str(tiny_calibration(folder / "ids.safetensors"))
        self.language = tiny_model()
        self.compressed = folder / "compressed"
        grail.compress(self.source, output=self.compressed, calibration=self.ids)
        self.mlp, self.conv = MLP(), ConvNet()
        self.vit = KINDS["vit-classifier"].build()
        self.vectors, self.images = torch.randn(64, 1, 1, 12), torch.randn(16, 3, 8, 8)
        self.pixels = hf_images(16)

    def compress(self, out, **flags):
        grail.compress(self.source, output=out, calibration=self.ids, **flags)
        return of_folder(out)

    def network(self, module, calibration, sites, **flags):
        return of_module(grail.compress(module, calibration=calibration, sites=sites, **{"ratio": 0.5} | flags))


def mlp_sites():
    return [grail.channels("fc1", "fc2", width=24), grail.channels("fc2", "fc3", width=20)]


def conv_sites():
    return [grail.channels("conv1", "conv2", width=16, norms=["bn1"])]


RUNS = {
    "folder": lambda given, out: given.compress(out),
    "folder-pruned": lambda given, out: given.compress(out, compensate=False),
    "folder-trained": lambda given, out: given.compress(out, method="wanda-pp-sp"),
    "folder-stream": lambda given, out: given.compress(out, target="stream"),
    "folder-fold": lambda given, out: given.compress(out, method="fold"),
    "folder-flap-error": lambda given, out: given.compress(out, method="flap", allocation="error"),
    "language-module": lambda given, out: of_module(grail.compress(given.language, calibration=given.ids)),
    "language-module-trained": lambda given, out: of_module(
        grail.compress(given.language, calibration=given.ids, method="wanda-pp-sp", output=out)
    ),
    "mlp-gram": lambda given, out: given.network(given.mlp, given.vectors, mlp_sites(), method="gram", bias=True),
    "mlp-pruned": lambda given, out: given.network(
        given.mlp, given.vectors, mlp_sites(), method="wanda", compensate=False, output=out
    ),
    "conv-fold": lambda given, out: given.network(given.conv, given.images, conv_sites(), method="fold", repair=True),
    "vit-stream": lambda given, out: of_module(
        grail.compress(given.vit, calibration=given.pixels, method="wanda", target="stream", output=out)
    ),
    "load": lambda given, out: grail.load(given.compressed).state_dict(),
    "evaluate": lambda given, out: evaluate(str(given.source), data=given.file),
    "convert": lambda given, out: convert(given.compressed, out, to="padded") and of_folder(out),
    "soup": lambda given, out: soup([given.source, given.other], out) and of_folder(out),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    torch.manual_seed(0)
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expected(given, tmp_path_factory):
    """By name, what a run gives in a plain script; made when first asked for."""
    found: dict = {}

    def of(run):
        if run not in found:
            found[run] = RUNS[run](given, tmp_path_factory.mktemp("expected") / "out")
        return found[run]

    return of


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@each_state
@pytest.mark.parametrize("run", RUNS)
def test_a_script_keeps_its_state_and_gets_the_same_bits(given, expected, tmp_path, run, state):
    wanted = expected(run)
    with entered(state):
        found = RUNS[run](given, tmp_path / "out")
    assert same(found, wanted)


# --- runs that end early ------------------------------------------------------------------------------------------


class Stopping(Progress):
    """Ctrl-C after the first layer."""

    def layers(self, label):
        def some(layers):
            for number, layer in enumerate(layers):
                if number:
                    raise KeyboardInterrupt
                yield layer

        return some


@each_state
def test_a_run_that_fails_or_is_stopped_leaves_the_state_too(given, tmp_path, state):
    broken = MLP()
    with torch.no_grad():
        broken.fc1.weight[0, 0] = float("nan")
    with entered(state):
        with pytest.raises(GrailError, match="no option"):
            grail.compress(given.source, output=tmp_path / "out", ratoi=1)
        with pytest.raises(GrailError, match="vocabulary"):
            grail.compress(given.source, output=tmp_path / "out", calibration=given.ids + 64)
        with pytest.raises(GrailError, match="NaN"):
            grail.compress(broken, method="wanda", calibration=given.vectors, sites=mlp_sites())
        with pytest.raises(Interrupted):
            grail.compress(
                given.source, output=tmp_path / "out", calibration=given.ids, store="disk", progress=Stopping()
            )


# --- the module that is given -------------------------------------------------------------------------------------


def training(module: nn.Module, inputs) -> list:
    """As a training loop has it: gradients, some layers in evaluation mode, some frozen, hooks, an optimiser."""
    calls: list = []
    module.train()
    first = next(inner for inner in module.modules() if isinstance(inner, nn.Linear | nn.Conv2d))
    first.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter is not first.weight)
    first.register_forward_hook(lambda *_: calls.append("forward"))
    first.register_full_backward_hook(lambda *_: calls.append("backward"))
    found = module(inputs)
    getattr(found, "logits", found).float().square().mean().backward()
    return calls


def state_of(module: nn.Module) -> dict:
    """Weights, their identities, modes, gradients, hooks, other attributes, configuration."""
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()},
        "who": {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()},
        "gradients": {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None},
        "requires": [p.requires_grad for p in module.parameters()],
        "modes": [inner.training for inner in module.modules()],
        "hooks": [
            [dict(value) for name, value in vars(inner).items() if name.endswith("hooks")] for inner in module.modules()
        ],
        "attributes": [set(vars(inner)) for inner in module.modules()],
        "class": [type(inner) for inner in module.modules()],
        "config": module.config.to_dict() if hasattr(module, "config") else None,
    }


GIVEN = {
    "language": (lambda given: tiny_model(), lambda given: {"calibration": given.ids}),
    "language-trained": (
        lambda given: tiny_model(), lambda given: {"calibration": given.ids, "method": "wanda-pp-sp"}
    ),
    "vit": (
        lambda given: KINDS["vit-classifier"].build(),
        lambda given: {"calibration": given.pixels, "method": "gram", "target": "stream"},
    ),
    "conv": (
        lambda given: ConvNet(),
        lambda given: {"calibration": given.images, "method": "fold", "sites": conv_sites(), "repair": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GIVEN)
def test_a_module_in_training_is_not_touched_and_gives_what_it_gives_at_rest(given, tmp_path, kind):
    build, flags = GIVEN[kind]
    torch.manual_seed(0)
    module = build(given)
    flags = flags(given)
    rested = of_module(grail.compress(module.eval(), **flags))
    training(module, flags["calibration"])
    before = state_of(module)
    grail.compress(module, output=tmp_path / "out", **flags)
    report = grail.compress(module, **flags)
    assert same(state_of(module), before)
    if kind != "conv":  # whose BatchNorm has learnt meanwhile
        assert same(of_module(report), rested)
    assert all(parameter.grad is None for parameter in report.model.parameters())
    assert not report.model.training


class Remembering(MLP):
    """Keeps what it computed last, which hangs on the graph of its forward."""

    def forward(self, x):
        self.last = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(self.last)))


def test_a_module_that_keeps_activations_can_be_copied(given):
    module = Remembering()
    module(given.vectors).sum().backward()
    last = module.last
    report = grail.compress(module, method="wanda", calibration=given.vectors, sites=mlp_sites())
    assert report.model.fc1.out_features < 24 and module.last is last and last.grad_fn is not None


# --- the context itself -------------------------------------------------------------------------------------------


def test_code_of_the_caller_finds_its_state_and_what_it_draws_counts():
    torch.manual_seed(3)
    expected = torch.rand(4, dtype=torch.float64)
    torch.manual_seed(3)
    with _default_dtype(torch.float64), torch.no_grad(), undisturbed() as caller:
        assert torch.is_grad_enabled() and torch.ones(1).dtype == torch.float32
        with caller.back():
            assert not torch.is_grad_enabled()
            first = torch.rand(2)
        torch.rand(5)
        with caller.back():
            second = torch.rand(1)
    assert torch.equal(torch.cat([first, second, torch.rand(1, dtype=torch.float64)]), expected)


def test_products_keep_all_digits_whatever_precision_the_script_has_set():
    """torch.set_float32_matmul_precision("medium") is a habit, and multiplies in bfloat16 where the processor can."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    wanted = x @ x
    with _products("medium"), unchanged(), undisturbed():
        assert torch.equal(x @ x, wanted)


def bars() -> list[bool]:
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    return [datasets.is_progress_bar_enabled(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()]


@pytest.mark.parametrize("hub", [True, False])
def test_other_libraries_keep_their_progress_bars(tmp_path, hub, monkeypatch):
    """They are switched off for the whole process while something is fetched or converted."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    monkeypatch.setenv("GRAIL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"no model")
    (enable_progress_bars if hub else disable_progress_bars)()
    before = bars()
    try:
        with pytest.raises(GrailError, match="could not be fetched"):
            grail.compress(
                tiny_tokenizer(tiny_checkpoint(tmp_path / "source")), output=tmp_path / "out", calibration="wikitext2"
            )
        with pytest.raises(GrailError, match="could not be fetched"):
            grail.compress(ConvNet(), sites=conv_sites(), method="wanda", calibration="hf:nobody/nothing")
        with pytest.raises(GrailError, match="cannot be read as a GGUF"):
            converted(tmp_path / "x.gguf")
        assert bars() == before and before[2] == hub
    finally:
        enable_progress_bars()


PRECISIONS = {
    "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "backend": "torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
    "everything": "torch.backends.fp32_precision = 'tf32'",
}
BY_BACKEND = """
import torch
from grail.surroundings import undisturbed

def tried(read):
    try:
        return read()
    except RuntimeError:
        return "mixed"

def seen():
    b = torch.backends
    parts = [b, b.cuda.matmul, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv, b.cudnn, b.cudnn.conv]
    return [tried(torch.get_float32_matmul_precision), tried(lambda: b.cuda.matmul.allow_tf32)] + [
        part.fp32_precision for part in parts
    ]

x, conv = torch.randn(64, 256), torch.nn.Conv1d(64, 64, 3)
wanted, convolved = x @ x.mT, conv(x)
{setting}
before = seen()
with undisturbed():
    assert torch.equal(x @ x.mT, wanted) and torch.equal(conv(x), convolved)
    assert "tf32" not in seen()[3:4] + seen()[5:7] + seen()[8:] and "mixed" not in seen(), seen()
assert seen() == before, (before, seen())
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one precision for all")
@pytest.mark.parametrize("way", PRECISIONS)
def test_precisions_that_were_set_by_backend_come_back(way):
    script = BY_BACKEND.replace("{setting}", PRECISIONS[way])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert not done.returncode, done.stderr[-2000:]


def test_variables_that_the_caller_sets_meanwhile_stay(monkeypatch):
    monkeypatch.setenv("GRAIL_TEST_GONE", "1")
    monkeypatch.setenv("GRAIL_TEST_SET", "before")
    with undisturbed() as caller:
        os.environ["GRAIL_TEST_OURS"] = "1"
        with caller.back():
            os.environ["GRAIL_TEST_SET"] = "after"
            del os.environ["GRAIL_TEST_GONE"]
    assert os.environ["GRAIL_TEST_SET"] == "after"
    assert not {"GRAIL_TEST_GONE", "GRAIL_TEST_OURS"} & os.environ.keys()


FRESH = """
import tests.test_global_state as state, grail, torch
from grail.families.network import channels
before = state.seen()
net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
torch.manual_seed(0)
drawn = torch.rand(3)
torch.manual_seed(0)
before = state.seen()
grail.compress(net, method="fold", calibration=torch.randn(16, 6, generator=torch.Generator().manual_seed(1)),
               sites=[channels("0", "2", width=8)])
after = state.seen()
before["pools"] = after["pools"]  # scikit-learn's own is loaded meanwhile
assert torch.equal(torch.rand(3), drawn)
print([name for name in before if before[name] != after[name]])
"""


def test_importing_what_a_method_needs_changes_nothing_either():
    """scikit-learn sets variables of OpenMP and a filter for warnings when it is imported."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
