"""The life of a result: keys, appends, resumption, faults. Trials here are real functions of this file."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pandas as pd
import pytest

from frozenfilters import keys, rows, study

CALLS = pytest.CALLS = []  # reached through a module, so that counting is no part of the trial's key
SCALE = 2


def trial(x, seed=0, device="cpu"):
    """Docstring that does not count."""
    pytest.CALLS.append(x)
    return {"value": x * SCALE + seed}


@pytest.fixture(autouse=True)
def _fresh():
    CALLS.clear()


def make(source: str, name: str = "trial", **space):
    """A trial from source, as a notebook cell makes one."""
    import linecache

    source = textwrap.dedent(source)
    file = f"<cell {abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    space = {"__name__": "__main__", **space}
    exec(compile(source, file, "exec"), space)
    return space[name]


def test_measures_once_and_resumes(tmp_path):
    points = study.grid(x=[1, 2, 3], seed=range(2))
    first = study.run(trial, points[:4], tmp_path)
    assert len(CALLS) == 4 and list(first.value) == [2, 3, 4, 5]
    again = study.run(trial, points, tmp_path)
    assert len(CALLS) == 6 and list(again.value) == [2, 3, 4, 5, 6, 7]
    assert study.run(trial, points, tmp_path).equals(again) and len(CALLS) == 6
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_key_ignores_layout_comments_docstring_device_and_locals():
    a = make("def trial(x, lr=0.1):\n    return {'v': x}")
    b = make('def trial(x,\n          lr=0.1):\n    """Doc."""\n    # comment\n    return {"v": x}', lr=7)
    assert keys.code_of(a) == keys.code_of(b)
    c = make("def trial(x, lr=0.1):\n    return {'v': x + 0}")
    assert keys.code_of(a) != keys.code_of(c)
    code = keys.code_of(trial)
    assert keys.key_of(code, keys.bind(trial, {"x": 1})) == keys.key_of(code, keys.bind(trial, {"x": 1, "seed": 0, "device": "cuda"}))
    assert keys.key_of(code, keys.bind(trial, {"x": 1})) != keys.key_of(code, keys.bind(trial, {"x": 1, "seed": 1}))
    assert keys.key_of("0", {"x": np.int64(3), "y": (1, 2)}) == keys.key_of("0", {"x": 3, "y": [1, 2]})


def test_key_is_the_same_on_every_python():
    """A golden value: if it moves, every row ever measured would be orphaned."""
    t = make("def trial(x, *, k=3):\n    'doc'\n    y = [i ** 2 for i in range(x) if i > k]\n    return {'v': f'{sum(y):.2f}'}")
    assert keys.code_of(t)[:16] == "3b80ac3f582f433a"


def test_key_follows_what_the_trial_refers_to():
    source = "def helper(x):\n    return x * FACTOR\ndef trial(x):\n    return {'v': helper(x)}"
    codes = {
        keys.code_of(make(source, FACTOR=2)),
        keys.code_of(make(source, FACTOR=3)),
        keys.code_of(make(source.replace("x * F", "x + F"), FACTOR=2)),
    }
    assert len(codes) == 3
    assert keys.code_of(make(source, FACTOR=2)) == keys.code_of(make(source, FACTOR=2, unrelated=5))
    with pytest.raises(ValueError, match="'net'.*as an argument"):
        keys.code_of(make("def trial(x):\n    return net(x)", net=np.zeros(3)))


def test_edited_trial_is_measured_again(tmp_path):
    old = study.run(make("def trial(x):\n    return {'v': x}"), study.grid(x=[1]), tmp_path)
    new = study.run(make("def trial(x):\n    return {'v': -x}"), study.grid(x=[1]), tmp_path)
    assert (old.v[0], new.v[0]) == (1, -1)


def test_older_protocol_is_stale(tmp_path, monkeypatch):
    study.run(trial, study.grid(x=[1]), tmp_path)
    monkeypatch.setattr(rows, "PROTOCOL", rows.PROTOCOL + 1)
    study.run(trial, study.grid(x=[1]), tmp_path)
    assert len(CALLS) == 2


def test_torn_line_is_skipped_and_measured_again(tmp_path):
    study.run(trial, study.grid(x=[1, 2]), tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="torn"):
        table = study.run(trial, study.grid(x=[1, 2]), tmp_path)
    assert CALLS == [1, 2, 2] and list(table.value) == [2, 4]


def test_newer_schema_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"schema": 99, "key": "k"}) + "\n")
    with pytest.raises(study.ResultsError, match="schema 99"):
        study.load(tmp_path)


def test_divergence_is_a_row_and_failure_is_tried_again(tmp_path):
    state = {"fail": True}

    def diverging(x):
        raise ArithmeticError("the loss is nan in epoch 2")

    table = study.run(diverging, study.grid(x=[1]), tmp_path / "a")
    assert table.status[0] == "diverged" and "nan" in table.error[0]
    assert rows._done(tmp_path / "a")
    flaky = make("def trial(x):\n    if FAIL:\n        raise RuntimeError('CUDA out of memory')\n    return {'v': x}", FAIL=True)
    with pytest.warns(UserWarning, match="out of memory.*again"):
        assert len(study.run(flaky, study.grid(x=[1, 2]), tmp_path / "b")) == 0
    assert len(rows.read(tmp_path / "b")) == 2 and not rows._done(tmp_path / "b")
    assert state


def test_a_mistake_stops_at_once_unless_something_was_measured(tmp_path):
    first, later = (
        make("def trial(x):\n    if x == BAD:\n        raise ValueError(\"unknown data set 'mist'\")\n    return {'v': x}", BAD=b)
        for b in (0, 1)
    )
    with pytest.raises(ValueError, match="mist"):
        study.run(first, study.grid(x=range(3)), tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.jsonl"))
    with pytest.warns(UserWarning, match="mist"):
        assert list(study.run(later, study.grid(x=range(3)), tmp_path / "b").v) == [0, 2]


def test_arrays_are_kept_beside_the_row(tmp_path):
    def spectral(x):
        return {"v": 1.0, "spectrum": np.arange(5.0) * x}

    table = study.run(spectral, study.grid(x=[3]), tmp_path)
    np.testing.assert_array_equal(study.arrays(table.iloc[0])["spectrum"], np.arange(5.0) * 3)

    def huge(x):
        return {"a": np.zeros(10**6)}

    with pytest.raises(ValueError, match="at most 200000"):
        study.run(huge, study.grid(x=[3]), tmp_path)
    next(tmp_path.glob("*.npz")).unlink()
    with pytest.raises(study.ResultsError, match="npz"):
        study.arrays(table.iloc[0])


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/version"), reason="needs a file system that refuses")
def test_results_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(study.ResultsError, match="FROZENFILTERS_RESULTS"):
        study.run(trial, study.grid(x=[1]), blocked / "results")
    assert not CALLS


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk_loses_nothing_that_was_flushed(tmp_path, monkeypatch):
    study.run(trial, study.grid(x=[1]), tmp_path)
    monkeypatch.setattr(rows.Shard, "__init__", lambda self, folder: setattr(self, "path", "/dev/full"))
    with pytest.raises(study.ResultsError, match="safe"):
        study.run(trial, study.grid(x=[1, 2]), tmp_path)
    assert len(study.load(tmp_path)) == 1


def test_a_torn_write_takes_no_other_row_with_it(tmp_path):
    shard = rows.Shard(tmp_path)
    shard.append({"schema": 1, "key": "a", "stamp": {}})
    with open(shard.path, "ab") as f:
        f.write(b'{"schema": 1, "key": "torn')
    shard.append({"schema": 1, "key": "c", "stamp": {}})
    with pytest.warns(UserWarning, match="line 2 is torn"):
        assert [r["key"] for r in rows.read(tmp_path)] == ["a", "c"]


def test_rows_of_an_older_protocol_are_not_returned(tmp_path, monkeypatch):
    study.run(trial, study.grid(x=[1, 2]), tmp_path)
    monkeypatch.setattr(rows, "PROTOCOL", rows.PROTOCOL + 1)
    assert len(study.run(trial, study.grid(x=[1, 2]), tmp_path, budget=0)) == 0


def test_budget_and_shards(tmp_path):
    def slow(x):
        time.sleep(0.1)
        return {"v": x}

    study.run(slow, study.grid(x=range(50)), tmp_path, budget="0.5s")
    assert 2 <= len(study.load(tmp_path)) <= 6
    assert study.run(slow, study.grid(x=range(50)), tmp_path, budget=0) is not None
    for part in ("1/3", "2/3", "3/3"):
        table = study.run(trial, study.grid(x=range(10)), tmp_path / "s", shard=part)
    assert list(table.x) == list(range(10)) and sorted(CALLS) == list(range(10))
    for bad in ("4/3", "0/2", "x"):
        with pytest.raises(ValueError, match="3/8"):
            study.run(trial, study.grid(x=[1]), tmp_path, shard=bad)
    with pytest.raises(ValueError, match="budget"):
        study.run(trial, study.grid(x=[1]), tmp_path, budget="soon")


def test_grid_and_trial_must_fit(tmp_path):
    with pytest.raises(TypeError, match="does not fit"):
        study.run(trial, study.grid(y=[1]), tmp_path)
    with pytest.raises(ValueError, match="empty"):
        study.grid(x=[])


def test_first_done_row_of_a_key_counts(tmp_path):
    study.run(trial, study.grid(x=[1]), tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    row = json.loads(path.read_text())
    row["metrics"]["value"], row["stamp"]["time"] = 99, "2999-01-01T00:00:00"
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    assert list(study.load(tmp_path).value) == [2]


SCRIPT = """
import sys, time
from frozenfilters import study
def trial(x):
    time.sleep(0.02)
    return {"v": x * x}
