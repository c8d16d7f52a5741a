"""Filters against closed forms, scipy and independent loops; all in float64."""

import functools
import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from torch import nn

from frozenfilters import filters as ff
from frozenfilters import steering
from frozenfilters.fills import rand

FIXED = {"ones", "identity"}
SQUARE = {"gabor", "haar", "ghaar", "ghaar4.s1", "ghaar4.s2", "psine", "polynomial", "covariance.recollected"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, atol=1e-12):
    a, b = (torch.as_tensor(x, dtype=None if isinstance(x, torch.Tensor) else torch.float64).double() for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------- bases


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 11])
def test_dct_is_scipys(k):
    basis = ff.dct(k)
    assert basis.dtype == torch.float64 and basis.shape == (k * k, k, k)
    x = np.random.default_rng(0).normal(size=(k, k))
    for kind, bank in ((2, basis), (4, ff.dct4(k))):
        close((bank.flatten(1) @ torch.from_numpy(x).flatten()).reshape(k, k), scipy.fft.dctn(x, type=kind, norm="ortho"))
        close(bank.flatten(1) @ bank.flatten(1).T, torch.eye(k * k))
    close(basis.sum((1, 2))[1:], torch.zeros(k * k - 1))


def test_dct_orientation_and_shapes():
    basis = ff.dct(3)
    assert torch.all(basis[3] == basis[3][:, :1]), "(u=1, v=0) is constant along columns: it sees horizontal edges"
    close(ff.dct((1, 5)).squeeze(1), ff.dct((5,)))
    box = ff.dct((2, 3, 4))
    assert box.shape == (24, 2, 3, 4)
    close(box.flatten(1) @ box.flatten(1).T, torch.eye(24))
    one = [scipy.fft.idct(np.eye(n)[i], norm="ortho") for n, i in ((2, 1), (3, 2), (4, 3))]
    close(box[23], np.einsum("i,j,k->ijk", *one))
    close(ff.dct(5, count=3), ff.dct(5).reshape(5, 5, 5, 5)[:3, :3].reshape(9, 5, 5))


def test_dct4_has_no_zero_sum():
    assert all((ff.dct4(k).sum((1, 2)).abs() > 1e-3).all() for k in (2, 3, 5, 9))


@pytest.mark.parametrize("a, b", [(0.5, 0), (0, 0), (0, 0.5), (0.5, 0.5), (0.3, 0.7)])
def test_cosine_family(a, b):
    expected = [[math.cos(math.pi * (u + b) * (m + a) / 7) for m in range(7)] for u in range(4)]
    close(ff.cosines(7, 4, a=a, b=b), expected)
    with pytest.raises(ValueError, match="count=8"):
        ff.cosines(7, 8)


def test_haar_triple_and_aliasing():
    close(ff.ghaar_filter(2, 1, 0, 0), [[1, 1], [-1, -1]])
    close(ff.ghaar_filter(2, 0, 1, 0), [[1, -1], [1, -1]])
    close(ff.ghaar_filter(2, 0, 0, 1), [[1, -1], [-1, 1]])
    for k in (2, 3, 5, 8):
        for f in (0.3, 1.0, 1.7):
            close(ff.ghaar_filter(k, 0.2, -0.7, 0.4, f=f), ff.ghaar_filter(k, 0.2, -0.7, 0.4, f=2 * (k - 1) - f))
        c = [math.cos(1.3 * math.pi * m / (k - 1)) for m in range(k)]
        close(ff.ghaar_filter(k, 0.2, 0.3, 0.4, 0.5, 1.3), [[0.2 * x + 0.3 * y + 0.4 * x * y + 0.5 for y in c] for x in c])
        close(ff.ghaar_filter(k, 0.2, 0.3, 0.4, f=k - 1, normalize=True).norm(), 1.0)


