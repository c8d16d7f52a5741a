"""The book's own Sphinx extension.

* {result}`key|format` puts a computed number into the text, {paper}`claim` what the paper reported, with its source. An unknown key is a warning, so the
  build stops;
* MathJax is served from the package sphinx-mathjax-offline, only the files a page needs: the book reads from file:// too;
* Thebe (live code through a public server) is not loaded: its scripts name a CDN and are included twice upstream;
* docstrings may hold names like `draw_` and indented formulas without reStructuredText's escapes;
* accessibility slips of the theme are mended in the written pages.
"""
import difflib
import importlib.util
import json
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.util import logging

log = logging.getLogger(__name__)
MATHJAX = ["tex-mml-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions", "a11y/assistive-mml.js"]
FIXES = [
    (re.compile(r'(<div class="citation" id="[^"]*" role=)"doc-biblioentry"'), r'\1"listitem"'),  # docutils 0.21 lists
    (re.compile(r'(<button class="btn search-button-field[^>]*?) aria-label="Search"'), r"\1"),  # name must hold visible text
    (re.compile(r'(<summary) aria-label="Toggle hidden content"'), r"\1"),
    (re.compile(r'<script type="text/x-thebe-config">.*?</script>', re.S), ""),
    (re.compile(r"<script>kernelName = .*?</script>", re.S), ""),
]


def lookup(kind, key, inliner, lineno):
    """The value of a key of book/_build/summary.json, or None with a warning that names the nearest key."""
    env = inliner.document.settings.env
    path = Path(env.srcdir) / "_build" / "summary.json"
    env.note_dependency(str(path))
    known = json.loads(path.read_text(encoding="utf-8"))[kind]
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        log.warning("{%s}`%s`: no such key%s", kind, key, f"; did you mean {near[0]}?" if near else "", location=(env.docname, lineno))
    return known.get(key)


def result_role(name, rawtext, text, lineno, inliner, options=None, content=None):
    key, _, fmt = text.partition("|")
    value = lookup("result", key, inliner, lineno)
    return [nodes.inline(rawtext, "?" if value is None else format(value, fmt or ".3g"), classes=["result"])], []


def paper_role(name, rawtext, text, lineno, inliner, options=None, content=None):
    return [nodes.inline(rawtext, lookup("paper", text, inliner, lineno) or "?", classes=["paper"])], []


CODE = re.compile(r"(``(?:[^\n]|\n(?![ ]*\n))+?``|(?::[\w:]+:)?`(?:[^`\n]|\n(?![ ]*\n))+`|^[ ]*>>>.*$|^[ ]*\.\.\. .*$)", re.M)
BULLET = re.compile(r" *[*-] ")
MARKUP = re.compile(r"(?<![\w*])\*[^*\s][^*\n]*\*(?![\w*])|^[ ]*\* |(?P<lone>\*+|\||(?<=\w)_+(?!\w))", re.M)


def tame_docstring(app, what, name, obj, options, lines):
    """Docstrings are written for people: lone `*`, `|` and `_` are characters, and an indented block of a module's docstring is shown as it stands."""
    out = []
    for line in lines:
        before = out[-1] if out else ""
        indent = before.index(before.strip())
        if what == "module" and line.startswith("    ") and not before.strip():
            out += ["::", ""]
        elif BULLET.match(before) and line.strip() and not BULLET.match(line) and line.index(line.strip()) <= indent:
            line = " " * indent + "  " + line.strip()                               # a bullet's text goes on
        out.append(line)
    parts = CODE.split("\n".join(out))
    for i, part in enumerate(parts):
        if i % 2 == 0:
            literal = re.split(r"((?:^    .*\n?)+)", part, flags=re.M) if what == "module" else [part]
            literal[::2] = [MARKUP.sub(lambda m: "".join("\\" + c for c in m[0]) if m["lone"] else m[0], text) for text in literal[::2]]
            parts[i] = "".join(literal)
            if i and parts[i][:1].isalnum():                # `name`s
                parts[i] = "\\ " + parts[i]
    lines[:] = "".join(parts).split("\n")


def drop_thebe(app, pagename, templatename, context, doctree):
    def is_thebe(f):
        return "thebe" in str(getattr(f, "filename", f)) or "thebe" in str(getattr(f, "attributes", {}).get("body", ""))
    for key in ("script_files", "css_files"):
        context[key] = [f for f in context.get(key, []) if not is_thebe(f)]


def finish(app, exc):
    if exc or app.builder.format != "html":
        return
    out = Path(app.outdir)
    src = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for k in MATHJAX:
        s, d = src / k, out / "_static" / "mathjax" / k
        if s.is_dir():
            shutil.copytree(s, d, dirs_exist_ok=True)
        else:
            d.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(s, d)
    for page in out.rglob("*.html"):
        if "_static" not in page.parts:
            old = new = page.read_text(encoding="utf-8")
            for pat, rep in FIXES:
                new = pat.sub(rep, new)
            if new != old:
                page.write_text(new, encoding="utf-8")


def setup(app):
    app.add_role("result", result_role)
    app.add_role("paper", paper_role)
    app.connect("autodoc-process-docstring", tame_docstring, priority=400)      # before napoleon
    app.config.mathjax_path = "mathjax/tex-mml-chtml.js"
    app.config.mathjax3_config = {"options": {"enableMenu": False}}   # the menu loads more files and 4 MB of speech data
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
