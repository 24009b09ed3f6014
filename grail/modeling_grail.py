"""LLaMA-like language models whose layers have widths of their own, as GRAIL writes them (format `grail`).

The layers are transformers' own, each built from `config.per_layer_config[i]`: num_attention_heads,
num_key_value_heads, intermediate_size, and whether o_proj and down_proj carry a bias. Nothing else differs from the
model type that the name ends in: `GrailLlamaForCausalLM` is LlamaForCausalLM with such layers.

This one file is both the module that `import grail` registers and the class file in a checkpoint folder, where
`trust_remote_code=True` loads it without grail. It needs only torch, huggingface_hub and transformers.
"""

import copy
import functools
import importlib

from huggingface_hub.dataclasses import strict
from torch import nn

BASES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "seed_oss": "SeedOss",
}
PREFIX = "grail_"
CONSUMERS = {"o_proj": "self_attn", "down_proj": "mlp"}


def layer_of_its_own_width(layer_class: type, config, index: int) -> nn.Module:
    """Layer `index` in the widths and with the consumer biases that its own configuration asks for."""
    own = config.per_layer_config[index]
    layer = layer_class(own, index)
    for name, part in CONSUMERS.items():
        module = getattr(layer, part)
        linear, wanted = getattr(module, name), getattr(own, f"{name}_bias")
        if wanted is not None and wanted != (linear.bias is not None):
            setattr(module, name, nn.Linear(linear.in_features, linear.out_features, bias=wanted))
    # the shared configuration, so that set_attn_implementation reaches every layer
    layer.self_attn.config = config
    return layer


def home_of(model_type: str, kind: str):
    """transformers' own module for a model type: its "configuration" or its "modeling"."""
    return importlib.import_module(f"transformers.models.{model_type}.{kind}_{model_type}")


@functools.cache
def make_config(model_type: str) -> type:
    """The configuration class for one of BASES; the same one every time."""
    plain_config = getattr(home_of(model_type, "configuration"), f"{BASES[model_type]}Config")
    own_type = PREFIX + model_type

    @strict
    class Config(plain_config):
        """The plain configuration with the widths it had before, and `per_layer_config` for the layers that differ.

        o_proj_bias, down_proj_bias: whether a layer's consumers carry a bias; None: as the plain class has them.
        """

        model_type = own_type
        o_proj_bias: bool | None = None
        down_proj_bias: bool | None = None

        def validate_architecture(self):
            """Any number of heads is allowed in any hidden size, but query heads divide over key/value heads."""
            for index, own in enumerate(self.per_layer_config):
                if own.num_attention_heads % own.num_key_value_heads:
                    raise ValueError(
                        f"layer {index} has {own.num_attention_heads} query heads, which is no multiple of its "
                        f"{own.num_key_value_heads} key/value heads"
                    )

        def validate_rope(self):
            """Of one layer: some checks read num_attention_heads, which has no single value here."""
            plain_config.validate_rope(self.per_layer_config[0])

    return _named(Config, model_type, "Config", "AutoConfig")


@functools.cache
def make_models(model_type: str) -> tuple[type, type]:
    """(base model, causal language model) for one of BASES; the same ones every time."""
    name, modeling, own_config = BASES[model_type], home_of(model_type, "modeling"), make_config(model_type)
    plain_model, plain_lm = getattr(modeling, f"{name}Model"), getattr(modeling, f"{name}ForCausalLM")
    layer_class = getattr(modeling, f"{name}DecoderLayer")

    class Model(plain_model):
        config_class = own_config

        def __init__(self, config):
            # everything but the layers, from one layer's configuration: it has a value for every field
            shared = copy.copy(config.per_layer_config[0])
            shared.num_hidden_layers = 0
            super().__init__(shared)
            shared.num_hidden_layers = config.num_hidden_layers
            self.config = config
            layers = range(config.num_hidden_layers)
            self.layers = nn.ModuleList([layer_of_its_own_width(layer_class, config, index) for index in layers])
            self.post_init()

    class CausalLM(plain_lm):
        config_class = own_config

        def __init__(self, config):
            super(plain_lm, self).__init__(config)  # not plain_lm's own, which would build layers of one width
            self.model = Model(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    return _named(Model, model_type, "Model"), _named(CausalLM, model_type, "ForCausalLM", "AutoModelForCausalLM")


def _named(made: type, model_type: str, suffix: str, auto_class: str | None = None) -> type:
    """The class under its public name; save_pretrained copies this file for those with an auto class."""
    made.__name__ = made.__qualname__ = f"Grail{BASES[model_type]}{suffix}"
    made.__module__, made._auto_class = __name__, auto_class
    return made


def __getattr__(name: str) -> type:
    """Classes are made when first asked for, each importing its own model type alone."""
    for model_type, base in BASES.items():
        if name == f"Grail{base}Config":
            return make_config(model_type)
        if name in (f"Grail{base}Model", f"Grail{base}ForCausalLM"):
            return make_models(model_type)[name.endswith("ForCausalLM")]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
