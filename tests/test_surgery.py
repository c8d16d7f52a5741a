"""Freezing, thawing, swapping and sharing, on small nets in detail and on a zoo of torchvision and timm networks."""

import copy
import hashlib
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from frozenfilters import filters, surgery
from frozenfilters.surgery import freeze, frozen_hash, frozen_share, inventory, layers, share, spatial, stored, summary, swap, thaw, thawed

torchvision = pytest.importorskip("torchvision")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False),
        nn.Conv2d(8, 12, (1, 5), padding=(0, 2), groups=2),
        nn.Conv2d(12, 4, 1),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def train(model, steps=3, **options):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True} | options
    optimiser = torch.optim.SGD(model.parameters(), **options)
    for step in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=seeded(step))
        optimiser.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimiser.step()


# ---------------------------------------------------------------- rules and freezing


def test_rules():
    assert [n for n, m in net().named_modules() if surgery.spatial(n, m)] == ["0", "3", "4"]
    assert list(layers(net(), surgery.depthwise)) == ["3"]
    assert surgery.is_spatial(nn.Conv1d(1, 1, 3)) and not surgery.is_spatial(nn.Conv1d(1, 1, 1))
    for other in (nn.Conv3d(1, 1, 3), nn.ConvTranspose1d(1, 1, 3), nn.Linear(3, 3), nn.Conv2d(1, 1, (1, 1))):
        assert not surgery.is_spatial(other)


def test_freeze_is_a_flag():
    model = net()
    keys = list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    assert freeze(model) == ["0", "3", "4"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight", "3.weight", "4.weight"]
    assert list(model.state_dict()) == keys and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(type(m) is type(o) for m, o in zip(model, net(), strict=True))
    model = net()
    freeze(model, bias=True)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight", "0.bias", "3.weight", "4.weight", "4.bias"]
    assert frozen_share(model) == sum(p.numel() for p in model.parameters() if not p.requires_grad) / sum(p.numel() for p in model.parameters())


def test_frozen_stays_frozen_under_momentum_and_decay():
    model = net()
    train(model, 1)  # gradients are there when we freeze
    freeze(model, bias=True)
    assert model[0].weight.grad is None
    frozen, learned = frozen_hash(model), model[5].weight.detach().clone()
    train(model)
    assert frozen_hash(model) == frozen and not torch.equal(model[5].weight, learned)


def test_a_freeze_of_nothing_raises_and_lists_what_it_saw():
    with pytest.raises(ValueError, match=r"matched no layer of Sequential.*0: Conv2d 1x1.*1: ConvTranspose2d 2x2"):
        freeze(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 2)))
    with pytest.raises(ValueError, match="no convolution at all"):
        freeze(nn.Linear(3, 3))
    for function in (lambda m: swap(m, nn.Sequential), lambda m: share(m, generator=seeded()), lambda m: thaw(m, spatial), inventory):
        with pytest.raises(ValueError, match="matched no layer"):
            function(nn.Sequential(nn.Linear(3, 3)))


def test_init_gain_and_streams():
    a, b = net(), net()
    freeze(a, init="dct", generator=seeded(), gain="match")
    freeze(b, init="dct", generator=seeded(), gain="match")
    assert frozen_hash(a) == frozen_hash(b)
    freeze(b, init="dct", generator=seeded(1), gain="match")
    assert frozen_hash(a) != frozen_hash(b)
    for i in (0, 3, 4):
        assert math.isclose(a[i].weight.double().square().mean().item(), 1 / (3 * a[i].weight[0].numel()), rel_tol=1e-6)
    # a layer's filters depend on its rank and the seed, not on the sizes of the layers before it
    wide, narrow = (nn.Sequential(nn.Conv2d(3, c, 5), nn.Conv2d(8, 8, 3)) for c in (4, 32))
    freeze(wide, init="random", generator=seeded())
    freeze(narrow, init="random", generator=seeded())
    assert torch.equal(wide[1].weight, narrow[1].weight)


