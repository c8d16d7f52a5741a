"""The study's public door: grids, rows, chapters and claims.

    df = study.run(trial, study.grid(rate=[1, 4], seed=range(3)), out=results, budget="9min")
    study.claims("02", df)
"""
from .chapters import ParameterError, chapter, chapters, check_parameters, measure, plan, preset, results, root, shown, start
from .claims import Interval, entries, interval, paired, select, shown_rows, summary
from .claims import table as claims
from .rows import ResultsError, arrays, grid, load, run
from .stamp import stamp

__all__ = ["Interval", "ParameterError", "ResultsError", "arrays", "chapter", "chapters", "check_parameters", "claims", "entries", "grid", "interval", "load",
           "measure", "paired", "plan", "preset", "results", "root", "run", "select", "shown", "shown_rows", "stamp", "start", "summary"]
