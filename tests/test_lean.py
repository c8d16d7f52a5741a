"""Lean backward passes: the numbers of autograd, fewer bytes, and nothing else changed."""
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import frozenfilters as ff
from frozenfilters import measure
from frozenfilters.backward import BitReLU, FrozenConv, Gate, lean, pack, unlean, unpack

D = torch.float64
LAST = torch.channels_last


def pair(build, dtype=D, **freeze):
    """A frozen network, and its lean copy."""
    torch.manual_seed(0)
    net = build().to(dtype=dtype, memory_format=LAST)
    ff.freeze(net, **freeze)
    other = copy.deepcopy(net)
    lean(other)
    return net, other


def gradients(net, x, loss=lambda y: y.square().mean()):
    x = x.clone().requires_grad_()
    net.zero_grad(set_to_none=True)
    loss(net(x)).backward()
    return {"x": x.grad} | {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def assert_same(a, b, tolerance=1e-12):
    assert a.keys() == b.keys() and all(g is not None for g in b.values())
    largest = max(g.norm() for g in a.values())                            # a bias before BatchNorm has gradient 0 but for rounding
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * max(a[name].norm(), 1e-3 * largest), name


NETS = {"resnet20": lambda: ff.models.resnet20(width=4), "convmixer": lambda: ff.models.convmixer(width=8, depth=2, kernel_size=9)}


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_autograds_in_float64(name):
    plain, thin = pair(NETS[name])
    x = torch.rand(4, 3, 12, 12, dtype=D).contiguous(memory_format=LAST)
    assert torch.equal(plain(x), thin(x))
    assert_same(gradients(plain, x), gradients(thin, x))
    for (name, a), b in zip(plain.named_buffers(), thin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)                         # running statistics
    assert torch.equal(plain.eval()(x), thin.eval()(x))
    assert_same(gradients(plain, x), gradients(thin, x))                   # saliency of a network in eval mode


@pytest.mark.parametrize("options", [
    {}, {"stride": 2}, {"padding": "same"}, {"padding": "valid", "bias": False}, {"padding": 2, "dilation": 2}, {"groups": 2, "padding": 1},
    {"groups": 8}, {"groups": 8, "padding": "same", "kernel_size": 7}, {"groups": 8, "padding": 3, "dilation": (1, 3), "kernel_size": (3, 5)},
    {"groups": 8, "stride": (1, 2)}, {"groups": 8, "padding": 4}, {"padding": 1, "padding_mode": "reflect"}, {"kernel_size": 4, "padding": "same"}], ids=str)
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["last", "contiguous"])
def test_every_frozen_convolution(options, layout):
    warnings.filterwarnings("ignore", "Using padding='same'")
    plain, thin = pair(lambda: nn.Sequential(nn.Conv2d(8, 8, **{"kernel_size": 3, **options})))
    assert_same(gradients(plain, x := torch.randn(3, 8, 11, 10, dtype=D).contiguous(memory_format=layout)), gradients(thin, x))
    if "padding_mode" not in options and options.get("kernel_size") != 4:
        kept = measure.saved_bytes(lambda: thin(x.requires_grad_()), exclude=thin)
        assert kept == 0


def test_frozen_conv1d_and_unbatched_input():
    plain, thin = pair(lambda: nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 4, 5, padding=2), nn.ReLU()))
    assert_same(gradients(plain, x := torch.randn(2, 9, dtype=D)), gradients(thin, x))
    plain, thin = pair(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert_same(gradients(plain, x := torch.randn(3, 9, 9, dtype=D)), gradients(thin, x))


def test_functions_pass_gradcheck_twice():
    x = torch.randn(2, 4, 6, 6, dtype=D).contiguous(memory_format=LAST).requires_grad_()
    w, b = torch.randn(4, 1, 3, 3, dtype=D), torch.randn(4, dtype=D, requires_grad=True)
    for groups, weight in ((4, w), (1, w.expand(4, 4, 3, 3).contiguous())):
        def conv(x, b, groups=groups, weight=weight):
            return FrozenConv.apply(x, weight, b, (1, 1), (1, 1), (1, 1), groups)
        assert torch.autograd.gradcheck(conv, (x, b)) and torch.autograd.gradgradcheck(conv, (x, b))
    x = torch.randn(3, 7, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: BitReLU.apply(x * 4, True, False), x)
    assert torch.autograd.gradgradcheck(lambda x: BitReLU.apply(x, False, False).square(), x)


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, D, torch.bfloat16, torch.float16])
def test_relu_is_torchs_to_the_bit(six, dtype):
    x = torch.tensor([-1, -0.0, 0, 1e-7, 3, 6, 7, float("inf"), -float("inf"), float("nan"), 5], dtype=dtype)
    for g in (torch.randn(11), torch.full((11,), float("inf")), torch.ones(1).expand(11)):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, got = (F.relu6 if six else F.relu)(a), BitReLU.apply(b * 1, six, True)
        want.backward(g.to(dtype))
        got.backward(g.to(dtype))
        torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0)
    g = torch.randn(2, 3, 4, 5).transpose(1, 3)                             # a gradient in another layout
    like = torch.randn(2, 5, 4, 3)
    assert torch.equal(Gate.apply(g, pack(like.flatten() > 0), like.shape, like.stride()), g * (like > 0))


