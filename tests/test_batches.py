"""Batches: one indexed read against slicing, flipping and scaling image by image."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from frozenfilters import batches
from frozenfilters.batches import Batches, as_batches


def images(n=50, c=3, h=12, w=10):
    return SimpleNamespace(
        images=torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)), labels=torch.arange(n)
    )


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"crop": 3, "flip": True},
        {"crop": 2},
        {"flip": True},
        {},
        {"crop": 2, "flip": True, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)},
    ],
    ids=str,
)
def test_exact_against_the_slow_way(monkeypatch, resident, options):
    if not resident:
        monkeypatch.setattr(batches, "LIMIT", 0)
    data, crop = images(), options.get("crop", 0)
    fast = Batches(data, 16, generator=torch.Generator().manual_seed(5), **options)
    assert fast.resident is resident
    x, y = fast.batch(torch.arange(10, 26))
    g, n = torch.Generator().manual_seed(5), 16
    dy, dx = torch.randint(0, 2 * crop + 1, (2, n), generator=g) if crop else torch.zeros(2, n, dtype=torch.long)
    mirrored = torch.randint(0, 2, (n,), generator=g) if options.get("flip") else torch.zeros(n)
    for i in range(n):
        image = F.pad(data.images[10 + i], (crop,) * 4)
        image = image.flip(2) if mirrored[i] else image
        image = image[:, dy[i] : dy[i] + 12, dx[i] : dx[i] + 10].float() / 255
        if "mean" in options:
            image = (image - torch.tensor(options["mean"]).view(-1, 1, 1)) / torch.tensor(options["std"]).view(-1, 1, 1)
        torch.testing.assert_close(x[i], image, atol=2e-6, rtol=0)
    assert y.tolist() == list(range(10, 26))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_epoch_holds_every_image_once_and_is_reproducible():
    loader = [Batches(images(), 16, shuffle=True, flip=True, crop=1, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    a, b = (list(x) for x in loader)
    assert len(a) == len(loader[0]) == 4
    assert sorted(torch.cat([y for _, y in a]).tolist()) == list(range(50))
    assert all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True))
    assert [len(y) for _, y in Batches(images(), 16, drop_last=True)] == [16, 16, 16]


def test_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    list(Batches(images(), 16, shuffle=True, crop=1, flip=True, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="generator"):
        Batches(images(), 4, shuffle=True)
    with pytest.raises(ValueError, match="batch_size"):
        Batches(images(), 0)
    with pytest.raises(ValueError, match="resize"):
        Batches(SimpleNamespace(images=(torch.zeros(1, 3, 3),), labels=torch.zeros(1)), 4)
    with pytest.raises(TypeError, match="ImageSet"):
        as_batches(3)


def test_datasets_and_loaders_are_accepted():
    dataset = torch.utils.data.TensorDataset(torch.rand(10, 1, 4, 4), torch.arange(10))
    assert sum(len(y) for _, y in as_batches(dataset, 4)) == 10
    loader = torch.utils.data.DataLoader(dataset, 5)
    assert as_batches(loader) is loader