def test_ghaar_zero_sum_only_for_odd_frequency_without_constant():
    for k in (3, 4, 5):
        assert abs(ff.ghaar_filter(k, 0.2, 0.3, 0.4, f=1.0).sum()) < 1e-12
        assert abs(ff.ghaar_filter(k, 0.2, 0.3, 0.4, a=0.1, f=1.0).sum()) > 0.1
    assert abs(ff.ghaar_filter(3, 0.2, 0.3, 0.4, f=2.0).sum()) > 0.1
    with pytest.raises(ValueError, match="normalize"):
        ff.ghaar_filter(3, 1.0, -1.0, 0.0, f=0.0, normalize=True)


def test_ghaar_vectors_equal_scalars():
    p = rand(5, 6, generator=seeded())
    bank = ff.ghaar_filter((3, 5), *p)
    for i in range(6):
        close(bank[i], ff.ghaar_filter((3, 5), *(x.item() for x in p[:, i])))


def test_dct_steered_and_ghaar4():
    b = ff.dct(4)
    close(ff.ghaar4_filter(4, 0.1, 0.2, 0.3, 0.4), 0.1 * b[0] + 0.2 * b[4] + 0.3 * b[1] + 0.4 * b[5])
    close(ff.dct_steered(4, torch.tensor([[2.0, 3.0]]), torch.tensor([[7, 2]]), power=2)[0], 4 * b[7] + 9 * b[2])


def test_psine_against_a_loop():
    g = seeded(3)
    w, f, t, p = rand(9, generator=g, low=-1), rand(9, 2, generator=g, high=4), rand(9, 2, generator=g, high=6), rand(9, generator=g, low=1, high=5)
    p[0] = 2.5  # half to even
    k = 4
    x = [math.pi * m / (k - 1) for m in range(k)]
    total = np.zeros((k, k))
    for i in range(9):
        wave = np.outer([math.sin(v * f[i, 0] + t[i, 0]) for v in x], [math.sin(v * f[i, 1] + t[i, 1]) for v in x])
        total += w[i].item() * wave ** round(p[i].item())
    total = 2 * (total - total.min()) / (total.max() - total.min()) - 1
    close(ff.psine_filter(k, w, f, t, p), total / np.linalg.norm(total))


def test_gabor_filter():
    bank = ff.gabor_filter(5, torch.tensor([0.0, math.pi / 2], dtype=torch.float64), 0.2, 0.3, 1.0)
    close(bank[0], bank[1].T)
    y, x = np.mgrid[-2:3, -2:3]
    one = np.exp(-(x**2 + y**2) / 2) * np.cos(2 * math.pi * 0.2 * x + 0.3)
    close(bank[0], one / np.linalg.norm(one))


# ---------------------------------------------------------------- random fills and recipes


@pytest.mark.parametrize("name", sorted(ff.BANKS))
@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_every_bank_at_every_size(name, k):
    weight = torch.empty(60, 3, k, k, dtype=torch.float64)
    if (name, k) == ("dct.fill0", 7):
        weight = torch.empty(70, 3, k, k, dtype=torch.float64)
    if name == "ghaar4.s2" and k == 2:
        with pytest.raises(ValueError, match="no frequency 2"):
            ff.draw_(weight, name, generator=seeded())
        return
    before = torch.random.get_rng_state()
    assert ff.draw_(weight, name, generator=seeded(), depth=0.5) is weight
    assert weight.isfinite().all() and weight.abs().sum() > 0
    assert torch.equal(weight, ff.draw_(weight.clone(), name, generator=seeded(), depth=0.5)), "same seed, same filters"
    if name not in FIXED and (name, k) != ("box", 2):  # a 2 x 2 box fills a 2 x 2 kernel
        assert not torch.equal(weight, ff.draw_(weight.clone(), name, generator=seeded(1), depth=0.5))
        with pytest.raises(ValueError, match="generator=None"):
            ff.draw_(weight, name)
    matched = ff.draw_(weight.clone(), name, generator=seeded(), gain="match", depth=0.5)
    close(matched.square().mean(), 1 / (3 * 3 * k * k), atol=1e-15)
    close(matched / matched.norm(), weight / weight.norm())
    assert torch.equal(before, torch.random.get_rng_state()), "the global stream must not move"


