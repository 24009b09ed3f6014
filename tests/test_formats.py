"""uniform, grail and padded, for every model type: each opens, computes what it should, and generates with a cache."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grail import modeling_grail
from grail.checkpoint import reopen
from grail.checkpoint.pieces import Piece
from grail.checkpoint.writer import OutputFolder
from grail.errors import GrailError
from grail.evaluation.perplexity import logits
from grail.families import open_family, register
from grail.families.llama import MODEL_TYPES
from grail.reduction import Folding, Selection
from tests.tiny import tiny_checkpoint, tiny_tokenizer

IDS = torch.tensor([[5, 9, 3, 7, 11, 20, 33, 2, 8, 41]])
FORMATS = ("uniform", "grail", "padded")
VARIANTS = {
    "mha": {"num_key_value_heads": 6},
    "head_dim": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "bf16": {"dtype": torch.bfloat16, "shard": "20KB"},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        }
    },
}  # fmt: skip
SLIDING = {
    "mistral": {"sliding_window": 4},
    "ministral": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1, 0]},
}


def plan(model, gqa="query", differ=False):
    """Keep 2 of 3 heads per group (or 4 of 6, or 1 of 2 groups) and 28 channels; `differ`: in layer 0 alone, and fewer
    channels in layer 1."""
    sites, kept, reductions = model.sites(gqa), {}, {}
    for site in sites:
        units = site.units
        kept[site.name] = units.per_group
        if differ and (site.layer, site.kind) == (1, "heads"):
            continue
        count = (17 if differ and site.layer else 28) if site.kind == "channels" else max(units.per_group * 2 // 3, 1)
        kept[site.name] = count
        order = torch.Generator().manual_seed(site.layer)
        chosen = [
            group * units.per_group + torch.randperm(units.per_group, generator=order)[:count]
            for group in range(units.groups)
        ]
        reductions[site.name] = Selection(torch.cat(chosen).sort().values, units.size, units.width)
    return sites, kept, reductions


def bias_of(site):
    return torch.randn(48, generator=torch.Generator().manual_seed(len(site.name) + site.layer)) * 0.3


def write(model, folder, asked, *, bias=False, gqa="query", differ=False, chosen=None):
    """What the pipeline does with a format, without statistics: consumers sliced, biases given."""
    sites, kept, reductions = chosen or plan(model, gqa, differ)
    given = [site.name for site in sites if bias and kept[site.name] < site.units.per_group]
    form = model.output_format(sites, kept, given_bias=given, asked=asked)
    with OutputFolder(folder) as out:
        for layer in range(model.layer_count):
            changed = {}
            for site in sites:
                if site.layer != layer or site.name not in reductions:
                    continue
                reduction = reductions[site.name]
                weight = model.source.get(f"{site.consumer}.weight")
                b_O = bias_of(site).to(weight.dtype) if bias else None
                changed |= model.narrow(site, reduction, reduction.lift_consumer(weight), b_O)
            tensors = form.layer_tensors(layer, changed, reductions)
            assert set(changed) <= set(tensors)
            names = [name for name in model.source.names() if model.layer_of(name) == layer]
            plain = {name: model.source.get(name) for name in names if name not in tensors}
            out.write_shard(f"model-{layer}.safetensors", [Piece.of(*item) for item in (plain | tensors).items()])
        rest = [name for name in model.source.names() if model.layer_of(name) is None]
        out.write_shard("model-rest.safetensors", [Piece.of(name, model.source.get(name)) for name in rest])
        out.write_json("config.json", form.config)
        for name, text in form.files.items():
            out.write_text(name, text)
        out.write_index()
        out.finish()
    return form, out


def masked_logits(source, sites, reductions, bias=False, ids=IDS):
    """The dense model with the removed units' consumer columns set to zero, and the biases in place."""
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    for site in sites:
        if site.name in reductions:
            consumer = dense.get_submodule(site.consumer)
            consumer.weight.data[:, reductions[site.name].removed_channels] = 0
            if bias:
                consumer.bias = torch.nn.Parameter(bias_of(site).to(consumer.weight.dtype))
    with torch.no_grad():
        return dense(ids).logits.float()


