"""Training: frozen stays frozen, seeds decide everything, divergence is told."""

import copy

import pytest
import torch
from torch import nn

import frozenfilters as ff
from frozenfilters.train import Callback, DivergedError, cosine, fit, resolve_precision


@pytest.fixture(scope="module")
def digits():
    return ff.data.load("digits").subset(256)


def network(seed=0, width=4):
    torch.manual_seed(seed)
    return ff.normalized(ff.models.resnet20(in_channels=1, width=width), [0.3], [0.4])


@pytest.mark.parametrize("arm", ["frozen", "bias", "dct", "lc", "lc-sequential", "shared"])
def test_frozen_weights_are_bit_identical(digits, arm, g):
    net = network()
    if arm == "lc":
        ff.lc(net, 2)
    elif arm == "lc-sequential":
        ff.lc(net, 2, execution="sequential")
    elif arm == "shared":
        ff.lc(net, 2, shared=True)
    else:
        ff.freeze(net, init="dct" if arm == "dct" else None, bias=arm == "bias", generator=g)
    before, learned = ff.frozen_hash(net), {n: p.clone() for n, p in net.named_parameters() if p.requires_grad}
    fit(net, digits, epochs=2, lr=0.1, weight_decay=0.1, seed=1)
    assert ff.frozen_hash(net) == before
    assert sum(not torch.equal(p, learned[n]) for n, p in net.named_parameters() if p.requires_grad) == len(learned)


def test_optimizer_never_holds_a_frozen_weight(digits):
    net, seen = network(), []
    names = ff.freeze(net)

    class Look(Callback):
        def on_train_begin(self, state):
            seen.extend(id(p) for group in state.optimizer.param_groups for p in group["params"])

    fit(net, digits, epochs=1, callbacks=[Look()])
    assert seen and not {id(net.get_submodule(n).weight) for n in names} & set(seen)


def test_same_seed_same_bits_other_seed_other_bits(digits):
    nets = [network() for _ in range(3)]
    states = torch.random.get_rng_state()
    for net, seed in zip(nets, (7, 7, 8), strict=True):
        fit(net, digits, epochs=1, seed=seed, crop=1, flip=True, deterministic=True)
    assert torch.equal(states, torch.random.get_rng_state())
    a, b, c = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_loop_is_the_textbook_loop(digits):
    """Against a plain loop with torch's own optimiser and scheduler, to the bit."""
    ours, theirs = network(), network()
    fit(ours, digits, epochs=2, lr=0.1, batch_size=64, weight_decay=1e-3, label_smoothing=0.1, seed=3)
    theirs = theirs.to(memory_format=torch.channels_last).train()
    opt = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: cosine(step / 8))
    loader = ff.batches.Batches(digits, 64, shuffle=True, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        for x, y in loader:
            opt.zero_grad()
            nn.functional.cross_entropy(theirs(x), y, label_smoothing=0.1).backward()
            opt.step()
            schedule.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_learns_digits():
    train, test = ff.data.load("digits"), ff.data.load("digits", "test")
    net = ff.normalized(ff.models.convmixer(width=16, depth=2, kernel_size=3, in_channels=1), *train.mean_std())
    history = fit(net, train, test, epochs=6, lr=0.1, batch_size=64)
    assert history[-1]["val_accuracy"] > 0.9 and history.frame.loss.is_monotonic_decreasing


def test_divergence_names_the_epoch(digits):
    net = network()
    with torch.no_grad():
        net[1].fc.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="epoch 1 of 3.*lr=0.3"):
        fit(net, digits, epochs=3, lr=0.3)


def test_divergence_becomes_a_row(tmp_path):
    def trial(lr):
        import torch

        import frozenfilters as ff

        torch.manual_seed(0)
        net = ff.normalized(ff.models.convmixer(width=8, depth=1, in_channels=1), [0.3], [0.001])
        ff.fit(net, ff.data.load("digits").subset(128), epochs=2, lr=lr, momentum=0.0)
        return {"accuracy": 1.0}

    table = ff.study.run(trial, ff.study.grid(lr=[1e30]), tmp_path)
    assert table.status[0] == "diverged" and "diverged" in table.error[0]


