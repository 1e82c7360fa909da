"""Caches compiled CPU kernels by content, so that a new checkout or a copy elsewhere finds them.

numba keeps compiled code under the source's path and modification time: a new clone compiles everything again, which
takes about a minute. It also ignores other files: if a callee in another module changes, the old kernel is used. Here
the key covers everything that the machine code is made from: the files of a kernel and of all kernels that it calls,
the constants that it takes from other modules, and numba's version. The version is included because environments share
the folder, and numba empties an index that another version wrote. Processor and signature are part of numba's own
index.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
from numba.core import caching, config
from numba.core.extending import _Intrinsic

_OURS = ("atlas_kernels", "atlas_rl")
_kernels: list[Any] = []
_CONSTANTS = (bool, int, float, complex, str, bytes, tuple, np.generic, np.ndarray)


def cached_njit(**options: Any) -> Callable[[Callable], Any]:
    """`numba.njit` with a cache by content, for functions of a module; `options` are numba's, without `cache`.

    `NUMBA_DISABLE_JIT`, `NUMBA_CACHE_DIR` and `NUMBA_CACHE_LOCATOR_CLASSES` apply as to any kernel.

    Raises:
        TypeError: The function takes variables from a function around it. These are not part of the key.
    """

    def decorate(function: Callable) -> Any:
        if function.__closure__:
            raise TypeError(
                f"{function.__qualname__} must not take variables of a function around it: its cache has no key for them"
            )
        kernel = numba.njit(**options)(function)
        if kernel is not function:  # with NUMBA_DISABLE_JIT the function stays as it is
            kernel._cache = _ContentCache(function)
            _kernels.append(kernel)
        return kernel

    return decorate


def num_kernels() -> tuple[int, int]:
    """Number of kernels in the loaded modules, and how many of them are compiled or read from the cache."""
    return len(_kernels), sum(bool(kernel.overloads) for kernel in _kernels)


def cache_folder() -> Path:
    """Folder of compiled kernels: `NUMBA_CACHE_DIR`, else `numba` in this library's cache folder."""
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR)
    own = os.environ.get("ATLAS_RL_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atlas_rl"
    return (Path(own) if own else user) / "numba"


def content_key(function: Any) -> str:
    """Hexadecimal key of everything a kernel is compiled from and with; its callees' modules must be loaded."""
    parts, seen, waiting = {f"numba {numba.__version__}"}, set(), [function]
    while waiting:
        called = waiting.pop()
        if called in seen:
            continue
        seen.add(called)
        parts.add(f"{called.__module__} {_digest_of(inspect.getfile(called))}")
        for name, value in _globals_of(called) if isinstance(called, FunctionType) else ():
            value = getattr(value, "py_func", value)
            if isinstance(value, _Intrinsic):
                value = value._defn
                parts.update(_seen_by(value))
            if isinstance(value, (FunctionType, type)) and _is_ours(value.__module__):
                waiting.append(value)
            elif isinstance(value, _CONSTANTS):
                parts.add(f"{called.__module__}.{name} = {_shown(value)}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


class _ContentCache:
    """Replaces numba's cache of one function. Opens at the first call, when all callees are defined."""

    def __init__(self, function: Any) -> None:
        self._function = function

    @cached_property
    def _opened(self) -> Any:
        try:
            return _KeptByContent(self._function)
        except RuntimeError:  # no writable folder: compiled once per process
            return caching.NullCache()

    @property
    def cache_path(self) -> str | None:
        return self._opened.cache_path

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        return self._opened.load_overload(signature, target_context)

    def save_overload(self, signature: Any, compiled: Any) -> None:
        self._opened.save_overload(signature, compiled)

    def flush(self) -> None:
        self._opened.flush()


class _Locator:
    """Tells numba the folder and key under which a function is cached; the members are numba's interface."""

    def __init__(self, function: Any, path: str) -> None:
        self._py_file, self._folder, self._key = path, cache_folder(), content_key(function)

    @classmethod
    def from_function(cls, function: Any, path: str) -> _Locator | None:
        locator = cls(function, path)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None  # numba then asks its own locators
        return locator

    def ensure_cache_path(self) -> None:
        """Make the folder; raises `OSError` if it cannot be written to."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self._folder).close()

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return self._key

    def get_disambiguator(self) -> str:
        """Part of the file names that keeps two versions of a kernel from replacing each other."""
        return self._key[:16]


class _StoredKernels(caching.CompileResultCacheImpl):
    _locator_classes = (_Locator, *caching.CompileResultCacheImpl._locator_classes)


class _KeptByContent(caching.FunctionCache):
    _impl_class = _StoredKernels


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Names that a function uses from its module and from our modules that it names, with their values."""
    names = set(_names_in(function.__code__))
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, ModuleType):
            inner = names & vars(value).keys() if _is_ours(value.__name__) else ()
            yield from ((f"{name}.{attribute}", vars(value)[attribute]) for attribute in inner)
        else:
            yield name, value


def _seen_by(intrinsic: FunctionType) -> Iterator[str]:
    """Constants that an intrinsic may write instructions with: of its module, and those that it was made with."""
    named = {name: value for name, value in intrinsic.__globals__.items() if not name.startswith("__")}
    named |= inspect.getclosurevars(intrinsic).nonlocals
    for name, value in named.items():
        if isinstance(value, _CONSTANTS):
            yield f"{intrinsic.__module__}.{name} = {_shown(value)}"


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _OURS


def _shown(value: Any) -> str:
    return f"{value.dtype} {value.shape} {value.tobytes().hex()}" if isinstance(value, np.ndarray) else repr(value)


@cache
def _digest_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
