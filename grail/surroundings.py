"""A public function works in torch's own settings, whatever the script that calls it has switched, and leaves all as it
was, also when it fails.

    with undisturbed() as caller:
        ...                # gradients on, float32, the CPU, no autocast, full precision, fixed random numbers
        with caller.back():
            ...            # the caller's settings again: for functions and loaders that it gave

Threads are the caller's: how many cores a run may have is for the script to say. So are deterministic algorithms,
which only make torch stricter.

Most of these settings are the process's: of several threads one runs at a time, the others wait, and what else a script
does meanwhile finds the settings of the run.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .turns import in_turn

AUTOCAST = ("cpu", "cuda")
HIGHEST, IEEE, UNSET = "highest", "ieee", "none"
SEED = 0
T = TypeVar("T")
Variables = dict[str, str | None]
"""Values by name; None: taken away."""
_noting: dict[int, list[Variables]] = {}
"""By thread, what its calls that are under way have changed."""


@dataclass(frozen=True)
class Settings:
    """What decides in torch how a line of code is carried out. autocast: the kinds of device it is on for; precision:
    of float32 products, as one word (None where it cannot be said in one) and by backend; short: whether cuDNN may
    take tf32 (torch's default: three digits, and other ones from each kernel; None where its parts differ)."""

    grad: bool
    inference: bool
    dtype: torch.dtype
    device: torch.device
    autocast: frozenset[str]
    precision: str | None
    short: bool | None
    products: tuple[str, ...]
    threads: int

    @classmethod
    def now(cls) -> Settings:
        """Those of this moment."""
        return cls(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            dtype=torch.get_default_dtype(),
            device=torch.get_default_device(),
            autocast=frozenset(kind for kind in AUTOCAST if torch.is_autocast_enabled(kind)),
            precision=_precision(),
            short=_short(),
            products=tuple(backend.fp32_precision for backend in _product_backends()),
            threads=torch.get_num_threads(),
        )

    def plain(self) -> Settings:
        """Torch's own, but for cuDNN's tf32, on as many threads."""
        return Settings(
            grad=True,
            inference=False,
            dtype=torch.float32,
            device=torch.device("cpu"),
            autocast=frozenset(),
            precision=HIGHEST,
            short=False,
            products=tuple(UNSET if given == UNSET else IEEE for given in self.products),
            threads=self.threads,
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """These within, those from before afterwards."""
        before = Settings.now()
        with ExitStack() as stack:
            if self.device != before.device:  # a mode, which costs time in every call: not where it says what is so
                stack.enter_context(self.device)
            if self.inference != before.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.callback(before._set)
            self._set()
            yield

    def _set(self) -> None:
        """All but device and inference mode, which are nested."""
        torch.set_grad_enabled(self.grad)
        torch.set_default_dtype(self.dtype)
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind) != (kind in self.autocast):
                torch.set_autocast_enabled(kind, kind in self.autocast)
        if self.precision is not None and _precision() != self.precision:
            torch.set_float32_matmul_precision(self.precision)
        if self.short is not None and _short() != self.short:
            # not by backend alone: torch.export asks for this word, which then has to agree with them
            torch.backends.cudnn.allow_tf32 = self.short
        for backend, wanted in zip(_product_backends(), self.products, strict=True):
            if backend.fp32_precision != wanted:
                backend.fp32_precision = wanted
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)


def _precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by backend, in a way that the word cannot say
        return None


