"""Look at a network without changing it: which layers a rule picks, what is frozen, and whether it stayed frozen.

"All spatial filters frozen" means 98 % of the parameters of a resnet18 and 5 % of those of an efficientnet_b0, so every table of the study prints
:func:`inventory`'s share (ExplainFix, arXiv 2303.10408). *Spatial* is a convolution with any kernel side above 1: what mixes pixels.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas

Rule = Callable[[str, nn.Module], bool]
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_spatial(module: nn.Module) -> bool:
    """Whether it is a Conv1d or Conv2d (or a subclass) with any kernel side above 1.

    >>> is_spatial(nn.Conv2d(3, 8, (1, 3))), is_spatial(nn.Conv2d(3, 8, 1)), is_spatial(nn.ConvTranspose2d(3, 8, 2))
    (True, False, False)
    """
    return isinstance(module, nn.Conv1d | nn.Conv2d) and max(module.kernel_size) > 1


def spatial(name: str, module: nn.Module) -> bool:
    """The default rule: :func:`is_spatial`, whatever the name.

    >>> spatial("stem", nn.Conv2d(3, 8, 3))
    True
    """
    return is_spatial(module)


def depthwise(name: str, module: nn.Module) -> bool:
    """A rule for spatial convolutions that filter each input channel by itself (groups = input channels > 1).

    >>> depthwise("", nn.Conv2d(8, 16, 3, groups=8)), depthwise("", nn.Conv2d(8, 8, 3))
    (True, False)
    """
    return is_spatial(module) and module.groups == module.in_channels > 1


def layers(model: nn.Module, where: Rule = spatial) -> dict[str, nn.Module]:
    """Every module that the rule picks, by name, in ``named_modules`` order; a module tied to several places comes once.

    Raises:
        ValueError: none matched; the message lists the convolutions that were seen.

    >>> list(layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))))
    ['0']
    """
    found = {name: module for name, module in model.named_modules() if where(name, module)}
    if not found:
        seen = [f"{name or '(root)'}: {describe(module)}" for name, module in model.named_modules() if _convolution(module)]
        seen = "; ".join(seen[:20]) + (f"; and {len(seen) - 20} more" if len(seen) > 20 else "") if seen else "no convolution at all"
        rule = getattr(where, "__name__", where)
        raise ValueError(f"where={rule} matched no layer of {type(model).__name__}. It has: {seen}. Give another rule where(name, module)")
    return found


def _convolution(module: nn.Module) -> bool:
    return isinstance(module, _CONV) or "Conv" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor)


def describe(module: nn.Module) -> str:
    """Type and kernel for messages.

    >>> describe(nn.Conv2d(3, 3, (1, 5)))
    'Conv2d 1x5'
    """
    size = getattr(module, "kernel_size", None)
    return type(module).__name__ + (" " + "x".join(map(str, size)) if isinstance(size, tuple) else "")


def own_weight(name: str, module: nn.Module) -> nn.Parameter:
    """The module's own parameter ``weight``; a ValueError if it has none, or if something else computes it."""
    weight = module._parameters.get("weight")
    if weight is None:
        computed = ", it is computed (remove the parametrization or weight norm first)" if hasattr(module, "weight") else ""
        raise ValueError(f"layer {name!r} ({type(module).__name__}) owns no parameter called weight{computed}; narrow where=")
    return weight


def frozen_share(model: nn.Module) -> float:
    """Frozen parameters divided by all parameters, in numbers (not tensors).

    >>> from frozenfilters.surgery import freeze
    >>> net = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Conv2d(1, 1, 1, bias=False)); _ = freeze(net)
    >>> frozen_share(net)
    0.9
    """
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if not p.requires_grad) / max(total, 1)


