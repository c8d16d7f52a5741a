"""Surgery on any network: freeze, thaw, swap or share its spatial filters, and say what was done.

A frozen filter is a flag: an ordinary convolution whose weight has ``requires_grad=False``. Same class, same ``state_dict``, every other tool still sees it.
*Spatial* is a convolution with any kernel side above 1 (ExplainFix, arXiv 2303.10408; The Power of Linear Combinations, arXiv 2301.11360): what mixes pixels.
1 x 1 convolutions, linear layers and normalisation stay learned, and so do transposed and 3-D convolutions, which :func:`summary` says. What only looks at a
model (the rules, ``summary``, ``frozen_hash``) lives in ``audit`` and can be had from here too.

Every function takes a rule ``where(name, module) -> bool``, changes the model in place and returns the names that it changed. Nothing is printed; a rule that
matched nothing raises, since a freeze that did nothing is the commonest bug of this kind.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from .audit import Rule, depthwise, describe, frozen_hash, frozen_share, inventory, is_spatial, layers, own_weight, spatial, stored, summary
from .fills import need, rand, spawn
from .filters import Bank, draw_

__all__ = [
    "Rule", "depthwise", "freeze", "frozen_hash", "frozen_share", "inventory", "is_spatial", "layers", "share", "spatial", "stored", "summary",
    "swap", "thaw", "thawed",
]  # fmt: skip


def freeze(
    model: nn.Module,
    where: Rule = spatial,
    *,
    init: Bank | Mapping[str, Bank] | None = None,
    generator: torch.Generator | None = None,
    gain: str | float | None = None,
    legacy: bool = False,
    bias: bool = False,
) -> list[str]:
    """Freeze the weights of the matched layers in place, refilled from a bank first if ``init`` is given.

    Args:
        model: any module.
        where: rule ``(name, module) -> bool``.
        init: a bank for :func:`frozenfilters.filters.draw_`, or a mapping ``{layer name: bank}``; None keeps the weights. Banks that change with depth are
            told the layer's rank among the matched ones, scaled to 0 .. 1.
        generator: each layer draws from its own stream, derived from this one in layer order, so that its filters do not depend on the sizes of others.
        gain, legacy: see :func:`frozenfilters.filters.draw_`.
        bias: freeze the bias as well (ExplainFix does).

    Returns:
        The names of the frozen layers. Normalisation layers and their running statistics are not touched.

    Raises:
        ValueError: nothing matched, a matched layer has no weight of its own, or the bank cannot fill a layer (the model is then unchanged).

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    >>> freeze(net, init="dct", generator=torch.Generator().manual_seed(0))
    ['0']
    >>> [name for name, p in net.named_parameters() if not p.requires_grad]
    ['0.weight']
    """
    found = layers(model, where)
    for name, module in found.items():
        own_weight(name, module)
    if init is not None:
        if isinstance(init, Mapping) and (missing := [name for name in found if name not in init]):
            raise ValueError(f"init has no bank for {missing}; give one for every layer that where= matches, or a narrower rule")
        fresh = []
        for rank, (name, module) in enumerate(found.items()):
            bank = init[name] if isinstance(init, Mapping) else init
            stream = None if generator is None else spawn(generator)
            try:
                depth = rank / max(len(found) - 1, 1)
                fresh.append(draw_(module.weight.detach().clone(), bank, generator=stream, gain=gain, legacy=legacy, depth=depth))
            except ValueError as error:
                raise ValueError(f"layer {name!r} ({describe(module)}): {error}") from error
        with torch.no_grad():
            for module, weight in zip(found.values(), fresh, strict=True):
                module.weight.copy_(weight)
    for module in found.values():
        for parameter in [module.weight] + ([module.bias] if bias and getattr(module, "bias", None) is not None else []):
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimiser moves whatever has a gradient, frozen or not
    return list(found)


def thaw(model: nn.Module, where: Rule | None = None) -> list[str]:
    """Make frozen parameters learnable again, all of them or those of the matched layers.

    Returns:
        The names of the layers that had something frozen.

    Raises:
        ValueError: a rule was given and matched nothing.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3)); _ = freeze(net)
    >>> thaw(net), net[0].weight.requires_grad
    (['0'], True)
    """
    changed = []
    for name, module in (dict(model.named_modules()) if where is None else layers(model, where)).items():
        frozen = [p for p in module.parameters(recurse=False) if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
        for parameter in frozen:
            parameter.requires_grad_(True)
        if frozen:
            changed.append(name)
    return changed


@contextlib.contextmanager
def thawed(model: nn.Module) -> Iterator[nn.Module]:
    """Everything learnable inside the block, as before afterwards, also after an exception: for tools that silently skip frozen weights.

    Flags are restored by name, so a tool may replace the parameters (a pruner does). Gradients that frozen parameters got inside are dropped, else an
    optimiser would move them.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3)); _ = freeze(net)
    >>> with thawed(net):
    ...     net[0].weight.requires_grad
    True
    >>> net[0].weight.requires_grad
    False
    """
    before = {name: (p, p.requires_grad, p.grad) for name, p in model.named_parameters(remove_duplicate=False)}
    for parameter, _, _ in before.values():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    try:
        yield model
    finally:
        now = dict(model.named_parameters(remove_duplicate=False))
        for name, (old, flag, grad) in before.items():
            for parameter in {id(p): p for p in (old, now.get(name, old))}.values():
                parameter.requires_grad_(flag)
                if not flag:
                    parameter.grad = grad if parameter is old else None


def swap(model: nn.Module, make: Callable[[nn.Module], nn.Module], where: Rule = spatial) -> list[str]:
    """Replace every matched module by ``make(module)``, in place, in any model.

    A module tied to several places is made once and stays tied. What lies inside a replaced module is not visited. The new module takes over the train or
    eval mode. All new modules are made before the first is put in, so an exception in ``make`` leaves the model as it was.

    Args:
        make: for instance ``LCConv2d.like``; may return its argument to keep it.

    Returns:
        The names of all replaced places.

    Raises:
        ValueError: nothing matched, or the model itself matched (there is no parent to put the new one into).
        TypeError: ``make`` did not return a module.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> swap(net, lambda conv: nn.Sequential(conv, nn.Conv2d(8, 8, 1)))
    ['0']
    """
    layers(model, where)
    if where("", model):
        raise ValueError(f"the model itself is the {type(model).__name__} to swap and has no parent; use make(model), or wrap it: nn.Sequential(model)")
    made: dict[int, nn.Module] = {}
    places: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not where(name, module) or any(name.startswith(outer + ".") for outer in places):
            continue
        if id(module) not in made:
            made[id(module)] = make(module)
            if not isinstance(made[id(module)], nn.Module):
                raise TypeError(f"make returned {type(made[id(module)]).__name__} for layer {name!r}; it must return a module")
        if made[id(module)] is not module:
            places[name] = made[id(module)].train(module.training)
    for name, new in places.items():
        model.set_submodule(name, new)
    return list(places)


@torch.no_grad()
def share(model: nn.Module, where: Rule = spatial, *, generator: torch.Generator | None = None, scale: bool = True) -> list[str]:
    """Freeze all matched layers to slices of one random tensor: weight sharing over depth (arXiv 2301.11360, version 1).

    ``W_l = s_l Wsh[:M_l, :C_l]`` with ``Wsh ~ U[-1, 1]`` of shape ``(max M, max C, *kernel)``, one tensor per kernel size, and
    ``s_l = 1 / sqrt(C_l prod(kernel))``, so that every layer has PyTorch's default distribution. M_l are the layer's filters, C_l its inputs per group. That
    slices start at the corner is our reading.

    Each weight stays an ordinary parameter and holds the *scaled* filters, so that whatever reads ``conv.weight`` is right. Layers with the same C_l have the
    same s_l and alias one storage; layers with another C_l hold multiples of the same numbers in a storage of their own. With ``scale=False``, s_l = 1 and
    every slice aliases the one tensor: as good where a normalisation follows each convolution and removes the scale. :func:`stored` counts what is
    kept. ``torch.save`` keeps the aliasing; ``copy.deepcopy`` and ``model.to(device)`` give each layer its copy, so move the model first.

    Returns:
        The names of the layers. Raises ValueError if nothing matched or ``generator`` is None.

    >>> net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False))
    >>> share(net, generator=torch.Generator().manual_seed(0)), torch.allclose(net[1].weight[:, :4] * 2**0.5, net[0].weight)
    (['0', '1'], True)
    """
    found = layers(model, where)
    need(generator, "share")
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, module in found.items():
        weight = own_weight(name, module)
        groups.setdefault((tuple(weight.shape[2:]), weight.dtype, weight.device), []).append(weight)
    for (kernel, dtype, device), members in groups.items():
        rows, columns = max(w.shape[0] for w in members), max(w.shape[1] for w in members)
        whole = rand(rows, columns, *kernel, generator=spawn(generator), low=-1)
        slices: dict[int, torch.Tensor] = {}
        for weight in members:
            inputs = weight.shape[1] if scale else columns
            if inputs not in slices:
                height = max(w.shape[0] for w in members if not scale or w.shape[1] == inputs)
                factor = 1 / math.sqrt(inputs * math.prod(kernel)) if scale else 1.0
                slices[inputs] = (whole[:height, :inputs] * factor).to(device, dtype, memory_format=torch.contiguous_format)
            weight.data = slices[inputs][: weight.shape[0], : weight.shape[1]]
    for module in found.values():
        module.weight.requires_grad_(False)
        module.weight.grad = None
    return list(found)