def opened(folder, **options):
    register()
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def assert_close(found, expected, tolerance=1e-5):
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error < tolerance, f"logits differ by {error:.1e} of the largest"


def assert_generates(model):
    ids = IDS[:, :4]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with_cache, without = (model.generate(ids, use_cache=cached, **settings) for cached in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type_in_every_format(tmp_path, model_type, asked, bias):
    # carriers need plain rotary attention: smollm3 has it without NoPE layers, the mistrals without a window
    plainly = {
        "smollm3": {"no_rope_layers": [1, 1]},
        "mistral": {"sliding_window": None},
        "ministral": {"layer_types": ["full_attention"] * 2},
    }
    source = tiny_checkpoint(tmp_path / "source", model_type, **plainly.get(model_type, {}))
    model = open_family(source)
    differ = asked != "uniform"
    sites, kept, reductions = chosen = plan(model, differ=differ)
    if model_type == "qwen3" and bias and asked != "grail":
        with pytest.raises(GrailError, match=f"--format {asked}: qwen3 has no bias in down_proj.*--format grail"):
            write(model, tmp_path / "out", asked, bias=bias, chosen=chosen)
        assert model.output_format(sites, kept, given_bias=kept, asked="auto").name == "grail"
        return
    form, _ = write(model, tmp_path / "out", asked, bias=bias, chosen=chosen)
    small = opened(tmp_path / "out")
    with torch.no_grad():
        found = small(IDS).logits
    assert_close(found, masked_logits(source, sites, reductions, bias))
    assert_generates(small)
    assert_close(logits(open_family(tmp_path / "out"), IDS), found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if asked == "grail":
        assert config["model_type"] == f"grail_{model_type}" and type(small).__module__ == "grail.modeling_grail"
        assert "--format grail was asked for" in form.class_changed
    elif bias and model_type in ("mistral", "ministral", "qwen2"):
        assert config["model_type"] == "seed_oss" and "has no bias in" in form.class_changed
    else:
        assert config["model_type"] == model_type and form.class_changed is None
    if asked == "padded":
        assert (config["num_attention_heads"], config["intermediate_size"]) == (6, 40)
        before, after = model.source, open_family(tmp_path / "out").source
        assert all(after.info(name).shape == before.info(name).shape for name in before.names())


@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_variants_in_every_format(tmp_path, variant, asked):
    source = tiny_checkpoint(tmp_path / "source", **VARIANTS[variant])
    model = open_family(source)
    chosen = plan(model, differ=asked != "uniform")
    write(model, tmp_path / "out", asked, chosen=chosen)
    small = opened(tmp_path / "out")
    with torch.no_grad():
        found = small(IDS).logits.float()
    assert_close(found, masked_logits(source, chosen[0], chosen[2]), 2e-2 if variant == "bf16" else 1e-5)
    assert_close(
        logits(open_family(tmp_path / "out", dtype=small.dtype), IDS), found, 2e-2 if variant == "bf16" else 1e-5
    )
    assert_generates(small)


@pytest.mark.parametrize("asked", ["grail", "padded"])
@pytest.mark.parametrize("model_type", SLIDING)
def test_sliding_windows_and_layer_types_stay(tmp_path, model_type, asked):
    source = tiny_checkpoint(tmp_path / "source", model_type, **SLIDING[model_type])
    model = open_family(source)
    chosen = plan(model, differ=True)
    write(model, tmp_path / "out", asked, chosen=chosen)
    small = opened(tmp_path / "out")
    with torch.no_grad():
        assert_close(small(IDS).logits, masked_logits(source, chosen[0], chosen[2]))
    assert_generates(small)


@pytest.mark.parametrize("model_type", SLIDING)
def test_no_carrier_for_another_computation(tmp_path, model_type):
    """A bias that the own class cannot carry must not move a windowed, NoPE or normalised model to seed_oss."""
    model = open_family(tiny_checkpoint(tmp_path / "source", model_type, **SLIDING[model_type]))
    sites, kept, _ = plan(model)
    form = model.output_format(sites, kept, given_bias=kept, asked="auto")
    own = model_type == "smollm3"
    assert (form.name, form.config["model_type"]) == (
        ("uniform", model_type) if own else ("grail", f"grail_{model_type}")
    )


@pytest.mark.parametrize("asked", FORMATS)
def test_whole_groups(tmp_path, asked):
    source = tiny_checkpoint(tmp_path / "source", "qwen2", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    model = open_family(source)
    chosen = plan(model, "group", differ=asked != "uniform")
    form, _ = write(model, tmp_path / "out", asked, chosen=chosen)
    with torch.no_grad():
        found = opened(tmp_path / "out")(IDS).logits
    assert_close(found, masked_logits(source, chosen[0], chosen[2]))
    assert form.widths[0].kv_heads == (4 if asked == "padded" else 2)


def test_folding_goes_to_the_first_slots(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    model = open_family(source)
    sites = model.sites()
    kept = {site.name: site.units.per_group for site in sites}
    folded = sites[1]
    kept[folded.name] = 10
    reductions = {folded.name: Folding(torch.arange(40) % 10)}
    for asked in ("padded", "grail"):
        write(model, tmp_path / asked, asked, chosen=(sites, kept, reductions))
    wide = load_file(tmp_path / "padded" / "model-0.safetensors")
    down_OH = model.source.get(f"{folded.consumer}.weight")
    assert torch.allclose(wide[f"{folded.consumer}.weight"][:, :10], down_OH.view(48, 4, 10).sum(1), atol=1e-6)
    assert not wide[f"{folded.consumer}.weight"][:, 10:].any()
    with torch.no_grad():
        assert_close(opened(tmp_path / "padded")(IDS).logits, opened(tmp_path / "grail")(IDS).logits)


def test_bias_in_some_layers_only(tmp_path):
    """Layer 1's heads are untouched: its o_proj has no bias in `grail`, zeros in `padded`."""
    model = open_family(tiny_checkpoint(tmp_path / "source"))
    write(model, tmp_path / "grail", "grail", bias=True, differ=True)
    write(model, tmp_path / "padded", "padded", bias=True, differ=True)
    name = "model.layers.1.self_attn.o_proj.bias"
    assert name not in open_family(tmp_path / "grail").source
    assert not open_family(tmp_path / "padded").source.get(name).any()
    layers = json.loads((tmp_path / "grail" / "config.json").read_text())["per_layer_config"]
    assert layers == {
        "0": {"num_attention_heads": 4, "intermediate_size": 28, "o_proj_bias": True, "down_proj_bias": True},
        "1": {"intermediate_size": 17, "down_proj_bias": True},
    }


def test_bias_replaces_an_existing_one(tmp_path):
    model = open_family(tiny_checkpoint(tmp_path / "source", attention_bias=True))
    site = model.sites()[0]
    reduction = Selection(torch.tensor([0, 1, 3, 4]), 8, 48)
    tensors = model.narrow(site, reduction, torch.zeros(48, 32), torch.ones(48))
    assert torch.equal(tensors[f"{site.consumer}.bias"], torch.ones(48))
    assert f"{site.consumer}.bias" not in model.narrow(site, reduction, torch.zeros(48, 32))


def test_a_grail_folder_is_compressed_again(tmp_path):
    """Widths of its own in every layer, a bias in some: once more through each format."""
    source = tiny_checkpoint(tmp_path / "source")
    first = plan(open_family(source), differ=True)
    write(open_family(source), tmp_path / "first", "grail", bias=True, chosen=first)
    again = open_family(tmp_path / "first")
    assert [w.heads for w in again.widths] == [4, 6] and [w.channels for w in again.widths] == [28, 17]
    sites, kept, reductions = again.sites(), {}, {}
    for site in sites:
        kept[site.name] = max(site.units.per_group // 2, 1)
        units = torch.arange(site.units.groups)[:, None] * site.units.per_group + torch.arange(kept[site.name])
        reductions[site.name] = Selection(units.flatten(), site.units.size, site.units.width)
    results = {}
    for asked in ("grail", "padded"):
        form, _ = write(again, tmp_path / asked, asked, chosen=(sites, kept, reductions))
        with torch.no_grad():
            results[asked] = opened(tmp_path / asked)(IDS).logits
        assert form.class_changed is None
    assert_close(results["padded"], results["grail"])
    assert_close(results["grail"], masked_logits(tmp_path / "first", sites, reductions))
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_attention_heads"] == 6 and config["attention_bias"] is True
    with pytest.raises(
        GrailError, match="--format uniform: the widths differ between layers; choose --format grail or"
    ):
        again.output_format(sites, kept, asked="uniform")  # no --allocation mends a source whose layers differ


def test_eager_attention_and_save_pretrained(tmp_path):
    model = open_family(tiny_checkpoint(tmp_path / "source", tie_word_embeddings=True))
    write(model, tmp_path / "out", "grail", bias=True, differ=True)
    sdpa, eager = opened(tmp_path / "out"), opened(tmp_path / "out", attn_implementation="eager")
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    with torch.no_grad():
        expected = sdpa(IDS).logits
        assert_close(eager(IDS, output_attentions=True).logits, expected)
    sdpa.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_grail.py").read_text() == (
        tmp_path / "out" / "modeling_grail.py"
    ).read_text()
    again = opened(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)
        sdpa.set_attn_implementation("eager")
        assert torch.equal(sdpa(IDS).logits, eager(IDS).logits)
    assert_generates(again)
    assert_close(logits(open_family(tmp_path / "saved"), IDS), expected)


@pytest.mark.parametrize("asked", FORMATS)
def test_a_fresh_process_opens_it(tmp_path, asked):
    model = open_family(tiny_checkpoint(tmp_path / "source"))
    sites, _, reductions = chosen = plan(model, differ=asked != "uniform")
    form, out = write(model, tmp_path / "out", asked, bias=True, chosen=chosen)
    expected = masked_logits(tmp_path / "source", sites, reductions, bias=True)
    found = reopen.verify(
        tmp_path / "out", IDS, expected, "float32", None, out.written, layerwise=False, loads=form.loads
    )
    assert found["logit_difference"] < 1e-5


@pytest.mark.parametrize("asked", ["grail", "uniform"])
def test_another_model_type_keeps_the_token_ids(tmp_path, asked):
    """AutoTokenizer takes Qwen2Tokenizer for qwen2, whatever the folder names; the new type must do the same."""
    source = tiny_tokenizer(tiny_checkpoint(tmp_path / "source", "qwen2"))
    form, _ = write(open_family(source), tmp_path / "out", asked, bias=True)
    assert form.config["model_type"] == {"grail": "grail_qwen2", "uniform": "seed_oss"}[asked]
    with OutputFolder(tmp_path / "carried") as out:
        for name, text in form.files.items():
            out.write_text(name, text)
        out.write_json("config.json", form.config)
        out.carry_over(source)
        out.finish()
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "carried"))
    assert before(reopen.SAMPLE).input_ids == after(reopen.SAMPLE).input_ids
    named = json.loads((source / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert type(after).__name__ == type(before).__name__ != named


def test_tensor_parallel_size(tmp_path):
    model = open_family(tiny_checkpoint(tmp_path / "source", num_attention_heads=8, num_key_value_heads=4))
    sites = model.sites()
    kept = {site.name: site.units.per_group for site in sites}
    assert model.output_format(sites, kept).tensor_parallel == 4
    kept["model.layers.1.mlp.down_proj"] = 38
    assert model.output_format(sites, kept).tensor_parallel == 2
    assert model.output_format(sites, kept, asked="padded").tensor_parallel == 4


def test_auto_takes_uniform_where_it_can(tmp_path):
    model = open_family(tiny_checkpoint(tmp_path / "source"))
    sites, kept, _ = plan(model)
    assert model.output_format(sites, kept).name == "uniform"
    sites, kept, _ = plan(model, differ=True)
    form = model.output_format(sites, kept)
    assert form.name == "grail" and "to keep LlamaForCausalLM, choose --allocation uniform" in form.class_changed
    with pytest.raises(GrailError, match="--format square: choose one of"):
        model.output_format(sites, kept, asked="square")


@pytest.mark.parametrize("asked", ["uniform", "padded"])
def test_no_bias_is_advised_only_where_it_helps(tmp_path, asked):
    """Where the run itself adds the bias that the class cannot have; not where the source has it already."""
    model = open_family(tiny_checkpoint(tmp_path / "source", "qwen3"))
    sites, kept, _ = plan(model)
    with pytest.raises(
        GrailError, match=f"^--format {asked}: qwen3 has no bias in down_proj; add --no-bias, or choose"
    ):
        model.output_format(sites, kept, given_bias=kept, asked=asked)
    assert "add --no-bias" in model.output_format(sites, kept, given_bias=kept).class_changed
    write(model, tmp_path / "biased", "grail", bias=True)
    again = open_family(tmp_path / "biased")
    sites = again.sites()
    kept = {site.name: max(site.units.per_group - 1, 1) for site in sites}
    for bias in (False, True):
        with pytest.raises(GrailError, match=r"qwen3 has no bias in down_proj; choose --format grail$"):
            again.output_format(sites, kept, given_bias=kept if bias else (), asked=asked)


def test_a_format_is_refused_before_the_widths_are_known(tmp_path):
    """Stand-in widths that say only which sites will change are enough to know that biases cannot be written."""
    model = open_family(tiny_checkpoint(tmp_path / "source", "qwen3"))
    sites = model.sites()
    stand_ins = {site.name: site.units.per_group - 1 for site in sites}
    with pytest.raises(GrailError, match="--format padded: qwen3 has no bias"):
        model.output_format(sites, stand_ins, given_bias=stand_ins, asked="padded")
    assert model.output_format(sites, stand_ins, asked="padded").name == "padded"


def test_how_to_keep_the_class(tmp_path):
    mha = open_family(tiny_checkpoint(tmp_path / "mha", num_key_value_heads=6))
    sites = mha.sites()
    kept = {site.name: site.units.per_group - (site.kind == "heads") for site in sites}
    changed = mha.output_format(sites, kept).class_changed
    assert "llama refuses 5 heads in a hidden size of 48; mistral is the same" in changed
    assert "to keep LlamaForCausalLM, choose an --attn-ratio" in changed
    qwen = open_family(tiny_checkpoint(tmp_path / "qwen", "qwen2"))
    sites, kept, _ = plan(qwen)
    assert qwen.output_format(sites, kept, given_bias=kept).class_changed.endswith(
        "to keep Qwen2ForCausalLM, add --no-bias"
    )


def test_nothing_removed_leaves_the_config_alone(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    model = open_family(source)
    sites = model.sites()
    form = model.output_format(sites, {site.name: site.units.per_group for site in sites})
    assert form.config == json.loads((source / "config.json").read_text()) and form.class_changed is None
    assert form.layer_tensors(0, {}, {}) == {}


def test_a_query_head_count_that_does_not_divide_is_refused():
    with pytest.raises(Exception, match="layer 1 has 5 query heads"):
        modeling_grail.make_config("llama")(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            per_layer_config={"1": {"num_attention_heads": 5}},
        )  # fmt: skip