def _short() -> bool | None:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _product_backends() -> list[Any]:
    """What has a precision of its own for products of float32, in torches that know such a thing."""
    known: list[Any] = [torch.backends.cuda.matmul]
    known += [getattr(torch.backends.mkldnn, name, None) for name in ("matmul", "conv")]
    known += [getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn")]
    return [backend for backend in known if hasattr(backend, "fp32_precision")]


@dataclass
class RandomState:
    """Of the generators that are not passed around; cuda: none where it is not in use."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> RandomState:
        """The state of this moment."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, np.random.get_state(legacy=False), random.getstate())

    def put(self) -> None:
        """Go on from here."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def _fix_random() -> None:
    """Nothing of ours draws from these generators; what a network of the user's draws is the same in every run."""
    torch.default_generator.manual_seed(SEED)  # torch.manual_seed would also seed a GPU that is not in use yet
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(SEED)
    np.random.seed(SEED)
    random.seed(SEED)


@dataclass
class Caller:
    """The state of the script that called a public function."""

    settings: Settings
    random: RandomState
    environment: dict[str, str]

    @contextmanager
    def back(self) -> Iterator[None]:
        """The script's own state for a while; what it draws meanwhile counts, and so do the variables it sets."""
        ours, environment = RandomState.now(), dict(os.environ)
        self.random.put()
        try:
            with replace(self.settings, threads=torch.get_num_threads()).entered():
                yield
        finally:
            self.random = RandomState.now()
            ours.put()
            self._note(environment, dict(os.environ))

    def _note(self, before: dict[str, str], after: dict[str, str]) -> None:
        """Take over what the script did to the environment between these two."""
        self.environment |= {name: value for name, value in after.items() if before.get(name) != value}
        for name in before.keys() - after.keys():
            self.environment.pop(name, None)

    def own(self, function: Callable[[T], object]) -> Callable[[T], None]:
        """A function of the script, which finds the script's state when it is called."""

        def called(argument: T) -> None:
            with self.back():
                function(argument)

        return called

    def lent(self, data: Any) -> Any:
        """Data of the script: what computes its parts only when they are asked for does so in the script's state."""
        finished = isinstance(data, (str, list, tuple, Tensor, np.ndarray)) or hasattr(data, "keys")
        return data if finished or not isinstance(data, Iterable) else _Lent(data, self)


@dataclass
class _Lent:
    """A loader or generator of the script. One that shuffles must go by the script's seed."""

    data: Iterable[Any]
    caller: Caller

    def __iter__(self) -> Iterator[Any]:
        with self.caller.back():
            items = iter(self.data)
        return self._each(items)

    def _each(self, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.caller.back():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


@contextmanager
def undisturbed() -> Iterator[Caller]:
    """Torch's own settings within; afterwards those of the caller, its random numbers, warning filters, environment and
    threads. One thread at a time; within one it nests. Also a decorator."""
    with in_turn():
        settings = Settings.now()
        with settings.plain().entered(), warnings.catch_warnings(), _variables_noted() as changed:
            caller = Caller(settings, RandomState.now(), dict(os.environ))
            try:
                _fix_random()
                yield caller
            finally:
                caller.random.put()
                _put_back(changed, caller.environment)


@contextmanager
def _variables_noted() -> Iterator[Variables]:
    """The variables that this thread sets or takes away within: those of others are not ours to put back."""
    _listen()
    changed: Variables = {}
    of_thread = _noting.setdefault(threading.get_ident(), [])
    of_thread.append(changed)
    try:
        yield changed
    finally:
        of_thread.pop()
        if not of_thread:
            del _noting[threading.get_ident()]


@functools.cache
def _listen() -> None:
    """Nothing else in Python tells which thread it was; a hook stays for good, so that there is one."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.putenv", "os.unsetenv"):
            value = os.fsdecode(arguments[1]) if event == "os.putenv" else None
            for changed in _noting.get(threading.get_ident(), ()):
                changed[os.fsdecode(arguments[0])] = value

    sys.addaudithook(note)
    os.register_at_fork(after_in_child=_forget_other_threads)


def _forget_other_threads() -> None:
    """None but the one that forked goes on in a child, where a new thread may get the number of a lost one."""
    own = threading.get_ident()
    for thread in _noting.keys() - {own}:
        del _noting[thread]


def _put_back(changed: Variables, wanted: dict[str, str]) -> None:
    """Libraries set variables when they are imported. One that somebody else has set since then stays."""
    for name, value in list(changed.items()):
        if os.environ.get(name) == value and name in wanted:
            os.environ[name] = wanted[name]
        elif value is not None and os.environ.get(name) == value:
            del os.environ[name]
