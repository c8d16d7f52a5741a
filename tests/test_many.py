"""Several trainings at once: the numbers of one after another, and failures that stay where they are."""
import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import frozenfilters as ff
from frozenfilters import many, models
from frozenfilters.batches import Batches
from frozenfilters.grouped import Grouped
from frozenfilters.many import fit_many
from frozenfilters.steps import TensorSGD, places
from frozenfilters.train import Callback, DivergedError, fit

OPTIONS = {"epochs": 2, "batch_size": 24, "weight_decay": 1e-3, "warmup": 0.2, "label_smoothing": 0.1}


class Double(nn.Module):
    """A network that computes in float64, so that only differences in kind are left."""

    def __init__(self, net):
        super().__init__()
        self.net = net.double()

    def forward(self, x):
        return self.net(x.double())


class Explodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        if self.training:
            raise RuntimeError("this member has a bug")
        return self.fc(x.flatten(1))


class Counts(Callback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, state):
        self.steps += 1


@pytest.fixture(scope="module")
def digits():
    return ff.data.load("digits").subset(64)


def network(seed=0, kind="resnet"):
    torch.manual_seed(seed)
    net = models.convmixer(width=4, depth=1, kernel_size=3, in_channels=1) if kind == "convmixer" else models.CifarResNet(8, 4, 10, 1)
    if kind == "frozen":
        ff.freeze(net)
    if kind.startswith("lc"):
        ff.lc(net, 2, execution={"lc": "composed", "lc-sequential": "sequential", "lc-auto": "auto"}[kind], generator=torch.Generator().manual_seed(seed))
    return ff.normalized(net, [0.3], [0.4])


def difference(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(((p - q).abs().max() / p.abs().max().clamp(min=1e-3)).item() for p, q in pairs)


@pytest.fixture
def broken():
    net = network()
    with torch.no_grad():
        net[1].fc.weight[0, 0] = float("nan")
    return net


# ----------------------------------------------------------------------------------------------------------------- steps
@pytest.mark.parametrize("options", [{}, {"crop": 2}, {"flip": True}, {"crop": 1, "flip": True}], ids=str)
def test_places_are_the_draws_of_batches(options):
    data = SimpleNamespace(images=torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8), labels=torch.arange(50))
    a, b = (Batches(data, 16, shuffle=True, generator=torch.Generator().manual_seed(5), **options) for _ in range(2))
    for _ in range(2):
        table, seen = places(b), 0
        for x, y in a:
            index, mirrored, dy, dx = table[:, seen:seen + len(y)]
            seen += len(y)
            assert torch.equal(data.labels[index], y)
            rows = b._windows(b.store)[index, mirrored, dy, dx].to(b.dtype).mul_(b.scale)
            assert torch.equal(rows.view(-1, 8, 8, 3).permute(0, 3, 1, 2), x)


@pytest.mark.parametrize("momentum, nesterov, decay", [(0.9, True, 0.01), (0.9, False, 0.0), (0.0, False, 0.01)])
def test_tensor_sgd_is_torchs(momentum, nesterov, decay):
    p, q = (nn.Parameter(torch.arange(6.0, dtype=torch.float64).view(3, 2)) for _ in range(2))
    ours = TensorSGD([p], [0.1, 0.2, 0.3], [decay, 0.0, decay * 2], momentum, nesterov)
    theirs = [torch.optim.SGD([nn.Parameter(q[i].detach().clone())], lr, momentum, nesterov=nesterov, weight_decay=d)
              for i, (lr, d) in enumerate(zip((0.1, 0.2, 0.3), (decay, 0.0, decay * 2), strict=True))]
    for t in range(4):
        g, factor = torch.randn(3, 2, dtype=torch.float64), 1 / (t + 1)
        p.grad = g.clone()
        ours.step(torch.tensor(factor, dtype=torch.float64))
        for i, opt in enumerate(theirs):
            opt.param_groups[0]["params"][0].grad = g[i].clone()
            opt.param_groups[0]["lr"] = (0.1, 0.2, 0.3)[i] * factor
            opt.step()
    torch.testing.assert_close(p.detach(), torch.stack([opt.param_groups[0]["params"][0].detach() for opt in theirs]), rtol=1e-14, atol=0)
    p.grad = None
    with pytest.raises(ValueError, match="not used"):
        ours.step(torch.ones(()))


