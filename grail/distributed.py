"""One compression in several processes: torch.distributed, as started by torchrun.

Processes wait for each other through gloo, without a time limit: a solve on one of them may take many minutes, and gloo
notices closed connections at once, so a process that dies does not leave the others waiting. Tensors on a GPU travel
through NCCL, which notices nothing; so all processes meet through gloo first, and NCCL gets a time limit.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import GrailError, Lost
from .machine import usable_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

START_LIMIT = timedelta(minutes=10)
WAIT_LIMIT = timedelta(days=365)
TRANSFER_LIMIT = timedelta(minutes=10)
VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")


class Group:
    """The processes of one run. `device` is what --device means for this one. Every process must make the same calls
    in the same order; a group of one does nothing.

    A call that needs the others raises Lost once one of them has died, failed under `guard` or left."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "auto"):
        self.rank, self.size, self.device = rank, size, device
        self._carriers: dict[str, ProcessGroup] = {}

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @classmethod
    def solo(cls, device: str = "auto") -> Group:
        """One process."""
        return cls(device=device)

    @classmethod
    def from_environment(cls, device: str = "auto") -> Group:
        """Join the processes that torchrun started, each with the GPU of its LOCAL_RANK unless `device` is a CPU; a
        group of one where torchrun's variables are not there. Raises GrailError when they cannot be joined."""
        rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        started = all(os.environ.get(name) for name in VARIABLES) and rank.isdecimal() and size.isdecimal()
        if not started or int(size) == 1:
            return cls.solo(device)
        group = cls(int(rank), int(size), own_device(device, int(rank), int(size)))
        with group.guard():
            group._join()
        return group

    def share(self, count: int) -> range:
        """The part of `count` items that is this process's: contiguous, sizes differ by at most one."""
        each, extra = divmod(count, self.size)
        start = self.rank * each + min(self.rank, extra)
        return range(start, start + each + (self.rank < extra))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place; the same bits on each, and whenever there are as many of them."""
        if self.size > 1:
            import torch.distributed as dist

            summed = tensor.detach().contiguous()
            with self.collective(tensor.device) as carrier:
                dist.all_reduce(summed, group=carrier)
            if not tensor.is_contiguous():
                tensor.detach().copy_(summed)
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """[size, ...]: the tensors of all processes, of one shape and dtype, in rank order; on every process."""
        stacked = tensor.new_empty(self.size, *tensor.shape).copy_(tensor.detach())
        if self.size > 1 and tensor.numel():
            import torch.distributed as dist

            with self.collective(tensor.device) as carrier:
                dist.all_gather([_bytes(part) for part in stacked], _bytes(tensor), group=carrier)
        return stacked

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of each process, in rank order; on every process."""
        values = [value] * self.size
        if self.size > 1:
            import torch.distributed as dist

            with self.collective() as carrier:
                dist.all_gather_object(values, value, group=carrier)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's small picklable value; what the others pass does not matter."""
        held = [value if self.main else None]
        if self.size > 1:
            import torch.distributed as dist

            with self.collective() as carrier:
                dist.broadcast_object_list(held, src=0, group=carrier)
        return held[0]

    def broadcast_tensor(self, tensor: Tensor | None) -> Tensor:
        """The main process's tensor, of any shape and dtype, on the others on a device of the same type; they pass
        None."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        described = self.broadcast(_described(tensor) if self.main else None)
        held = tensor if self.main else self._like(described)
        if held.numel():
            with self.collective(held.device) as carrier:
                dist.broadcast(_bytes(held), src=0, group=carrier)
        return held

    def send_to_main(self, tensors: list[Tensor]) -> list[Tensor]:
        """On the main process the tensors of all processes, in rank order, on devices of the same type; elsewhere
        nothing. Their number, shapes and dtypes may differ."""
        if self.size == 1:
            return tensors
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        described = self.gather([_described(tensor) for tensor in tensors])
        if not self.main:
            self._send(tensors)
            return []
        received = [self._received(entry, rank) for rank in range(1, self.size) for entry in described[rank]]
        return [*tensors, *received]

    def _send(self, tensors: list[Tensor]) -> None:
        import torch.distributed as dist

        for tensor in tensors:
            if tensor.numel():
                with self._reported():
                    dist.send(_bytes(tensor), dst=0, group=self._carriers[tensor.device.type])

    def _received(self, described: tuple, rank: int) -> Tensor:
        import torch.distributed as dist

        held = self._like(described)
        if held.numel():
            with self._reported():
                dist.recv(_bytes(held), src=rank, group=self._carriers[held.device.type])
        return held

    def _like(self, described: tuple) -> Tensor:
        shape, dtype, kind = described
        return torch.empty(shape, dtype=dtype, device=self.device if kind == "cuda" else kind)

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            import torch.distributed as dist

            with self._reported():
                dist.barrier(group=self._carriers["cpu"])

    @contextmanager
    def collective(self, device: torch.device | str = "cpu") -> Iterator[ProcessGroup]:
        """torch's own group for tensors on a device, for calls of torch.distributed; what goes wrong in them because
        another process is gone becomes Lost."""
        kind = torch.device(device).type
        if kind != "cpu":
            torch.cuda.synchronize(device)
            self.barrier()
        with self._reported():
            yield self._carriers[kind]

    @contextmanager
    def guard(self) -> Iterator[None]:
        """When this process fails inside, close its connections at once: the others do not wait for it in vain."""
        try:
            yield
        except BaseException as error:
            if self.size > 1:
                _release_frames(error)
                self._leave(abort=True)
            raise

    def close(self) -> None:
        """Leave after the last call, together with the others. After a failure `guard` has done so."""
        if self._carriers:
            with suppress(GrailError):
                self.barrier()
            self._leave()

    def _join(self) -> None:
        import torch.distributed as dist

        if not dist.is_available():
            raise GrailError(f"this torch has no torch.distributed: run one process instead of {self.size}")
        if self.rank >= self.size:
            raise GrailError(f"RANK is {self.rank} of WORLD_SIZE {self.size}: they count from 0; use torchrun")
        try:
            socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
        except (OSError, UnicodeError) as error:  # torch would try for minutes
            raise GrailError(f"MASTER_ADDR {os.environ['MASTER_ADDR']} is no known host ({_reason(error)})") from error
        try:
            if not dist.is_initialized():
                # kept until the process ends: torchrun's store cannot be joined twice
                dist.init_process_group("gloo", timeout=START_LIMIT)
                atexit.register(_leave_default)
            self._carriers["cpu"] = dist.new_group(backend="gloo", timeout=WAIT_LIMIT)
        except (RuntimeError, ValueError) as error:
            raise GrailError(
                f"process {self.rank} of {self.size} could not join the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({_reason(error)}); start all of them with torchrun"
            ) from error
        kinds = set(self.gather(torch.device(self.device).type))
        if len(kinds) > 1:
            raise GrailError(f"some processes would run on {' and some on '.join(sorted(kinds))}; give --device")
        if kinds == {"cuda"}:
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # without it a lost process kills this one unheard
            torch.cuda.set_device(self.device)
            self._carriers["cuda"] = dist.new_group(backend="nccl", timeout=TRANSFER_LIMIT)

    def _leave(self, *, abort: bool = False) -> None:
        """Destroy the groups. A gloo connection closes with the last reference to its group, whoever holds it.

        Freeing a group waits for threads that may still have a tensor to free, for which they need the interpreter's
        lock. torch 2.6 does not give that up while a group goes, but does while a backend goes: so that is held longer.
        """
        import torch.distributed as dist

        carriers, self._carriers = self._carriers, {}
        with suppress(RuntimeError):
            if abort and "cuda" in carriers:
                carriers["cuda"].abort()  # destroying waits for transfers that cannot end
            while carriers:
                kind, group = carriers.popitem()
                backend = group._get_backend(torch.device(kind))
                dist.destroy_process_group(group)
                del group
                del backend

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            raise Lost(
                f"process {self.rank} of {self.size} cannot go on because another one ended ({_reason(error)}); "
                "see what that one said, and start all of them again with --resume"
            ) from error


def _leave_default() -> None:
    """A group that is still there when the interpreter goes may abort the process, whatever its exit code was."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(asked: str, rank: int, size: int) -> str:
    """What --device means for one of several processes. Raises GrailError when it cannot be used, or two would share a
    GPU."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    index, local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if asked.startswith("cuda:") and local > 1:
        raise GrailError(f"--device {asked} is one GPU for {local} processes; use --device cuda, one GPU for each")
    if asked != "cuda":
        return str(usable_device(asked))
    if local > torch.cuda.device_count():
        raise GrailError(
            f"{local} processes were started on a machine with {torch.cuda.device_count()} usable GPUs; start at most "
            "one for each GPU, or use --device cpu"
        )
    return f"cuda:{index}"


def _described(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, str]:
    return tuple(tensor.shape), tensor.dtype, tensor.device.type


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor as the bytes it is made of, which every backend carries whatever the dtype. It shares the memory of a
    contiguous one, so that it can be received into."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _is_lost(error: RuntimeError) -> bool:
    """Whether torch.distributed raised this, and not a mistake in a call (sizes that differ: "enforce fail")."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or ("gloo" in str(error) and "enforce fail" not in str(error))


def _reason(error: Exception) -> str:
    """An error's first sentence without the source file that raised it."""
    return re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()).splitlines()[0].split(". ")[0].rstrip(".")


def _release_frames(error: BaseException) -> None:
    """Let go of what the frames behind an error hold: a process group among it would keep its connections open."""
    found = [error]
    for link in found:
        traceback.clear_frames(link.__traceback__)
        found += [e for e in (link.__cause__, link.__context__) if e is not None and e not in found]