def test_init_mapping_depth_and_errors():
    model = net()
    freeze(model, init={"0": "ones", "3": filters.dct(3), "4": lambda k, n, g: torch.full((n, *k), 0.5)})
    assert (model[0].weight == 1).all() and (model[4].weight == 0.5).all()
    depths = []
    freeze(model, init=lambda k, n, g, depth: depths.append(depth) or torch.zeros(n, *k))
    assert depths == [0.0, 0.5, 1.0]
    before = copy.deepcopy(net().state_dict())
    for options, message in (
        ({"init": {"0": "ones"}}, r"no bank for \['3', '4'\]"),
        ({"init": "dct"}, r"layer '0' \(Conv2d 3x3\): generator=None"),
        ({"init": "dtc", "generator": seeded()}, "did you mean"),
        ({"init": {"0": "ones", "3": "ones", "4": filters.dct(3)}}, "layer '4'"),
    ):
        model = net()
        with pytest.raises(ValueError, match=message):
            freeze(model, **options)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "an error must leave the model alone"
        assert all(p.requires_grad for p in model.parameters())


def test_computed_weights_are_refused():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 3)))
    with pytest.raises(ValueError, match="layer '0'.*computed"):
        freeze(model)
    assert "computed" in summary(model).note[0]


def test_the_global_stream_is_left_alone():
    before = torch.random.get_rng_state()
    model = net()
    after_net = torch.random.get_rng_state()
    freeze(model, init="ghaar4.ms", generator=seeded())
    share(model, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), after_net)
    torch.random.set_rng_state(before)


# ---------------------------------------------------------------- thawing


def test_thaw():
    model = net()
    freeze(model, bias=True)
    model[1].bias.requires_grad_(False)
    assert thaw(model, lambda name, module: name == "3") == ["3"]
    assert thaw(model) == ["0", "1", "4"]
    assert thaw(model) == [] and all(p.requires_grad for p in model.parameters())


def test_thawed_restores_flags_gradients_and_replaced_parameters():
    model = net()
    freeze(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    digest = frozen_hash(model)
    with pytest.raises(RuntimeError, match="stop"), thawed(model) as same:
        assert same is model and all(p.requires_grad for p in model.parameters())
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert model[0].weight.grad is not None
        raise RuntimeError("stop")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert model[0].weight.grad is None and model[5].weight.grad is not None and frozen_hash(model) == digest
    old = model[3].weight
    with thawed(model):
        model[3].weight = nn.Parameter(model[3].weight[:4].clone())  # what a pruner does
    assert not model[3].weight.requires_grad and not old.requires_grad
    train_free = nn.Sequential(nn.Conv2d(1, 1, 3))
    with thawed(train_free):
        pass
    assert all(p.requires_grad for p in train_free.parameters())


# ---------------------------------------------------------------- hash and reports


def test_frozen_hash_definition():
    model = net()
    assert frozen_hash(model) == hashlib.sha256().hexdigest()
    freeze(model, where=lambda n, m: n in ("3", "0"))
    digest = hashlib.sha256()
    for name in ("0.weight", "3.weight"):
        p = model.get_parameter(name).detach()
        digest.update(f"{name}\0torch.float32\0{tuple(p.shape)}\0".encode() + p.numpy().tobytes())
    assert frozen_hash(model) == digest.hexdigest()
    assert frozen_hash(model.to(memory_format=torch.channels_last)) == digest.hexdigest(), "bytes are those of the values, not of the layout"
    assert frozen_hash(copy.deepcopy(model).bfloat16()) != digest.hexdigest()


def test_summary():
    model = net()
    freeze(model, init="ones")
    frame = summary(model).set_index("layer")
    assert list(frame.columns) == ["type", "kernel", "filters", "frozen", "parameters", "share", "note"]
    assert list(frame.index) == ["0", "1", "3", "4", "5", "6", "9"]
    assert list(frame.kernel) == ["3x3", "", "3x3", "1x5", "1x1", "2x2", ""]
    assert list(frame.filters) == [24, 0, 8, 48, 48, 16, 0]
    assert list(frame.frozen) == [True, False, True, True, False, False, False]
    assert frame.parameters.sum() == sum(p.numel() for p in model.parameters()) and math.isclose(frame.share.sum(), 1)
    assert frame.note["0"] == "bias learned" and frame.note["3"] == "" and frame.note["6"] == "transposed: left learned"
    tied = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv3d(3, 3, 3))
    tied[1].weight = tied[0].weight
    assert list(summary(tied).note) == ["", "weight tied to 0", "3-D: left learned"] and list(summary(tied).parameters[:2]) == [84, 3]


