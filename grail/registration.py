"""Tell transformers' Auto classes about the `grail` format, without importing them.

`from transformers import AutoModelForCausalLM` takes seconds and `grail --help` needs none of it. So `import grail`
only waits until AutoConfig is imported (`install`), and gives it a stand-in for each configuration: the first folder
in the format that is opened brings in the classes themselves.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
MODEL_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "seed_oss")
PREFIX = "grail_"


def register() -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM open folders in the `grail` format without trust_remote_code.

    May be called any number of times. The classes are those of the class file in the folder.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .modeling_grail import make_config, make_models

    for model_type in MODEL_TYPES:
        config, (model, causal_lm) = make_config(model_type), make_models(model_type)
        AutoConfig.register(PREFIX + model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


def install() -> None:
    """Make `register` happen when it is needed. Once is enough, more does no harm."""
    if AUTO_CONFIG in sys.modules:
        _add_stand_ins(sys.modules[AUTO_CONFIG])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds AutoConfig's module where the others do, and adds the stand-ins when it has been executed."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_stand_ins(module)

        spec.loader.exec_module = execute_and_add
        return spec


def _add_stand_ins(module: ModuleType) -> None:
    for model_type in MODEL_TYPES:
        if PREFIX + model_type not in module.CONFIG_MAPPING:
            module.AutoConfig.register(PREFIX + model_type, _stand_in(model_type))


def _stand_in(own: str) -> type:
    """What AutoConfig asks of a configuration class, passed on to the one that `register` puts in its place."""

    class StandIn:
        model_type = PREFIX + own

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _registered(own)(*args, **kwargs)

        @staticmethod
        def from_dict(*args: Any, **kwargs: Any) -> Any:
            return _registered(own).from_dict(*args, **kwargs)

        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            return _registered(own).from_pretrained(*args, **kwargs)

    return StandIn


def _registered(model_type: str) -> type:
    from .modeling_grail import make_config

    register()
    return make_config(model_type)
