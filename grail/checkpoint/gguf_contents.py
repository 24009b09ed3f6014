"""What a GGUF file says of its network and transformers' reader passes over: stretched rotations, optional biases,
another kind of attention.

What the configuration has a place for is put there; everything else is refused, since without it the network would be
another one. llama.cpp is the authority on what the keys mean (llama-model.cpp, load_hparams).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import GrailError

FREQUENCIES = "rope_freqs.weight"
READ = {"freq_base", "dimension_count", "scaling.type", "scaling.factor", "scale_linear"}
UNUSED = {"scaling.original_context_length", "scaling.finetuned"}
"""Keys under `ARCHITECTURE.rope.`; the unused ones mean something to other scalings than none and linear alone."""
BIASES = {
    "attention_bias": (r"blk\.\d+\.attn_(q|k|v|output)\.bias", ".self_attn."),
    "mlp_bias": (r"blk\.\d+\.ffn_(gate|up|down)\.bias", ".mlp."),
}
"""Fields of a configuration: tensors of the file that ask for it, and what the names of its own have in them."""
WINDOW = "attention.sliding_window"
NEUTRAL = {
    "attention.causal": (True,), "attention.scale": (0.0,), "attention.clamp_kqv": (0.0,), "logit_scale": (0.0, 1.0),
    "attention.max_alibi_bias": (0.0,), "use_parallel_residual": (False,), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0),
    "expert_count": (0,), "expert_used_count": (0,),
}  # fmt: skip
"""Keys under `ARCHITECTURE.` that make another network, and the values with which they do not."""
KEY_LENGTH, VALUE_LENGTH = "attention.key_length", "attention.value_length"
HARMLESS = {WINDOW, KEY_LENGTH, VALUE_LENGTH, "vocab_size", "tensor_data_layout", "pooling_type"}
"""Keys under `ARCHITECTURE.` that are judged by themselves, or say nothing of the network up to its logits."""
COMPRESSED = {"llama", "qwen2", "qwen3"}
"""Architectures whose keys are all judged; the others make networks that are refused once they are opened."""
LOW, HIGH = 1.0, 4.0
"""Of LLaMA-3: wavelengths above length / LOW are stretched, those below length / HIGH are not."""
SAME = 1e-5
"""Relative error of a divisor in float32, which may itself have been worked out in float32."""


class Contents:
    """The header of a GGUF file beside the configuration that transformers makes of it. Raises GrailError naming file
    and key for what has no place in it."""

    def __init__(self, file: Path, config: Any):
        self.file, self.config = file, config
        self.reader = GGUFReader(file)
        self.architecture = self.reader.fields["general.architecture"].contents()
        self._parts = tuple(self._ask_for_biases())
        self._carry_heads()
        self._carry_window()
        self._check_neutral()
        self._carry_rotations()
        if self.architecture in COMPRESSED:
            self._check_known()
            self._check_heads()

    def optional(self, name: str) -> bool:
        """Whether a tensor of the model is a bias that the file may leave out where it is zero."""
        return name.endswith(".bias") and any(part in name for part in self._parts)

    def check_read(self, model: Any) -> None:
        """Raises GrailError naming a tensor of the file that went nowhere in the model."""
        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=self.config.to_dict())
        places = get_gguf_hf_weights_map(model, processor)
        for tensor in self.reader.tensors:
            known = tensor.name in places or tensor.name.removesuffix(".weight") in places  # experts have no suffix
            if not known and tensor.name != FREQUENCIES:
                raise GrailError(
                    f"{self.file}: {type(model).__name__} has no place for the tensor {tensor.name}, without which it "
                    f"would be another network; give the checkpoint that the file was made from"
                )

    def _ask_for_biases(self) -> list[str]:
        found = []
        for field, (pattern, part) in BIASES.items():
            there = any(re.fullmatch(pattern, tensor.name) for tensor in self.reader.tensors)
            if there and getattr(self.config, field, None) is False:
                setattr(self.config, field, True)
                found.append(part)
        return found

    def _value(self, name: str) -> Any:
        """Of a key that transformers' reader does not take; None where there is none."""
        field = self.reader.fields.get(f"{self.architecture}.{name}")
        return None if field is None or name in self._taken() else field.contents()

    def _taken(self) -> dict[str, Any]:
        return GGUF_CONFIG_MAPPING.get(self.config.model_type, {})

    def _carry_heads(self) -> None:
        size = self._value(KEY_LENGTH)
        named = getattr(self.config, "head_dim", None) is not None
        if size is not None and (named or (self.architecture in COMPRESSED and size != self._head_size())):
            self.config.head_dim = int(size)

    def _head_size(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def _check_known(self) -> None:
        """Every key of the architecture is carried over, or known to be without effect; for `rope.` see `_told`."""
        prefix, known = f"{self.architecture}.", self._taken().keys() | NEUTRAL.keys() | HARMLESS
        for key in self.reader.fields:
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and not name.startswith("rope.") and name not in known:
                raise GrailError(
                    f"{self.file}: {key} is no key that can be carried over, and it may make another network; give "
                    f"the checkpoint that the file was made from"
                )

    def _check_heads(self) -> None:
        """The tensors of every attention have the rows that the keys say."""
        size, heads = self._head_size(), self.config.num_attention_heads
        groups = self.config.num_key_value_heads
        values = self._value(VALUE_LENGTH) or size
        wanted = {"attn_q": (heads, size), "attn_k": (groups, size), "attn_v": (groups, values)}
        for tensor in self.reader.tensors:
            found = re.fullmatch(r"blk\.\d+\.(attn_[qkv])\.weight", tensor.name)
            if found is None:
                continue
            (count, length), rows = wanted[found[1]], int(tensor.shape[-1])
            if rows != count * length:
                raise GrailError(
                    f"{self.file}: {tensor.name} has {rows} rows, but the keys say {count} heads of {length}; fetch "
                    f"the file again, or give the checkpoint that it was made from"
                )

    def _carry_window(self) -> None:
        window = self._value(WINDOW)
        if not window or window >= getattr(self.config, "max_position_embeddings", 0):
            return
        if not hasattr(self.config, "sliding_window") or hasattr(self.config, "use_sliding_window"):
            raise self._other_network(WINDOW, window)
        self.config.sliding_window = int(window)

    def _check_neutral(self) -> None:
        for name, neutral in NEUTRAL.items():
            value = self._value(name)
            if value is not None and value not in neutral:
                raise self._other_network(name, value)

    def _other_network(self, name: str, value: Any) -> GrailError:
        return GrailError(
            f"{self.file}: {self.architecture}.{name} = {value} makes another network than transformers reads; give "
            f"the checkpoint that the file was made from"
        )

    def _carry_rotations(self) -> None:
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") != "default":
            return  # the reader has taken it from the file
        told = self._told()
        stretched = [one for one in (self._linear(told), self._by_frequency(rope)) if one]
        if not stretched:
            return
        (key, parameters), *more = stretched
        if more or "rope_theta" not in rope:
            raise self._refusal(key)
        self.config.rope_parameters = rope | parameters

    def _told(self) -> dict[str, Any]:
        """The keys of the rotary embedding, those of them that are known."""
        prefix = f"{self.architecture}.rope."
        told = {}
        for key, field in self.reader.fields.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                if name not in READ | UNUSED:
                    raise self._refusal(key)
                told[name] = field.contents()
        if "dimension_count" in told and told["dimension_count"] != self._rotated():
            raise self._refusal(f"{prefix}dimension_count")
        return told

    def _rotated(self) -> int:
        rope = getattr(self.config, "rope_parameters", None) or {}
        return int(self._head_size() * rope.get("partial_rotary_factor", 1.0))

    def _linear(self, told: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """(the key, the parameters) of a linear scaling; None where the frequencies stay what they are."""
        kind, key = told.get("scaling.type", "linear"), f"{self.architecture}.rope.scaling.factor"
        factor = float(told.get("scaling.factor") or told.get("scale_linear") or 1.0)
        if kind not in ("none", "linear"):
            raise self._refusal(f"{self.architecture}.rope.scaling.type", f" {kind}")
        if not 0 < factor < math.inf:
            raise self._refusal(key, f" {factor}")
        return None if kind == "none" or factor == 1 else (key, {"rope_type": "linear", "factor": factor})

    def _by_frequency(self, rope: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """(the tensor's name, the parameters) of LLaMA-3's scaling; None where every divisor is 1."""
        found = [tensor for tensor in self.reader.tensors if tensor.name == FREQUENCIES]
        if not found:
            return None
        divisors = torch.tensor(dequantize(found[0].data, found[0].tensor_type)).double().flatten()
        if torch.equal(divisors, torch.ones_like(divisors)):
            return None
        plain = rope.get("rope_theta", math.nan) ** (-torch.arange(0, self._rotated(), 2).double() / self._rotated())
        if len(plain) == len(divisors):
            parameters = _llama3(divisors, 2 * math.pi / plain)
            if torch.allclose(self._scaled(rope | parameters), plain / divisors, rtol=SAME, atol=0):
                return FREQUENCIES, parameters
        raise self._refusal(FREQUENCIES, " (not LLaMA-3's)")

    def _scaled(self, rope: dict[str, Any]) -> Tensor:
        """The frequencies as transformers works them out."""
        before, self.config.rope_parameters = self.config.rope_parameters, rope
        frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, torch.device("cpu"))
        self.config.rope_parameters = before
        return frequencies.double()

    def _refusal(self, key: str, said: str = "") -> GrailError:
        return GrailError(
            f"{self.file}: {key}{said} is a rotary embedding that cannot be carried over; give the checkpoint that the "
            f"file was made from"
        )


def _llama3(divisors: Tensor, wavelengths: Tensor) -> dict[str, Any]:
    """The parameters that may have given these divisors, float64 [d / 2]: the last one is the factor, and the first one
    that is not 1 tells the length; where that is the factor too, any length between two wavelengths would do."""
    factor = round(float(divisors[-1]), 4)
    first = int((divisors > 1 + SAME).int().argmax())
    divisor, wavelength = float(divisors[first]), float(wavelengths[first])
    if divisor < factor * (1 - SAME):
        smooth = (1 / divisor - 1 / factor) / (1 - 1 / factor)
        length = round(wavelength * (LOW + smooth * (HIGH - LOW)))
    else:
        length = int(wavelength)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": length,
    }
