"""What makes two measurements the same: the key of a row.

SHA-256 of the trial's syntax tree (comments, docstrings and layout do not count), of whatever else of its notebook it refers to,
and of the canonical JSON of every argument it was called with, defaults bound. How it was run (device, threads) never enters.
"""

from __future__ import annotations

import ast
import builtins
import dis
import hashlib
import inspect
import json
import textwrap
import types
from collections.abc import Callable

import numpy as np

NOT_IN_KEY = ("device", "threads", "workers", "progress")  # how it was run, not what was measured


def _canonical(node):
    """A syntax tree as nested lists, the same for every Python version, layout, comment and docstring."""
    if isinstance(node, ast.AST):
        fields = []
        for name, value in ast.iter_fields(node):
            if name in ("type_comment", "type_params", "kind", "ctx") or value is None or value == []:
                continue
            if name == "body" and isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
                value = value[1:]
            fields.append([name, _canonical(value)])
        return [type(node).__name__, fields]
    return [_canonical(v) for v in node] if isinstance(node, list) else repr(node)


def code_of(function: Callable) -> str:
    """The hash of a trial's code: its own syntax tree and, with it, everything of its notebook that it refers to.

    Functions, classes and plain constants of the notebook are followed; modules and what is imported from packages are not
    (the package's own numerics are versioned by `PROTOCOL`).

    Raises:
        ValueError: if the source is not to be had, or the trial leans on an object that cannot be hashed.
    """
    seen: dict[str, object] = {}

    def visit(name: str, obj: object) -> None:
        if name in seen:
            return
        if isinstance(obj, types.ModuleType) or (callable(obj) and getattr(obj, "__module__", None) != function.__module__):
            return
        if callable(obj):
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(obj)))
            except (OSError, TypeError) as e:
                raise ValueError(f"trial: the source of {name!r} cannot be read ({e}); define it in a notebook cell or a file") from e
            seen[name] = _canonical(tree.body)
            for other, value in sorted(_referred(obj).items()):
                visit(other, value)
        else:
            try:
                seen[name] = json.dumps(plain(obj), sort_keys=True)
            except TypeError as e:
                raise ValueError(
                    f"trial refers to {name!r}, a {type(obj).__name__} of the notebook that no key can stand for; pass what it needs as an "
                    "argument (a number, a string, a list) or build it inside the trial"
                ) from e

    visit(function.__name__, function)
    return hashlib.sha256(json.dumps(sorted(seen.items()), sort_keys=True).encode()).hexdigest()


def _referred(obj: Callable) -> dict[str, object]:
    """The global and enclosing variables that a function (or a class's methods) really reads; its own locals are not among them."""
    functions = (
        [obj] if inspect.isfunction(obj) else [f for f in vars(obj).values() if inspect.isfunction(f)] if inspect.isclass(obj) else []
    )
    found = {}
    for function in functions:
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            for step in dis.get_instructions(code):
                if (
                    step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
                    and step.argval in function.__globals__
                    and not hasattr(builtins, step.argval)
                ):
                    found[step.argval] = function.__globals__[step.argval]
        found |= {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)}
    return found


def bind(trial: Callable, point: dict) -> dict:
    """Every argument of the trial at this point, defaults bound.

    Raises:
        TypeError: for an argument that the trial does not take, or one that is missing.
    """
    try:
        call = inspect.signature(trial).bind(**point)
    except TypeError as e:
        raise TypeError(
            f"the grid does not fit the trial: {e}; {trial.__name__}{inspect.signature(trial)} was given {sorted(point)}"
        ) from None
    call.apply_defaults()
    return dict(call.arguments)


def key_of(code: str, arguments: dict) -> str:
    """SHA-256 of the trial's code hash and the canonical JSON of its arguments, without device, threads and the like."""
    arguments = {k: plain(v) for k, v in arguments.items() if k not in NOT_IN_KEY}
    return hashlib.sha256(f"{code}\n{json.dumps(arguments, sort_keys=True, allow_nan=False)}".encode()).hexdigest()


def plain(value):
    """JSON's own types: NumPy scalars become numbers, tuples and ranges lists, 1.0 stays a float."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, float):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} is not a plain value")
