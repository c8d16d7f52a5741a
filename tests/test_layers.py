"""LC blocks: three executions of one function and one trajectory, in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import frozenfilters as ff
from frozenfilters.algebra import compose, plan, sample_gram
from frozenfilters.layers import LCConv2d

D = torch.float64


def block(execution="sequential", rate=3, k=3, stride=1, seed=0, **options):
    return LCConv2d(
        4,
        6,
        k,
        stride=stride,
        padding=k // 2,
        rate=rate,
        execution=execution,
        generator=torch.Generator().manual_seed(seed),
        dtype=D,
        **options,
    )


def naive(layer, x):
    """The paper's block, written out."""
    s = layer.spatial
    return F.conv2d(
        F.conv2d(x, s.weight, None, s.stride, s.padding, s.dilation, s.groups), layer.mix.weight, layer.mix.bias, groups=layer.mix.groups
    )


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"depthwise": True}, {"bias": True}, {"frozen": False}, {"dilation": 2}], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_executions_equal_the_paper(options, stride):
    layer, x = block(stride=stride, **options), torch.randn(2, 4, 9, 9, dtype=D, requires_grad=True)
    want = naive(layer, x)
    learned = [p for p in layer.parameters() if p.requires_grad]
    want_grads = torch.autograd.grad(want.square().sum(), [x, *learned])
    for execution in ("sequential", "composed", "auto"):
        other = layer.with_execution(execution)
        got = other(x)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        for a, b in zip(torch.autograd.grad(got.square().sum(), [x, *learned]), want_grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-12)
    torch.testing.assert_close(layer.fold()(x), want, atol=1e-12, rtol=0)


def test_compose_gradient_is_autograds():
    P, f = torch.randn(6, 5, 1, 1, dtype=D, requires_grad=True), torch.randn(5, 4, 3, 3, dtype=D, requires_grad=True)
    from frozenfilters.algebra import Compose

    assert torch.autograd.gradcheck(lambda p, q: Compose.apply(p, q, 1, False, None, None), (P, f))
    torch.testing.assert_close(compose(P, f), torch.einsum("om,mcij->ocij", P[:, :, 0, 0], f))


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_trajectory_over_20_steps(k, stride):
    """SGD with Nesterov momentum and weight decay moves W = P F alike in all three forms."""
    start = block(k=k, stride=stride, rate=2)
    x, y = torch.randn(20, 3, 4, 10, 10, dtype=D), torch.randn(20, 3, 6, dtype=D)
    weights = {}
    for execution in ("sequential", "composed", "gram"):
        layer = copy.deepcopy(start).with_execution(execution)
        opt = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.05, 0.9, nesterov=True, weight_decay=0.01)
        for i in range(20):
            opt.zero_grad()
            (layer(x[i]).mean((2, 3)) - y[i]).square().mean().backward()
            opt.step()
        weights[execution] = layer.weight.detach()
    assert (weights["sequential"] - start.weight).abs().max() > 1e-4
    for execution in ("composed", "gram"):
        torch.testing.assert_close(weights[execution], weights["sequential"], atol=1e-12, rtol=0)


def test_accumulation_reuses_one_weight_and_sees_every_update():
    layer, x = block("composed"), torch.randn(2, 4, 8, 8, dtype=D)
    layer(x).sum().backward()
    first = layer._cache[1]
    layer(x).sum().backward()
    assert layer._cache[1].data_ptr() == first.data_ptr()
    twice = layer.mix.weight.grad.clone()
    layer.mix.weight.grad = None
    naive(layer, x).sum().mul(2).backward()
    torch.testing.assert_close(twice, layer.mix.weight.grad)
    with torch.no_grad():
        layer.mix.weight.mul_(2)
    torch.testing.assert_close(layer(x), naive(layer, x))
    with torch.no_grad():
        layer.spatial.weight.add_(1)
    torch.testing.assert_close(layer(x), naive(layer, x))


def test_cache_forgets_what_it_must():
    layer, x = block("composed"), torch.randn(2, 4, 8, 8, dtype=D)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()  # nothing of inference mode was kept
    layer.eval()
    layer(x)
    layer.mix.weight.data.mul_(2)
    torch.testing.assert_close(layer.eval()(x), naive(layer, x))


@pytest.mark.parametrize("between", ["relu", "bn", "bn_relu"])
def test_between(between):
    layer, x = block("auto", between=between), torch.randn(2, 4, 8, 8, dtype=D)
    h = layer.spatial(x)
    if "bn" in between:
        h = F.batch_norm(h, None, None, training=True)
    if "relu" in between:
        h = F.relu(h)
    torch.testing.assert_close(layer(x), layer.mix(h))
    with pytest.raises(ValueError, match="not linear"):
        layer.with_execution("composed")
    with pytest.raises(ValueError, match="between="):
        block("gram", between=between)
    if between == "bn":
        with pytest.raises(ValueError, match="eval"):
            layer.fold()
        torch.testing.assert_close(layer.eval().fold()(x), layer(x))
    else:
        with pytest.raises(ValueError, match="cannot be folded"):
            layer.fold()


def test_gram_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="composed"):
        block("gram", frozen=False)
    layer = block("gram")
    with pytest.raises(ValueError, match="no way back"):
        layer.with_execution("sequential")
    opt = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad])
    layer(torch.randn(1, 4, 5, 5, dtype=D)).sum().backward()
    with pytest.raises(ValueError, match="Adam.*composed"):
        opt.step()
    clone = copy.deepcopy(layer)
    with pytest.raises(ValueError, match="Adam"):
        opt = torch.optim.Adam(clone.parameters())
        clone(torch.randn(1, 4, 5, 5, dtype=D)).sum().backward()
        opt.step()