@pytest.mark.parametrize("kind", ["resnet", "frozen", "lc"])
def test_a_step_without_capture_is_fits(digits, kind):
    """The code that a GPU records, run as it stands: members of other architectures, rates and losses side by side."""
    nets = [Double(network(0, kind)), Double(network(1, "convmixer"))]
    ours = copy.deepcopy(nets)
    own = [{"lr": 0.1, "seed": 3, "crop": 1, "flip": True}, {"lr": 0.02, "seed": 4, "schedule": "linear", "nesterov": False, "precision": "bfloat16"}]
    want = [fit(net, digits, digits, **OPTIONS, **o) for net, o in zip(nets, own, strict=True)]
    jobs = [many._Job(net, {**OPTIONS, **o}) for net, o in zip(ours, own, strict=True)]
    assert [job.why_not_a_step(digits) for job in jobs] == [None, None]
    many._side_by_side(jobs, digits, digits, capture=False)
    for net, our, history, job in zip(nets, ours, want, jobs, strict=True):
        assert difference(net, our) < 1e-10
        for a, b in zip(history, job.result, strict=True):
            assert all(a[key] == pytest.approx(b[key], rel=1e-6) for key in ("epoch", "loss", "lr", "val_accuracy"))


def test_a_member_that_cannot_step_is_left_to_fit(digits):
    jobs = [many._Job(model, OPTIONS) for model in (network(), nn.Sequential(nn.Flatten(), nn.Linear(7, 10)))]
    many._side_by_side(jobs, digits, None, capture=False)
    assert len(jobs[0].result) == 2 and jobs[1].result is None
    assert "dropout" in many._Job(nn.Sequential(nn.Dropout(), nn.Linear(1, 1)), {}).why_not_a_step(digits)
    assert "ema" in many._Job(network(), {"ema": 0.9}).why_not_a_step(digits)
    assert "ImageSet" in many._Job(network(), {}).why_not_a_step([])


# ----------------------------------------------------------------------------------------------------------------- fused
@pytest.mark.parametrize("kind", ["resnet", "frozen", "convmixer", "lc", "lc-sequential", "lc-auto"])
def test_fused_is_one_after_another(digits, kind):
    nets = [Double(network(seed, kind)) for seed in range(3)]
    ours = copy.deepcopy(nets)
    own = [{"seed": 5, "lr": 0.05}, {"seed": 6, "lr": 0.1}, {"seed": 6, "lr": 0.05, "weight_decay": 0.0}]
    want = [fit(net, digits, digits, **{**OPTIONS, **o}, crop=1) for net, o in zip(nets, own, strict=True)]
    got = fit_many([{"model": net, **o} for net, o in zip(ours, own, strict=True)], digits, digits, fuse=True, crop=1, **OPTIONS)
    for net, our, a, b in zip(nets, ours, want, got, strict=True):
        assert difference(net, our) < 1e-10 and b.model is our and our.training
        assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in our.parameters()]
        for x, y in zip(a, b, strict=True):
            assert all(x[key] == pytest.approx(y[key], rel=1e-6) for key in ("epoch", "loss", "lr", "val_accuracy"))


def test_fused_with_another_loss(digits):
    def loss(output, y):
        return (output - nn.functional.one_hot(y, 10)).square().mean()
    nets = [Double(network(seed)) for seed in range(2)]
    ours = copy.deepcopy(nets)
    for seed, net in enumerate(nets):
        fit(net, digits, seed=seed, loss=loss, **OPTIONS)
    fit_many([{"model": net, "seed": seed} for seed, net in enumerate(ours)], digits, fuse=True, loss=loss, **OPTIONS)
    assert max(difference(a, b) for a, b in zip(nets, ours, strict=True)) < 1e-10


def test_one_diverges_among_the_fused(digits, broken):
    good = [network(1), network(2)]
    alone = copy.deepcopy(good)
    a, b, c = fit_many([{"model": good[0]}, {"model": broken, "lr": 0.3}, {"model": good[1]}], digits, fuse=True, **OPTIONS)
    assert isinstance(b, DivergedError) and "epoch 1 of 2 (lr=0.3)" in str(b) and len(a) == len(c) == 2
    for mine, net in zip(alone, good, strict=True):
        fit(mine, digits, **OPTIONS)
        assert difference(mine, net) < 1e-3


