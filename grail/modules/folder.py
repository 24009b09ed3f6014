"""A narrowed network on disk: model.safetensors, and a config.json from which its module is built anew.

config.json holds the architecture (or null for a class of the user's own), every site with the units it keeps, the
preprocessing and the class names. Nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..calibration.preprocessing import Preprocessing
from ..checkpoint.pieces import Piece
from ..checkpoint.reader import SafetensorsFolder, read_json
from ..checkpoint.writer import OutputFolder
from ..children import python
from ..documents import about
from ..errors import GrailError, naming
from ..families.attention import replace_attention
from ..families.buffers import kept_buffers
from ..families.copies import copied
from ..families.fields import whole
from ..families.network import ModuleSite, Network, check
from ..report import versions
from ..result import SiteResult
from . import narrow
from .answers import answer
from .architecture import Architecture
from .names import KEY, PACKAGES

WEIGHTS, VERSION = "model.safetensors", 1
VERSION_TEXT = re.compile(r"[\w.+-]{1,40}", re.ASCII)
TOLERANCE = 1e-5
WANTED, EXAMPLE = "wanted", "example:"


def config_of(
    architecture: Architecture | None,
    results: list[SiteResult],
    preprocessing: Preprocessing | None,
    classes: list[str] | None,
) -> dict:
    """What config.json holds."""
    sites = []
    for result in results:
        units = result.site.units
        kept = units.count if result.reduction is None else result.reduction.kept_width // units.size
        sites.append(result.site.to_json() | {"kept": kept})
    return {
        KEY: VERSION,
        "architecture": architecture and architecture.to_json(),
        "sites": sites,
        "preprocessing": preprocessing and preprocessing.to_json(),
        "classes": classes,
    }


def write(out: OutputFolder, module: nn.Module, config: dict) -> int:
    """Weights and configuration into an open output folder; bytes of the weights."""
    tensors = module.state_dict()
    pieces = [Piece.of(name, tensor) for name, tensor in tensors.items()]
    out.write_file(WEIGHTS, pieces)
    out.write_json("config.json", config)
    return sum(piece.nbytes for piece in pieces)


def load(path: Path | str, module: nn.Module | None = None) -> nn.Module:
    """The network in a folder, in evaluation mode, its parameters trainable where those of the module it is built from
    are. module: one of the original widths, for a class that no library makes (it is not modified); where its
    parameters are of one dtype and the stored ones of another, buffers that are not stored take theirs, as in
    `module.to(dtype)`.
    Raises GrailError naming what is missing or does not fit, and for anything else than such a module."""
    if module is not None and not isinstance(module, nn.Module):
        raise GrailError(
            f"grail.load(path, module=...) takes a network of the original widths; got {_called(module)}, which is none"
        )
    folder = Path(path)
    file = folder / "config.json"
    with about(file):
        config, source = read_json(file), SafetensorsFolder(folder / WEIGHTS)
        try:
            return _loaded(folder, config, source, module)
        except GrailError as error:
            raise type(error)(f"{error}{_written_with(folder)}") from error


def _called(found: Any) -> str:
    """What somebody gave in the place of a network."""
    return f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"


def _written_with(folder: Path) -> str:
    """Of which packages that make networks there was another version when the folder was written, or nothing."""
    try:
        told, here = read_json(folder / "grail.json")["versions"], versions(*PACKAGES)
        written = {name: str(told[name]) for name in ("transformers", *PACKAGES) if name in told}
    except (GrailError, KeyError, TypeError, OSError):
        return ""
    others = [
        f"{name} {was}, here is {here[name]}"
        for name, was in written.items()
        if was != here[name] and VERSION_TEXT.fullmatch(was)
    ]
    return f" (written with {'; '.join(others)})" if others else ""


def _loaded(folder: Path, config: dict, source: SafetensorsFolder, module: nn.Module | None) -> nn.Module:
    built = module is None
    if module is None:
        if config.get("architecture") is None:
            raise GrailError(
                f"{folder} is a network of its user's own class: grail.load(path, module=THE_ORIGINAL_MODULE)"
            )
        architecture = Architecture.from_json(config["architecture"], folder)
        architecture.check_size(source)
        module = architecture.build()
    try:
        sites = [ModuleSite.from_json({k: v for k, v in site.items() if k != "kept"}) for site in config["sites"]]
        kept = [whole(site["name"], "kept", site["kept"]) for site in config["sites"]]
        if not all(1 <= count <= site.units.count for site, count in zip(sites, kept, strict=True)):
            raise ValueError("a site keeps more than it has, or nothing")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise GrailError(f"{folder / 'config.json'} describes no sites that grail can read ({error})") from error
    network = Network(module, sites).clone()  # residual streams among them: here they are sites like any other
    known = {name for name, _ in network.module.named_modules(remove_duplicate=False)}
    replace_attention(network.module, [name for site in sites for name, _ in site.counts if name in known])
    check(network)
    for site, count in zip(sites, kept, strict=True):
        _narrow(network, site, count)
    was = _float_dtypes(network.module.parameters())
    filled = _filled(network.module, source)
    if not built:
        _complete_buffers(filled, source, was)
    return filled


def _float_dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _complete_buffers(module: nn.Module, source: SafetensorsFolder, was: set[torch.dtype]) -> None:
    """Buffers that no file holds, of a module whose parameters were of other dtypes before they were filled in: those
    of the module's dtype go with it. (One that was given in 16 bits may keep buffers in float32 on purpose.) Raises
    GrailError naming one without data."""
    stored, now = set(source.names()), _float_dtypes(module.parameters())
    for owner_name, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            name = f"{owner_name}.{key}".lstrip(".")
            if buffer is None or name in stored:
                continue
            if buffer.is_meta:
                raise GrailError(
                    f"the module's buffer {name} holds no data (it is on the meta device), and {source.path} does not "
                    f"store it; make the module on the CPU"
                )
            if len(was) == len(now) == 1 and {buffer.dtype} == was:
                owner._buffers[key] = buffer.to(*now)


def _narrow(network: Network, site: ModuleSite, count: int) -> None:
    """To the widths alone: which units stay does not matter for what is filled in afterwards."""
    if count == site.units.count:
        return
    narrow.prune(network, site, torch.arange(count))


def _filled(module: nn.Module, source: SafetensorsFolder) -> nn.Module:
    tensors = {name: source.get(name) for name in source.names()}
    layers, tied = dict(module.named_modules()), _tied(module)
    try:
        for name in tensors:
            owner, _, leaf = name.rpartition(".")
            if leaf in ("weight", "bias") and getattr(layers.get(owner), leaf, "") is None:
                trained = any(p.requires_grad for p in layers[owner].parameters(recurse=False))
                setattr(layers[owner], leaf, nn.Parameter(tensors[name], requires_grad=trained))
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in tensors:
                tensors[name] = narrow.laid_as(tensors[name], parameter)
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise GrailError(
            f"{source.path} does not fit its config.json: {str(error).splitlines()[-1].strip()}"
        ) from error
    for first, *others in tied:
        for owner, leaf in (name.rpartition(".")[::2] for name in others if tensors[name].equal(tensors[first])):
            setattr(module.get_submodule(owner), leaf, module.get_parameter(first))
    return module.eval()


def _tied(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [several for several in names.values() if len(several) > 1]


@torch.no_grad()
def answers(module: nn.Module, examples: dict[str, Tensor]) -> Tensor:
    """What each method gives for its example, one after another by name, in float64."""
    runs = {call: getattr(module, call) if call else module for call in sorted(examples)}
    with kept_buffers(module):
        return torch.cat([answer(run, examples[call]).cpu() for call, run in runs.items()])


def reopen_here(folder: Path, expected: nn.Module, examples: dict[str, Tensor], module: nn.Module) -> float:
    """The same in this process, for a class that only its user can make: from a module of the original widths."""
    loaded = load(folder, module).to(next(iter(examples.values())).device)
    return _judged(folder, relative_difference(answers(loaded, examples), answers(expected, examples)))


def reopen(folder: Path, expected: nn.Module, examples: dict[str, Tensor]) -> float:
    """Load a folder in a fresh process and compare outputs on examples: the relative difference. Raises GrailError
    where it is above rounding."""
    examples = {call: example.cpu().contiguous() for call, example in examples.items()}
    if any(tensor.is_cuda for tensor in expected.state_dict().values()):
        # the other process computes on the CPU, and a GPU rounds otherwise: in 16 bits far above the tolerance
        expected = copied(expected).cpu()
    with tempfile.TemporaryDirectory(prefix="grail-reopen-") as work:
        probe = Path(work) / "probe.safetensors"
        tensors = {f"{EXAMPLE}{call}": example for call, example in examples.items()}
        with naming(probe):
            probe.write_bytes(save(tensors | {WANTED: answers(expected, examples)}))
        done = subprocess.run(python(__name__, folder, probe), capture_output=True, text=True)
    if done.returncode:
        raise GrailError(f"{folder} cannot be opened again: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    return _judged(folder, float(json.loads(done.stdout)["difference"]))


def _judged(folder: Path, difference: float) -> float:
    if not difference <= TOLERANCE:
        raise GrailError(f"{folder} gives other outputs when it is opened again (relative difference {difference:.1e})")
    return difference


def _answer(folder: str, probe: str) -> dict[str, Any]:
    tensors = load_file(probe)
    wanted = tensors.pop(WANTED)
    examples = {name.removeprefix(EXAMPLE): tensor for name, tensor in tensors.items()}
    return {"difference": relative_difference(answers(load(folder), examples), wanted)}


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64, over 1 where all is zero; without where both are -∞, as masks make it."""
    masked = found.isneginf() & wanted.isneginf()
    found, wanted = (tensor.double().masked_fill(masked, 0) for tensor in (found, wanted))
    return torch.linalg.vector_norm(found - wanted).item() / (torch.linalg.vector_norm(wanted).item() or 1.0)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(*sys.argv[1:])))
