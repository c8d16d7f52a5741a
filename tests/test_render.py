"""The book's machinery, with small notebooks of its own."""
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from frozenfilters import pages, render, study

ROOT = Path(__file__).resolve().parents[1]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
TRIAL = "def trial(seed):\n    return {'accuracy': 0.5 + seed / 100}"


def notebook(path, *code, title="A title", trial=TRIAL):
    """A chapter as small as can be: a grid over seeds, then the given cells."""
    def cell(source, *tags):
        return new_code_cell(source, metadata={"tags": list(tags)}, id=f"cell-{len(cells)}")
    cells = [new_markdown_cell(f"# {title}\n\n*Is it so?*", id="title")]
    cells.append(cell("seeds = [0, 1]", "parameters"))
    cells.append(cell(f"import os\n\nfrom frozenfilters import study\n\nresults = study.results('{path.stem}')", "setup"))
    cells.append(cell(trial, "trial"))
    cells.append(cell("rows = study.run(trial, study.grid(seed=seeds), out=results)", "measure"))
    for source in code:
        cells.append(cell(source, "figure"))
    nb = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    nbformat.write(nb, path)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout with two chapters; the second one is written by the test."""
    for folder in ("notebooks", "book/results", "requirements"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "requirements" / "lock.txt").write_text("")
    (tmp_path / "book" / "claims.yml").write_text("[]")
    (tmp_path / "notebooks" / "presets.yml").write_text(
        "01_one:\n  minutes: {smoke: 0.1, cpu: 2}\n  smoke: {}\n  cpu: {seeds: [0, 1, 2]}\n02_two:\n  smoke: {}\n")
    notebook(tmp_path / "notebooks" / "01_one.ipynb", "len(rows)")
    notebook(tmp_path / "notebooks" / "02_two.ipynb")
    monkeypatch.setenv("FROZENFILTERS_ROOT", str(tmp_path))
    monkeypatch.delenv("FROZENFILTERS_RESULTS", raising=False)
    return tmp_path


def test_smoke_runs_all_keeps_the_failure_and_skips_what_is_unchanged(checkout, capsys):
    notebook(checkout / "notebooks" / "02_two.ipynb", "wrong = 1\nraise RuntimeError('the data are gone')")
    with pytest.raises(render.BookError, match=r"02_two.ipynb: cell \[\d\] `wrong = 1` raised RuntimeError: the data are gone\n.*failed/02_two.ipynb"):
        render.run_smoke()
    kept = nbformat.read(checkout / "book" / "_build" / "failed" / "02_two.ipynb", 4)
    assert any(o.output_type == "error" for c in kept.cells if c.cell_type == "code" for o in c.outputs)
    assert "smoke 01_one: ok" in capsys.readouterr().out
    assert len(study.load(checkout / "book" / "_build" / "smoke" / "01_one")) == 2

    notebook(checkout / "notebooks" / "02_two.ipynb", trial="def trial(seed):\n    raise OSError('no disk')")
    with pytest.raises(render.BookError, match="2 of 2 trials failed, the first with OSError: no disk"):
        render.run_smoke()
    assert "01_one" not in capsys.readouterr().out, "an unchanged notebook that passed runs no more"


def test_an_unknown_parameter_is_refused_before_anything_runs(checkout):
    with pytest.raises(render.BookError, match="did you mean 'seeds'"):
        render.execute(study.chapter("01"), {"seed": [3]}, "mine")


def test_a_page_shows_the_largest_complete_preset(checkout):
    chapter = study.chapter("01")
    assert render.choose(chapter).fallback and render.choose(chapter).preset == "smoke"
    study.measure(chapter, study.preset(chapter, "smoke"))
    assert render.choose(chapter).fallback, "a smoke run is no evidence, wherever its rows lie"
    study.measure(chapter, study.preset(chapter, "cpu"))
    shown = render.choose(chapter)
    assert (shown.preset, shown.fallback, len(shown.keys)) == ("cpu", False, 3)
    assert "`cpu` preset" in pages.note(chapter, shown) and "`smoke` 0.1 min · `cpu` 2 min" in pages.note(chapter, shown)
    text = pages.provenance({"01_one": shown, "02_two": render.choose(study.chapter("02"))})
    assert "| Grid measured | `smoke` 2 of 2 · `cpu` 3 of 3 |" in text
    assert "| Rows kept | 3, of which 0 stale |" in text and "no larger preset is complete" in text


def test_nbval_counts_as_the_smoke_run(checkout, monkeypatch, capsys):
    monkeypatch.setenv("FROZENFILTERS_RESULTS", str(checkout / "book" / "_build" / "smoke"))
    for chapter in study.chapters():
        study.measure(chapter, {})
    render.stamp_smoke()
    capsys.readouterr()
    render.run_smoke()
    assert capsys.readouterr().out == ""


CHAPTER = SimpleNamespace(number="02", name="02_two", notebook=Path("02_two.ipynb"))


def picture(alt=None):
    return new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": alt}} if alt else {})


def test_finish_gives_each_image_its_own_alternative_text_and_the_same_bytes():
    def executed(stamp):
        figure = new_code_cell("draw()", id="figure", metadata={"tags": ["figure"], "papermill": {"duration": stamp}, "execution": {"at": str(stamp)}})
        figure.outputs = [picture("one thing"), new_output("stream", text="said between"), picture("another\nthing")]
        table = new_code_cell("table", id="table")
        html = f'<table id="T_{stamp:05x}"><td id="T_{stamp:05x}_a">'
        table.outputs = [new_output("execute_result", {"text/html": html, "text/plain": f"<S at {stamp:#x}>"}, execution_count=1)]
        injected = new_code_cell("seeds = [3]", id=f"random-{stamp}", metadata={"tags": ["injected-parameters"]})
        return new_notebook(cells=[new_markdown_cell("# Two", id="t"), injected, figure, table], metadata={"papermill": {"start": stamp}})
    first, second = (pages.finish(executed(stamp), CHAPTER, "note") for stamp in (11, 12))
    assert nbformat.writes(first) == nbformat.writes(second)
    assert first.cells[0].source == "# 2 · Two" and first.cells[1].source == "note"
    assert first.cells[2].metadata.tags == ["injected-parameters", "remove-cell"]
    whole, rest = first.cells[3:5]
    assert [whole.metadata.mystnb.image.alt, rest.metadata.mystnb.image.alt] == ["one thing", "another thing"]
    assert len(whole.outputs) == 2 and rest.metadata.tags == ["remove-input"]
    nbformat.validate(first)


def test_finish_refuses_an_image_without_text():
    cell = new_code_cell("draw_it()", id="figure")
    cell.outputs = [picture()]
    with pytest.raises(render.BookError, match=r"02_two.ipynb, cell figure \('draw_it\(\)'\): an image has no alternative text"):
        pages.finish(new_notebook(cells=[new_markdown_cell("# Two"), cell]), CHAPTER, "note")


def test_numbers_typed_by_hand_are_found_and_settings_are_not(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "book" / "a.md").write_text(
        "---\nversion: 1.5\n---\n# 3 seeds, 32 x 32\nIt reached 91.89 and 17 %, at `lr=0.1`, $x = 0.5$, {result}`02.1.mean|+.2f`.\n"
        "```python\nx = 0.25\n```\n[paper 2.5](http://a.b/1.5) with its 95 % interval, {cite}`a2.5`; see http://a.b/2.5 too\n"
        "```{note}\nA drop of -0.7 points\n```\n$$\ny = 0.75\n$$\n95 % of all\n")
    cell = new_markdown_cell("fine\n\nabout 4.5 points")
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "notebooks" / "b.ipynb")
    assert render.unearned(tmp_path) == [
        "book/a.md:5: 91.89", "book/a.md:5: 17 %", "book/a.md:11: -0.7", "book/a.md:16: 95 %", "notebooks/b.ipynb:cell 0, line 3: 4.5"]


def test_the_answer_table_survives_any_text(checkout):
    claims = pd.DataFrame([("01.1", "S", "a | b\nc", "p", False, "", "–", "not reproduced", "no rows"),
                           ("09.1", "T", "d", "q", True, "a minus b", "+1.0", "partly", "")],
                          columns=["id", "system", "claim", "paper", "ours_alone", "measures", "ours", "verdict", "reason"])
    lines = pages.answers(claims).splitlines()
    assert lines[0] == "Of the papers' claims 1 not reproduced; of our own controls 1 partly."
    assert lines[4] == "| S | a \\| b c | p | – (no rows) | **not reproduced** | [01](chapters/01_one.ipynb) |"
    assert lines[5] == "| T | d *(Ours.)* | q | a minus b: +1.0 | **partly** | 09 |", "a claim may wait for its chapter"
    assert "*Of the papers' claims 1 not reproduced.*" in pages.sentences(claims) and "*No verdict yet.*" in pages.sentences(claims)


def extension():
    spec = importlib.util.spec_from_file_location("study_book", ROOT / "book" / "_ext" / "study_book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_need_no_escapes():
    pytest.importorskip("sphinx")
    lines = ["Uses draw_, *args and |x|; keeps `draw_`, *this* and ``a_``.", "* one", "more of one", "", ">>> f(*a_)", "`weight`s"]
    extension().tame_docstring(None, "function", "f", None, None, lines)
    assert lines == ["Uses draw\\_, \\*args and \\|x\\|; keeps `draw_`, *this* and ``a_``.", "* one", "  more of one", "", ">>> f(*a_)", "`weight`\\ s"]
    lines = ["Text", "", "    y = a_ * b", "", "end_"]
    extension().tame_docstring(None, "module", "m", None, None, lines)
    assert lines == ["Text", "", "::", "", "    y = a_ * b", "", "end\\_"]
