"""A soup on disk: one .safetensors file, or a Hugging Face folder. Written beside, then renamed into its place."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.carried import without_code
from ..checkpoint.reader import SINGLE
from ..checkpoint.writer import OutputFolder
from ..errors import Circumstance, GrailError
from ..replacing import NO_FILE, is_special
from .average import averaged
from .inputs import SUFFIX, Ingredient

CANDIDATE = "candidate"


class OutputFile(OutputFolder):
    """OUT.partial/, locked while a single file is written in it; `finish` renames that file to OUT."""

    def check(self, *inputs: Path) -> None:
        """Refuse an occupied output before any work is done, and one that is an input."""
        for source in inputs:
            if Path(os.path.realpath(source)) == self.path:
                raise GrailError(f"--output {self.path} is the input {source}; choose another file")
            if Path(os.path.realpath(source)).is_relative_to(self.partial):
                raise GrailError(f"--output {self.path}: {self.partial} holds the input {source}; choose another file")
        if is_special(self.path):
            raise GrailError(f"--output {self.path} {NO_FILE}")
        if self.path.is_dir():
            raise GrailError(f"--output {self.path} is a folder; name a {SUFFIX} file")
        if self.path.exists() and not self.overwrite:
            raise GrailError(f"--output {self.path} exists; choose another, or add --overwrite")
        self._refuse_foreign()

    @property
    def content(self) -> Path:
        """Where the file lies until it is finished."""
        return self.partial / self.path.name

    def finish(self) -> Path:
        """Put the file in its place; the working folder goes when the context ends."""
        try:
            self.check()
        except GrailError as error:
            raise Circumstance(f"{error}; it came while the run worked") from error
        os.replace(self.content, self.path)
        return self.path


def open_output(output: str | Path, folder: bool, overwrite: bool) -> OutputFolder:
    """Where the soup goes; raises GrailError for a name of the other kind."""
    named_file = Path(output).suffix == SUFFIX
    if folder and named_file:
        raise GrailError(f"--output {output}: the inputs are folders, so the soup is one too; name a folder")
    if not folder and not named_file:
        raise GrailError(f"--output {output}: the inputs are files, so the soup is one too; name a {SUFFIX} file")
    return (OutputFolder if folder else OutputFile)(output, overwrite=overwrite)


def candidate(out: OutputFolder) -> OutputFolder:
    """A place within an open output for a soup that is only tried; it goes when its context ends."""
    name = CANDIDATE + SUFFIX if isinstance(out, OutputFile) else CANDIDATE
    return type(out)(out.partial / name)


def write(out: OutputFolder, ingredients: list[Ingredient]) -> Path:
    """The average of the ingredients into an open output; where it lies until it is finished."""
    if isinstance(out, OutputFile):
        out.write_file(out.path.name, [averaged(ingredients, name) for name in ingredients[0].tensors.names()])
        return out.content
    _write_folder(out, ingredients)
    return out.partial


def _write_folder(out: OutputFolder, ingredients: list[Ingredient]) -> None:
    """In as many shards as the first has, under names of our own: an index may call a shard anything."""
    first = ingredients[0]
    by_shard: dict[Path, list[str]] = {}
    for name in first.tensors.names():
        by_shard.setdefault(first.info(name).file, []).append(name)
    for number, names in enumerate(by_shard.values(), 1):
        shard = SINGLE if len(by_shard) == 1 else f"model-{number:05d}-of-{len(by_shard):05d}{SUFFIX}"
        out.write_shard(shard, [averaged(ingredients, name) for name in names])
    out.write_json("config.json", without_code(first.config))
    out.carry_over(first.path)
    if len(by_shard) > 1:
        out.write_index()
