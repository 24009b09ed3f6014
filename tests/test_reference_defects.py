"""The defects of the public reference code (REFERENCE section 4, language models), one test each, named after it.

Written from outside: what GRAIL wrote or reported is held against float64 arithmetic on activations that plain
transformers modules gave (`closed_loop`). Shapes: N windows, L tokens, T rows, H width, K kept, O outputs.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import grail
from grail.checkpoint.reader import SafetensorsFolder
from grail.cli import app
from grail.selectors import methods
from grail.session import Session
from grail.statistics import MOMENTS, SiteStatistics
from tests.test_masks_float64 import assert_mask, closed_loop, stored_inputs, wanda_sp
from tests.tiny import tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("reopen_here")
MHA = {"num_key_value_heads": 6}


def random_windows(count: int = 8, length: int = 32, low: int = 0, high: int = 64) -> Tensor:
    return torch.randint(low, high, (count, length), generator=torch.Generator().manual_seed(count))


def compress(source, output, windows_NL: Tensor, **flags) -> grail.Report:
    flags = {"method": "wanda-sp", "ratio": 0.5, "samples": len(windows_NL)} | flags
    return grail.compress(source, output=output, calibration=windows_NL, **{"target": "hidden"} | flags)


NETWORKS = {
    "head-size": {"head_dim": 12},
    "layer-count": {"num_hidden_layers": 5},
    "rope-base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "gqa": {"num_key_value_heads": 3},
    "mha": MHA,
}


@pytest.mark.parametrize("network", NETWORKS)
def test_sizes_layer_count_rope_base_and_gqa_are_not_hard_coded(tmp_path, network):
    source, windows = tiny_checkpoint(tmp_path / "source", **NETWORKS[network]), random_windows()
    report = compress(source, tmp_path / "out", windows)
    sites = list(closed_loop(source, tmp_path / "out", windows))
    assert [site.name for site in sites] == [entry["name"] for entry in report.sites]
    for site, entry in zip(sites, report.sites):
        assert site.error() == pytest.approx(entry["error_after"], rel=1e-3), site.name


@pytest.mark.parametrize("method", ["wanda-sp", "wanda-pp-sp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_device_and_dtype_are_not_hard_coded(tmp_path, linears, dtype, method):
    """Products in the compute dtype (of gradients: float32), on the device asked for; the result as stored before."""
    source = tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    compress(source, tmp_path / "out", random_windows(), dtype=dtype, device="cpu", method=method)
    expected = {getattr(torch, dtype)} | ({torch.float32} if method == "wanda-pp-sp" else set())
    assert {(w.dtype, w.device.type) for w in linears} == {(found, "cpu") for found in expected}
    written = SafetensorsFolder(tmp_path / "out")
    assert {written.info(name).dtype for name in written.names()} == {torch.bfloat16}


@pytest.mark.parametrize("heads", [MHA, {}], ids=["mha", "gqa"])
def test_magnitude_with_compensation_works(tmp_path, heads):
    """Scored and solved from the weights before pruning, whole heads at a time."""
    source, windows = tiny_checkpoint(tmp_path / "source", **heads), random_windows()
    compress(source, tmp_path / "out", windows, method="mag-sp", ratio=0.34)
    removed = {"heads": 2 if heads else 1, "channels": 14}
    for site in closed_loop(source, tmp_path / "out", windows):
        norms = site.consumer.weight.norm(dim=0).view(-1, site.size).sum(1)
        assert_mask(site, norms, removed[site.kind])
        torch.testing.assert_close(site.written.weight, site.anchored(), rtol=1e-3, atol=1e-4)


def test_flap_with_compensation_does_not_count_the_mean_twice(tmp_path):
    """One joint least-squares fit: on the calibration data nothing is left of the mean, and bias and weights together
    are as good as any affine map, hence never worse than either alone."""
    source, windows = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1, mlp_bias=True, **MHA), random_windows()
    compress(source, tmp_path / "out", windows, method="flap", set={"structure": "UL-UM"}, ridge=0.0)
    for site in closed_loop(source, tmp_path / "out", windows):
        z_TK, target_TO = site.x_TH[:, site.channels], site.x_TH @ site.consumer.weight.T
        with torch.no_grad():
            left_TO = site.consumer(site.x_TH) - site.written(z_TK)
            pruned_TO = target_TO - z_TK @ site.consumer.weight[:, site.channels].T
        affine_TI = torch.cat([z_TK, torch.ones(len(z_TK), 1)], 1)
        alone = {
            "bias": pruned_TO - pruned_TO.mean(0),
            "weights": target_TO - z_TK @ torch.linalg.lstsq(z_TK, target_TO).solution,
            "any": target_TO - affine_TI @ torch.linalg.lstsq(affine_TI, target_TO).solution,
        }
        for name, residual_TO in alone.items():
            assert left_TO.norm() <= residual_TO.norm() * (1 + 1e-5), f"{site.name}: worse than {name} alone"
        assert left_TO.mean(0).abs().max() < 1e-4 * target_TO.mean(0).abs().max(), site.name


def test_wanda_pp_with_compensation_keeps_what_regional_optimisation_trained(tmp_path):
    source, windows = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1), random_windows()
    compress(source, tmp_path / "repaired", windows, method="wanda-pp-sp", set={"regional": "none"})
    report = compress(source, tmp_path / "trained", windows, method="wanda-pp-sp", set={"learning_rate": "1e-3"})
    folders = (source, tmp_path / "repaired", tmp_path / "trained")
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]
    dense, *others = (stored_inputs(model, model.model.norm, windows) for model in models)
    found = [(output - dense).square().mean().item() for output in others]
    assert found[1] < 0.98 * found[0], "the written weights are the trained ones"
    (told,) = report.to_json()["regional"]
    assert found == [pytest.approx(told["loss_before"], rel=1e-3), pytest.approx(told["loss_after"], rel=1e-3)]


def test_the_gradient_term_is_no_floor(tmp_path):
    """Γ against autograd in float64, window by window; it decides masks, which a floor of 1e-8 cannot."""
    source, windows = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1, **MHA), random_windows()
    compress(source, tmp_path / "out", windows, method="wanda-pp-sp", set={"regional": "none"})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    layer, output = model.model.layers[0], []
    model.model.norm.register_forward_hook(lambda _module, inputs, _output: output.append(inputs[0]))
    consumers = [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    squares = [torch.zeros_like(weight) for weight in consumers]
    for window in windows:
        model(window[None])
        for total, found in zip(squares, torch.autograd.grad(output[-1].norm(), consumers)):
            total += found.square()
    differ = 0  # sites whose mask a floor would change
    for site, total, removed in zip(closed_loop(source, tmp_path / "out", windows), squares, (3, 20)):
        gradient_OH, norm_H = (total / len(windows)).sqrt(), (site.x_TH.square().sum(0) / len(windows)).sqrt()
        scores = {
            floor: ((100 * g + norm_H) * site.consumer.weight.abs()).mean(0).view(-1, site.size).sum(1)
            for floor, g in ((False, gradient_OH), (True, 1e-8))
        }
        assert_mask(site, scores[False], removed)
        differ += set(scores[True].argsort()[removed:].tolist()) != set(site.kept.tolist())
    assert differ


def test_selection_statistics_come_from_all_asked_samples(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1, **MHA)
    windows = torch.cat([random_windows(4, high=3), random_windows(12, low=3)])
    compress(source, tmp_path / "out", windows)
    *_, mlp = closed_loop(source, tmp_path / "out", windows)
    assert_mask(mlp, wanda_sp(mlp), 20)
    mlp.x_TH = mlp.x_TH[: 4 * 32]
    assert set(wanda_sp(mlp).argsort()[20:].tolist()) != set(mlp.kept.tolist()), "the first windows say otherwise"


def test_more_than_2048_samples_are_used(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1)
    windows = torch.cat([random_windows(2048, 4, high=8), random_windows(500, 4, low=8)])
    report = compress(source, tmp_path / "out", windows)
    for site, entry in zip(closed_loop(source, tmp_path / "out", windows), report.sites):
        assert site.error(repaired=False) == pytest.approx(entry["error_before"], rel=1e-4)
        assert site.error() == pytest.approx(entry["error_after"], rel=1e-4)
    for rows in (slice(2048), slice(2048 * 4)):  # of the MLP: so many tokens, and samples, give another figure
        assert site.error(rows, repaired=False) != pytest.approx(entry["error_before"], rel=0.1)


@pytest.mark.parametrize("sizes", [[1, 59], [30, 30], [7] * 8 + [4], [1] * 60], ids=len)
def test_flaps_variance_is_unbiased_and_does_not_depend_on_chunks(sizes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator) + torch.tensor([0.0, 1.0, -5.0, 300.0, 0.0])
    x[0, 4] = 50.0  # without the first row this variance is another one
    statistics = SiteStatistics(5, frozenset({MOMENTS}))
    for part in x.split(sizes):
        statistics.update(part)
    torch.testing.assert_close(statistics.variance(), x.double().var(0, correction=1), rtol=1e-9, atol=0)


def test_flaps_bias_and_masks_do_not_depend_on_chunks(tmp_path, monkeypatch):
    """b = Σ over removed channels of μ_j W_:j, whatever the chunks."""
    source, windows = tiny_checkpoint(tmp_path / "source", **MHA), random_windows()
    for name, tokens in (("whole", 256), ("small", 32)):
        monkeypatch.setattr(Session, "chunk_tokens", tokens)
        compress(source, tmp_path / name, windows, method="flap", set={"structure": "UL-UM"}, compensate=False)
    for whole, small in zip(*(closed_loop(source, tmp_path / name, windows) for name in ("whole", "small"))):
        assert torch.equal(whole.kept, small.kept)
        mean_H = whole.x_TH.mean(0)
        mean_H[whole.channels] = 0
        for site in (whole, small):
            torch.testing.assert_close(site.written.bias.detach(), whole.consumer.weight @ mean_H, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_head_cost_is_not_truncated(tmp_path, ratio):
    """Heads of 2 cost 8/3 of a channel. The budget is met to half a head, which a cost of 2 would miss."""
    shape = {"num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 2}
    source = tiny_checkpoint(tmp_path / "source", **shape)
    report = compress(source, tmp_path / "out", random_windows(), method="flap", ratio=ratio)
    removed = [entry["before"] - entry["after"] for entry in report.sites]  # attention and MLP in turn
    heads, channels = sum(removed[::2]) // 2, sum(removed[1::2])
    head, channel = 4 * 48 * 2, 3 * 48
    budget, spent = ratio * 2 * (24 * head + 40 * channel), heads * head + channels * channel
    assert abs(spent - budget) <= head / 2
    assert abs(spent - budget - heads * (head - 2 * channel)) > head / 2, "a test that can fail"


@pytest.mark.parametrize("allocation", [None, "global"])
@pytest.mark.parametrize("method", sorted(methods()))
def test_ratio_0_removes_nothing(tmp_path, method, allocation):
    allocation = "log" if allocation and method == "fold" else allocation  # folding gives no scores to compare
    source = tiny_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    compress(source, tmp_path / "out", random_windows(), method=method, ratio=0.0, bias=True, allocation=allocation)
    assert_same_bytes(source, tmp_path / "out", "")


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_site_with_ratio_0_is_left_alone(tmp_path, method):
    source = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1, mlp_bias=True)
    compress(source, tmp_path / "out", random_windows(), method=method, attn_ratio=0.0, mlp_ratio=0.5)
    assert_same_bytes(source, tmp_path / "out", "self_attn")


def assert_same_bytes(source, output, part: str) -> None:
    before, after = SafetensorsFolder(source), SafetensorsFolder(output)
    assert {name for name in before.names() if part in name} == {name for name in after.names() if part in name}
    for name in filter(lambda name: part in name, before.names()):
        assert before.info(name).dtype == after.info(name).dtype
        assert b"".join(bytes(c) for c in before.chunks(name)) == b"".join(bytes(c) for c in after.chunks(name)), name


@pytest.mark.parametrize("heads", [MHA, {}], ids=["mha", "gqa"])
@pytest.mark.parametrize("method", ["flap", "wanda-sp"])
def test_a_layer_never_loses_all_heads(tmp_path, method, heads):
    source, windows = tiny_checkpoint(tmp_path / "source", num_hidden_layers=3, **heads), random_windows()
    compress(source, tmp_path / "out", windows, method=method, ratio=0.9, allocation="global")
    kept = [len(s.kept) for s in closed_loop(source, tmp_path / "out", windows) if s.kind == "heads"]
    assert len(kept) == 3 and min(kept) == (1 if heads else 2), "the floor is reached and holds"
    assert torch.isfinite(grail.load(tmp_path / "out")(windows[:1]).logits).all()


def test_the_mlps_gram_is_taken_behind_the_compressed_attention(tmp_path):
    source, windows = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1, **MHA), random_windows()
    compress(source, tmp_path / "out", windows)
    _, mlp = closed_loop(source, tmp_path / "out", windows)
    torch.testing.assert_close(mlp.written.weight, mlp.anchored(), rtol=1e-3, atol=1e-4)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    mlp.x_TH = stored_inputs(dense, dense.model.layers[0].mlp.down_proj, windows)
    assert (mlp.written.weight - mlp.anchored()).abs().max() > 1e-2, "a test that can fail"


@pytest.fixture
def linears(monkeypatch) -> list[Tensor]:
    """The weights of all matrix products of the compressing pass, in order."""
    seen: list[Tensor] = []
    linear, stream = torch.nn.functional.linear, grail.run.stream

    def counted(hidden, weight, bias=None):
        seen.append(weight)
        return linear(hidden, weight, bias)

    def counting(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", counted)
            return stream(*arguments, **options)

    monkeypatch.setattr(grail.run, "stream", counting)
    return seen


def test_a_layer_is_not_run_once_per_site(tmp_path, linears):
    """Every expensive module runs once per layer and chunk: here one chunk of windows, and the probe."""
    source = tiny_checkpoint(tmp_path / "source", head_dim=10, num_hidden_layers=3)  # 60 and 20 rows, 40 channels
    compress(source, tmp_path / "out", random_windows())
    shapes = [tuple(weight.shape) for weight in linears]
    products = {(60, 48): 1, (20, 48): 2, (40, 48): 2}  # q; k and v; gate and up
    assert {shape: shapes.count(shape) for shape in products} == {s: 3 * 2 * n for s, n in products.items()}
    assert len(shapes) == 3 * 2 * 7, "seven per layer and chunk, the probe's head, not the last one's calibration"


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_nan_in_a_gram_matrix_names_the_site(tmp_path, method):
    """Finite weights whose product overflows in the second layer's MLP."""
    model = tiny_model(num_hidden_layers=2)
    for projection in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
        projection.weight[3] = 1e25
    model.save_pretrained(tmp_path / "source")
    save_file({"input_ids": random_windows()}, tmp_path / "ids.safetensors")
    paths = {"--model": "source", "--calibration": "ids.safetensors", "--output": "out"}
    named = [word for option, name in paths.items() for word in (option, str(tmp_path / name))]
    done = CliRunner().invoke(app, ["compress", *named, "--method", method, "--mlp-ratio", "0.5"])
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines()[-1].startswith("grail: model.layers.1.mlp.down_proj: "), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads", [MHA, {}], ids=["mha", "gqa"])
@pytest.mark.parametrize("form", ["uniform", "padded"])
def test_what_is_written_loads(tmp_path, form, heads):
    source, windows = tiny_checkpoint(tmp_path / "source", **heads), random_windows()
    compress(source, tmp_path / "out", windows, format=form, ratio=0.34)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.") and not any(told.values())
    widths = (model.config.num_attention_heads, model.config.intermediate_size)
    assert widths == {"uniform": (4, 26), "padded": (6, 40)}[form]
    assert torch.isfinite(model(windows).logits).all()
