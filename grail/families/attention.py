"""nn.MultiheadAttention with fewer heads than its width allows.

Shapes: B windows, L and S tokens of queries and of keys, D width outside, N heads, E channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GrailError

NAMES = {f"in_proj.{leaf}": f"in_proj_{leaf}" for leaf in ("weight", "bias")}
"""Where the projection's tensors lie here, and what they are called in a state dict."""


class Attention(nn.Module):
    """Computes what nn.MultiheadAttention computes, with the same arguments, results and names in the state dict, for
    any number of heads of `head_dim` channels: the projection is [3 N E, D], out_proj [D, N E]. Both are layers that
    are called, so that hooks see the context that out_proj reads."""

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, *, bias: bool = True, dropout: float = 0.0,
                 batch_first: bool = False):  # fmt: skip
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.dropout, self.batch_first = dropout, batch_first
        self._qkv_same_embed_dim = False  # torch's own encoder layers then call forward, not their fused kernel
        self.in_proj = nn.Linear(embed_dim, 3 * num_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        self._register_hooks()

    def _register_hooks(self) -> None:
        self.register_state_dict_post_hook(_to_flat)
        self.register_load_state_dict_pre_hook(_from_flat)

    @classmethod
    def of(cls, module: nn.MultiheadAttention, name: str) -> Attention:
        """The same computation with the same tensors, not copied. Raises GrailError naming the module where keys and
        values have widths or tokens of their own."""
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            raise GrailError(
                f"{name}: attention with keys or values of another width, or with tokens of its own (bias_k, "
                f"add_zero_attn), cannot be narrowed; --attn-ratio 0 leaves it as it is"
            )
        with torch.device("meta"):
            made = cls(module.embed_dim, module.num_heads, module.head_dim, bias=module.in_proj_bias is not None,
                       dropout=module.dropout, batch_first=module.batch_first)  # fmt: skip
        made.in_proj.weight, made.in_proj.bias = module.in_proj_weight, module.in_proj_bias
        made.out_proj.weight, made.out_proj.bias = module.out_proj.weight, module.out_proj.bias
        return made.train(module.training)

    @property
    def in_proj_weight(self) -> Tensor:
        """[3 N E, D]: queries, keys and values."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """[3 N E], or None."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: (output, weights or None). Raises ValueError for a mask with another number of
        heads."""
        single = query.dim() == 2
        swapped = not self.batch_first and not single
        given = [query, query if key is None else key, query if value is None else value]
        parts = self._projected(given, single, swapped)
        mask = self._mask(attn_mask, key_padding_mask, parts[0])
        context, weights = self._attend(*parts, mask, need_weights, is_causal and attn_mask is None)
        out = self.out_proj(context.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if swapped else out, weights

    def _projected(self, given: list[Tensor], single: bool, swapped: bool) -> list[Tensor]:
        """Queries, keys and values, [B, N, L or S, E]."""
        if given[1] is given[0] and given[2] is given[0]:
            made = list(self.in_proj(given[0]).chunk(3, -1))
        else:
            biases = (None,) * 3 if self.in_proj.bias is None else self.in_proj.bias.chunk(3)
            made = [F.linear(x, w, b) for x, w, b in zip(given, self.in_proj.weight.chunk(3), biases, strict=True)]
        if single:
            made = [x.unsqueeze(0) for x in made]
        elif swapped:
            made = [x.transpose(0, 1) for x in made]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in made]

    def _mask(self, attention: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores, [B or 1, N or 1, L or 1, S], or None. Where a mask is True nothing is seen."""
        total = None
        if attention is not None:
            total = _additive(attention, like)
            if total.dim() == 3:
                if len(total) != len(like) * self.num_heads:
                    raise ValueError(
                        f"an attention mask for {len(total)} heads of all windows, where there are {len(like)} windows "
                        f"of {self.num_heads} heads"
                    )
                total = total.unflatten(0, (len(like), self.num_heads))
        if padding is not None:
            unseen = _additive(padding if padding.dim() == 2 else padding[None], like)[:, None, None, :]
            total = unseen if total is None else total + unseen
        return total

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' contexts [B, N, L, E]; the attention weights [B, N, L, S] where they are asked for."""
        dropout = self.dropout if self.training else 0.0
        if not weights:
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
            return found, None
        scores = (q * self.head_dim**-0.5) @ k.mT
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        shares = (scores if mask is None else scores + mask).softmax(-1)
        shares = F.dropout(shares, dropout) if dropout else shares
        return shares @ v, shares


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(like.dtype)


def _to_flat(_: nn.Module, state: dict, prefix: str, *__: object) -> None:
    for here, there in NAMES.items():
        if prefix + here in state:
            state[prefix + there] = state.pop(prefix + here)


def _from_flat(_: nn.Module, state: dict, prefix: str, *__: object) -> None:
    for here, there in NAMES.items():
        if prefix + there in state:
            state[prefix + here] = state.pop(prefix + there)


def replace_attention(module: nn.Module, names: list[str]) -> None:
    """Put `Attention` in the places of these nn.MultiheadAttention, in place; others of those names stay."""
    for name in names:
        found = module.get_submodule(name)
        if isinstance(found, nn.MultiheadAttention):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, Attention.of(found, name))
