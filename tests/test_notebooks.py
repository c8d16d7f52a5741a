"""The second way to use the study: plain papermill, with other parameters. (nbval runs every notebook as stored.)"""

import json
import os
import subprocess
import sys

import pytest

from frozenfilters import study

SMALL = ["-p", "n_train", "100", "-p", "n_test", "50", "-p", "seeds", "1", "-p", "epochs", "1", "-p", "rates", "[1, 2]"]


def papermill(tmp_path, *words):
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(study.chapter("02").notebook), str(out), "--no-progress-bar", "-k", "python3", *SMALL, *words]
    env = {**os.environ, "FROZENFILTERS_RESULTS": str(tmp_path / "rows"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env), out


def test_papermill_with_other_parameters(tmp_path):
    """Any working folder; lists arrive as text; the rows land where the reader wants them, and figures carry their text."""
    (tmp_path / "images").mkdir()
    done, out = papermill(tmp_path, "-p", "lr", "0.1")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = study.load(tmp_path / "rows" / "02_linear_combinations")
    assert set(rows.rate) == {0, 1, 2} and set(rows.lr) == {0.1} and len(rows) == 8 and set(rows.dataset) == {"digits"}
    outputs = [o for c in json.loads(out.read_text())["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    alts = [o["metadata"]["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(alts) == 2 and all("LC" in a for a in alts)


def test_papermill_with_a_parameter_that_the_notebook_lacks(tmp_path):
    done, _ = papermill(tmp_path, "-p", "epoch", "3")
    assert done.returncode != 0 and "did you mean 'epochs'" in done.stderr
    assert not (tmp_path / "rows").exists()


@pytest.mark.skipif("FROZENFILTERS_DATA" not in os.environ, reason="Fashion-MNIST is not on this machine (FROZENFILTERS_DATA)")
def test_papermill_on_fashion_mnist(tmp_path):
    done, _ = papermill(tmp_path, "-p", "dataset", "fashion-mnist")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(study.load(tmp_path / "rows" / "02_linear_combinations").dataset) == {"fashion-mnist"}
