"""What the book's pages say: generated text, the last touch on executed chapters, and the search for numbers typed by hand.

The text (answer table, a sentence per chapter, provenance, reference) is made from rows, claims and docstrings and written to book/generated, which the prose
pages include, and to book/_build/summary.json, which the roles `result` and `paper` read. Nothing is measured or executed here.
"""
import ast
import json
import re
from collections import Counter
from pathlib import Path

import nbformat
from nbformat import v4

from . import PROTOCOL, study

CHOICE = {"gpu": "the paper's scale, as far as the data can be had", "cpu": "in small, for two processor cores", "smoke": "a few seconds, to see that it works"}

IMAGES = ("image/png", "image/svg+xml", "image/jpeg")


class BookError(RuntimeError):
    """The book could not be built; the message says where and what to do."""


def write(root: Path, shown: dict) -> None:
    """Write every generated page for the presets shown ({chapter name: render.Shown})."""
    out = root / "book" / "generated"
    out.mkdir(exist_ok=True)
    claims = study.claims()
    _put(out / "answers.md", answers(claims))
    _put(out / "chapters.md", sentences(claims))
    _put(out / "provenance.md", provenance(shown))
    _put(out / "api.md", api(Path(__file__).parent))
    _put(out / "landing.md", _landing(out))
    papers = {row.id: row.paper for row in claims.itertuples()}
    (root / "book" / "_build").mkdir(exist_ok=True)
    _put(root / "book" / "_build" / "summary.json", json.dumps({"result": study.summary(), "paper": papers}, indent=1, sort_keys=True, default=float) + "\n")


def _put(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _table(header: list, rows: list) -> str:
    def line(cells):
        return "| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in cells) + " |"
    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)]) + "\n"


def _link(chapter, text: str | None = None) -> str:
    return f"[{text or f'{int(chapter.number)} · {chapter.title}'}](chapters/{chapter.name}.ipynb)"


def answers(claims) -> str:
    """The landing table: one line per claim, and a count of the verdicts above it."""
    if not len(claims):
        return "No claim has been stated yet.\n"
    chapters = {c.number: c for c in study.chapters()}
    rows = []
    for r in claims.itertuples():
        number = r.id.split(".")[0]
        ours = f"– ({r.reason})" if r.ours == "–" else f"{r.measures}: {r.ours}" if r.measures else r.ours
        claim, place = f"{r.claim} *(Ours.)*" if r.ours_alone else r.claim, _link(chapters[number], number) if number in chapters else number
        rows.append([r.system, claim, r.paper, ours, f"**{r.verdict}**", place])
    return f"{tally(claims)}.\n\n" + _table(["System", "Claim", "The paper said", "We measured", "Verdict", "Chapter"], rows)


BEGIN, END = "<!-- answers: made by `make readme` -->", "<!-- end of answers -->"


def readme(claims) -> str:
    """README's answer table, between its two marks: chapter | claim | verdict | command."""
    chapters = {c.number: c for c in study.chapters()}
    rows = [[f"[{int(r.chapter)} {c.title}](notebooks/{c.name}.ipynb)", r.claim, f"**{r.verdict}**", f"`{r.command}`" if r.measures else r.reason]
            for r in claims.itertuples() if (c := chapters.get(r.chapter))]
    return f"{BEGIN}\n{_table(['Chapter', 'Claim', 'Verdict', 'Measured by'], rows)}{END}"


def readme_is_stale(root: Path, write: bool = False) -> bool:
    """Whether README.md's answer table differs from what rows and claims say; with `write`, it is put right."""
    path, new = root / "README.md", readme(study.claims())
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise BookError(f"README.md lacks the marks {BEGIN} and {END}, between which its answer table belongs")
    old = text[text.index(BEGIN):text.index(END) + len(END)]
    if write and old != new:
        path.write_text(text.replace(old, new), encoding="utf-8")
    return old != new


def tally(claims) -> str:
    """Counts of the verdicts in words, the most frequent first, our own controls apart."""
    def counted(some) -> str:
        return ", ".join(f"{n} {verdict}" for verdict, n in sorted(Counter(some.verdict).items(), key=lambda x: (-x[1], x[0])))

    parts = [(claims[~claims.ours_alone], "of the papers' claims "), (claims[claims.ours_alone], "of our own controls ")]
    text = "; ".join(words + counted(some) for some, words in parts if len(some))
    return text[:1].upper() + text[1:]


def sentences(claims) -> str:
    """One sentence per chapter, and what came out."""
    out = []
    for c in study.chapters():
        mine = claims[[i.split(".")[0] == c.number for i in claims.id]] if len(claims) else claims
        out.append(f"- **{_link(c)}** {(c.summary or c.question).strip()} *{tally(mine) if len(mine) else 'No verdict yet'}.*")
    return "\n".join(out) + "\n"


