"""Networks by name, such as `timm/NAME` and `open_clip/NAME`, with weights from a safetensors file, and transformers'
folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.preprocessing import Preprocessing, imported
from ..calibration.processor import preprocessing_of
from ..checkpoint.reader import SafetensorsFolder, TensorInfo
from ..documents import about, check_counts
from ..errors import GrailError, first_line
from ..hub import at_once
from ..recipe import shown
from . import hf
from .names import LIBRARIES, NAMED, is_hf_folder, is_module_folder

OPTIONS = {
    "num_classes": int, "in_chans": int, "img_size": (int, list), "patch_size": int, "global_pool": str,
    "embed_dim": int, "depth": int, "num_heads": int, "mlp_ratio": (int, float), "dynamic_img_size": bool,
    "force_image_size": (int, list), "force_quick_gelu": bool, "force_context_length": int,
}  # fmt: skip
"""What a factory may be given: config.json is data from anywhere, and some of timm's options name files to unpickle."""
MOST_BEFORE, SMALL = 100, 10**7
"""A network had at most so many times the parameters of what was made of it, or so many more."""
UNBUILT = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, OSError,
)  # fmt: skip
"""What factories raise for options that do not fit their network."""
COUNTER = "num_batches_tracked"
TORCHVISION_HEADS = ("fc.weight", "classifier.weight", "heads.head.weight")


@dataclass(frozen=True)
class Architecture:
    """library: timm, torchvision, open_clip or transformers; options: what its factory is given (num_classes, img_size,
    ...; for transformers the configuration); folder: where files beside the weights lie, for transformers' networks."""

    library: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def parse(cls, model: str) -> Architecture | None:
        """That of `timm/NAME` and its like, and of a folder of transformers; None for anything else."""
        if is_hf_folder(Path(model)):
            return cls(hf.LIBRARY, *hf.named_in(Path(model)), Path(model))
        library, _, name = model.partition("/")
        return cls(library, name) if library in LIBRARIES and name and not Path(model).exists() else None

    @classmethod
    def of_module(cls, module: nn.Module) -> Architecture | None:
        """What builds a module of transformers anew; None for others."""
        options = hf.options_of(module)
        return options and cls(hf.LIBRARY, type(module).__name__, options)

    @classmethod
    def from_json(cls, found: Any, folder: Path) -> Architecture:
        """The inverse of to_json, for an output in a folder. Raises GrailError for anything else."""
        try:
            with about(folder / "config.json"):
                return cls(str(found["library"]), str(found["name"]), dict(found["options"]), folder)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, GrailError):
                raise
            raise GrailError(f"{folder / 'config.json'} names no architecture that grail can read") from error

    def __post_init__(self):
        if self.library == hf.LIBRARY:
            return hf.check_options(self.name, self.options)
        for name, value in self.options.items():
            if name not in OPTIONS or not isinstance(value, OPTIONS[name]):
                known = ", ".join(OPTIONS)
                raise GrailError(
                    f"{self.library}/{self.name}: option {name}={shown(value)} is not one of {known}, or no such value"
                )

    def _is_known(self) -> bool:
        if self.library == "timm":
            return bool(imported("timm").is_model(self.name.partition(".")[0])) and ":" not in self.name
        if self.library == "open_clip":
            return self.name in imported("open_clip").list_models()
        models = imported("torchvision").models
        return self.library == "torchvision" and self.name in models.list_models(module=models)

    def check_known(self) -> None:
        """Raises GrailError for a name the library does not know."""
        if not self._is_known():
            raise GrailError(f"--model {self.library}/{self.name}: {self.library} has no such network")

    def build(self) -> nn.Module:
        """The network with random weights, in evaluation mode. Raises GrailError for a name the library does not
        know."""
        if self.library == hf.LIBRARY:
            return hf.build(self.name, self.options)
        self.check_known()
        try:
            if self.library == "timm":
                module = imported("timm").create_model(self.name, pretrained=False, **self.options)
            elif self.library == "open_clip":
                module = imported("open_clip").create_model(self.name, pretrained=None, **self.options)
            else:
                module = imported("torchvision").models.get_model(self.name, weights=None, **self.options)
        except UNBUILT as error:
            given = _listed(self.options)
            asked = f" (with {given})" if given else ""
            raise GrailError(f"--model {self.library}/{self.name}: {first_line(error)}{asked}") from error
        return module.eval()

    def check_size(self, source: SafetensorsFolder) -> None:
        """Raises GrailError where the network before it was narrowed has far more layers or parameters than the
        weights there are: what the options say is data from anywhere, and making it would take all memory."""
        check_counts(self.options, f"{self.library}/{self.name}", len(source.names()))
        if self.library == "open_clip":  # whose factory needs real tensors; its options say no widths
            return
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in self.build().parameters())
        stored = sum(math.prod(source.info(name).shape) for name in source.names())
        if parameters > MOST_BEFORE * stored + SMALL:
            raise GrailError(f"{self.library}/{self.name} would have {parameters:,} parameters, {stored:,} are stored")

    def preprocessing(self, module: nn.Module) -> Preprocessing | None:
        """How images become its inputs; None where nothing says it."""
        if self.library == hf.LIBRARY:
            channels, size = hf.images_of(self.options["config"])
            return self.folder and channels and preprocessing_of(self.folder, channels, size)
        if self.library == "timm":
            return Preprocessing.from_timm(module)
        if self.library == "open_clip":
            return Preprocessing.from_open_clip(module)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return Preprocessing((224, 224), 3, mean, std, 0.875, "bilinear")

    def tokenizer(self) -> Callable[[list[str]], Tensor] | None:
        """Texts -> token ids [N, L], for networks that read text. Raises GrailError where it cannot be had here."""
        if self.library == hf.LIBRARY:
            length = hf.text_length(self.options["config"])
            return self.folder and length and hf.tokenizer_of(self.folder, length)
        if self.library != "open_clip":
            return None
        try:
            return imported("open_clip").get_tokenizer(self.name)
        except (OSError, ImportError, ValueError) as error:
            raise GrailError(f"{self.library}/{self.name}: no tokenizer ({first_line(error)})") from error

    def to_json(self) -> dict:
        """For config.json."""
        return {"library": self.library, "name": self.name, "options": self.options}