def frozen_hash(model: nn.Module) -> str:
    """sha256 over the names and bytes of all frozen parameters, in name order: equal before and after training, or something moved.

    >>> from frozenfilters.surgery import freeze
    >>> net = nn.Sequential(nn.Conv2d(1, 1, 3)); _ = freeze(net); before = frozen_hash(net)
    >>> _ = net[0].weight.data.mul_(2); frozen_hash(net) == before
    False
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters(), key=lambda item: item[0]):
        if not p.requires_grad:
            digest.update(f"{name}\0{p.dtype}\0{tuple(p.shape)}\0".encode())
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def inventory(model: nn.Module, where: Rule = spatial) -> dict[str, int | float]:
    """What a rule would freeze: ``layers``, ``kernels`` (k x k slices, O x I/g per layer), ``spatial`` and ``parameters`` (numbers), ``share``.

    >>> inventory(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 27, 1, bias=False)))
    {'layers': 1, 'kernels': 24, 'spatial': 216, 'parameters': 432, 'share': 0.5}
    """
    weights = [own_weight(name, module) for name, module in layers(model, where).items()]
    kernels, numbers = sum(w.shape[0] * w.shape[1] for w in weights), sum(w.numel() for w in weights)
    total = sum(p.numel() for p in model.parameters())
    return {"layers": len(weights), "kernels": kernels, "spatial": numbers, "parameters": total, "share": numbers / total}


def stored(model: nn.Module) -> int:
    """How many numbers the frozen parameters occupy in memory: each storage counted once, so that shared filters count once.

    >>> from frozenfilters.surgery import freeze
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)); _ = freeze(net); stored(net)
    216
    """
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() // p.element_size() for p in model.parameters() if not p.requires_grad}
    return sum(storages.values())


def summary(model: nn.Module) -> "pandas.DataFrame":
    """One row for every layer that owns parameters.

    Returns:
        Columns ``layer``, ``type``, ``kernel`` ("3x3", empty for other layers), ``filters`` (k x k slices, O x I/g), ``frozen`` (is its weight frozen),
        ``parameters`` (numbers; tied ones are counted where they come first), ``share`` (of all parameters; sums to 1) and ``note``, which says what a reader
        would otherwise trip over: a transposed or 3-D convolution that the default rule leaves learned, a learned bias, a tied or shared weight.

    >>> from frozenfilters.surgery import freeze
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 1, 2)); _ = freeze(net)
    >>> summary(net)[["layer", "kernel", "filters", "frozen", "note"]].to_string(index=False).splitlines()[2].split(maxsplit=4)
    ['1', '2x2', '8', 'False', 'transposed: left learned']
    """
    import pandas

    total = max(sum(p.numel() for p in model.parameters()), 1)
    places = Counter(p.untyped_storage().data_ptr() for p in model.parameters())
    rows, owner = [], {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        weight, convolution = own.get("weight"), _convolution(module)
        parameters = sum(p.numel() for p in own.values() if id(p) not in owner)
        rows.append(
            {
                "layer": name,
                "type": type(module).__name__,
                "kernel": "x".join(map(str, module.kernel_size)) if isinstance(getattr(module, "kernel_size", None), tuple) else "",
                "filters": weight.shape[0] * weight.shape[1] if convolution and weight is not None and weight.ndim > 2 else 0,
                "frozen": not (weight if weight is not None else next(iter(own.values()))).requires_grad,
                "parameters": parameters,
                "share": parameters / total,
                "note": "; ".join(_notes(module, own, owner, places)),
            }
        )
        owner.update({id(p): name for p in own.values() if id(p) not in owner})
    return pandas.DataFrame(rows, columns=["layer", "type", "kernel", "filters", "frozen", "parameters", "share", "note"])


def _notes(module: nn.Module, own: dict[str, nn.Parameter], owner: dict[int, str], places: Counter) -> list[str]:
    notes, weight = [], own.get("weight")
    if _convolution(module) and max(getattr(module, "kernel_size", None) or (1,)) > 1 and not is_spatial(module):
        kind = "transposed" if "Transpose" in type(module).__name__ else "3-D" if isinstance(module, nn.Conv3d) else "not a Conv1d or Conv2d"
        notes.append(f"{kind}: " + ("left learned" if weight is None or weight.requires_grad else "frozen by another rule"))
    if is_spatial(module) and weight is None:
        notes.append("weight is computed (parametrization): cannot be frozen as it is")
    if weight is not None and not weight.requires_grad and any(p.requires_grad for p in own.values()):
        notes.append(f"{', '.join(n for n, p in own.items() if p.requires_grad)} learned")
    if weight is not None and id(weight) in owner:
        notes.append(f"weight tied to {owner[id(weight)]}")
    elif weight is not None and places[weight.untyped_storage().data_ptr()] > 1:
        notes.append("storage shared")
    return notes
