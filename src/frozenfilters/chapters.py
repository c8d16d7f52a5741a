"""A chapter is one number: a notebook, its presets, its folder of rows. Run it with a kernel (papermill) or without one (here).

Notebook cells carry tags: `parameters` (plain assignments), `setup` (imports), `trial` (the measured function), `measure`
(grid and `study.run`). These four are all that is needed to measure; the rest draws.
"""

from __future__ import annotations

import ast
import difflib
import json
import linecache
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from . import rows

PRESETS = ("smoke", "cpu", "gpu")
MEASURING = {"parameters", "setup", "trial", "measure"}


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or of another type than its default."""


def root() -> Path:
    """The study's folder: FROZENFILTERS_ROOT, else upwards from here, else the checkout that the package was installed from.

    Raises:
        FileNotFoundError: naming what was looked for and where.
    """
    if named := os.environ.get("FROZENFILTERS_ROOT"):
        if not (Path(named) / "notebooks" / "presets.yml").exists():
            raise FileNotFoundError(f"FROZENFILTERS_ROOT={named} holds no notebooks/presets.yml; point it at a checkout of the study")
        return Path(named).resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "notebooks" / "presets.yml").exists():
            return folder
    raise FileNotFoundError(
        f"no notebooks/presets.yml in {here} or above it: run inside a checkout of the study, or set FROZENFILTERS_ROOT to one"
    )


def results(name: str | None = None) -> Path:
    """The folder of rows: FROZENFILTERS_RESULTS, else book/results; of one chapter with its name."""
    folder = Path(os.environ.get("FROZENFILTERS_RESULTS") or root() / "book" / "results")
    return folder / name if name else folder


@dataclass(frozen=True)
class Chapter:
    """One notebook and what presets.yml says of it."""

    number: str
    name: str
    notebook: Path
    title: str
    question: str
    summary: str
    system: str
    presets: dict
    minutes: dict


def chapters() -> list[Chapter]:
    """All chapters of the checkout, in order."""
    known = yaml.safe_load((root() / "notebooks" / "presets.yml").read_text())
    found = []
    for name, entry in sorted(known.items()):
        path = root() / "notebooks" / f"{name}.ipynb"
        if not path.exists():
            raise FileNotFoundError(f"presets.yml names {name}, but {path} does not exist; add the notebook or remove the entry")
        lines = "".join(json.loads(path.read_text())["cells"][0]["source"]).strip().splitlines()
        question = next((line.strip("*_ ") for line in lines[1:] if line.strip()), "")
        found.append(
            Chapter(
                name[:2],
                name,
                path,
                lines[0].lstrip("# "),
                question,
                entry.get("summary", ""),
                entry.get("system", ""),
                {p: entry.get(p) or {} for p in PRESETS if p in entry},
                entry.get("minutes", {}),
            )
        )
    return found


def chapter(name: str) -> Chapter:
    """A chapter by number ("02" or "2"), name or notebook file.

    Raises:
        LookupError: listing the chapters there are.
    """
    wanted = Path(str(name)).stem
    for c in chapters():
        if wanted in (c.name, c.number, c.number.lstrip("0")):
            return c
    close = difflib.get_close_matches(wanted, [c.name for c in chapters()], 1, 0.3)
    raise LookupError(
        f"no chapter {name!r}" + (f"; did you mean {close[0]!r}?" if close else "") + f" Chapters: {', '.join(c.name for c in chapters())}"
    )


def preset(c: Chapter, name: str) -> dict:
    """The parameters of a preset.

    Raises:
        LookupError: listing the presets there are.
    """
    if name not in c.presets:
        raise LookupError(f"chapter {c.name} has no preset {name!r}; it has: {', '.join(c.presets)} (notebooks/presets.yml)")
    return dict(c.presets[name])


# ------------------------------------------------------------------------------------------------------------ parameters
def _assigned(source: str) -> dict[str, object]:
    """Names and literal values that a parameters cell assigns."""
    found = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            try:
                found[target.id] = ast.literal_eval(node.value)
            except (AttributeError, ValueError):
                raise ParameterError(f"parameters cell: line {node.lineno} is not a plain `name = literal`") from None
    return found


def check_parameters(given: dict, defaults: dict) -> None:
    """Refuse what papermill would only warn about: unknown names, and values of another type than the default.

    >>> check_parameters({"epoch": 3}, {"epochs": 1, "lr": 0.1})
    Traceback (most recent call last):
    ...
    frozenfilters.chapters.ParameterError: unknown parameter 'epoch': did you mean 'epochs'? This notebook takes: epochs, lr
    """
    for name, value in given.items():
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, 1)
            raise ParameterError(
                f"unknown parameter {name!r}"
                + (f": did you mean {close[0]!r}?" if close else ".")
                + f" This notebook takes: {', '.join(defaults)}"
            )
        default = defaults[name]
        wanted = (int, float) if isinstance(default, float) else type(default)
        if (
            default is not None
            and value is not None
            and (not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)))
        ):
            raise ParameterError(
                f"parameter {name}={value!r} is {type(value).__name__}; the default {default!r} is {type(default).__name__}"
            )


def cells(notebook: Path) -> list[tuple[int, set[str], str]]:
    """(index, tags, source) of the code cells."""
    found = json.loads(Path(notebook).read_text())["cells"]
    return [(i, set(c["metadata"].get("tags", [])), "".join(c["source"])) for i, c in enumerate(found) if c["cell_type"] == "code"]


def defaults(notebook: Path) -> dict[str, object]:
    """The parameters of a notebook and their default values.

    Raises:
        ParameterError: if no cell is tagged `parameters`.
    """
    for _, tags, source in cells(notebook):
        if "parameters" in tags:
            return _assigned(source)
    raise ParameterError(f"{notebook}: no cell is tagged 'parameters'")


def start(name: str, namespace: dict, out: str | None = None) -> Path:
    """First call of a chapter's notebook: refuse unknown or ill-typed injected parameters, set the figure style, name the results folder."""
    history = [source for source in namespace.get("_ih", []) if source.strip()]
    injected = next((i for i, source in enumerate(history) if source.startswith("# Parameters")), None)
    if injected:
        known: dict = {}
        for source in history[:injected]:
            try:
                known |= _assigned(source)
            except (ParameterError, SyntaxError):
                continue
        given = _assigned(history[injected])
        for key, value in given.items():  # papermill -p passes a list as text
            if isinstance(value, str) and isinstance(known.get(key), list):
                given[key] = namespace[key] = yaml.safe_load(value)
        check_parameters(given, known)
    if "ipykernel" in sys.modules:
        from . import plots

        plots.style()
    return Path(out) if out else results(name)


