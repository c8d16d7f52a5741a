"""Frozen filters: do convolutional networks need to learn their spatial filters?

`import frozenfilters as ff` costs nothing: modules, and torch with them, are imported when a name is first used.
"""
from importlib import import_module

__version__ = "0.1.0"

PROTOCOL = 1        # raised by hand when a change of the package alters numerics: rows of an older protocol are stale

_MODULES = (
    "algebra", "backward", "batches", "bench", "chapters", "check", "claims", "data", "filters", "gpu", "grouped", "keys", "layers", "lcnets", "machine",
    "many", "measure", "models", "pack", "plots", "render", "rivals", "rows", "stamp", "starts", "steering", "steps", "study", "surgery", "train", "warm",
)
_NAMES = {
    "backward": ("lean", "unlean"),
    "layers": ("LCConv2d",),
    "lcnets": ("lc", "lr_matched"),
    "machine": ("tuned",),
    "many": ("fit_many",),
    "measure": ("accuracy", "fgsm", "pgd"),
    "models": ("fold", "normalized", "small_stem"),
    "surgery": ("depthwise", "freeze", "frozen_hash", "frozen_share", "inventory", "share", "spatial", "summary", "swap", "thaw", "thawed"),
    "train": ("DivergedError", "fit"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES + tuple(_HOME))


def __getattr__(name):
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