@pytest.mark.parametrize("name", sorted(ff.BANKS))
@pytest.mark.parametrize("kernel", [(5,), (1, 7), (3, 5)])
def test_other_shapes_work_or_say_so(name, kernel):
    weight = torch.empty(40, 2, *kernel)
    if name in SQUARE and len(kernel) == 1:
        with pytest.raises(ValueError, match="axes"):
            ff.draw_(weight, name, generator=seeded())
    elif name in ("ghaar4.s1", "ghaar4.s2") and kernel == (1, 7):
        with pytest.raises(ValueError, match="no frequency"):
            ff.draw_(weight, name, generator=seeded())
    else:
        assert ff.draw_(weight, name, generator=seeded()).isfinite().all()


def test_one_by_one_weights():
    for name in ("random", "normal", "orthogonal", "impulse", "ones", "identity", "dct", "spectrum", "covariance"):
        assert ff.draw_(torch.empty(8, 4, 1, 1), name, generator=seeded()).isfinite().all()


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_default_scales(name):
    w = ff.draw_(torch.empty(128, 64, 3, 3, dtype=torch.float64), name, generator=seeded())
    assert abs(w.var().item() * 3 * 64 * 9 - 1) < 0.02
    if name == "uniform":
        assert w.abs().max() <= 1 / math.sqrt(64 * 9)
        torch.manual_seed(0)
        default = nn.Conv2d(64, 128, 3).weight
        assert abs(default.var().item() / w.var().item() - 1) < 0.02


def test_orthogonal_rows_and_basis():
    for out, inp in ((8, 4), (60, 4)):
        w = ff.draw_(torch.empty(out, inp, 3, 3, dtype=torch.float64), "orthogonal", generator=seeded()).flatten(1)
        gram = w @ w.T if out <= inp * 9 else w.T @ w
        close(gram, torch.eye(len(gram)))
    w = ff.draw_(torch.empty(9, 4, 3, 3, dtype=torch.float64), "random-basis", generator=seeded()).flatten(2).flatten(0, 1)
    assert len(torch.unique(w.round(decimals=9), dim=0)) == 9


def test_small_random_banks():
    assert ff.impulse(5, 500, seeded()).flatten(1).sum(0).min() > 5
    sparse = ff.sparse(3, 5000, seeded(), density=0.3)
    assert abs((sparse != 0).double().mean() - 0.3) < 0.01 and abs(sparse.mean()) < 0.01
    with pytest.raises(ValueError, match="density"):
        ff.sparse(3, 1, seeded(), density=0)
    box = ff.box((4, 6), 300, seeded(), side=3)
    assert (box.flatten(1).sum(1) == 9).all() and (box.sum(0) > 0).all()
    for filters, column in ((box, box.sum(1)), (box, box.sum(2))):
        assert set(column.unique().tolist()) == {0.0, 3.0} and len(filters) == 300
    assert ff.blob(5, 10, seeded(), sigma=1e-3).max() <= 1
    for name in ("gabor", "psine", "haar", "polynomial"):
        close(ff.BANKS[name](5, 200, generator=seeded()).flatten(1).norm(dim=1), torch.ones(200))


def e0_share(bank):
    """ExplainSteer's e0: rows plus columns of sqrt(E), as shares."""
    root = torch.einsum("nij,mij->nm", bank, ff.dct(3)).abs().mean(0).reshape(3, 3).sqrt()
    e0 = root.sum(0) + root.sum(1)
    return e0 / e0.sum()