# ------------------------------------------------------------------------------------------------------- without a kernel
def measure(c: Chapter, parameters: dict) -> dict:
    """Run the measuring cells of a chapter in this process, without a kernel; returns their namespace.

    Raises:
        ParameterError: before anything runs.
    """
    check_parameters(parameters, defaults(c.notebook))
    chosen = [(i, tags, source) for i, tags, source in cells(c.notebook) if tags & MEASURING]
    namespace = {"__name__": "__main__"}
    for i, tags, source in chosen:
        name = f"<{c.name} cell {i}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # so that the trial's source can be read
        exec(compile(source, name, "exec"), namespace)
        if "parameters" in tags:
            namespace |= parameters
    return namespace


@dataclass(frozen=True)
class Plan:
    """What a preset's grid asks for: its keys, how many have an up-to-date row, and the code of its trials."""

    total: int
    present: int
    keys: tuple[str, ...]
    codes: tuple[str, ...]


def plan(c: Chapter, name: str = "smoke", folder: Path | None = None) -> Plan:
    """List the points of a preset's grid and count those that a results folder holds; nothing is measured."""
    parameters = preset(c, name)
    if "out" in defaults(c.notebook):
        parameters["out"] = str((folder or results()) / c.name)
    token = rows.PLAN.set([])
    try:
        measure(c, parameters)
        planned = rows.PLAN.get()
    finally:
        rows.PLAN.reset(token)
    keys = tuple(k for p in planned for k in p["keys"])
    return Plan(len(keys), sum(p["present"] for p in planned), keys, tuple(p["code"] for p in planned))


def shown(c: Chapter, folder: Path | None = None) -> tuple[str, Plan]:
    """The largest preset whose rows are complete, and its plan; ("smoke", plan) where none is."""
    for name in reversed(PRESETS):
        if name in c.presets:
            p = plan(c, name, folder)
            if p.total and p.present == p.total:
                return name, p
    return "smoke", plan(c, "smoke", folder)
