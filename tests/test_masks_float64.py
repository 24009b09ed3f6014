"""Masks of the one-shot scores against the formulas of REFERENCE section 1, end to end.

The formulas are written out again here in float64, on activations stored with forward hooks of plain transformers
modules; nothing of GRAIL computes them. The masks are read from the written weights: which of the source's producer
rows are still there. Shapes: T rows of activations, H width of a site, O outputs of its consumer, U units of it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import grail
from benchmarks.quality_smollm2 import multi_head_form
from grail.calibration.text import Windows, load_calibration
from grail.calibration.tokenizer import load_tokenizer
from grail.checkpoint.locate import SMOLLM2, locate
from grail.checkpoint.reader import SafetensorsFolder
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here")

METHODS: dict[str, dict] = {
    "wanda-sp": {"method": "wanda-sp"},
    "flap": {"method": "flap", "set": {"structure": "UL-UM"}},
    "slimgpt": {"method": "slimgpt", "set": {"greedy": "false"}, "allocation": "uniform"},
}
TIE = 1e-5
"""Two scores that differ by less than this share may change places: GRAIL's activations are float32, and so are the
norms in transformers' float64 modules."""


class _Seen(Exception):
    """Ends a forward once the hooked module was reached."""


def stored_inputs(model: nn.Module, module: nn.Module, windows_NL: Tensor) -> Tensor:
    """What reaches `module` when `model` runs on the windows, [T, H] in the model's dtype."""
    seen = []

    def keep(_, arguments):
        seen.append(arguments[0].flatten(0, -2))
        raise _Seen

    hook = module.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            model.model(windows_NL, use_cache=False)
    except _Seen:
        return seen[0]
    finally:
        hook.remove()
    raise AssertionError("the module was never called")


@dataclass
class StoredSite:
    """One site as the closed loop sees it: its consumer before and after (as plain modules, float64), its producers'
    rows before and after in the stored dtype, and its activations [T, H]."""

    name: str
    kind: str
    consumer: nn.Linear
    written: nn.Linear
    rows: Tensor
    written_rows: Tensor
    x_TH: Tensor
    groups: int
    size: int

    @property
    def kept(self) -> Tensor:
        """Units [K] whose producer rows were written, found by their bits; every row of a unit must be there."""
        per_unit = self.rows.unflatten(0, (-1, self.size)).flatten(1)
        there = self.written_rows.unflatten(0, (-1, self.size)).flatten(1)
        equal = (there[:, None] == per_unit[None]).all(-1)  # [K, U]
        assert (equal.sum(1) == 1).all(), f"{self.name}: a written unit is none of the source's"
        kept = equal.int().argmax(1)
        assert (kept.diff() > 0).all(), f"{self.name}: units are not in their order"
        return kept

    @property
    def channels(self) -> Tensor:
        """Kept channels [K * size]."""
        return (self.kept[:, None] * self.size + torch.arange(self.size)).flatten()

    @torch.no_grad()
    def error(self, rows: slice = slice(None), *, repaired: bool = True) -> float:
        """Σ‖W x + b − W' x_P − b'‖² / Σ‖W x‖² over stored rows; not repaired: W' = W_P, b' = b."""
        x_TH, weight_OH, kept = self.x_TH[rows], self.consumer.weight, self.channels
        if repaired:
            left_TO = self.consumer(x_TH) - self.written(x_TH[:, kept])
        else:
            left_TO = x_TH @ weight_OH.T - x_TH[:, kept] @ weight_OH[:, kept].T
        return (left_TO.square().sum() / (x_TH @ weight_OH.T).square().sum()).item()

    @torch.no_grad()
    def anchored(self, ridge: float = 1e-3) -> Tensor:
        """W' [O, K] of DESIGN section 1: least squares for the dense output, with λ‖W' − W_P‖² added."""
        gram_HH, kept = self.x_TH.T @ self.x_TH, self.channels
        gone = torch.tensor([j for j in range(len(gram_HH)) if j not in set(kept.tolist())])
        normal_KK = gram_HH[kept][:, kept]
        damped_KK = normal_KK + ridge * normal_KK.diagonal().mean() * torch.eye(len(kept)).to(normal_KK)
        map_KQ = torch.linalg.solve(damped_KK, gram_HH[kept][:, gone])
        return self.consumer.weight[:, kept] + self.consumer.weight[:, gone] @ map_KQ.T


def closed_loop(source: Path, written: Path, windows_NL: Tensor) -> Iterator[StoredSite]:
    """Every site in execution order. An MLP's activations are those behind the written attention of its layer, a
    layer's those behind the layers before it as written."""
    model, small = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).eval() for f in (source, written))
    before, after = (_tensors(folder) for folder in (source, written))
    heads, size = model.config.num_attention_heads, model.model.layers[0].self_attn.head_dim
    groups = model.config.num_key_value_heads if model.config.num_key_value_heads < heads else 1
    for i, (layer, narrow) in enumerate(zip(list(model.model.layers), small.model.layers)):
        for part, consumer, producer, kind in (
            ("self_attn", "o_proj", "q_proj", "heads"),
            ("mlp", "down_proj", "gate_proj", "channels"),
        ):
            old, new = getattr(layer, part), getattr(narrow, part)
            prefix = f"model.layers.{i}.{part}."
            yield StoredSite(
                name=prefix + consumer,
                kind=kind,
                consumer=getattr(old, consumer),
                written=getattr(new, consumer),
                rows=before[f"{prefix}{producer}.weight"],
                written_rows=after[f"{prefix}{producer}.weight"],
                x_TH=stored_inputs(model, getattr(old, consumer), windows_NL),
                groups=groups if kind == "heads" else 1,
                size=size if kind == "heads" else 1,
            )
            setattr(layer, part, new)
        model.model.layers[i] = narrow


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def wanda_sp(site: StoredSite) -> Tensor:
    """mean_i |W_ij| · sqrt(G_jj / N), summed over a head's channels."""
    score_H = site.consumer.weight.abs().mean(0) * site.x_TH.square().mean(0).sqrt()
    return score_H.view(-1, site.size).sum(1)


