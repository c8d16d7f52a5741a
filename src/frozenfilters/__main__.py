"""The command line: list, run, book, check, data, bench."""

from __future__ import annotations

import argparse
import json
import os
import sys

import yaml

EXAMPLES = """examples:
  frozenfilters list                                    chapters, presets, minutes, rows present
  frozenfilters run 02 --preset cpu                     measure what is missing, then draw the chapter's notebook
  frozenfilters run 02 -p dataset fashion-mnist -p epochs 3
  frozenfilters run 02 --preset gpu --budget 9m --shard 3/8 --rows-only
  frozenfilters book                                    smoke runs, pages, the book
  frozenfilters check                                   stale rows, unearned numbers, missing verdicts
  frozenfilters bench inputs folded                     speed as ratios, measured here and now
  frozenfilters data                                    which data sets are here, and how to get the others
  frozenfilters data pack cifar10-jpeg ~/cifar-10-batches-py
"""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    p = argparse.ArgumentParser(
        "frozenfilters",
        description="Do convolutional networks need to learn their spatial filters?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = p.add_subparsers(dest="command", required=True, metavar="list | run | book | check | data | bench")
    s = sub.add_parser("list", help="chapters, presets, minutes, rows present")
    s.add_argument("--json", action="store_true", help="machine-readable")
    s = sub.add_parser(
        "run", help="measure a chapter's grid and draw its notebook", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    s.add_argument("chapter", help="number, name or notebook: 02, 02_linear_combinations")
    s.add_argument("--preset", default="smoke", help="smoke (seconds), cpu (minutes), gpu (the paper's scale); see notebooks/presets.yml")
    s.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="overrides the preset; VALUE is YAML"
    )
    s.add_argument("--budget", help="stop starting trials in time: 9m, 2h, seconds; run again to go on")
    s.add_argument("--shard", help="measure only a part of the grid: 3/8")
    s.add_argument("--workers", type=int, default=None, help="processes with one thread each (default: one per core)")
    s.add_argument("--rows-only", action="store_true", help="measure without a notebook kernel, draw nothing")
    s.add_argument("--json", action="store_true", help="a summary line as JSON")
    s = sub.add_parser("book", help="run the smoke presets, render the pages, build the book")
    s.add_argument("--no-smoke", action="store_true", help="skip the live smoke runs")
    s = sub.add_parser("bench", help="speed and memory of the engine as ratios, in under three minutes")
    s.add_argument("cells", nargs="*", help="some of the cells only (default: all)")
    s.add_argument("--rounds", type=int, help="interleaved repetitions (default: each cell's own)")
    s.add_argument("--json", action="store_true", help="machine-readable")
    s = sub.add_parser("check", help="stale rows, numbers without a row, claims without a verdict")
    s.add_argument("--json", action="store_true", help="machine-readable")
    s = sub.add_parser("data", help="data sets: list, get, pack")
    s.add_argument("--json", action="store_true", help="machine-readable")
    d = s.add_subparsers(dest="action", metavar="get | pack")
    g = d.add_parser("get", help="download through torchvision")
    g.add_argument("name")
    k = d.add_parser("pack", help="build a packed archive from the official release")
    k.add_argument("name")
    k.add_argument("source")
    k.add_argument("--partial", action="store_true", help="accept a release that is not whole; rows will say so")
    k.add_argument("--out", help="folder (default: FROZENFILTERS_DATA)")
    return p


def _list(a) -> int:
    from . import study

    lines = []
    for c in study.chapters():
        for name in c.presets:
            plan = study.plan(c, name)
            lines.append(
                {
                    "chapter": c.name,
                    "title": c.title,
                    "preset": name,
                    "minutes": c.minutes.get(name),
                    "rows": plan.present,
                    "grid": plan.total,
                }
            )
    if a.json:
        print(json.dumps(lines))
        return 0
    for line in lines:
        minutes = "?" if line["minutes"] is None else f"{line['minutes']:g}"
        print(f"{line['chapter']:26} {line['preset']:6} {minutes:>6} min  {line['rows']:>4} of {line['grid']:<4} rows  {line['title']}")
    return 0


def _run(a) -> int:
    from . import study

    c = study.chapter(a.chapter)
    parameters = study.preset(c, a.preset) | {name: yaml.safe_load(value) for name, value in a.parameter}
    for name in ("budget", "shard"):
        if getattr(a, name) is not None:
            parameters[name] = getattr(a, name)
    os.environ.setdefault("FROZENFILTERS_WORKERS", str(a.workers or os.cpu_count() or 1))
    if a.workers:
        os.environ["FROZENFILTERS_WORKERS"] = str(a.workers)
    space = study.measure(c, parameters)
    table = space.get("rows")
    counts = {str(k): int(v) for k, v in table.status.value_counts().items()} if table is not None and len(table) else {}
    executed = None
    if counts and not a.rows_only and not a.shard:
        from . import render

        executed = render.execute(
            c,
            {k: v for k, v in parameters.items() if k not in ("budget", "shard")} | ({"budget": 0} if "budget" in parameters else {}),
            a.preset,
        )
    if a.json:
        print(json.dumps({"chapter": c.name, "preset": a.preset, "rows": counts, "notebook": str(executed) if executed else None}))
    else:
        print(
            f"{c.name} {a.preset}: {', '.join(f'{v} rows {k}' for k, v in counts.items()) or 'no rows yet'}"
            + (f"; drawn in {executed}" if executed else "")
        )
    return 0 if a.budget or a.shard or sum(counts.values()) == len(space["grid"]) else 1


def _check(a) -> int:
    from . import check

    found = check.everything()
    if a.json:
        print(json.dumps(found))
    else:
        for kind, lines in found.items():
            print(f"{kind}: {len(lines)}" if lines else f"{kind}: none")
            for line in lines:
                print(f"  {line}")
    return 1 if any(found.values()) else 0


def _bench(a) -> int:
    from . import bench

    table = bench.run(a.cells, a.rounds)
    if a.json:
        print(table.to_json(orient="records"))
    else:
        shown = table[[c for c in ("cell", "variant", "against", "ratio", "low", "high") if c in table]]
        print(shown.to_string(index=False, float_format=lambda v: f"{v:.3f}", na_rep="exact"))
    return 0


def _data(a) -> int:
    from . import data

    if a.action == "pack":
        from .pack import pack

        print(pack(a.name, a.source, out=a.out, partial=a.partial))
    elif a.action == "get":
        for split in data.info(a.name).splits:
            found = data.load(a.name, split, download=True)
            print(f"{found.name} {split}: {len(found)} examples, {found.source}")
    else:
        table = data.available()
        print(table.to_json(orient="records") if a.json else table.to_string(index=False))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command. A mistake of the user's gives one clear line and exit code 2; an interruption gives 130."""
    a = parser().parse_args(argv)
    try:
        if a.command == "book":
            from . import render

            render.book(smoke=not a.no_smoke)
            return 0
        return {"list": _list, "run": _run, "check": _check, "data": _data, "bench": _bench}[a.command](a)
    except KeyboardInterrupt:
        return 130
    except (ValueError, LookupError, OSError, RuntimeError) as e:
        print(f"frozenfilters: {e.args[0] if isinstance(e, KeyError) and e.args else e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