def _landing(out: Path) -> str:
    from . import plots
    if not hasattr(plots, "landing"):
        return ""
    alt = plots.landing(out / "landing.png")
    return f"![{alt}](generated/landing.png)\n" if alt else ""                    # as seen from the page that includes it


def facts(chapter, what) -> dict:
    """Where the rows that a chapter's page shows come from: devices, days, hours, versions, commits."""
    rows = study.load(what.results / chapter.name)
    used = rows[rows.key.isin(what.keys)] if len(rows) else rows

    def values(column):
        return sorted({str(v) for v in used[column].dropna()}) if column in used else []

    days = sorted({time[:10] for time in values("stamp.time")})
    minutes = float(used.seconds.sum()) / 60 if len(used) else 0.0
    packages = [(name, values(f"stamp.{name}")) for name in ("python", "torch", "torchvision", "numpy", "frozenfilters")]
    return {"used": len(used), "where": ", ".join(values("stamp.device")) or "–",
            "when": " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "–",
            "time": f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min", "dirty": "True" in values("stamp.dirty"),
            "commits": [commit[:10] for commit in values("stamp.commit")],
            "versions": ", ".join(f"{name} {' / '.join(found)}" for name, found in packages if found) or "–"}


def note(chapter, what) -> str:
    """The card under a chapter's title: what this page shows, and what each preset costs."""
    minutes = {p: chapter.minutes.get(p) for p in chapter.presets}
    cost = " · ".join(f"`{p}` " + ("not timed" if m is None else f"{m:g} min") for p, m in minutes.items())
    parameters = ", ".join(f"`{k}={v!r}`" for k, v in chapter.presets[what.preset].items())
    if what.fallback:
        larger = "cpu" if "cpu" in chapter.presets else "gpu"
        title, kind = "A smoke run: it proves that the code works, and nothing more", "warning"
        text = (f"This page shows the `smoke` preset, run by the machine that built this book. No larger preset has all its rows yet. "
                f"To measure one: `python -m frozenfilters run {chapter.number} --preset {larger}`.")
    else:
        f = facts(chapter, what)
        title, kind = "What this page shows", "note"
        text = f"The `{what.preset}` preset ({CHOICE[what.preset]}): {f['used']} trials measured on {f['where']}, {f['when']}."
    if parameters:
        text += f" With {parameters}; other parameters as in the cell below."
    return f"```{{admonition}} {title}\n:class: {kind}\n{text}\n\nCost: {cost}. [How to read](../how_to_read.md) · [Provenance](../provenance.md)\n```"


def provenance(shown: dict) -> str:
    """A section per chapter: when, where, how long, versions, commit, rows, share of each preset's grid."""
    out = []
    for c in study.chapters():
        what = shown[c.name]
        f, kept = facts(c, what), study.root() / "book" / "results"
        plans = {preset: study.plan(c, preset, what.results if preset == what.preset else kept) for preset in c.presets}
        rows = study.load(kept / c.name)
        codes = {code[:16] for plan in plans.values() for code in plan.codes}
        stale = rows[(rows.protocol != PROTOCOL) | ~rows.code.isin(codes)] if len(rows) else rows
        lines = [
            ("Preset shown", f"`{what.preset}`" + (", **run by the machine that built this book**: no larger preset is complete" if what.fallback else "")),
            ("Rows shown", f["used"]),
            ("Rows kept", f"{len(rows)}, of which {len(stale)} stale"),
            ("Grid measured", " · ".join(f"`{preset}` {plan.present} of {plan.total}" for preset, plan in plans.items())),
            ("When", f["when"]), ("Where", f["where"]), ("How long", f["time"]), ("Versions", f["versions"]),
            ("Commit", (", ".join(f"`{commit}`" for commit in f["commits"]) or "not recorded") + (" (with uncommitted changes)" if f["dirty"] else ""))]
        out.append(f"## {_link(c)}\n\n" + _table(["What", "Value"], lines))
    return "\n".join(out)


def api(package: Path) -> str:
    """Sphinx directives that document every public module from its docstrings."""
    out = []
    for path in sorted(package.glob("*.py")):
        if path.stem in ("__init__", "__main__") or path.stem.startswith("_"):
            continue
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        options = "\n".join(["   :members:", "   :ignore-module-all:", "   :member-order: bysource"])
        if doc:
            out.append(f"## {path.stem}\n\n```{{eval-rst}}\n.. automodule:: frozenfilters.{path.stem}\n{options}\n```\n")
    return "\n".join(out)


