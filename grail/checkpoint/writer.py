"""Write a checkpoint shard by shard into OUT.partial, each shard beside and renamed; rename the folder at the end.

DESIGN section 6: a run is a sequence of committed steps: temporary name, fsync, rename, then a journal line. What is
committed outlives an error or a kill, and the next run can go on from it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch

from ..documents import check_writable, is_utf8, not_utf8
from ..errors import Circumstance, GrailError, naming, sentence_of
from ..replacing import NO_FILE, is_special
from .carried import TOKENIZER_CONFIG, data_files, without_code
from .disk import link, locked, remove
from .journal import JOURNAL, Journal
from .pieces import DTYPE_NAMES, Piece, serialised
from .reader import DTYPES, INDEX, read_json

LOCK, STORE, CANDIDATES, REPLACED = "lock", "store", "candidates", "replaced"
SHARD = "shard"


class OutputFolder:
    """OUT.partial, locked while it is worked in; `finish` renames it to OUT.

    Used as a context manager. An error removes the partial folder. With `keep` only bad input does (no other run could
    go on with it), and any error before the first committed step. resume: go on with what an earlier run left there, if
    anything.
    """

    def __init__(self, path: Path | str, *, overwrite: bool = False, keep: bool = False, resume: bool = False):
        if "\0" in os.fspath(path):
            raise GrailError("--output has a NUL character in it, which no name can have; choose another")
        self.path = Path(os.path.realpath(path))
        if not self.path.name:
            raise GrailError(f"--output {path}: name a folder")
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.overwrite, self.keep, self.resume = overwrite, keep, resume
        self.journal = Journal(self.partial / JOURNAL)
        self._entered = False
        self._forget()

    def _forget(self) -> None:
        self.weight_map: dict[str, str] = {}
        self.written: dict[str, tuple[str, list[int]]] = {}
        self.total_bytes = 0
        self.total_parameters = 0

    def check(self, *inputs: Path) -> None:
        """Refuse an occupied output before any work is done, and one that holds an input, which would be deleted."""
        if not is_utf8(self.path):  # which safetensors asks for
            raise GrailError(not_utf8("--output", self.path))
        for source in inputs:
            for place in (self.path, self.partial):
                if Path(os.path.realpath(source)).is_relative_to(place):
                    raise GrailError(f"--output {self.path}: {place} holds the input {source}; choose another folder")
        self._refuse_occupied()
        self._refuse_foreign()
        if Journal(self.partial / JOURNAL).committed and not (self.resume or self.overwrite):
            lock = locked(self.partial / LOCK)
            if lock is None:
                raise GrailError(self._occupied)
            lock.close()
            raise GrailError(
                f"{self.partial} holds the work of a run that was interrupted: add --resume to go on with it, or "
                f"--overwrite to start over"
            )

    def _refuse_occupied(self) -> None:
        """Raises GrailError where the place of the output is taken, and may not be made free."""
        if self.path.is_symlink():  # though all links were followed
            raise GrailError(f"--output {self.path} is a link that leads to itself; choose another, or take it away")
        if is_special(self.path):
            raise GrailError(f"--output {self.path} {NO_FILE}")
        if os.path.ismount(self.path):
            raise GrailError(f"--output {self.path} is a mount point, which cannot be replaced; name a folder in it")
        if self.path.is_file():
            raise GrailError(f"--output {self.path} is a file; name a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._cut_off_while_finishing():
            if not self.overwrite:
                raise GrailError(f"--output {self.path} exists and is not empty; choose another, or add --overwrite")
            if not any(any(self.path.glob(kind)) for kind in ("grail.json", "config.json", "*.safetensors")):
                raise GrailError(
                    f"--output {self.path} holds no model: --overwrite would delete other files; choose another folder"
                )
            if Path.cwd().is_relative_to(self.path):
                raise GrailError(f"--output {self.path} holds the current folder; choose another")

    def _cut_off_while_finishing(self) -> bool:
        """Whether all that was left to do in OUT was to take away the working files."""
        return self.resume and not self.partial.exists() and (self.path / JOURNAL).exists()

    def _refuse_foreign(self) -> None:
        """Raises GrailError where something else lies in the place of the working folder."""
        if self.partial.exists() and not self._is_ours():
            raise GrailError(
                f"{self.partial} is in the way and was not made by grail; move it or choose another output"
            )

    def _is_ours(self) -> bool:
        """A working folder of an earlier run (or nothing at all)."""
        left = {file.name for file in self.partial.iterdir()} if self.partial.is_dir() else {""}
        return not left or bool(left & {LOCK, JOURNAL})

    def __enter__(self) -> OutputFolder:
        self.check()
        self._made = [folder for folder in (self.partial, *self.partial.parents) if not folder.exists()]
        home = self.path if self._cut_off_while_finishing() else self.partial
        try:
            home.mkdir(parents=True, exist_ok=True)
            self._lock = locked(home / LOCK)
        except OSError as error:
            self._unmake()
            raise GrailError(f"--output {self.path} cannot be written: {error.strerror}") from error
        if self._lock is None:
            raise GrailError(self._occupied)
        if home != self.partial:
            os.replace(home, self.partial)
        else:
            self._return_old()
        self._entered = True
        self.journal = Journal(self.partial / JOURNAL)
        goes_on = self.resume and self.journal.committed
        committed = {step.get("file") for step in self.journal.find(SHARD)} if goes_on else set()
        self._clear(but=committed | ({LOCK, JOURNAL, STORE, CANDIDATES} if goes_on else {LOCK}))
        return self

    def _return_old(self) -> None:
        """An output that was to be replaced has its place again, or stays where it is. Raises GrailError for the
        latter, and where it may not be replaced."""
        if self._put_back():
            self._refuse_occupied()
        elif (self.partial / REPLACED).exists():
            raise GrailError(
                f"{self.partial / REPLACED} was the output {self.path}, whose place is taken; move one of them away"
            )

    @property
    def _occupied(self) -> str:
        return f"another run is working in {self.partial}; wait for it or choose another output"

    def _clear(self, but: set[str]) -> None:
        """Take away what an earlier run left, but for what is committed."""
        for left_over in self.partial.iterdir():
            if left_over.name not in but:
                inside = left_over.is_dir() and not left_over.is_symlink()
                shutil.rmtree(left_over) if inside else left_over.unlink()
        self.journal = Journal(self.partial / JOURNAL)

    def start_over(self, keep: Callable[[dict], bool]) -> None:
        """Forget the first committed step that `keep` does not hold for, and all that followed from it."""
        self.journal.rewind(keep)
        self._forget()

    @property
    def kept(self) -> bool:
        """Whether this run leaves work that another one can go on with: what lies on disk decides, since an
        interruption may come between a journal line and what this process knows of it."""
        return self.keep and self._entered and Journal(self.home / JOURNAL).committed

    @property
    def home(self) -> Path:
        """Where the working files lie: in OUT itself where all that was left was to take them away."""
        return self.partial if self.partial.exists() else self.path

    def __exit__(self, kind, error, trace) -> None:
        refused = isinstance(error, GrailError) and not isinstance(error, Circumstance)
        with suppress(OSError):
            self._put_back()
        held = (self.partial / REPLACED).exists()  # the old output could not be given its place again
        if self.partial.exists() and not held and (refused or not self.kept):
            remove(self.partial)
            self._unmake()
        self._lock.close()

    def _unmake(self) -> None:
        with suppress(OSError):  # what stopped the run is told, and may stop this too
            for folder in self._made:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()

    def _put_back(self) -> bool:
        """Give an old output its place again, where the new one did not get so far as to take it; whether it did."""
        if not (self.partial / REPLACED).exists() or self.path.exists():
            return False
        os.replace(self.partial / REPLACED, self.path)
        return True

    def write_shard(self, file: str, pieces: list[Piece], **said: object) -> None:
        """Write and commit one safetensors file; `said` is kept in the journal beside it."""
        self.commit_shard(file, pieces, self.write_file(file, pieces), **said)

    def write_file(self, file: str, pieces: list[Piece]) -> int:
        """Write one safetensors file, the tensors streamed in the order given, and return its CRC-32. It counts for
        nothing until it is committed."""
        checksum = 0
        with self._replacing(file) as handle:
            for block in serialised(pieces):
                checksum = zlib.crc32(block, checksum)
                handle.write(block)
        return checksum

    @contextmanager
    def _replacing(self, file: str) -> Iterator[IO]:
        """A file written beside, then on disk, then renamed."""
        temporary = self.partial / (file + ".tmp")
        with naming(temporary, nameless=True), open(temporary, "wb") as handle:  # what is copied names its source
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, self.partial / file)

    def commit_shard(self, file: str, pieces: list[Piece], checksum: int, **said: object) -> None:
        """A journal line for a file that lies there."""
        tensors = {piece.name: [DTYPE_NAMES[piece.dtype], list(piece.shape)] for piece in pieces}
        step = {"step": SHARD, "file": file, "crc32": checksum, "tensors": tensors, **said}
        self.journal.append(step)
        self._count(step)

    def adopt(self, other: OutputFolder) -> None:
        """Take over the shards that another working folder has committed, as far as an earlier run has not."""
        there = {step["file"]: step for step in self.journal.find(SHARD)}  # a file may have been committed twice
        if not all(map(self.recall, there.values())):
            self.start_over(lambda step: step["step"] != SHARD)
        for step in {step["file"]: step for step in other.journal.find(SHARD)}.values():
            if step["file"] not in self.weight_map.values():
                link(other.partial / step["file"], self.partial / step["file"])
                self.journal.append(step)
                self._count(step)

    def recall(self, step: dict) -> bool:
        """Take a shard that an earlier run committed for written; False when the file is not what it was."""
        file = self.partial / step["file"]
        checksum = 0
        if file.parent != self.partial or not file.is_file():
            return False
        with open(file, "rb") as handle:
            while block := handle.read(16 * 2**20):
                checksum = zlib.crc32(block, checksum)
        if checksum == step["crc32"]:
            self._count(step)
        return checksum == step["crc32"]

    def _count(self, step: dict) -> None:
        for name, (dtype, shape) in step["tensors"].items():
            self.weight_map[name] = step["file"]
            self.written[name] = (dtype, shape)
            count = torch.Size(shape).numel()
            self.total_bytes += count * DTYPES[dtype].itemsize
            self.total_parameters += count

    def write_json(self, file: str, value: dict) -> None:
        """Commit one JSON file: two spaces, sorted where the value is, newline at the end."""
        self.write_text(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, file: str, text: str) -> None:
        """Commit one text file, UTF-8."""
        with self._replacing(file) as handle:
            handle.write(text.encode())

    def carry_over(self, source: Path) -> None:
        """Copy tokenizer, chat template, generation config and licence files, following links.

        Data only: whoever compresses a folder, or trusts the class file that GRAIL puts beside a result, has not agreed
        to run the source's code. A file that has been written already stays as it was written.
        """
        for file in data_files(source):
            target = self.partial / file.relative_to(source)
            if target.exists():
                continue
            target.parent.mkdir(exist_ok=True)
            if file.name == TOKENIZER_CONFIG and (config := read_json(file)) != without_code(config):
                check_writable(config, file)
                self.write_json(file.name, without_code(config))
            else:
                shutil.copyfile(file, target)

    def write_index(self) -> None:
        """The shard index, written last of the weights."""
        metadata = {"total_size": self.total_bytes, "total_parameters": self.total_parameters}
        self.write_json(INDEX, {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))})

    def finish(self) -> Path:
        """Put the folder in its place and drop the working files. Cut off anywhere within, it can be done again. Raises
        Circumstance where something has come to that place meanwhile."""
        try:
            self._refuse_occupied()
        except GrailError as error:
            raise Circumstance(f"{error}; it came while the run worked") from error
        self.journal.append({"step": "finished"})
        if self.overwrite and self.path.exists():  # else an empty folder, over which a folder can be renamed
            os.replace(self.path, self.partial / REPLACED)
        self._take_place()
        for name in (REPLACED, STORE, CANDIDATES):
            shutil.rmtree(self.path / name, ignore_errors=True)
            if (self.path / name).exists():
                raise Circumstance(f"{self.path} is finished, but {self.path / name} cannot be taken away")
        for name in (LOCK, JOURNAL):
            (self.path / name).unlink(missing_ok=True)
        return self.path

    def _take_place(self) -> None:
        """Raises Circumstance where neither the new output nor the old one can be put there any more."""
        try:
            os.replace(self.partial, self.path)
        except OSError as error:
            with suppress(OSError):
                self._put_back()
            if (self.partial / REPLACED).exists():
                raise Circumstance(
                    f"{sentence_of(error)}; what was in {self.path} lies in {self.partial / REPLACED} until the next "
                    f"command with that output puts it back"
                ) from error
            raise