def test_the_originals_norms_and_spectra():
    for k, mean, std in ((3, 2.12, 0.98), (5, 3.37, 1.39)):
        norms = ff.ghaar(k, 40000, generator=seeded()).flatten(1).norm(dim=1)
        assert abs(norms.mean() - mean) < 0.03 and abs(norms.std() - std) < 0.05
    close(e0_share(ff.ghaar(3, 40000, generator=seeded())), [0.416, 0.309, 0.275], atol=4e-3)
    close(e0_share(ff.psine(3, 40000, generator=seeded())), [0.338, 0.335, 0.328], atol=4e-3)


def test_ghaar_relatives_live_on_their_atoms():
    basis = ff.dct(4).flatten(1)
    for name, atoms in (("ghaar4.s1", {0, 1, 4, 5}), ("ghaar4.s2", {0, 2, 8, 10})):
        used = (ff.BANKS[name](4, 50, generator=seeded()).flatten(1) @ basis.T).abs() > 1e-12
        assert set(used.any(0).nonzero().flatten().tolist()) == atoms and used.sum() == 200
    for name, count in (("ghaar2.ms", 2), ("ghaar4.ms", 4)):
        used = (ff.BANKS[name](4, 50, generator=seeded()).flatten(1) @ basis.T).abs() > 1e-12
        assert (used.sum(1) == count).all() and used.any(0).all()
    counts = set()
    for seed in range(40):
        used = (ff.ghaar_mixed(4, 5, seeded(seed)).flatten(1) @ basis.T).abs() > 1e-12
        assert len(used.sum(1).unique()) == 1
        counts.add(used.sum(1)[0].item())
    assert 1 in counts and max(counts) <= 16 and len(counts) > 5


def test_fill0_gives_each_input_every_atom_once():
    w = ff.draw_(torch.empty(12, 5, 3, 3, dtype=torch.float64), "dct.fill0", generator=seeded())
    for i in range(5):
        kernels = w[:, i].flatten(1)
        assert (kernels.norm(dim=1) > 0).sum() == 9
        close(kernels.T @ kernels, torch.eye(9))
    with pytest.raises(ValueError, match="9 output channels"):
        ff.draw_(torch.empty(8, 5, 3, 3), "dct.fill0", generator=seeded())


def test_fillzero():
    w = torch.randn(6, 2, 3, 3, generator=seeded(), dtype=torch.float64)
    w[0, 0] = 0
    w[1, 1, :2] = 0
    new = ff.draw_(w.clone(), "fillzero", generator=seeded(1))
    touched = torch.zeros_like(w, dtype=torch.bool)
    touched[0, 0], touched[1, 1, :2] = True, True
    assert torch.equal(new[~touched], w[~touched]) and (new[touched] != 0).all()
    assert new[0, 0].abs().max() <= 1 / math.sqrt(18)
    many = torch.zeros(20000, 1, 1, 3, dtype=torch.float64)
    many[..., 0] = 3.0  # mean 1, unbiased std sqrt(3)
    redrawn = ff.draw_(many, "fillzero", generator=seeded())[..., 1:]
    assert abs(redrawn.mean() - 1) < 0.04 and abs(redrawn.std() - math.sqrt(3)) < 0.04


# ---------------------------------------------------------------- dealing and draw_


@pytest.mark.parametrize("out, inp", [(64, 3), (16, 16), (32, 1), (7, 5)])
def test_deal_is_balanced(out, inp):
    index = ff.deal((out, inp), 9, seeded())
    counts = index.flatten().bincount(minlength=9)
    assert index.shape == (out, inp) and counts.max() - counts.min() <= 1
    w = ff.draw_(torch.empty(out, inp, 3, 3, dtype=torch.float64), "dct", generator=seeded())
    close((torch.einsum("oiab,mab->oim", w, ff.dct(3)).abs() > 0.5).long().argmax(-1), index)


