"""What the papers claim, and what our rows say of it, by rules written down in book/claims.yml before the run.

A rule compares two arms of a grid, paired by everything else that the rows share (seeds above all), on each data set apart:

    value = metric(a) - metric(b)            for each pair; with `axis`, the slope of that value over log2(axis) in each pair
    test  = above m | below m | within m     the 95 % interval of the mean lies entirely above m, below m, in [-m, m]

A data set `holds`, `fails` (the interval lies entirely on the other side) or is `undecided`. All hold: reproduced; some hold:
partly; none holds and some fail: not reproduced; too few seeds, no rows, or nothing decided: not tested at this scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import yaml

from . import chapters, rows

VERDICTS = ("reproduced", "partly", "not reproduced", "not tested at this scale")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its two-sided interval."""

    mean: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".3g"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def interval(values: Sequence[float], confidence: float = 0.95, method: str = "t") -> Interval:
    """Mean and interval over seeds: Student's t by default; `method="bootstrap"` takes percentiles of resampled means.

    At the three to ten seeds of this study the percentile bootstrap of a mean covers clearly less than it says (a test
    measures it), so that it would earn verdicts too cheaply; Student's interval does not. A single value has no interval.

    Raises:
        ValueError: if there is no finite value.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484..., n=3)
    """
    from scipy import stats

    x = np.asarray(values, float)
    x = x[np.isfinite(x)]
    if not len(x):
        raise ValueError("values: no finite value to average")
    if len(x) == 1:
        return Interval(float(x[0]), -np.inf, np.inf, 1)
    if np.ptp(x) == 0:
        return Interval(float(x[0]), float(x[0]), float(x[0]), len(x))
    if method == "bootstrap":
        ci = stats.bootstrap(
            (x,), np.mean, confidence_level=confidence, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
    else:
        ci = stats.t.interval(confidence, len(x) - 1, x.mean(), stats.sem(x))
    return Interval(float(x.mean()), float(ci[0]), float(ci[1]), len(x))


def select(table: pd.DataFrame, **where) -> pd.DataFrame:
    """The rows whose columns have these values (a list: any of them).

    Raises:
        KeyError: for a column that the rows do not have.
    """
    for column, value in where.items():
        if column not in table:
            raise KeyError(f"the rows have no column {column!r}; they have: {', '.join(c for c in table if not c.startswith('stamp.'))}")
        table = table[table[column].isin(value)] if isinstance(value, list) else table[table[column] == value]
    return table


def paired(
    table: pd.DataFrame, metric: str, a: dict, b: dict | None = None, *, pair: Sequence[str] = ("seed",), axis: str | None = None
) -> pd.Series:
    """metric(a) - metric(b) for each value of `pair`; with `axis`, its slope per doubling of that parameter.

    Diverged trainings have no metric and drop out with their pair.
    """
    keys = [*pair, axis] if axis else list(pair)

    def arm(where: dict, keys: list[str]) -> pd.DataFrame:
        chosen = select(table, **where)
        if len(chosen) and metric not in chosen:
            raise KeyError(f"the rows have no metric {metric!r}")
        if chosen.duplicated(keys).any():
            varied = [c for c in ("dataset", "arm", "bank", "rate", "arch", "width", "lr") if c in chosen and c not in keys and chosen[c].nunique() > 1]
            raise ValueError(f"arm {where} has several rows for one {keys}; fix or pair by {varied or 'more columns'} too")
        return chosen.reindex(columns=[*keys, metric])

    frame = arm(a, keys)
    frame["value"] = frame[metric].astype(float)
    if b is not None:
        fixed = axis is not None and select(table, **b)[axis].nunique() < 2  # an arm without the axis is the same at all of its values
        other = arm(b, list(pair) if fixed else keys).rename(columns={metric: "other"})
        frame = frame.merge(other, on=list(pair) if fixed else keys)
        frame["value"] -= frame["other"].astype(float)
    frame = frame.dropna(subset="value")
    if axis is None:
        return frame.set_index(keys)["value"]
    slopes = {
        name: np.polyfit(np.log2(part[axis].astype(float)), part["value"], 1)[0]
        for name, part in frame.groupby(list(pair))
        if part[axis].nunique() > 1
    }
    return pd.Series(slopes, dtype=float)


def _decide(i: Interval, test: dict) -> str:
    ((kind, m),) = test.items()
    if kind == "above":
        return "holds" if i.low > m else "fails" if i.high <= m else "undecided"
    if kind == "below":
        return "holds" if i.high < m else "fails" if i.low >= m else "undecided"
    if kind == "within":
        return "holds" if -m <= i.low and i.high <= m else "fails" if i.low > m or i.high < -m else "undecided"
    raise ValueError(f"test {kind!r} is none of above, below, within")


def verdict(rule: dict | None, table: pd.DataFrame) -> tuple[str, str, dict[str, Interval]]:
    """(verdict, reason, interval per data set) of one rule on the rows shown.

    Raises:
        KeyError, ValueError: if the rule does not fit the rows' columns.
    """
    if not rule:
        return VERDICTS[3], "no rule: the data or the scale cannot be had here", {}
    found, decisions = {}, {}
    over = rule.get("over", "dataset")
    if not len(table):
        return VERDICTS[3], "no rows", {}
    chosen = select(table, **rule.get("where", {}))
    for name in rule.get("datasets") or list(dict.fromkeys(chosen[over])):
        values = paired(
            chosen[chosen[over] == name], rule["metric"], rule["a"], rule.get("b"), pair=rule.get("pair", ["seed"]), axis=rule.get("axis")
        )
        if len(values) < rule.get("min_seeds", 3):
            decisions[name] = "untested"
            continue
        found[name] = interval(values)
        decisions[name] = _decide(found[name], rule["test"])
    words = set(decisions.values())
    reason = ", ".join(f"{name}: {word}" for name, word in decisions.items()) or "no rows"
    if words and words <= {"holds"}:
        return VERDICTS[0], reason, found
    if "holds" in words:
        return VERDICTS[1], reason, found
    return VERDICTS[2] if "fails" in words else VERDICTS[3], reason, found


def entries(number: str | None = None) -> list[dict]:
    """The claims of book/claims.yml, of one chapter or all.

    Raises:
        ValueError: for an entry without id, claim or paper, or a doubled id.
    """
    found = yaml.safe_load((chapters.root() / "book" / "claims.yml").read_text()) or []
    ids = [e.get("id") for e in found]
    for e in found:
        if not all(e.get(k) for k in ("id", "system", "claim", "paper")) or ids.count(e["id"]) > 1:
            raise ValueError(f"claims.yml: entry {e.get('id')!r} needs its own id, system, claim and paper (text, source)")
    return [e for e in found if number is None or str(e["id"]).startswith(f"{number}.")]


def table(number: str | None = None, measured: pd.DataFrame | None = None) -> pd.DataFrame:
    """id | chapter | system | claim | paper | ours | verdict | reason | command, one line per claim.

    Args:
        number: a chapter ("02"), or None for all.
        measured: that chapter's rows; by default those of the largest complete preset of each chapter.
    """
    lines, known = [], {}
    for e in entries(number):
        chapter = str(e["id"]).split(".")[0]
        if chapter not in known:
            known[chapter] = measured if measured is not None else shown_rows(chapter)
        word, reason, found = verdict(e.get("rule"), known[chapter])
        reason = e.get("not_tested", reason)
        rule = e.get("rule") or {}
        scale, unit = (100, " points") if rule.get("unit", "points") == "points" else (1, f" {rule['unit']}")
        shape = "+.1f" if unit == " points" else ".2f"
        scaled = {name: Interval(i.mean * scale, i.low * scale, i.high * scale, i.n) for name, i in found.items()}
        ours = "; ".join(f"{name}: {i:{shape}}{unit} (n={i.n})" for name, i in scaled.items())
        lines.append(
            {
                "id": str(e["id"]),
                "chapter": chapter,
                "system": e["system"],
                "claim": e["claim"],
                "paper": f"{e['paper']['text']} ({e['paper']['source']})",
                "ours_alone": bool(e.get("ours")),
                "measures": rule.get("measures", ""),
                "ours": ours or "–",
                "verdict": word,
                "reason": reason,
                "command": f"python -m frozenfilters run {chapter} --preset {rule.get('preset', 'cpu')}",
                "intervals": found,
            }
        )
    return pd.DataFrame(
        lines, columns=["id", "chapter", "system", "claim", "paper", "ours_alone", "measures", "ours", "verdict", "reason", "command", "intervals"]
    )


def shown_rows(number: str) -> pd.DataFrame:
    """The rows of a chapter's largest complete preset, smoke excepted: a verdict is never earned by a smoke run."""
    try:
        c = chapters.chapter(number)
    except LookupError:
        return pd.DataFrame()
    name, plan = chapters.shown(c)
    return pd.DataFrame() if name == "smoke" else rows.load(chapters.results(c.name), plan.keys)


def summary() -> dict[str, float]:
    """Every computed number that prose may quote: "02.1.fashion-mnist.mean", ".low", ".high", ".n", in the rule's own unit."""
    found = {}
    for _, line in table().iterrows():
        scale = 100 if line.ours != "–" and "points" in line.ours else 1
        for name, i in line.intervals.items():
            found |= {
                f"{line.id}.{name}.mean": i.mean * scale,
                f"{line.id}.{name}.low": i.low * scale,
                f"{line.id}.{name}.high": i.high * scale,
                f"{line.id}.{name}.n": i.n,
            }
    return found