def test_state_dicts():
    sequential, composed = block(), block("composed", seed=1)
    composed.load_state_dict(sequential.state_dict())
    gram = block("gram", seed=2)
    gram.load_state_dict(sequential.state_dict())
    x = torch.randn(1, 4, 6, 6, dtype=D)
    torch.testing.assert_close(composed(x), sequential(x))
    torch.testing.assert_close(gram(x), sequential(x))
    with pytest.raises(RuntimeError, match="execution='gram'"):
        composed.load_state_dict(gram.state_dict())


def test_initial_scale_does_not_depend_on_the_rate(g):
    for rate in (1, 8, 64):
        layer = LCConv2d(16, 64, 3, rate=rate, generator=g)
        assert layer.weight.std().item() == pytest.approx(1 / (3 * math.sqrt(16 * 9)), rel=0.05)


def test_gram_spectrum_is_marchenko_pastur(g):
    """E[S] = c I with c = E Co / (3 Ci k^2), eigenvalues of S/c within [(1 - sqrt gamma)^2, (1 + sqrt gamma)^2]."""
    layer = LCConv2d(16, 16, 3, rate=128, execution="gram", generator=g)
    c, gamma = 128 * 16 / (3 * 144), 144 / (128 * 16)
    eig = torch.linalg.eigvalsh(layer.gram.double() / c)
    assert eig.mean().item() == pytest.approx(1, rel=0.01)
    assert eig.min() > (1 - gamma**0.5) ** 2 - 0.06 and eig.max() < (1 + gamma**0.5) ** 2 + 0.06


def test_any_rate_by_sampling_the_gram_matrix(g):
    layer = LCConv2d(4, 8, 3, rate=10**6, execution="gram", generator=g, dtype=D)
    c = 10**6 * 8 / (3 * 36)
    torch.testing.assert_close(layer.gram / c, torch.eye(36, dtype=D), atol=0.01, rtol=0)
    assert layer.weight.std().item() == pytest.approx(1 / (3 * math.sqrt(36)), rel=0.15)
    draws = torch.stack([sample_gram(2, 50, torch.Size([2, 2, 2]), g, torch.zeros((), dtype=D))[1] for _ in range(400)])
    torch.testing.assert_close(draws.mean(0), torch.eye(8, dtype=D) * 50 / 24, atol=0.1, rtol=0)  # E S = M/(3n) I
    want = 2 * 50 / 24**2  # Var S_ii of Wishart(M)/(3n)
    assert torch.diagonal(draws, dim1=1, dim2=2).var(0).mean().item() == pytest.approx(want, rel=0.15)


def test_parameter_counts_of_the_paper():
    assert sum(p.numel() for p in ff.models.resnet20().parameters()) == 272_474
    for rate in (1, 2, 8, 64):
        net = ff.models.resnet20()
        assert len(ff.lc(net, rate)) == 19
        learned = sum(p.numel() for p in net.parameters() if p.requires_grad)
        assert learned == 4_778 + 32_512 * rate
        assert sum(p.numel() for p in net.parameters()) - learned == 267_696 * rate
    net = ff.models.resnet20()
    ff.freeze(net)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 4_778


def test_shared_bank_aliases_one_storage(g):
    net = ff.models.resnet20(width=4)
    ff.lc(net, rate=2, shared=True, generator=g)
    layers = [m for m in net.modules() if isinstance(m, LCConv2d)]
    assert len({m.spatial.weight.untyped_storage().data_ptr() for m in layers}) == 1
    x = torch.rand(1, 3, 8, 8)
    m = layers[0]
    want = F.conv2d(F.conv2d(x, m.spatial.weight / math.sqrt(27), padding=1), m.mix.weight)
    for execution in ("sequential", "composed"):
        torch.testing.assert_close(m.with_execution(execution)(x), want, atol=1e-6, rtol=1e-5)


def test_composes_in_float32_under_autocast():
    layer = LCConv2d(4, 6, 3, rate=4, execution="composed", generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        assert layer(torch.rand(1, 4, 5, 5)).dtype == torch.bfloat16


def test_planner_follows_the_cost_model():
    assert plan(8, 16, 144, 128 * 1024) == "composed"
    assert plan(0.5, 16, 144, 128 * 1024) == "sequential"
    assert plan(1, 16, 16, 128 * 1024, depthwise=True) == "sequential"
    assert plan(4, 16, 16, 128 * 1024, depthwise=True) == "composed"


@pytest.mark.parametrize(
    "bad, word",
    [
        ({"rate": 0}, "rate"),
        ({"execution": "fast"}, "execution"),
        ({"between": "gelu"}, "between"),
        ({"depthwise": True, "groups": 2}, "groups"),
    ],
)
def test_bad_arguments_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        LCConv2d(4, 6, 3, **bad)


def test_lr_matched_is_the_mean_of_lc():
    """With S = c I exactly, the control takes the very steps of the gram form."""
    conv = nn.Conv2d(4, 6, 3, bias=False, dtype=D)
    gram = LCConv2d(4, 6, 3, rate=6, execution="gram", generator=torch.Generator().manual_seed(0), dtype=D)
    c = 6 * 6 / (3 * 36)
    gram.gram.copy_(torch.eye(36, dtype=D) * c)
    net = nn.Sequential(conv)
    groups = ff.lr_matched(net, 6, 0.1, 0.01)
    with torch.no_grad():
        conv.weight.copy_(gram.weight)
    x = torch.randn(2, 4, 6, 6, dtype=D)
    for model, g in ((net, [k for k in groups if k["params"]]), (gram, [{"params": [gram.conv.weight]}])):
        opt = torch.optim.SGD(g, 0.1, 0.9, nesterov=True, weight_decay=0.01)
        for _ in range(10):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    torch.testing.assert_close(conv.weight, gram.weight, atol=1e-12, rtol=0)