def open_network(model: str, weights: str | None, options: dict[str, Any]) -> tuple[nn.Module, Architecture, dict]:
    """(the network with its weights, what builds it, where they came from). Number of classes (of timm's and some of
    torchvision's) and input channels (of timm's) follow the weights unless `options` say otherwise. Raises GrailError
    naming the file and what does not fit."""
    found = _named(model)
    if found.library == hf.LIBRARY:
        return _open_folder(found, model, weights, options)
    found.check_known()  # before anything is fetched
    source = SafetensorsFolder(_weights_file(found, weights))
    shapes = {name: source.info(name).shape for name in source.names()}
    found = Architecture(found.library, found.name, _inferred(found, shapes) | options)
    if options:  # which may ask for more than there is memory; what the weights say fits them
        with _about_options(options):
            found.check_size(source)
    module = found.build()
    wanted = {name: _kind(tensor, name) for name, tensor in module.state_dict().items()}
    missing = [name for name in wanted if name not in shapes and not name.endswith(COUNTER)]
    other = [name for name in shapes if _kind(source.info(name), name) != wanted.get(name)]
    for what, names in (("lacks", missing), ("holds another", other)):
        if names:
            few = f"{names[0]} ({len(names)} such tensors)"
            raise GrailError(f"{source.path} {what} {few}: these are not weights of {model}")
    tensors = {name: source.get(name) for name in shapes}
    counters = {name: tensor.long() for name, tensor in tensors.items() if name.endswith(COUNTER)}
    module.load_state_dict(tensors | counters, strict=False, assign=True)
    return module.eval(), found, {"id": model, "revision": None, "sha256": source.sha256()}


def _kind(tensor: Tensor | TensorInfo, name: str) -> tuple[tuple[int, ...], bool]:
    """(shape, whether of floating point) of a tensor, or of what a file says of one. A counter of batches is a whole
    number, also where a script has cast all tensors."""
    return tuple(tensor.shape), tensor.dtype.is_floating_point and not name.endswith(COUNTER)


def _named(model: str) -> Architecture:
    """What a name or folder says. Raises GrailError for what is_network takes and nothing can be built from."""
    found = Architecture.parse(model)
    if found is not None:
        return found
    if is_module_folder(Path(model)):
        raise GrailError(
            f"--model {model} is compressed already: compress the original with a higher ratio, or open it with "
            f"grail.load and give the module to grail.compress"
        )
    raise GrailError(f"--model {model} names no network: give one with its library, such as timm/resnet18")


@contextmanager
def _about_options(options: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except GrailError as error:
        if "--model" in str(error):
            raise
        raise GrailError(f"--model-option {_listed(options)}: {error}") from error


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in options.items())


def _open_folder(
    found: Architecture, model: str, weights: str | None, options: dict[str, Any]
) -> tuple[nn.Module, Architecture, dict]:
    for option, given in (("--weights", weights is not None), ("--model-option", bool(options))):
        if given:
            raise GrailError(f"{option} is for {NAMED}; {model} is a folder with weights and options of its own")
    source = SafetensorsFolder(found.folder)
    with about(found.folder / "config.json"):
        found.check_size(source)
        module, options, sha256 = hf.opened(source, found.name, found.options)
    return module, replace(found, options=options), {"id": model, "revision": None, "sha256": sha256}


def _weights_file(found: Architecture, weights: str | None) -> Path:
    if weights is None:
        return _downloaded(found)
    file = Path(weights)
    if not file.is_file():
        what = "is a folder; name a .safetensors file in it" if file.is_dir() else "no such file"
        raise GrailError(f"--weights {weights}: {what}")
    if file.suffix != ".safetensors":
        raise GrailError(f"--weights {weights}: only .safetensors is read; save the state dict with safetensors.torch")
    return file


def _downloaded(found: Architecture) -> Path:
    """The hub's weights of a timm network, without timm's own loader, which may unpickle."""
    name = f"{found.library}/{found.name}"
    if found.library != "timm":
        raise GrailError(f"--model {name}: name a file with --weights FILE.safetensors (the library's own is a pickle)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    tagged = imported("timm").models.get_pretrained_cfg(found.name)
    repository = (tagged.hf_hub_id if tagged and tagged.hf_hub_id else None) or name
    repository = f"{repository}{found.name}" if repository.endswith("/") else repository
    try:
        with at_once(repository):
            return Path(hf_hub_download(repository, "model.safetensors"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise GrailError(f"--model {name}: no weights from {repository} ({reason}); name --weights FILE") from error


def _inferred(found: Architecture, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if found.library == "timm":
        known = imported("timm").models.get_pretrained_cfg(found.name)
        if known is None:
            return options
        heads = [f"{name}.weight" for name in _names(known.classifier)]
        options["num_classes"] = next((shapes[head][0] for head in heads if head in shapes), 0)
        first = next(
            (shapes[f"{name}.weight"] for name in _names(known.first_conv) if f"{name}.weight" in shapes), None
        )
        if first is not None and first[1] != 3:
            options["in_chans"] = first[1]
        return options
    known = TORCHVISION_HEADS if found.library == "torchvision" else ()
    heads = [shapes[head][0] for head in known if head in shapes]
    return {"num_classes": heads[0]} if heads else options


def _names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
