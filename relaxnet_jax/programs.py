"""Traced programs cached on disk, so that a second process neither traces nor compiles them again.

XLA's cache of compiled programs is keyed by the program, which takes Python seconds to trace: for a
single prediction, longer than everything else. This module caches the traced program itself
(StableHLO, as written by `jax.export`), keyed by everything it depends on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import sys
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.export

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.errors import InputError

log = logging.getLogger(__name__)

FOLDER = "traced"  # within the folder of compiled programs
SUFFIX = ".stablehlo"
KEPT = 200  # maximum number of files; the most recently used are kept
_DIGEST = 32  # bytes
_Kind = TypeVar("_Kind", bound=type)
# Packages whose versions affect what tracing the network's code produces.
_TRACERS = ("jax", "jaxlib", "flax", "diffrax", "equinox", "e3nn-jax", "jraph")


def _digest_code() -> str:
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    for package in _TRACERS:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()


# Digest of the code that is traced, as imported: the source of this package and the versions of others.
CODE = _digest_code()


def storable(kind: _Kind) -> _Kind:
    """Class decorator for NamedTuples that a `Program` returns."""
    name = f"{kind.__module__}.{kind.__name__}"
    jax.export.register_namedtuple_serialization(kind, serialized_name=name)
    return kind


class _Signature(NamedTuple):
    """What a traced program depends on besides code."""

    static: Any
    tree: Any
    leaves: tuple[Any, ...]
    settings: tuple[Any, ...]


_programs: weakref.WeakSet[Program] = weakref.WeakSet()


def forget() -> None:
    """Forgets the programs in memory, which are then read from disk again (see `jax.clear_caches`)."""
    for program in _programs:
        program._known.clear()


class _Known(NamedTuple):
    """A traced program, and the function that runs it."""

    exported: jax.export.Exported
    compiled: Callable[..., Any]


class Program:
    """A compiled pure function whose traced form is stored beside JAX's compiled programs.

    It is plain `jax.jit` if JAX has no folder for compiled programs (see
    `runtime.enable_compilation_cache`), if the arguments are themselves being traced, if the
    program calls back to Python, or if JAX is configured to check for non-finite values, not to
    compile, or to run on a platform other than its default.

    Args:
      function: takes a static argument (hashable, with a repr that is unique to its value) and
        trees of arrays, and returns a tree of arrays; NamedTuples in the result are `storable`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._compiled: Any = jax.jit(function, static_argnums=0)
        self._known: dict[_Signature, _Known | None] = {}  # None: cannot be stored
        _programs.add(self)

    def __call__(self, static: Any, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
        known = None if traced else self._look_up(static, leaves, tree)
        return self._compiled(static, *args) if known is None else known.compiled(*leaves)

    def inline(self, static: Any, *args: Any) -> Any:
        """Its result as part of a program that is being traced (`jax.jit`, `jax.pmap`).

        A stored program is inserted without being traced again. The result can be neither
        differentiated nor vectorised.
        """
        leaves, tree = jax.tree.flatten(args)
        known = self._look_up(static, leaves, tree)
        return self.function(static, *args) if known is None else known.exported.call(*leaves)

    def shapes(self, static: Any, *args: Any) -> Any:
        """Shapes and types of its result (`jax.ShapeDtypeStruct`), without computing it."""
        leaves, tree = jax.tree.flatten(args)
        known = self._look_up(static, leaves, tree)
        if known is None:
            return jax.eval_shape(functools.partial(self.function, static), *args)
        shapes = [jax.ShapeDtypeStruct(k.shape, k.dtype) for k in known.exported.out_avals]
        return jax.tree.unflatten(known.exported.out_tree, shapes)

    def cache_size(self) -> int:
        """Number of kinds of arguments it has been called with in this process."""
        kept = sum(known is not None for known in self._known.values())
        return kept + self._compiled._cache_size()

    def _look_up(self, static: Any, leaves: list[Any], tree: Any) -> _Known | None:
        """The stored program for such arguments, traced if necessary; None if none can be stored."""
        folder = _folder()
        if folder is None or _elsewhere(leaves):
            return None
        kinds = tuple(jax.typeof(x) for x in leaves)
        signature = _Signature(static, tree, kinds, _settings())
        if signature not in self._known:
            try:
                exported = self._find_or_trace(folder, signature)
                self._known[signature] = _Known(exported, jax.jit(exported.call))
            except NotImplementedError as error:  # the adaptive solver's callbacks to Python
                log.debug("%s: cannot be kept: %s", self.function.__qualname__, error)
                self._known[signature] = None
        return self._known[signature]

    def _find_or_trace(self, folder: Path, signature: _Signature) -> jax.export.Exported:
        path = folder / (self._key(signature) + SUFFIX)
        exported = _read(path)
        if exported is None:
            exported = self._trace(signature)
            if _digest_code() == CODE:  # files that changed since their import make other programs
                _write(path, exported)
        return exported

    def _trace(self, signature: _Signature) -> jax.export.Exported:
        def flat(*leaves):
            return self.function(signature.static, *jax.tree.unflatten(signature.tree, leaves))

        shapes = [jax.ShapeDtypeStruct(k.shape, k.dtype, weak_type=k.weak_type)
                  for k in signature.leaves]  # fmt: skip
        return jax.export.export(jax.jit(flat))(*shapes)

    def _key(self, signature: _Signature) -> str:
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        leaves = [(k.shape, str(k.dtype), k.weak_type) for k in signature.leaves]
        told = (
            name,
            CODE,
            signature.static,
            str(signature.tree),
            leaves,
            signature.settings,
        )
        return hashlib.sha256(repr(told).encode()).hexdigest()


def _settings() -> tuple[Any, ...]:
    """The platform and the settings of JAX that tracing depends on."""
    c: Any = jax.config
    precision = c.jax_default_matmul_precision
    return jax.default_backend(), c.jax_enable_x64, precision, c.jax_numpy_dtype_promotion


def _elsewhere(leaves: list[Any]) -> bool:
    """Whether arguments are bound to a platform other than the one that programs are exported for."""
    platform = jax.default_backend()
    if platform == "cpu":  # there is no other platform
        return False
    config: Any = jax.config
    asked = config.jax_default_device
    if asked is not None and getattr(asked, "platform", asked) != platform:
        return True
    arrays = (x for x in leaves if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
    return any(x.committed and next(iter(x.devices())).platform != platform for x in arrays)


def _folder() -> Path | None:
    """The folder of traced programs; None if they are not stored."""
    c: Any = jax.config
    compiled = c.jax_compilation_cache_dir
    if not compiled or "://" in str(compiled) or not c.jax_enable_compilation_cache:
        return None
    return (
        None
        if c.jax_debug_nans or c.jax_debug_infs or c.jax_disable_jit
        else Path(compiled) / FOLDER
    )


def _read(path: Path) -> jax.export.Exported | None:
    """The program in a file; None if there is none or it is damaged."""
    try:
        content = path.read_bytes()
        digest, packed = content[:_DIGEST], content[_DIGEST:]
        # A damaged program could crash the process.
        if hashlib.sha256(packed).digest() != digest:
            return None
        with contextlib.suppress(OSError):  # a read-only folder
            path.touch()
        return jax.export.deserialize(bytearray(zlib.decompress(packed)))
    except OSError:
        return None
    except Exception as error:  # written by another build of JAX with the same version
        log.debug("%s: cannot be read, traced again: %s", path, error)
        return None


def _write(path: Path, exported: jax.export.Exported) -> None:
    """Stores a program and removes the least recently used; silently does nothing if it cannot write."""
    packed = zlib.compress(bytes(exported.serialize()), 1)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(hashlib.sha256(packed).digest() + packed)
        files = sorted(path.parent.glob(f"*{SUFFIX}"), key=lambda f: f.stat().st_mtime)
        for file in files[:-KEPT]:
            file.unlink(missing_ok=True)
    except (OSError, InputError) as error:
        log.debug("%s: not kept: %s", path, error)
