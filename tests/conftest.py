import warnings

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_and_apart(monkeypatch, tmp_path):
    """No test writes into the study's own results; warnings of ours stay errors where a test does not expect them."""
    monkeypatch.setenv("FROZENFILTERS_RESULTS", str(tmp_path / "results"))
    warnings.simplefilter("default")


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)