class Mixer(nn.Module):
    """Joins channels by hand: what side-by-side members would get wrong without any error."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1), nn.Linear(2, 10)

    def forward(self, x):
        return self.fc(self.b(torch.cat([x, self.a(x)], 1)).mean((2, 3)))


def test_what_cannot_be_fused_says_why(digits):
    def tied():
        net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(16, 10))
        net[1].weight = net[0].weight
        return net

    def hooked():
        net = network()
        net[1].conv.register_forward_hook(lambda *_: None)
        return net
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for build, word in ((Mixer, "mixes channels"), (tied, "ties"), (hooked, "hooks"), (lambda: nn.Sequential(nn.GroupNorm(1, 1), head), "GroupNorm"),
                        (lambda: nn.Sequential(nn.Dropout(0.5), head), "dropout")):
        with pytest.raises(ValueError, match=f"fuse=True.*{word}"):
            fit_many([{"model": build()} for _ in range(2)], digits, fuse=True, **OPTIONS)
    with pytest.raises(ValueError, match="no other"):
        fit_many([{"model": network()}, {"model": network(1), "momentum": 0.5}], digits, fuse=True, **OPTIONS)
    with pytest.raises(ValueError, match="differ in structure"):
        Grouped([network(), network(kind="convmixer")], torch.rand(2, 1, 8, 8))
    mixers = [Mixer() for _ in range(2)]
    assert [len(h) for h in fit_many([{"model": m} for m in mixers], digits, workers=1, **OPTIONS)] == [2, 2]         # "auto" trains them all the same


def test_auto_fuses_only_equal_tiny_networks(digits):
    def sets(nets, data=digits, **options):
        return [len(batch) for batch in many._fusable([many._Job(net, options) for net in nets], data, "auto")]
    assert sets([network(), network(kind="convmixer"), network(1), network(2)]) == [3]
    assert sets([network(), network(1)], ema=0.9) == [] == sets([network()])
    wide = [ff.normalized(models.resnet20(in_channels=1), [0.3], [0.4]) for _ in range(2)]
    large = SimpleNamespace(images=torch.zeros(256, 1, 32, 32, dtype=torch.uint8), labels=torch.zeros(256, dtype=torch.long))
    assert sets(wide, large) == [] and sets([network(), network(1)], large, batch_size=2) == [2]


# ------------------------------------------------------------------------------------------------------------- processes
def test_processes_are_bit_identical_and_failures_stay_apart(digits, broken):
    nets = [network(0), network(1, "convmixer"), network(2, "lc")]
    ours = copy.deepcopy(nets)
    own = [{"seed": 1, "ema": 0.9}, {"seed": 2, "lr": 0.1, "crop": 1}, {"seed": 3, "precision": "bfloat16"}]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    want = [fit(net, digits, digits, **OPTIONS, **o) for net, o in zip(nets, own, strict=True)]
    counts = Counts()
    members = [{"model": net, **o} for net, o in zip(ours, own, strict=True)]
    members[0]["callbacks"] = [counts]
    locked = network(4)
    locked.lock = threading.Lock()                                         # cannot be pickled
    members += [{"model": broken}, {"model": Explodes()}, {"model": locked}, {"model": lambda: 1 / 0}]
    got = fit_many(members, digits, digits, workers=2, fuse=False, **OPTIONS)
    torch.set_num_threads(threads)
    for net, our, a, b in zip(nets, ours, want, got[:3], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), our.state_dict().values(), strict=True))
        assert [{**line, "seconds": 0} for line in a] == [{**line, "seconds": 0} for line in b] and b.model is our
    assert counts.steps == 6
    assert isinstance(got[3], DivergedError)
    assert isinstance(got[4], RuntimeError) and "a bug" in str(got[4]) and "in forward" in "".join(got[4].__notes__)
    assert isinstance(got[5], TypeError) and "workers=1" in "".join(got[5].__notes__)
    assert isinstance(got[6], ZeroDivisionError)


def test_in_this_process(digits, broken):
    def build():
        return models.normalized(models.convmixer(width=4, depth=1, in_channels=1), [0.3], [0.4])
    state = torch.random.get_rng_state()
    members = [{"model": build, "seed": 1}, {"model": build, "seed": 1}, {"model": broken}, {"model": build, "seed": 2}]
    a, b, c, d = fit_many(members, digits, workers=1, fuse=False, epochs=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert difference(a.model, b.model) == 0 < difference(a.model, d.model) and isinstance(c, DivergedError)


def test_what_cannot_be_meant(digits):
    net = network()
    one = {"model": net}
    for members, options, error, word in (([], {}, ValueError, "empty"), ([{"seed": 1}], {}, ValueError, "no model"),
                                          ([one | {"rate": 1}], {}, TypeError, "rate"), ([one, one], {}, ValueError, "share"),
                                          ([one], {"fuse": "yes"}, ValueError, "fuse"),
                                          ([one], {"callbacks": [Counts()]}, ValueError, "its own")):
        with pytest.raises(error, match=word):
            fit_many(members, digits, **options)
    (result,) = fit_many([{"model": net}], digits, epochs=0)
    assert isinstance(result, ValueError) and "epochs=0" in str(result)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arm", ["learned", "frozen", "lc"])
def test_one_graph_on_a_gpu_is_fit_within_tolerance(arm):
    """Members recorded in one CUDA graph against `fit` one after another, float32: weights to 1e-3 of their norm after two epochs."""
    data = ff.data.load("digits").subset(300)

    def build():
        net = ff.models.resnet20(in_channels=1, width=4)
        if arm == "frozen":
            ff.freeze(net)
        elif arm == "lc":
            ff.lc(net, 2)
        return net

    options = {"epochs": 2, "batch_size": 64, "lr": 0.01, "crop": 1, "device": "cuda"}
    together = ff.fit_many([{"model": build, "seed": s} for s in range(2)], data, workers=1, fuse=False, **options)
    for seed, history in enumerate(together):
        torch.manual_seed(seed)
        alone = build()
        ff.fit(alone, data, seed=seed, **options)
        a, b = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (history.model, alone))
        assert (a - b).norm() <= 1e-3 * b.norm()
