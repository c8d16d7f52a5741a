"""The committed rows: complete, clean, and enough for what the pages say."""

import pytest

from frozenfilters import __main__, check, study

CHAPTERS = [c for c in study.chapters() if "cpu" in c.presets]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_pages_show_real_measurements(chapter):
    """The cpu preset (or a larger one) is complete among the committed rows, measured from committed code."""
    results = study.root() / "book" / "results"
    name, plan = study.shown(chapter, results)
    assert name != "smoke"
    rows = study.load(results / chapter.name, plan.keys)
    assert set(rows.status) <= {"ok", "diverged"}
    assert not rows["stamp.dirty"].any() and rows["stamp.commit"].notna().all()
    if "seed" in rows:
        trials = rows[rows.trial == "trial"]
        arms = [c for c in ("dataset", "arch", "bank", "arm", "rate") if c in trials]
        assert trials.groupby(arms).seed.nunique().min() >= 3
        assert {"fashion-mnist", "cifar10-jpeg"} <= set(trials.dataset)
        lossy = trials.loc[trials.dataset == "cifar10-jpeg", "stamp.data"].iloc[0]
        assert "lossy" in lossy["cifar10-jpeg"]["note"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_a_complete_preset_is_never_measured_again(chapter, monkeypatch, capsys):
    """`frozenfilters run NN --preset cpu` on the committed rows measures nothing, needs no data folder and exits with 0."""
    results = study.root() / "book" / "results"
    monkeypatch.setenv("FROZENFILTERS_RESULTS", str(results))
    monkeypatch.delenv("FROZENFILTERS_DATA", raising=False)
    before = sorted(p.name for p in results.rglob("*"))
    assert __main__.main(["run", chapter.number, "--preset", "cpu", "--rows-only"]) == 0
    assert sorted(p.name for p in results.rglob("*")) == before
    assert "measured" not in capsys.readouterr().out


def test_every_footer_says_what_a_reader_must_know():
    from frozenfilters import plots

    for number in ("01", "02"):
        rows = study.load(study.root() / "book" / "results" / study.chapter(number).name)
        foot = plots.footer(rows[rows.trial == "trial"], study.chapter(number).name)
        for word in ("fashion-mnist", "lossy", "seeds", "epochs", "training images", "rows book/results/", "notebooks/"):
            assert word in foot


def test_nothing_is_stale_and_no_number_is_typed_by_hand(monkeypatch):
    monkeypatch.setenv("FROZENFILTERS_RESULTS", str(study.root() / "book" / "results"))
    assert check.stale() == [] and check.failed() == [] and check.without_verdict() == []
    from frozenfilters import pages

    assert pages.unearned(study.root()) == []
