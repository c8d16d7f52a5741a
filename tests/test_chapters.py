"""Chapters, presets, parameters, plans; the command line's errors."""

import json
import os
import subprocess
import sys

import pytest

from frozenfilters import __main__, chapters, study
from frozenfilters.chapters import ParameterError, check_parameters


def test_chapters_and_their_notebooks():
    found = study.chapters()
    assert [c.number for c in found] == ["01", "02", "12"]
    for c in found:
        assert c.title and c.question.endswith("?") and c.summary and c.system
        given = chapters.defaults(c.notebook)
        for name, values in c.presets.items():
            check_parameters(values, given)
            assert name in c.minutes and (c.minutes[name] is not None or name == "gpu")  # null: never timed
        tags = [t for _, t, _ in chapters.cells(c.notebook)]
        assert sum("parameters" in t for t in tags) == 1 and any("trial" in t for t in tags) and any("measure" in t for t in tags)
        assert json.loads(c.notebook.read_text())["metadata"]["kernelspec"]["language"] == "python"


def test_every_rule_fits_the_rows_of_its_chapter(tmp_path):
    """Smoke rows have the columns and the arms that claims.yml speaks of, but never earn a verdict."""
    from frozenfilters import claims

    small = {"seeds": 1, "epochs": 1, "n_train": 100, "n_test": 50, "rates": [16, 1]}
    for c in study.chapters():
        if "seeds" not in chapters.defaults(c.notebook):
            continue  # ratios of time, not trainings
        given = {name: value for name, value in small.items() if name in chapters.defaults(c.notebook)}
        rows = study.measure(c, given | {"out": str(tmp_path / c.name)})["rows"]
        for e in claims.entries(c.number):
            if rule := e.get("rule"):
                values = claims.paired(rows, rule["metric"], rule["a"], rule.get("b"), axis=rule.get("axis"))
                assert len(values) == 1


@pytest.mark.parametrize(
    "given, words",
    [
        ({"epoch": 3}, "unknown parameter 'epoch': did you mean 'epochs'"),
        ({"epochs": "many"}, "epochs='many' is str"),
        ({"epochs": True}, "bool"),
        ({"rates": 3}, "rates=3 is int"),
    ],
)
def test_bad_parameters(given, words):
    with pytest.raises(ParameterError, match=words):
        study.measure(study.chapter("02"), given)


def test_ints_pass_for_floats_and_none_takes_anything():
    check_parameters({"lr": 1, "out": "x"}, {"lr": 0.1, "out": None})


def test_start_refuses_what_papermill_let_through():
    history = ["", "epochs = 3\nrates = [1]\n", "# Parameters\nepoch = 5\n"]
    with pytest.raises(ParameterError, match="epochs"):
        chapters.start("02_linear_combinations", {"_ih": history})
    space = {"_ih": ["", "rates = [1]\nx = 1\n", "# Parameters\nrates = '[1, 4]'\n"], "rates": "[1, 4]"}
    chapters.start("02_linear_combinations", space)
    assert space["rates"] == [1, 4]  # papermill -p passes lists as text


def test_unknown_chapter_and_preset():
    with pytest.raises(LookupError, match="02_linear_combinations"):
        study.chapter("2_linear")
    with pytest.raises(LookupError, match="smoke, cpu, gpu"):
        study.preset(study.chapter("2"), "huge")


def test_plan_counts_without_measuring(tmp_path):
    c = study.chapter("02")
    assert study.plan(c, "smoke", tmp_path).present == 0
    study.measure(c, {"out": str(tmp_path / c.name), "budget": "1s"})
    plan = study.plan(c, "smoke", tmp_path)
    assert 0 < plan.present <= plan.total == 16
    name, _ = study.shown(c, tmp_path)
    assert name == "smoke"


def test_root_says_what_it_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FROZENFILTERS_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"presets\.yml"):
        study.root()


# ------------------------------------------------------------------------------------------------------ the command line
@pytest.mark.parametrize(
    "words, message",
    [
        (["run", "99"], "no chapter '99'"),
        (["run", "02", "--preset", "huge"], "no preset 'huge'"),
        (["run", "02", "-p", "epoch", "3"], "did you mean 'epochs'"),
        (["run", "02", "-p", "dataset", "fashion-mist", "--rows-only", "-p", "seeds", "1", "-p", "rates", "[1]"], "fashion-mnist"),
        (["data", "pack", "nothing", "/nowhere"], "nothing"),
        (["data", "get", "cifar11"], "cifar10"),
    ],
)
def test_errors_are_one_line_and_exit_2(words, message, capsys, monkeypatch):
    monkeypatch.setenv("FROZENFILTERS_WORKERS", "1")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = __main__.main(words)
    captured = capsys.readouterr()
    assert code in (1, 2) and message in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_list_and_data_speak_json(capsys):
    assert __main__.main(["list", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert {line["preset"] for line in lines} == {"smoke", "cpu", "gpu"}
    assert __main__.main(["data", "--json"]) == 0
    assert any(line["name"] == "digits" for line in json.loads(capsys.readouterr().out))


def test_run_measures_and_resumes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FROZENFILTERS_WORKERS", "1")
    words = ["run", "02", "-p", "seeds", "1", "-p", "epochs", "1", "-p", "rates", "[1]", "-p", "n_train", "100", "--rows-only", "--json"]
    assert __main__.main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == {"ok": 5}
    assert __main__.main(words) == 0
    assert len(list((tmp_path / "results").rglob("*.jsonl"))) == 1


def test_a_failing_trial_gives_a_non_zero_exit(capsys, monkeypatch):
    monkeypatch.setenv("FROZENFILTERS_WORKERS", "1")
    words = [
        "run",
        "01",
        "-p",
        "epochs",
        "1",
        "-p",
        "n_train",
        "100",
        "-p",
        "seeds",
        "1",
        "-p",
        "banks",
        "[random]",
        "--rows-only",
        "-p",
        "archs",
    ]
    with pytest.warns(UserWarning, match="resnet21"):
        assert __main__.main([*words, "[convmixer, resnet21]"]) == 1
    assert __main__.main([*words, "[resnet21]"]) == 2
    assert "resnet21" in capsys.readouterr().err


def test_an_unknown_bank_is_named_and_costs_nothing(monkeypatch, capsys):
    monkeypatch.setenv("FROZENFILTERS_WORKERS", "1")
    words = ["run", "01", "-p", "banks", "[dtc]", "-p", "seeds", "1", "-p", "archs", "[convmixer]", "-p", "epochs", "1", "-p", "n_train", "100", "--rows-only"]
    with pytest.warns(UserWarning, match='did you mean .dct.'):
        assert __main__.main(words) == 1
    assert "1 rows ok" in capsys.readouterr().out  # the learned arm was measured, and stays


def test_import_is_light():
    """`import frozenfilters` brings no torch; its parts bring no torchvision, seaborn or pandas before they are used."""
    code = (
        "import sys, frozenfilters as ff; assert 'torch' not in sys.modules; ff.freeze; ff.LCConv2d; ff.fit; ff.models; ff.data;"
        "print([m for m in ('torchvision', 'seaborn', 'pandas', 'matplotlib', 'sklearn', 'scipy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert out.stdout.strip() == "[]"
