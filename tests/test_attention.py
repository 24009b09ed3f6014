"""Attention against nn.MultiheadAttention: the same results for all arguments, the same names, fewer heads."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import Tensor, nn

from grail.errors import GrailError
from grail.families.attention import Attention, replace_attention

WIDTH, HEADS, LENGTH, BATCH = 24, 4, 7, 3


def both(bias: bool = True, batch_first: bool = True, dropout: float = 0.0) -> tuple[nn.MultiheadAttention, Attention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first, dropout=dropout).eval()
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    return theirs, Attention.of(theirs, "attn")


def inputs(batch_first: bool, length: int = LENGTH, seed: int = 1) -> Tensor:
    shape = (BATCH, length, WIDTH) if batch_first else (length, BATCH, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(ours: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)


causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
padded = torch.arange(LENGTH)[None] >= torch.tensor([[LENGTH], [5], [2]])
MASKS = {
    "none": {},
    "boolean": {"attn_mask": causal},
    "additive": {"attn_mask": torch.zeros(LENGTH, LENGTH).masked_fill(causal, float("-inf"))},
    "each head": {"attn_mask": torch.randn(BATCH * HEADS, LENGTH, LENGTH)},
    "padding": {"key_padding_mask": padded},
    "both": {"attn_mask": torch.randn(LENGTH, LENGTH), "key_padding_mask": padded},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize(("bias", "batch_first"), list(itertools.product([True, False], repeat=2)))
@torch.no_grad()
def test_the_same_as_torchs_own(mask, weights, bias, batch_first):
    theirs, ours = both(bias, batch_first)
    x = inputs(batch_first)
    same(ours(x, x, x, **MASKS[mask], **weights), theirs(x, x, x, **MASKS[mask], **weights))


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_keys_and_values_of_their_own(batch_first):
    theirs, ours = both(batch_first=batch_first)
    q, k, v = inputs(batch_first), inputs(batch_first, 5, seed=2), inputs(batch_first, 5, seed=3)
    same(ours(q, k, v), theirs(q, k, v))
    same(ours(q, k, k, need_weights=False), theirs(q, k, k, need_weights=False))


@torch.no_grad()
def test_one_window_without_a_batch():
    theirs, ours = both()
    x = inputs(True)[0]
    same(ours(x, x, x), theirs(x, x, x))
    same(ours(x, x, x, key_padding_mask=padded[1]), theirs(x, x, x, key_padding_mask=padded[1]))


def test_gradients_and_dropout_in_training():
    theirs, ours = both(dropout=0.5)
    theirs.dropout = ours.dropout = 0.0
    x = inputs(True)
    for module in (theirs.train(), ours.train()):
        module.zero_grad()
        module(x, x, x, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(ours.in_proj.weight.grad, theirs.in_proj_weight.grad)
    ours.dropout = 0.5
    assert not torch.equal(ours(x)[0], ours(x)[0])
    assert torch.equal(ours.eval()(x)[0], ours(x)[0])


def test_state_dicts_are_exchangeable():
    theirs, ours = both()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    other = Attention(WIDTH, HEADS, WIDTH // HEADS)
    parent = nn.ModuleDict({"attn": other})
    parent.load_state_dict({f"attn.{name}": tensor for name, tensor in theirs.state_dict().items()})
    assert torch.equal(other.in_proj.weight, theirs.in_proj_weight)
    nn.ModuleDict({"attn": theirs}).load_state_dict(parent.state_dict())


def test_copies_and_pickles_work():
    _, ours = both()
    x = inputs(True)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x)[0], ours(x)[0])
        assert other.state_dict().keys() == ours.state_dict().keys()
        other.in_proj.weight = nn.Parameter(torch.zeros_like(other.in_proj.weight))
        assert not torch.equal(other.state_dict()["in_proj_weight"], ours.state_dict()["in_proj_weight"])


@torch.no_grad()
def test_fewer_heads_are_the_heads_that_stay():
    """Against torch's own with the other heads' columns of out_proj at zero."""
    theirs, ours = both()
    size, kept = WIDTH // HEADS, torch.tensor([0, 2, 3])
    channels = (kept[:, None] * size + torch.arange(size)).flatten()
    rows = torch.cat([channels + part * WIDTH for part in range(3)])
    ours.in_proj.weight = nn.Parameter(theirs.in_proj_weight[rows])
    ours.in_proj.bias = nn.Parameter(theirs.in_proj_bias[rows])
    ours.out_proj.weight = nn.Parameter(theirs.out_proj.weight[:, channels])
    ours.num_heads = 3
    gone = torch.ones(WIDTH, dtype=torch.bool)
    gone[channels] = False
    theirs.out_proj.weight[:, gone] = 0
    x = inputs(True)
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="3 windows of 3 heads"):
        ours(x, attn_mask=MASKS["each head"]["attn_mask"])


@torch.no_grad()
def test_hooks_see_the_context():
    _, ours = both()
    seen = []
    ours.out_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    out, _ = ours(inputs(True))
    torch.testing.assert_close(ours.out_proj(seen[0]), out)


@torch.no_grad()
def test_in_torchs_encoder_layer_the_fused_path_is_not_taken():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).eval()
    x = inputs(True)
    expected = layer(x)
    replace_attention(layer, ["self_attn"])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    assert layer(x, src_mask=mask, is_causal=True).isfinite().all()


@pytest.mark.parametrize("options", [{"kdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_other_kinds_are_refused_by_name(options):
    with pytest.raises(GrailError, match=r"^blocks\.0\.attn: .*--attn-ratio 0"):
        Attention.of(nn.MultiheadAttention(WIDTH, HEADS, **options), "blocks.0.attn")
