"""Networks: exact counts, small stems, normalisation inside, folding."""

import pytest
import torch
from torch import nn

import frozenfilters as ff


def test_resnet20_is_exact():
    net = ff.models.resnet20()
    assert sum(p.numel() for p in net.parameters()) == 272_474
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules()) == 19
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert [m.stride for m in net.modules() if isinstance(m, nn.Conv2d)].count((2, 2)) == 4  # two stages, each with a 1 x 1 shortcut


@pytest.mark.parametrize("kernel_size", [1, 5, 7, 9])
def test_kernel_variants_keep_the_image_size(kernel_size):
    assert ff.models.resnet20(in_channels=1, width=4, kernel_size=kernel_size)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="depth=19"):
        ff.models.CifarResNet(19)
    with pytest.raises(ValueError, match="kernel_size=4"):
        ff.models.resnet20(kernel_size=4)


def test_small_stem_on_torchvision_networks():
    from torchvision import models

    for make in (models.resnet18, models.densenet121, models.mobilenet_v2):
        net = ff.small_stem(make(num_classes=10))
        first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
        assert first.kernel_size == (3, 3) and first.stride == (1, 1)
        assert net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert not any(isinstance(m, nn.MaxPool2d) for m in ff.small_stem(models.resnet18()).modules())
    assert any(isinstance(m, nn.MaxPool2d) for m in ff.small_stem(models.resnet18(), pool=True).modules())
    with pytest.raises(ValueError, match="no strided first"):
        ff.small_stem(ff.models.resnet20())


def test_wrong_channels_say_what_to_do():
    net = ff.normalized(ff.models.resnet20(in_channels=3, width=4), [0.5] * 3, [0.2] * 3)
    with pytest.raises(ValueError, match="in_channels=1"):
        net(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="std"):
        ff.normalized(nn.Identity(), [0.5], [0.0])


@pytest.mark.parametrize("rate", [0.5, 1, 4])
def test_fold_is_the_same_function(rate):
    net = ff.normalized(ff.models.resnet20(width=4), [0.4] * 3, [0.2] * 3)
    ff.lc(net, rate)
    x = torch.rand(4, 3, 16, 16)
    for _ in range(3):
        net(x)  # running statistics away from their start
    net.eval().double()
    folded = ff.fold(net)
    torch.testing.assert_close(folded(x.double()), net(x.double()), atol=1e-10, rtol=1e-9)
    assert not any(isinstance(m, (nn.BatchNorm2d, ff.LCConv2d)) for m in folded.modules())
    assert net.training is False and any(isinstance(m, ff.LCConv2d) for m in net.modules())


def test_fold_keeps_what_cannot_be_traced():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ff.LCConv2d(1, 2, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

    net, x = Branching().eval(), torch.rand(1, 1, 5, 5)
    torch.testing.assert_close(ff.fold(net)(x), net(x))