def test_bits_come_back():
    for n in (1, 7, 8, 9, 1000):
        flags = torch.rand(n) > 0.5
        bits = pack(flags)
        assert len(bits) == -(-n // 8) and bits.dtype == torch.uint8 and torch.equal(unpack(bits, n), -flags.to(torch.int8))


def test_bytes_kept():
    """Counted, not timed: frozen ResNet-20 lean / learned plain <= 0.6; freezing alone saves next to nothing."""
    x, kept = torch.rand(8, 3, 32, 32).contiguous(memory_format=LAST), {}
    for arm in ("learned", "frozen", "lean"):
        net = ff.models.resnet20().to(memory_format=LAST)
        if arm != "learned":
            ff.freeze(net)
        if arm == "lean":
            lean(net)
        kept[arm] = measure.saved_bytes(lambda net=net: net(x), exclude=net)
    assert kept["frozen"] / kept["learned"] > 0.95
    assert kept["lean"] / kept["learned"] <= 0.6


def test_same_trajectory():
    plain, thin = pair(lambda: ff.models.resnet20(width=4, in_channels=1))
    for net in (plain, thin):
        opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05, 0.9, nesterov=True, weight_decay=1e-3)
        g = torch.Generator().manual_seed(1)
        for _ in range(5):
            x, y = torch.rand(8, 1, 8, 8, dtype=D, generator=g).contiguous(memory_format=LAST), torch.randint(0, 10, (8,), generator=g)
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    for (name, a), b in zip(plain.state_dict().items(), thin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    assert ff.frozen_hash(plain) == ff.frozen_hash(thin)


def test_fit_and_autocast():
    digits = ff.data.load("digits").subset(96)
    for precision in ("float32", "bfloat16"):
        plain, thin = pair(lambda: ff.normalized(ff.models.resnet20(width=4, in_channels=1), [0.3], [0.4]), torch.float32)
        a, b = (ff.fit(net, digits, epochs=1, batch_size=32, precision=precision)[0]["loss"] for net in (plain, thin))
        assert a == pytest.approx(b, rel=1e-5 if precision == "float32" else 1e-3)


def test_thawed_filters_learn_again():
    _, thin = pair(lambda: ff.models.resnet20(width=4))
    x = torch.rand(2, 3, 8, 8, dtype=D)
    ff.thaw(thin)
    fresh = copy.deepcopy(thin)
    unlean(fresh)
    assert_same(gradients(fresh, x), gradients(thin, x))
    ff.freeze(thin)
    assert "conv.weight" not in gradients(thin, x)


def test_a_module_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x):
            for _ in range(2):
                x = self.relu(self.bn(self.conv(x)) + x)
            return x
    plain, thin = pair(Twice)
    x = torch.randn(2, 4, 5, 5, dtype=D)
    assert_same(gradients(plain, x), gradients(thin, x))
    assert_same(gradients(plain, x, lambda y: y.sum()), gradients(thin, x, lambda y: y.sum()))        # an expanded gradient


def test_nothing_else_changes():
    plain, thin = pair(lambda: ff.models.resnet20(width=4))
    assert [type(m) for m in plain.modules()] == [type(m) for m in thin.modules()]
    assert list(plain.state_dict()) == list(thin.state_dict()) and repr(plain) == repr(thin)
    thin.load_state_dict(plain.state_dict())
    x, want = torch.rand(2, 3, 8, 8, dtype=D), measure.saved_bytes(lambda: thin(torch.rand(2, 3, 8, 8, dtype=D)), exclude=thin)
    for other in (copy.deepcopy(thin), pickle.loads(pickle.dumps(thin))):
        assert measure.saved_bytes(lambda other=other: other(x), exclude=other) == want
        other.conv.weight.data.zero_()                                      # the copy runs its own weights
        assert not torch.equal(other.eval()(x), plain.eval()(x))
    assert lean(thin) == unlean(thin) and unlean(thin) == []
    assert not any("forward" in vars(m) for m in thin.modules())
    assert_same(gradients(plain.train(), x), gradients(thin.train(), x), 0)


def test_it_says_when_there_is_nothing_to_do():
    with pytest.raises(ValueError, match="freeze"):
        lean(ff.models.resnet20(width=4))

    class Scaled(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight * 2)
    net = nn.Sequential(Scaled(3, 4, 3), nn.Conv2d(4, 4, 3))
    ff.freeze(net)
    assert lean(net) == ["1"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_zoo_networks_run(name):
    import torchvision
    plain, thin = pair(lambda: getattr(torchvision.models, name)(num_classes=4))
    x, got = torch.rand(2, 3, 64, 64, dtype=D).contiguous(memory_format=LAST), []
    for net in (plain, thin):
        torch.manual_seed(0)                                               # dropout
        got.append(gradients(net, x))
    assert_same(*got, 1e-9)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), thin.eval()(x))


def test_sequential_lc_blocks_keep_less():
    nets = [ff.models.resnet20(width=4).double() for _ in range(2)]
    for net in nets:
        ff.lc(net, 2, execution="sequential", generator=torch.Generator().manual_seed(0))
    nets[1].load_state_dict(nets[0].state_dict())
    lean(nets[1])
    x = torch.rand(2, 3, 8, 8, dtype=D)
    assert_same(*(gradients(net, x) for net in nets))
    a, b = (measure.saved_bytes(lambda net=net: net(x), exclude=net) for net in nets)
    assert b < 0.9 * a