def test_legacy_deal():
    rgb = ff.deal((64, 3), 9, seeded(), legacy=True)
    assert all(sorted(row.tolist()) == [0, 1, 2] for row in rgb), "an RGB stem only ever sees the three lowest raster indices"
    wide = ff.deal((8, 20), 9, seeded(), legacy=True)
    assert all(sorted(row.tolist()) == sorted(i % 9 for i in range(20)) for row in wide)
    depthwise = ff.deal((20, 1), 9, seeded(), legacy=True).flatten()
    assert sorted(depthwise.tolist()) == sorted(i % 9 for i in range(20))
    w = ff.draw_(torch.empty(8, 3, 3, 3), "dct", generator=seeded(), legacy=True)
    assert torch.equal(w, ff.dct(3).float()[ff.deal((8, 3), 9, seeded(), legacy=True)])


def test_custom_banks():
    bank = torch.randn(4, 3, 3, generator=seeded())
    w = torch.empty(2, 4, 3, 3)
    assert torch.equal(ff.draw_(w, bank), torch.stack([bank, bank]))
    dealt = ff.draw_(w, bank, generator=seeded()).flatten(0, 1)
    assert sorted(f.sum().item() for f in dealt) == sorted(f.sum().item() for f in torch.cat([bank, bank]))
    assert torch.equal(ff.draw_(w, lambda k, n, g: torch.full((n, *k), 2.0)), torch.full_like(w, 2))
    seen = {}

    def bank_with_context(kernel_size, n, generator, fan_in, channels, depth):
        seen.update(kernel_size=kernel_size, n=n, fan_in=fan_in, channels=channels, depth=depth)
        return torch.zeros(n, *kernel_size)

    ff.draw_(w, bank_with_context, generator=seeded(), depth=0.25)
    assert seen == {"kernel_size": (3, 3), "n": 8, "fan_in": 36, "channels": (2, 4), "depth": 0.25}
    ff.draw_(w, functools.partial(ff.spectrum, beta=3.0), generator=seeded())
    ff.draw_(w, ff.dct4, generator=seeded())


def test_errors_name_the_remedy():
    w = torch.empty(4, 4, 3, 3)
    with pytest.raises(ValueError, match='did you mean "ghaar"'):
        ff.draw_(w, "gharr", generator=seeded())
    with pytest.raises(ValueError, match="Known: .*dct.*unchanged"):
        ff.draw_(w, "qqqqq")
    with pytest.raises(ValueError, match="needs"):
        ff.draw_(w, ff.dct(5), generator=seeded())
    with pytest.raises(ValueError, match='gain="?.?lots'):
        ff.draw_(w, "ones", gain="lots")
    with pytest.raises(ValueError, match="no kernel"):
        ff.draw_(torch.empty(4, 4), "ones")
    with pytest.raises(ValueError, match="kernel_size=0"):
        ff.dct(0)


def test_gain_unchanged_and_types():
    w = torch.randn(8, 4, 3, 3, generator=seeded())
    assert torch.equal(ff.draw_(w.clone(), "unchanged"), w)
    close(ff.draw_(w.double(), "unchanged", gain="match").square().mean(), 1 / (3 * 36))
    close(ff.draw_(w.double(), "unchanged", gain=2.0), 2 * w.double())
    half = nn.Conv2d(4, 8, 3).half()
    assert ff.draw_(half.weight, "psine", generator=seeded()).dtype == torch.float16 and half.weight.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(ff.BANKS))
def test_devices_may_differ(name):
    reference = ff.draw_(torch.empty(16, 4, 3, 3), name, generator=seeded())
    assert torch.equal(ff.draw_(torch.empty(16, 4, 3, 3, device="cuda"), name, generator=seeded()).cpu(), reference)
    ff.draw_(torch.empty(16, 4, 3, 3), name, generator=torch.Generator("cuda").manual_seed(0))


# ---------------------------------------------------------------- steering