study.run(trial, study.grid(x=range(60)), sys.argv[1], workers=int(sys.argv[2]))
"""


def _start(script, *args):
    return subprocess.Popen([sys.executable, str(script), *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_run_resumes_with_nothing_lost(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "rows"
    script.write_text(SCRIPT)
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(4):
        p = _start(script, out, 1)
        deadline = time.time() + 60
        while time.time() < deadline and len(list(out.glob("*.jsonl")) if out.exists() else []) == 0:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.1, 0.6))
        p.send_signal(signal.SIGKILL)
        p.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            now = len(rows._done(out))
        assert now >= kept
        kept = now
    assert 0 < kept
    assert _start(script, out, 1).wait() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everything, table = rows.read(out), study.load(out)
    assert sorted(table.v) == [x * x for x in range(60)]
    assert len(everything) == 60  # no key twice


def test_two_writers_and_worker_processes(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "rows"
    script.write_text(SCRIPT)
    a, b = _start(script, out, 1), _start(script, out, 1)
    assert a.wait() == 0 and b.wait() == 0
    table = study.load(out)
    assert sorted(table.v) == [x * x for x in range(60)] and table.key.is_unique
    assert _start(script, tmp_path / "parallel", 2).wait() == 0
    parallel = study.load(tmp_path / "parallel")
    assert sorted(parallel.key) == sorted(table.key)
    pd.testing.assert_series_equal(parallel.sort_values("key").v, table.sort_values("key").v, check_index=False)


def test_interrupted_run_says_how_to_go_on(tmp_path, capsys):
    def interrupted(x):
        if x == 2:
            raise KeyboardInterrupt
        return {"v": x}

    with pytest.raises(KeyboardInterrupt):
        study.run(interrupted, study.grid(x=[1, 2, 3]), tmp_path)
    assert "resume" in capsys.readouterr().err and len(study.load(tmp_path)) == 1


def test_stamp_says_where_a_number_comes_from(tmp_path):
    def with_data(x):
        import frozenfilters as ff

        return {"n": len(ff.data.load("digits", "test"))}

    row = study.run(with_data, study.grid(x=[1]), tmp_path).iloc[0]
    assert row["stamp.device"] and row["stamp.torch"] and row["stamp.time"] and row["stamp.data"]["digits"]["source"] == "embedded"