def flap(site: StoredSite) -> Tensor:
    """WIFV: σ²_j ‖W_:j‖², of attention the square, summed over a head's channels (UL)."""
    score_H = site.x_TH.var(0, correction=1) * site.consumer.weight.square().sum(0)
    return (score_H**2 if site.kind == "heads" else score_H).view(-1, site.size).sum(1)


def slimgpt(site: StoredSite) -> Tensor:
    """tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ) with H = G + 0.01 · mean(diag G) · I; of a channel ‖W_:j‖² / [H⁻¹]_jj."""
    gram_HH = site.x_TH.T @ site.x_TH
    inverse_HH = torch.linalg.inv(gram_HH + 0.01 * gram_HH.diagonal().mean() * torch.eye(len(gram_HH)).to(gram_HH))
    costs = []
    for block in torch.arange(len(gram_HH)).split(site.size):
        weight_OS = site.consumer.weight[:, block]
        costs.append(torch.trace(weight_OS @ torch.linalg.inv(inverse_HH[block][:, block]) @ weight_OS.T))
    return torch.stack(costs)


SCORES: dict[str, Callable[[StoredSite], Tensor]] = {"wanda-sp": wanda_sp, "flap": flap, "slimgpt": slimgpt}


def assert_mask(site: StoredSite, score_U: Tensor, removed_per_group: int) -> None:
    """The lowest `removed_per_group` units of each group are gone, ties apart."""
    gone = torch.ones(len(score_U), dtype=torch.bool)
    gone[site.kept] = False
    for group, (gone_P, score_P) in enumerate(zip(gone.chunk(site.groups), score_U.detach().chunk(site.groups))):
        assert gone_P.sum() == removed_per_group, f"{site.name}, group {group}"
        highest_gone, lowest_kept = score_P[gone_P].max().item(), score_P[~gone_P].min().item()
        assert highest_gone <= lowest_kept * (1 + TIE), f"{site.name}, group {group}: {highest_gone} > {lowest_kept}"


@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("method", METHODS)
def test_tiny_llama(tmp_path, method, heads):
    source = tiny_checkpoint(tmp_path / "source", num_key_value_heads=6 if heads == "mha" else 2, num_hidden_layers=3)
    file = tiny_calibration(tmp_path / "calibration.safetensors", windows=16)
    grail.compress(source, output=tmp_path / "out", calibration=file, ratio=0.4, target="hidden", **METHODS[method])
    removed = {"heads": 2 if heads == "mha" else 1, "channels": 16}  # 0.4 of 6 in one group, of 3 in each of two, of 40
    sites = list(closed_loop(source, tmp_path / "out", load_file(file)["input_ids"]))
    assert len(sites) == 6
    for site in sites:
        assert_mask(site, SCORES[method](site), removed[site.kind])


@pytest.fixture(scope="module")
def multi_head() -> Path:
    """SmolLM2-135M in the publication's form: each key/value head repeated."""
    return multi_head_form(locate(SMOLLM2).folder)


@pytest.fixture(scope="module")
def text(multi_head) -> Windows:
    """The windows that the built-in text gives with seed 0."""
    return load_calibration("builtin", lambda: load_tokenizer(multi_head), 49152, samples=4, seq_len=256, seed=0)


@pytest.fixture(scope="module")
def two_layers(multi_head, tmp_path_factory) -> Path:
    """A copy that ends after two layers."""
    folder, source = tmp_path_factory.mktemp("two-layers"), SafetensorsFolder(multi_head)
    config = json.loads((multi_head / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    names = [n for n in source.names() if not n.startswith("model.layers.") or int(n.split(".")[2]) < 2]
    save_file({name: source.get(name) for name in names}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check_smollm2(source: Path, written: Path, windows_NL: Tensor, method: str) -> None:
    """The masks of the first two layers: 0.3 of 9 heads is 2.7, of 1536 channels 460.8."""
    for site in itertools.islice(closed_loop(source, written, windows_NL), 4):
        assert_mask(site, SCORES[method](site), {"heads": 3, "channels": 461}[site.kind])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_first_layers_of_multi_head_smollm2(tmp_path, two_layers, text, method):
    """Real weights and text. Earlier layers do not depend on later ones, so the first two are compressed on their own:
    the whole model with three methods is minutes."""
    grail.compress(two_layers, output=tmp_path / "out", calibration=text.ids, target="hidden", **METHODS[method])
    check_smollm2(two_layers, tmp_path / "out", text.ids, method)


@pytest.mark.slow
def test_whole_multi_head_smollm2(tmp_path, multi_head, text):
    """Nothing tied to the copy: the whole model and the built-in text, pruned only."""
    asked = {"samples": 4, "seq_len": 256, "seed": 0, "eval": "none", "compensate": False}
    report = grail.compress(multi_head, output=tmp_path / "out", **asked, **METHODS["wanda-sp"])
    assert report.calibration["sha256"] == text.sha256
    check_smollm2(multi_head, tmp_path / "out", text.ids, "wanda-sp")
