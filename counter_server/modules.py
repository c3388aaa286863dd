"""Modules: one name for each, in all processes, so that a class of one is found in the others; and their import."""

import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from importlib.machinery import SourceFileLoader
from types import ModuleType
from zipimport import zipimporter

_MAIN = ("__main__", "__mp_main__")  # `multiprocessing` names a main program so in other processes


@contextmanager
def quick_imports() -> Iterator[None]:
    """Collect no garbage while a program imports its modules.

    Most of what an import makes stays. To look at all of it again and again took up to 40 % of the time of a start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # now they are old, and rarely looked at; the referrers of frozen ones would not be found
        if was_enabled:
            gc.enable()


@cache
def place_of(name: str) -> tuple[str, str]:
    """Return the name under which another process finds a module of this process, and the module's file.

    A main program has the name that others import it by, so a class is one class for `python app.py` and `flask shell`.
    A module that no other process finds by name has an @ in its name, and is loaded from its file. A module without a
    file, as in a notebook, keeps its name, and has the file ``""``.
    """
    if is_everywhere(name):
        return name, ""
    module = sys.modules.get(name)
    file = file_of(module)
    if not file or getattr(sys, "frozen", False):
        return ("__main__" if name in _MAIN else name), ""
    spec = getattr(module, "__spec__", None)
    if name == "__main__" and spec is not None and spec.name not in _MAIN:
        return spec.name, file  # `python -m`
    stem = os.path.splitext(os.path.basename(file))[0]
    for known in (stem,) if name in _MAIN else (name, stem):
        # A name that is not UTF-8 cannot be sent.
        if known not in _MAIN and known.isprintable() and _is_found(known, file):
            return known, file
    if not os.path.isfile(file) and stem not in _MAIN:
        return name, ""
    word = stem if stem.isidentifier() and stem.isascii() and stem not in _MAIN else "program"
    return f"{word}@{blake2b(os.fsencode(file), digest_size=4).hexdigest()}", file


def file_of(module: ModuleType | None) -> str:
    """Return the path of a module's file, without links; empty if it has none."""
    path = getattr(module, "__file__", None)
    return os.path.realpath(path) if path else ""


def name_of(name: str, file: bytes) -> str:
    """Return a module's name, by which its other releases are known, too."""
    word, at, _ = name.partition("@")
    return f"{word}@{os.fsdecode(os.path.basename(file))}" if at else name


def is_everywhere(name: str) -> bool:
    """Return whether a module is this package's or built in."""
    return name.startswith(f"{__package__}.") or name in sys.builtin_module_names


def _is_found(name: str, file: str) -> bool:
    """Return whether another process finds this file if it imports a module by this name."""
    package = name.partition(".")[0]
    # Not `importlib.util.find_spec`: a module that is imported already has its name from whatever loaded it.
    found = (finder.find_spec(package, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    spec = next((spec for spec in found if spec is not None), None)
    return spec is not None and (name != package or os.path.realpath(spec.origin or "") == file)


def import_from(name: str, file: str) -> ModuleType:
    """Import a module from its place. Raise whatever it raises."""
    if "@" not in name or name in sys.modules:
        return importlib.import_module(name)
    loader = (SourceFileLoader if os.path.isfile(file) else _ArchiveLoader)(name, file)
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded as a module")
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise
    return loaded


class _ArchiveLoader(SourceFileLoader):
    """Loads the main program of a zip archive."""

    def get_data(self, path: str | bytes) -> bytes:
        name = os.fsdecode(path)
        return zipimporter(os.path.dirname(name)).get_data(name)


def imported(name: str) -> ModuleType | None:
    """Return the module of a place if this process has imported it: the main program too, by its name for others."""
    if name not in sys.modules:
        name = next((main for main in _MAIN if main in sys.modules and place_of(main)[0] == name), name)
    return sys.modules.get(name)
