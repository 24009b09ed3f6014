"""Tell transformers' Auto classes about the `grail` format, without importing them.

`from transformers import AutoModelForCausalLM` takes seconds and `grail --help` needs none of it. So `import grail`
only waits until AutoConfig is imported (`install`), and gives it a stand-in for each configuration: the first folder
in the format that is opened brings in the classes themselves.
"""

from __future__ import annotations

import sys
import threading
from importlib.abc import Loader, MetaPathFinder
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
    """Make `register` happen when it is needed. Once is enough, more does no harm.

    If AutoConfig's module is just being executed (by another thread, or further up in this one) its stand-ins follow
    with the next import of anything.
    """
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.done = None
    finder.catch_up()


class _Finder(MetaPathFinder):
    """Finds AutoConfig's module where the others do, and has the stand-ins added whenever it has been executed.

    done: the module whose stand-ins need no more thought; another one was found before there was this finder.
    """

    def __init__(self) -> None:
        self.done: ModuleType | None = None
        self._asking = threading.local()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        self.catch_up()
        if name != AUTO_CONFIG or getattr(self._asking, "others", False):
            return None
        self._asking.others = True  # one of them may ask sys.meta_path, and so this one, in turn
        try:
            spec = _found_by_others(self, name, path, target)
        finally:
            self._asking.others = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec

    def catch_up(self) -> None:
        """Add the stand-ins to a module that others found, if it has come far enough."""
        module = sys.modules.get(AUTO_CONFIG)
        if module is not None and module is not self.done and _add_stand_ins(module):
            self.done = module


def _found_by_others(finder: MetaPathFinder, name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
    for other in list(sys.meta_path):
        if other is not finder and hasattr(other, "find_spec"):
            spec = other.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


class _Loader(Loader):
    """Another loader for one module, which gets the stand-ins after it was executed.

    That loader is not touched: it may serve many modules, as the one of a zip file does.
    """

    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _add_stand_ins(module)

    def __getattr__(self, name: str) -> Any:
        """get_source, is_package, get_resource_reader, path, ..., as far as that loader has them."""
        if name == "_own":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self._own, name)


def _add_stand_ins(module: ModuleType) -> bool:
    """Whether the module has what is needed for it: one that is still being executed may not."""
    mapping, base = (vars(module).get(name) for name in ("CONFIG_MAPPING", "PreTrainedConfig"))
    if mapping is None or base is None:
        return False
    for model_type in MODEL_TYPES:
        if PREFIX + model_type not in mapping:
            mapping.register(PREFIX + model_type, _stand_in(model_type, base))
    return True


def _stand_in(own: str, base: type) -> type:
    """What AutoConfig asks of a configuration class, passed on to the one that `register` puts in its place.

    A subclass of transformers' PreTrainedConfig (`base`), as whoever goes through CONFIG_MAPPING expects; none of its
    own instances is ever made.
    """

    class StandIn(base):
        model_type = PREFIX + own

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _registered(own)(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return _registered(own).from_dict(*args, **kwargs)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return _registered(own).from_pretrained(*args, **kwargs)

    return StandIn


def _registered(model_type: str) -> type:
    from .modeling_grail import make_config

    register()
    return make_config(model_type)