def finish(nb, chapter, note: str):
    """Make an executed notebook a page: same bytes from same results, alternative text on every image, a number and a note under the title."""
    nb.metadata.pop("papermill", None)
    nb.metadata.get("language_info", {}).pop("version", None)
    cells = []
    for cell in nb.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"
            cell.metadata.tags = ["injected-parameters", "remove-cell"]
        for n, output in enumerate(cell.get("outputs", [])):            # pandas' styled tables have a random name, other objects an address
            for mime, text in output.get("data", {}).items():
                if mime.startswith("text/"):
                    text = re.sub(r"T_[0-9a-f]{5}(?=[_\s\"#])", f"T_{cell.id}-{n}", "".join(text))
                    output.data[mime] = re.sub(r" at 0x[0-9a-f]+>", ">", text)
        cells += _one_image_each(cell, chapter) if cell.cell_type == "code" else [cell]
    cells[0].source = cells[0].source.replace("# ", f"# {int(chapter.number)} · ", 1)
    cells.insert(1, v4.new_markdown_cell(note, id="what-this-page-shows"))
    nb.cells = cells
    return nb


def _one_image_each(cell, chapter):
    """MyST-NB gives all images of a cell one alternative text, so a cell with several is cut into one visible cell and output-only ones."""
    groups = [[]]
    for output in cell.outputs:
        if any(m in output.get("data", {}) for m in IMAGES) and any(m in o.get("data", {}) for o in groups[-1] for m in IMAGES):
            groups.append([])
        groups[-1].append(output)
    out = []
    for n, group in enumerate(groups):
        part = cell
        if n:
            part = v4.new_code_cell("# more output of the cell above", id=f"{cell.id}-{n}", metadata={"tags": ["remove-input"]})
            part.execution_count = cell.execution_count
        part.outputs = group
        for output in group:
            for mime in IMAGES:
                if mime in output.get("data", {}):
                    alt = output.get("metadata", {}).get(mime, {}).get("alt") or cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
                    if not alt:
                        first = cell.source.strip().splitlines()[0]
                        raise BookError(f"{chapter.notebook.name}, cell {cell.id} ({first!r}): an image has no alternative text. "
                                        "Show it with IPython.display.Image(..., alt='what it shows'), as plots.show does.")
                    part.metadata["mystnb"] = {"image": {"alt": " ".join(alt.split())}}
        out.append(part)
    return out


# Numbers typed by hand. Prose may not state results: a number in it that was not computed will be wrong one day.
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+\.\d+(?![\w.]*\w\.\w)|(?<![\w.])\d+(?:\.\d+)?\s?(?:%|per\s?cent\b)")
ALLOWED = re.compile(r"95\s?(?:%|per\s?cent)(?=\s+(?:bootstrap\s+|confidence\s+)?intervals?)")
FENCE = re.compile(r"^(?P<ticks> *(?:`{3,}|~{3,}))(?P<info>[^\n`]*)\n.*?^(?P=ticks)[`~]* *$", re.S | re.M)
PROSE = re.compile(r"\{(?:admonition|note|warning|tip|important|caution|seealso|dropdown|margin|glossary|card|grid|tab-item|list-table|csv-table|epigraph)")
SKIP = [re.compile(p, re.S | re.M) for p in (
    r"\A---\n.*?^---$",                                     # front matter
    r"<!--.*?-->",
    r"\$\$.*?\$\$",
    r"(?:\{[\w:+-]+\})?(`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)\1(?!`)",          # code spans and roles
    r"\$[^$\n]+\$",
    r"!?\[[^\]]*\]\([^)]*\)|\[[^\]]*\]\[[^\]]*\]",          # links and images
    r"https?://\S+")]


def unearned(root: Path) -> list[str]:
    """Decimal numbers and percentages typed by hand in the prose of the book and the notebooks, as ``"file:line: number"``.

    Code spans, formulas, links, roles and citations do not count: settings go into code spans, results come from the role `result`,
    what a paper reported from the role `paper`.
    """
    found = []
    for path in sorted((root / "book").glob("*.md")):
        found += [f"book/{path.name}:{line}: {number}" for line, number in _numbers(path.read_text(encoding="utf-8"))]
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        for i, cell in enumerate(nbformat.read(path, 4).cells):
            if cell.cell_type == "markdown":
                found += [f"notebooks/{path.name}:cell {i}, line {line}: {number}" for line, number in _numbers(cell.source)]
    return found


def _numbers(text: str) -> list:
    def blank(match):                                       # lines stay where they are
        return re.sub(r"[^\n]", " ", match[0])
    def fence(match):                                       # a directive's text is prose, a code block is not
        if not PROSE.match(match["info"].strip()):
            return blank(match)
        first, rest = match[0].split("\n", 1)
        inner, _, last = rest.rpartition("\n")
        return "\n".join([re.sub(r"[`~]|\{[^}]*\}", lambda m: " " * len(m[0]), first), FENCE.sub(fence, inner), " " * len(last)])

    text = FENCE.sub(fence, text)
    for pattern in [*SKIP, ALLOWED]:
        text = pattern.sub(blank, text)
    return [(text.count("\n", 0, m.start()) + 1, m[0].strip()) for m in NUMBER.finditer(text)]
