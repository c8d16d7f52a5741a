"""Speed as ratios: what can be counted is asserted here, what must be timed is only run (in small). No timed assertion."""

import pytest
import torch

from frozenfilters import bench, gpu, measure, models, surgery


def test_counted_operations_are_the_specs():
    """ResNet-20, batch 128, one training step: 31.2 GFLOP plain, 20.9 frozen, 31.7 composed, 195.5 sequential (E = 8)."""
    counted = {line["variant"]: line["flops"] / 1e9 for line in bench.operations()}
    assert counted == {
        name: pytest.approx(want, abs=0.06)
        for name, want in (("plain", 31.2), ("frozen", 20.9), ("composed, E = 8", 31.7), ("sequential, E = 8", 195.5))
    }


def test_counted_memory_is_within_the_bars():
    ratios = {(line["variant"], line["against"]): line["ratio"] for line in bench.memory()}
    assert ratios["composed, E = 8", "sequential, E = 8"] <= 0.22
    assert ratios["frozen, lean", "plain"] <= 0.77
    assert ratios["frozen", "plain"] > 0.95  # the flag alone saves no memory: the reason why lean exists


@pytest.mark.parametrize("cell", ["inputs", "loops", "members"])
def test_cells_run(cell):
    lines = bench.CELLS[cell](rounds=1, **({"n": 256} if cell == "inputs" else {"steps": 5} if cell == "loops" else {"count": 2}))
    assert lines and all(line["ratio"] > 0 and line["low"] <= line["ratio"] <= line["high"] for line in lines)


def test_unknown_cell_is_named():
    with pytest.raises(ValueError, match="no such|none of operations"):
        bench.run(["nothing"])


def test_gpu_cells_run_in_small_on_a_cpu():
    lines = gpu.graphs(rounds=1, device="cpu", n=32, batch=8, members=2, size=8, width=4)
    assert [line["variant"] for line in lines] == ["one graph", "2 members, one graph"]
    lines = gpu.rates(rounds=1, device="cpu", batch=4, rates=(2,), size=8, width=4)
    assert {line["variant"] for line in lines} == {"composed, E = 2", "gram, E = 2", "sequential, E = 2"}
    lines = gpu.imagenet(device="cpu", rate=1, batch=2, size=32)
    assert lines[0]["ratio"] > 0
    lines = gpu.recipe(device="cpu", n=16, epochs=1, batch=8, rate=1, members=2, size=8, width=4)
    assert [line["variant"] for line in lines] == ["one training", "2 trainings together"] and all(line["images_per_second"] > 0 for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    with pytest.raises(RuntimeError, match="no CUDA device.*cpu preset"):
        gpu.graphs()


def test_a_step_of_a_frozen_network_changes_no_frozen_weight():
    net = models.resnet20(width=4)
    surgery.freeze(net)
    before = surgery.frozen_hash(net)
    step = bench.stepper(net, batch=4, size=8)
    step()
    assert surgery.frozen_hash(net) == before and measure.parameters(net)["frozen"] > 0
