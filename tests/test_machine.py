"""Settings of the process: applied, told, taken back."""
import resource

import pytest
import torch

from frozenfilters import machine
from frozenfilters.machine import environment, settings, tuned


def test_threads_come_back_also_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), tuned(threads=before + 1):
        assert torch.get_num_threads() == settings()["threads"] == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads=0"), tuned(threads=0):
        pass


@pytest.mark.skipif(machine._glibc() is None, reason="not glibc")
def test_the_heap_is_kept_and_given_back():
    def faults(n=5):
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(n):
            torch.ones(2**24)                                              # 64 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
    found = faults()
    with tuned() as active:
        assert active["allocator"] == settings()["allocator"] == "heap kept"
        faults(20)                                                         # until the heap has grown to its size
        with tuned(threads=1):
            pass
        assert settings()["allocator"] == "heap kept"                       # the inner block leaves the outer one's
        assert faults() < 0.1 * found
    assert settings()["allocator"] == "as found" and faults() > 0.1 * found
    with tuned(allocator=False) as active:
        assert active["allocator"] == "as found"


def test_elsewhere_it_says_so(monkeypatch):
    monkeypatch.setattr(machine, "_glibc", lambda: None)
    with tuned(threads=1) as active:
        assert active["allocator"] == "not glibc: left as it is"
    assert not any(name.startswith("MALLOC") for name in environment(1))


def test_environment_shares_the_cores():
    assert environment(1)["OMP_NUM_THREADS"] == str(machine.cores()) and "OMP_WAIT_POLICY" not in environment(1)
    assert environment(machine.cores())["OMP_NUM_THREADS"] == "1"
    assert environment(2)["OMP_WAIT_POLICY"] == "PASSIVE" and all(isinstance(value, str) for value in environment(2).values())
    with pytest.raises(ValueError, match="jobs=0"):
        environment(0)