@pytest.mark.parametrize(
    "name, layers_, kernels, share_, spatial_",
    [
        ("resnet18", 17, 1_220_672, 98.35, None),
        ("resnet50", 17, 1_257_536, 48.15, 11_320_384),
        ("densenet121", 59, 237_632, 30.80, None),
        ("efficientnet_b0", 17, 8_992, 4.54, None),
        ("efficientnet_b5", None, None, 2.61, None),
    ],
)
def test_inventory_of_the_papers_networks(name, layers_, kernels, share_, spatial_):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=5)
        stem, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
        model.set_submodule(stem, nn.Conv2d(1, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None))
    found = inventory(model)
    assert round(100 * found["share"], 2) == share_ and set(found) == {"layers", "kernels", "spatial", "parameters", "share"}
    assert layers_ in (None, found["layers"]) and kernels in (None, found["kernels"]) and spatial_ in (None, found["spatial"])
    if name == "resnet50":
        assert found["parameters"] == 23_512_005


def test_spatial_is_not_always_what_one_thinks():
    """timm's vgg11 has a 7 x 7 convolution as its classifier; weight-standardised convolutions are subclasses that an exact-type rule misses."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        vgg, nf = timm.create_model("vgg11"), timm.create_model("nf_resnet50")
        assert round(inventory(vgg)["share"], 2) == 0.84 and summary(vgg).set_index("layer").share["pre_logits.fc1"] > 0.7
        assert inventory(nf)["layers"] == 17 and not any(type(m) is nn.Conv2d for m in layers(nf).values())


# ---------------------------------------------------------------- swapping


def test_swap_places_modes_and_ties():
    model = net().eval()
    assert swap(model, lambda conv: nn.Sequential(conv, nn.Identity())) == ["0", "3", "4"]
    assert not any(m.training for m in model.modules())
    shared = nn.Conv2d(4, 4, 3, padding=1)
    tied = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    made = []
    assert swap(tied, lambda conv: made.append(conv) or nn.Sequential(conv)) == ["a", "b.0"]
    assert made == [shared] and tied["a"] is tied["b"][0]
    assert swap(net(), lambda conv: conv) == []


def test_swap_refuses_the_root_and_leaves_a_failed_model_alone():
    with pytest.raises(ValueError, match=r"the model itself is the Conv2d.*nn\.Sequential"):
        swap(nn.Conv2d(3, 3, 3), nn.Sequential)
    model = net()
    modules = list(model)
    with pytest.raises(TypeError, match="make returned NoneType for layer '4'"):
        swap(model, lambda conv: nn.Sequential(conv) if conv.kernel_size == (3, 3) else None)
    assert all(a is b for a, b in zip(model, modules, strict=True))


def test_swap_does_not_enter_what_it_replaced():
    class Outer(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 3, 3)
            self.inner = nn.Conv2d(3, 3, 3)

    model = nn.Sequential(Outer())
    assert swap(model, lambda conv: nn.Identity()) == ["0"]
    assert isinstance(model[0], nn.Identity)


# ---------------------------------------------------------------- sharing


def resnet20(width=16):
    """The convolutions of a CIFAR ResNet-20: what its filters need, not how they are wired."""
    sizes = [(3, width)] + [(width, width)] * 6 + [(width, 2 * width)] + [(2 * width, 2 * width)] * 5 + [(2 * width, 4 * width)] + [(4 * width, 4 * width)] * 5
    return nn.Sequential(*[nn.Conv2d(i, o, 3, bias=False) for i, o in sizes])


def test_share_slices_one_tensor():
    model = resnet20()
    assert sum(p.numel() for p in model.parameters()) == 267_696
    assert len(share(model, generator=seeded())) == 19
    whole = model[18].weight * math.sqrt(64 * 9)
    for conv in model:
        o, i = conv.weight.shape[:2]
        torch.testing.assert_close(conv.weight, whole[:o, :i] / math.sqrt(i * 9))
        assert not conv.weight.requires_grad and type(conv) is nn.Conv2d and conv.weight.is_contiguous()
    assert whole.abs().max() <= 1 and abs(whole.var() * 3 - 1) < 0.02
    storage = {(c.in_channels, c.weight.untyped_storage().data_ptr()) for c in model}
    assert len(storage) == 4, "layers with equally many inputs alias one storage"
    assert stored(model) == 9 * (3 * 16 + 16 * 32 + 32 * 64 + 64 * 64)
    assert (summary(model).note != "").sum() == 18  # all but the stem
    same = resnet20()
    share(same, generator=seeded())
    assert frozen_hash(same) == frozen_hash(model)


def test_share_without_scale_keeps_one_storage():
    model = resnet20()
    share(model, generator=seeded(), scale=False)
    assert len({c.weight.untyped_storage().data_ptr() for c in model}) == 1 and stored(model) == 36_864
    assert round(267_696 / stored(model), 2) == 7.26
    before = model(torch.ones(1, 3, 48, 48))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() < 1.2 * 36_864 * 4 + 20_000, "a checkpoint keeps the aliasing"
    buffer.seek(0)
    fresh = resnet20()
    share(fresh, generator=seeded(1), scale=False)
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(torch.ones(1, 3, 48, 48)), before) and stored(fresh) == 36_864
    torch.testing.assert_close(copy.deepcopy(model)(torch.ones(1, 3, 48, 48)), before)


def test_share_trains_around_it_and_takes_all_kernels():
    model = net()
    assert share(model, generator=seeded()) == ["0", "3", "4"]
    torch.testing.assert_close(model[3].weight / model[0].weight[:, :1], torch.full_like(model[3].weight, math.sqrt(3)))
    digest = frozen_hash(model)
    train(model)
    assert frozen_hash(model) == digest
    with pytest.raises(ValueError, match="generator=None: share"):
        share(model)


# ---------------------------------------------------------------- the zoo

TORCHVISION = """resnet18 resnext50_32x4d densenet121 efficientnet_b0 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 squeezenet1_1
    regnet_y_400mf regnet_x_400mf convnext_tiny googlenet inception_v3 lraspp_mobilenet_v3_large""".split()
TIMM = """test_byobnet test_coatnet test_convnext test_convnext2 test_efficientnet test_efficientnet_gn test_mambaout test_maxvit test_nfnet test_resnet
    test_vit resnet10t nf_resnet26 ghostnet_050 tf_mobilenetv3_small_minimal_100 tinynet_e lcnet_050 mixnet_s hardcorenas_a repvgg_a0
    edgenext_xx_small mobilevit_xxs efficientvit_b0 poolformer_s12 gernet_s skresnet18""".split()


def build(name):
    torch.manual_seed(0)
    if name in TORCHVISION:
        slow = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        extra = {"weights_backbone": None} if name.startswith("lraspp") else slow
        return torchvision.models.get_model(name, weights=None, **extra), 96
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False), 160 if name.startswith("test_") else 96


@pytest.mark.parametrize("name", TORCHVISION + TIMM)
def test_zoo(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, side = build(name)
    model.eval()
    x = torch.randn(1, 3, side, side, generator=seeded())
    expected = [n for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d) and math.prod(m.kernel_size) > 1]

    def run():
        with torch.no_grad():
            out = model(x)
        return out["out"] if isinstance(out, dict) else out

    keys = list(model.state_dict())
    assert freeze(model, init="normal", generator=seeded()) == expected and list(model.state_dict()) == keys
    table = summary(model)
    assert table.parameters.sum() == sum(p.numel() for p in model.parameters())
    assert math.isclose(frozen_share(model), inventory(model)["share"])
    before, digest = run(), frozen_hash(model)
    assert before.isfinite().all()
    assert set(swap(model, lambda conv: nn.Sequential(conv))) >= set(expected)
    assert torch.equal(run(), before), "the same convolutions in a wrapper give the same output"
    model.train()
    loss = model(torch.randn(2, 3, side, side, generator=seeded()))
    loss = loss["out"] if isinstance(loss, dict) else loss
    loss = loss if isinstance(loss, torch.Tensor) else loss[0]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    loss.square().mean().backward()
    optimiser.step()
    swap(model, lambda wrapper: wrapper[0], where=lambda n, m: type(m) is nn.Sequential and len(m) == 1 and spatial("", m[0]))
    assert frozen_hash(model) == digest, "the wrapper is gone, the names are back, no frozen bit has moved"
