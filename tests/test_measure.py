"""Measures: attacks against foolbox, counted arithmetic, ratios."""

from functools import partial

import pytest
import torch
from torch import nn

import frozenfilters as ff
from frozenfilters import measure


@pytest.fixture(scope="module")
def trained():
    train, test = ff.data.load("digits"), ff.data.load("digits", "test")
    torch.manual_seed(0)
    net = ff.normalized(ff.models.convmixer(width=16, depth=2, kernel_size=3, in_channels=1), *train.mean_std())
    ff.fit(net, train, epochs=3, lr=0.1, batch_size=64)
    x, y = next(iter(ff.batches.Batches(test, 100)))
    return net.eval(), test, x, y


def test_attacks_agree_with_foolbox(trained):
    foolbox = pytest.importorskip("foolbox")
    net, _, x, y = trained
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    for eps in (0.02, 0.1):
        _, theirs, _ = foolbox.attacks.LinfFastGradientAttack(random_start=False)(model, x, y, epsilons=eps)
        torch.testing.assert_close(ff.fgsm(net, x, y, eps), theirs, atol=1e-6, rtol=0)
        _, theirs, _ = foolbox.attacks.LinfProjectedGradientDescentAttack(steps=5, abs_stepsize=eps / 2, random_start=False)(
            model, x, y, epsilons=eps
        )
        ours = ff.pgd(net, x, y, eps, steps=5, step_size=eps / 2)
        assert (ours - theirs).abs().gt(1e-6).float().mean() < 0.01  # a gradient of exactly zero may turn either way
        assert (net(ours).argmax(1) == y).float().mean() == pytest.approx((net(theirs).argmax(1) == y).float().mean().item(), abs=0.011)


def test_attack_accuracy_is_over_all_images(trained, g):
    net, test, x, y = trained
    clean = ff.accuracy(net, test)
    assert clean > 0.8 and ff.accuracy(net, test, attack=partial(ff.fgsm, eps=0.0)) == clean
    weak, strong = (ff.accuracy(net, test, attack=partial(ff.fgsm, eps=e)) for e in (0.01, 0.2))
    assert clean >= weak > strong
    adv = ff.pgd(net, x, y, 0.1, generator=g)
    assert (adv - x).abs().max() <= 0.1 + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    assert net.training is False


def test_attacks_refuse_normalised_images(trained):
    net, _, x, y = trained
    with pytest.raises(ValueError, match=r"\[0, 1\].*normalized"):
        ff.fgsm(net, x * 2 - 1, y, 0.1)
    with pytest.raises(ValueError, match="eps"):
        ff.fgsm(net, x, y, -0.1)


def test_accuracy_restores_every_mode():
    net = ff.models.resnet20(in_channels=1, width=4).train()
    net.bn.eval()
    ff.accuracy(net, ff.data.load("digits", "test").subset(20))
    assert net.training and not net.bn.training and net.blocks[0].bn1.training


def test_folded_accuracy_is_the_same():
    net = ff.normalized(ff.models.resnet20(in_channels=1, width=4), [0.3], [0.4])
    ff.lc(net, 4)
    ff.fit(net, ff.data.load("digits").subset(200), epochs=1)
    test = ff.data.load("digits", "test")
    for attack in (None, partial(ff.fgsm, eps=0.05)):
        assert ff.accuracy(net, test, attack=attack) == pytest.approx(ff.accuracy(net, test, attack=attack, fold=False), abs=0.006)
    assert net.training and any(isinstance(m, ff.LCConv2d) for m in net.modules())


def test_counts_are_exact():
    net = ff.models.resnet20()
    ff.freeze(net)
    assert measure.parameters(net) == {"total": 272_474, "learned": 4_778, "frozen": 267_696, "frozen_share": 267_696 / 272_474}
    conv, x = nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.rand(2, 3, 10, 10)
    assert measure.flops(conv, x) == 2 * 2 * 8 * 100 * 27
    assert measure.flops(conv, x.requires_grad_(), backward=True) == 3 * 2 * 2 * 8 * 100 * 27


def test_composed_saves_less_than_sequential():
    """Exact bytes that autograd keeps, ResNet-20 at E = 8."""
    kept = {}
    for execution in ("sequential", "composed"):
        net = ff.models.resnet20().to(memory_format=torch.channels_last)
        ff.lc(net, 8, execution=execution)
        kept[execution] = measure.saved_bytes(lambda net=net: net(torch.rand(32, 3, 32, 32)), exclude=net)
    assert kept["composed"] / kept["sequential"] < 0.3


def test_step_ratio_counts_what_it_runs():
    ticks = iter(range(1000))
    calls = []
    table = measure.step_ratio(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1, clock=lambda: next(ticks)
    )
    assert calls == ["a", "b"] * 4 and list(table.ratio) == [1.0, 1.0]
    with pytest.raises(ValueError, match="base"):
        measure.step_ratio({"a": lambda: None}, base="c")


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        ff.accuracy(nn.Identity(), [])
