"""`import grail` opens its format in transformers' Auto classes: whatever comes first, at no cost, breaking nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
from transformers import AutoConfig

from grail import modeling_grail, registration
from grail.families import register

OPENED = """
config = AutoConfig.for_model("grail_qwen2", hidden_size=8, vocab_size=8, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=2, intermediate_size=4, per_layer_config={"1": {"intermediate_size": 3}})
print(AutoModelForCausalLM.from_config(config).model.layers[1].mlp.up_proj.out_features)
"""
BEFORE = """
import sys
import grail
from grail import registration
registration.install()
assert not {"transformers", "torch"} & set(sys.modules)
assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1
"""
# a configuration first: it imports the Auto classes half-way through
FIRST = BEFORE + "from transformers import Qwen2Config, AutoConfig, AutoModelForCausalLM" + OPENED
# looked up without being imported, an import that fails half-way, and an import once more
AGAIN = (
    BEFORE
    + """
import importlib.util, transformers.models.auto
assert importlib.util.find_spec(registration.AUTO_CONFIG) is not None
real, sys.modules["transformers.dynamic_module_utils"] = sys.modules.get("transformers.dynamic_module_utils"), None
try:
    from transformers import AutoConfig
except ImportError:
    pass
else:
    sys.exit("the first import did not fail")
del sys.modules["transformers.dynamic_module_utils"]
import transformers.models.auto.configuration_auto as auto
assert "grail_qwen2" in auto.CONFIG_MAPPING
auto = importlib.reload(auto)
assert "grail_qwen2" in auto.CONFIG_MAPPING
assert auto.__spec__.loader.get_source(auto.__name__).startswith("# Copyright")
from transformers import AutoConfig, AutoModelForCausalLM
"""
    + OPENED
)
# another thread is half-way through AutoConfig's module while this one imports grail
RACE = (
    """
import importlib.abc, importlib.machinery, sys, threading

halfway, go_on = threading.Event(), threading.Event()

class Slow(importlib.abc.Loader):
    def __init__(self, own):
        self.own = own
    def exec_module(self, module):
        halfway.set()  # not in find_spec, which holds the one lock of all imports
        assert go_on.wait(60)
        self.own.exec_module(module)

class Stop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.dynamic_module_utils":
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            spec.loader = Slow(spec.loader)
            return spec

sys.meta_path.insert(0, Stop())
importing = threading.Thread(target=lambda: __import__("transformers.models.auto.configuration_auto"))
importing.start()
assert halfway.wait(60)
module = sys.modules["transformers.models.auto.configuration_auto"]
assert module.__spec__._initializing and not hasattr(module, "CONFIG_MAPPING")
import grail
go_on.set()
importing.join()
from transformers import AutoConfig, AutoModelForCausalLM
"""
    + OPENED
)


@pytest.mark.parametrize("code", [FIRST, AGAIN, RACE], ids=["grail first", "again", "two threads"])
def test_the_format_opens_in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize("content", [None, "raise RuntimeError('broken')"], ids=["absent", "broken"])
def test_grail_is_imported_without_a_transformers_that_works(tmp_path, content):
    if content is None:
        broken = "import sys; sys.modules['transformers'] = None"
    else:
        (tmp_path / "transformers.py").write_text(content)
        broken = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    error = "ImportError" if content is None else "RuntimeError"
    code = f"{broken}\nimport grail\ntry:\n    import transformers\nexcept {error}:\n    print('as before')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("as before\n"), done.stderr


def test_after_transformers_and_once_only(monkeypatch):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    registration.install()
    assert CONFIG_MAPPING["grail_llama"] is not modeling_grail.GrailLlamaConfig
    assert type(AutoConfig.for_model("grail_llama")) is modeling_grail.GrailLlamaConfig
    assert CONFIG_MAPPING["grail_llama"] is modeling_grail.GrailLlamaConfig


def test_stand_ins_are_configuration_classes(monkeypatch):
    """Libraries go through CONFIG_MAPPING and ask issubclass."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    registration.install()
    for own in registration.MODEL_TYPES:
        held = CONFIG_MAPPING[f"grail_{own}"]
        assert issubclass(held, PreTrainedConfig) and held.model_type == f"grail_{own}"
        assert held is not modeling_grail.make_config(own)
    assert type(CONFIG_MAPPING["grail_qwen2"]()) is modeling_grail.GrailQwen2Config


def test_a_loader_of_many_modules_is_left_alone(monkeypatch):
    """As in a zip file: the finder's spec has a loader of its own, and another module's has not."""

    class Shared:
        def create_module(self, spec):
            return None

        def exec_module(self, module):
            module.executed = True

        def get_source(self, name):
            return f"source of {name}"

    shared = Shared()

    class Zip:
        def find_spec(self, name, path=None, target=None):
            # a finder that asks all of sys.meta_path, as some import hooks do, must not go round for ever
            assert own.find_spec(name, path, target) is None
            return ModuleSpec(name, shared)

    own = registration._Finder()
    monkeypatch.setattr(sys, "meta_path", [own, Zip()])
    spec = own.find_spec(registration.AUTO_CONFIG)
    assert spec.loader is not shared and spec.loader.get_source("x") == "source of x"
    assert "exec_module" not in vars(shared) and own in sys.meta_path
    assert own.find_spec(registration.AUTO_CONFIG).loader is not spec.loader
    assert own.find_spec("transformers.models.auto.modeling_auto") is None
    with pytest.raises(AttributeError):
        spec.loader.is_package("x")


def test_registering_twice_keeps_the_classes():
    register()
    first = type(AutoConfig.for_model("grail_llama"))
    register()
    assert type(AutoConfig.for_model("grail_llama")) is first is modeling_grail.GrailLlamaConfig
    assert tuple(modeling_grail.BASES) == registration.MODEL_TYPES and modeling_grail.PREFIX == registration.PREFIX