def test_nothing_to_train_and_bad_arguments(digits):
    net = network()
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(net, digits)
    for bad, word in (({"epochs": 0}, "epochs"), ({"schedule": "step"}, "schedule"), ({"precision": "half"}, "precision")):
        with pytest.raises(ValueError, match=word):
            fit(network(), digits, **bad)


def test_ema_and_warmup_and_stop(digits):
    class Stop(Callback):
        def on_epoch_end(self, state):
            state.stop = state.epoch == 2

    net, plain = network(), network()
    lrs = []

    class Rates(Callback):
        def on_step_end(self, state):
            lrs.append(state.optimizer.param_groups[0]["lr"])

    assert len(fit(net, digits, epochs=5, ema=0.9, warmup=0.2, schedule="constant", batch_size=64, callbacks=[Stop(), Rates()])) == 2
    assert lrs[0] == pytest.approx(0.01 / 4) and lrs[3:] == [pytest.approx(0.01)] * 5
    fit(plain, digits, epochs=5, warmup=0.2, schedule="constant", batch_size=64, callbacks=[Stop()])
    assert not torch.equal(net[1].fc.weight, plain[1].fc.weight)


def test_bfloat16_by_rule():
    cpu = torch.device("cpu")
    assert resolve_precision("float32", network(), cpu) is None
    assert resolve_precision("bfloat16", network(), cpu) is torch.bfloat16
    assert resolve_precision("auto", ff.models.convmixer(width=8), cpu) is None  # depthwise: never on a CPU


def test_any_dataset_and_loader(digits):
    dataset = torch.utils.data.TensorDataset(torch.rand(32, 1, 8, 8), torch.randint(0, 10, (32,)))
    for source in (dataset, torch.utils.data.DataLoader(dataset, 8), digits):
        assert len(fit(network(), source, dataset, epochs=1)) == 1


def test_param_groups_keep_their_own_rates(digits):
    net = copy.deepcopy(network())
    fc = {id(p) for p in net[1].fc.parameters()}
    before = net[1].conv.weight.clone()
    fit(
        net,
        digits,
        epochs=1,
        params=[
            {"params": [p for p in net.parameters() if id(p) in fc]},
            {"params": [p for p in net.parameters() if id(p) not in fc], "lr": 0.0},
        ],
    )
    assert torch.equal(net[1].conv.weight, before)


GOLDEN = {"learned": 2.3374, "random": 2.3890, "dct": 2.4261, "ghaar": 2.3447, "lc": 2.4185, "lr-matched": 2.3502}


@pytest.mark.parametrize("arm", GOLDEN)
def test_golden_losses(arm):
    """If these move, numerics have changed: raise frozenfilters.PROTOCOL, which makes every older row stale. (Rounding moves them by less than 2e-3.)"""
    digits = ff.data.load("digits").subset(256)
    torch.manual_seed(0)
    net, groups, g = ff.models.resnet20(in_channels=1, width=4), None, torch.Generator().manual_seed(0)
    if arm in ("random", "dct", "ghaar"):
        ff.freeze(net, init=None if arm == "random" else arm, gain="match", generator=g)
    elif arm == "lc":
        ff.lc(net, 2, generator=g)
    elif arm == "lr-matched":
        groups = ff.lr_matched(net, 2, 0.05, 5e-4)
    model = ff.normalized(net, *digits.mean_std())
    history = fit(model, digits, epochs=1, lr=0.05, batch_size=64, weight_decay=5e-4, crop=1, flip=True, params=groups, seed=0)
    assert history[-1]["loss"] == pytest.approx(GOLDEN[arm], abs=4e-3)