@pytest.mark.parametrize("form", ["psd", "recollected"])
@pytest.mark.parametrize("zero_mean", [False, True])
def test_covariances_are_psd(form, zero_mean):
    for k in (2, 3, 5, 9):
        for s in (0.1, 1.0, 8.0):
            sigma = ff.covariance_matrix(k, s, form=form, zero_mean=zero_mean)
            assert (sigma - sigma.T).abs().max() < 1e-12
            assert torch.linalg.eigvalsh(sigma).min() > -1e-10 and abs(sigma.trace() - k * k) < 1e-9
            if zero_mean:
                assert sigma.sum(0).abs().max() < 1e-9
    with pytest.raises(ValueError, match="form="):
        ff.covariance_matrix(3, 1.0, form="other")
    with pytest.raises(ValueError, match="s=0"):
        ff.covariance_matrix(3, 0)


def test_covariance_formulas():
    k, s, t = 4, 0.7, 1.3
    sigma = ff.covariance_matrix(k, s, t)
    c = (k - 1) / 2

    def entry(p, q):
        def loud(x):
            return math.exp(-((x[0] - c) ** 2 + (x[1] - c) ** 2) / (4 * s))

        return loud(p) * loud(q) * math.exp(-((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2) / (2 * t))

    points = [(i, j) for i in range(k) for j in range(k)]
    expected = torch.tensor([[entry(p, q) for q in points] for p in points], dtype=torch.float64)
    close(sigma, expected * k * k / expected.trace())


def test_recollected_form_and_its_negative_mass():
    k, s, c = 5, 0.8, 2
    z = torch.tensor([[math.exp(-((i - c) ** 2 + (j - c) ** 2) / (2 * s)) for j in range(k)] for i in range(k)], dtype=torch.float64)
    rows = []
    for i in range(k):
        for j in range(k):
            moved, zij = z.roll((i - c, j - c), (0, 1)), z[i, j]
            rows.append(((z + zij) * (moved - z * zij / 2)).flatten())
    close(steering.recollected((k, k), s), torch.stack(rows))
    for k in (3, 5, 7, 9):
        for s in (0.1, 0.5, 1.0, 3.0, 8.0):
            raw = steering.recollected((k, k), s)
            values = torch.linalg.eigvalsh((raw + raw.T) / 2)
            assert values.clamp_max(0).abs().sum() / values.abs().sum() <= 0.087


def test_samples_follow_the_covariance():
    sigma = ff.covariance_matrix(3, 0.8)
    sample = ff.covariance(3, 200_000, seeded(), s=0.8)
    close(ff.empirical_covariance(sample) * 27, sigma, atol=0.03)
    mean_square = ff.covariance(5, 20000, seeded(), fan_in=100, depth=0.7).square().mean()
    assert abs(mean_square * 300 - 1) < 0.03
    early, late = (ff.covariance(7, 4000, seeded(), depth=d).square().mean(0) for d in (0.0, 1.0))
    assert (early / early.sum())[3, 3] > (late / late.sum())[3, 3], "the envelope widens with depth"
    close([ff.schedule(0.5, 0.1, 0.2, 3)], [0.1 + 0.1 + 3 * 0.125])


def test_spectrum_dial():
    for beta in (-1.0, 0.0, 1.0, 2.5):
        sample = ff.spectrum(3, 100_000, seeded(), fan_in=50, beta=beta)
        power = torch.einsum("nij,mij->nm", sample, ff.dct(3)).square().mean(0)
        expected = torch.tensor([(1 + u * u + v * v) ** -beta for u in range(3) for v in range(3)], dtype=torch.float64)
        close(power / power.sum(), expected / expected.sum(), atol=5e-3)
        assert abs(sample.square().mean() * 150 - 1) < 0.02
    box = ff.spectrum(5, 3, seeded(), beta=60.0)
    close(box - box.mean((1, 2), keepdim=True), torch.zeros_like(box), atol=1e-6)


def test_steer_kde_is_scipys():
    data = torch.randn(40, 1, 2, 2, generator=seeded(), dtype=torch.float64) @ torch.tensor([[1.0, 0.5], [0.0, 0.3]], dtype=torch.float64)
    kde = scipy.stats.gaussian_kde(data.flatten(1).T.numpy())
    sample = ff.steer(data)(2, 200_000, seeded()).flatten(1)
    x = data.flatten(1)
    expected = (x.T @ x / 40 - torch.outer(x.mean(0), x.mean(0))) + torch.from_numpy(kde.covariance)
    close(sample.mean(0), x.mean(0), atol=0.01)
    close(torch.cov(sample.T), expected, atol=0.02)
    assert abs(kde.factor - 40 ** (-1 / 8)) < 1e-12
    probe = torch.randn(4, 4, generator=seeded(5), dtype=torch.float64)
    for direction in probe:  # third moments as well: the smoothed bootstrap, not just a Gaussian
        a, b = sample @ direction, torch.from_numpy(kde.resample(200_000, seed=1).T) @ direction
        assert scipy.stats.ks_2samp(a[:20000].numpy(), b[:20000].numpy()).pvalue > 1e-4


def test_steer_gaussian_and_dct():
    data = torch.randn(30, 4, 3, 3, generator=seeded(), dtype=torch.float64).cumsum(-1) + 0.5
    x = data.flatten(0, 1).flatten(1)
    sample = ff.steer(data, "gaussian")(3, 200_000, seeded()).flatten(1)
    close(sample.mean(0), x.mean(0), atol=0.02)
    close(torch.cov(sample.T), torch.cov(x.T), atol=0.06)
    c = x @ ff.dct(3).flatten(1).T
    for kind, mean, power in (("dct", torch.zeros(9), c.square().mean(0)), ("dct-mean", c.mean(0), c.var(0) + c.mean(0).square())):
        got = ff.steer(data, kind)(3, 200_000, seeded()).flatten(1) @ ff.dct(3).flatten(1).T
        close(got.mean(0), mean, atol=0.05)
        close(got.square().mean(0) / power, torch.ones(9), atol=0.03)
        off = torch.corrcoef(got.T) - torch.eye(9)
        assert off.abs().max() < 0.02
    with pytest.raises(ValueError, match="kernel_size=.*transfer"):
        ff.steer(data)(5, 2, seeded())
    with pytest.raises(ValueError, match="kind="):
        ff.steer(data, "svd")
    with pytest.raises(ValueError, match="at least two"):
        ff.steer(data[:1, :1])


def test_steer_takes_a_singular_layer():
    few = torch.randn(4, 1, 3, 3, generator=seeded())
    flat = few.flatten(1).double()
    sample = ff.steer(few, "gaussian")(3, 100, seeded()).flatten(1)
    spanned = torch.linalg.lstsq((flat - flat.mean(0)).T, (sample - flat.mean(0)).T).solution
    close((flat - flat.mean(0)).T @ spanned, (sample - flat.mean(0)).T, atol=1e-6)


def test_transfer_over_depth_and_size():
    layers = [torch.randn(500, 1, 3, 3, generator=seeded(i), dtype=torch.float64) * (i + 1) for i in range(3)]
    sigmas = [torch.cov(w.flatten(1).T) for w in layers]
    bank = ff.transfer(layers)
    for depth, expected in ((0.0, sigmas[0]), (0.25, (sigmas[0] + sigmas[1]) / 2), (1.0, sigmas[2]), (0.9, 0.2 * sigmas[1] + 0.8 * sigmas[2])):
        close(ff.interpolate(sigmas, depth), expected)
        close(torch.cov(bank(3, 100_000, seeded(), depth=depth).flatten(1).T) / 9, expected / 9, atol=0.02)
    assert bank((5, 7), 4, seeded()).shape == (4, 5, 7)
    with pytest.raises(ValueError, match="depth=2"):
        ff.interpolate(sigmas, 2)
    small = ff.resample(torch.arange(5.0).expand(1, 5, 5), 3)
    close(small[0, 0], [0, 2, 4])
    close(ff.interpolate(sigmas[:1], 0.5), sigmas[0])
