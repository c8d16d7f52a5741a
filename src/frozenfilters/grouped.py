"""S equal networks as one, S times as wide and in S groups; members do not mix.

A tiny network spends its time between operations, not in them. Side by side, member after member along the channels, S of them
cost one network's operations: convolutions become grouped, BatchNorm gets S times the features, linear layers become one batched
product, and what acts on each channel alone stays as it is (horizontal fusion: Wang et al., arXiv 2102.02344).
"""
from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .measure import evaluating

CHANNELWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity, nn.Flatten,
               nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d)
WIDENED = {nn.Conv2d: ("in_channels", "out_channels", "groups"), nn.BatchNorm2d: ("num_features",)}

TINY = 4e6              # floating-point operations of a layer on a batch, below which 8 members as one took at most half the time of 8 (measured on a CPU)


class GroupedLinear(nn.Linear):
    """S linear layers: (N, S in_features) -> (N, S out_features), weight (S out_features, in_features)."""

    members: int

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"a linear layer on an input of shape {tuple(x.shape)} cannot be grouped; it must be (N, features)")
        x = x.unflatten(1, (self.members, -1)).transpose(0, 1)                                            # (S, N, in)
        weight = self.weight.unflatten(0, (self.members, -1)).transpose(1, 2)                             # (S, in, out)
        y = x @ weight if self.bias is None else torch.baddbmm(self.bias.view(self.members, 1, -1), x, weight)
        return y.transpose(0, 1).flatten(1)


class Grouped:
    """One network that computes what `models` compute, and the way back.

    Args:
        models: networks of the same structure, whatever their weights. They are not changed before `scatter`.
        example: images (N, C, H, W) on which the one network is compared with its members, since code between the layers
            (a concatenation, a reshape) may mix channels in a way that no inspection finds.

    Raises:
        ValueError: they cannot run as one; the message says why.

    >>> nets = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)) for _ in range(5)]
    >>> Grouped(nets, torch.rand(2, 1, 4, 4)).model
    Sequential(
      (0): Conv2d(5, 10, kernel_size=(3, 3), stride=(1, 1), groups=5)
      (1): ReLU()
      (2): Flatten(start_dim=1, end_dim=-1)
      (3): GroupedLinear(in_features=8, out_features=3, bias=True)
    )
    """

    def __init__(self, models: Sequence[nn.Module], example: Tensor):
        _alike(models)
        self.members, self.links = len(models), []           # links: (the one network's tensor, its members' tensors, dimension or None)
        self.model = copy.deepcopy(models[0])
        parts = [dict(m.named_modules()) for m in models]
        for name, module in list(self.model.named_modules()):
            self._widen(module, [p[name] for p in parts], name)
        self._check(models, example)

    def _widen(self, module: nn.Module, parts: list[nn.Module], name: str) -> None:
        kind, where = type(module), f"{name or 'the network'} ({type(module).__name__})"
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        if any(getattr(module, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")):
            raise ValueError(f"{where} has hooks, which would see all members at once")
        constants = bool(own) and not module._parameters and all(t.dim() > 1 and t.shape[0] == 1 for t in own.values())       # (1, C, 1, 1): channels.Normalize
        if kind in WIDENED:
            for attribute in WIDENED[kind]:
                setattr(module, attribute, getattr(module, attribute) * self.members)
        elif kind is nn.Linear:
            module.__class__, module.members = GroupedLinear, self.members
        elif kind in CHANNELWISE or isinstance(module, nn.Dropout | nn.Dropout2d) and module.p == 0 or constants:
            pass
        elif own or not list(module.children()):
            raise ValueError(f"{where} is no layer that can be grouped")
        elif hasattr(module, "bank_groups"):                 # an LC block: P F in groups
            if module.depthwise:
                raise ValueError(f"{where}: depthwise LC blocks mix all channels and cannot be grouped")
            module.bank_groups = module.bank_groups * self.members
            module._bank = module._cache = (None, None)
        for key, tensor in own.items():
            theirs = [getattr(p, key) for p in parts]
            dim = None if tensor.dim() == 0 else 1 if constants else 0
            wide = tensor.detach().clone() if dim is None else torch.cat([t.detach() for t in theirs], dim)
            if key in module._parameters:
                module._parameters[key] = wide = nn.Parameter(wide, requires_grad=tensor.requires_grad)
            else:
                module._buffers[key] = wide
            self.links.append((wide, theirs, dim))

    @torch.no_grad()
    def _check(self, models: Sequence[nn.Module], example: Tensor) -> None:
        x = [example.roll(i, 0) * (0.5 + 0.5 * i / self.members) for i in range(self.members)]            # another input for each member
        with evaluating(self.model):
            try:
                together = self.model(torch.cat(x, 1)).unflatten(1, (self.members, -1))
            except (RuntimeError, ValueError, IndexError) as error:
                raise ValueError(f"{type(models[0]).__name__} does not run on members side by side: {error}") from error
        for i, model in enumerate(models):
            with evaluating(model):
                alone = model(x[i])
            mine, size = together[:, i], alone.nan_to_num(0, 0, 0).abs().max().item()
            if alone.shape != mine.shape or not torch.allclose(mine, alone, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
                raise ValueError(f"{type(models[0]).__name__} mixes channels between its layers (a concatenation or reshape?): side by side its members differ")

    @torch.no_grad()
    def scatter(self) -> None:
        """Write what the one network has learned into its members."""
        for wide, theirs, dim in self.links:
            for mine, tensor in zip([wide] * self.members if dim is None else wide.chunk(self.members, dim), theirs, strict=True):
                tensor.copy_(mine)


def _alike(models: Sequence[nn.Module]) -> None:
    """Raise unless the networks have one structure: types and arguments of all layers, shapes, precision and what is frozen."""
    def form(model: nn.Module) -> tuple:
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        return repr(model), [(name, t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors]
    first = form(models[0])
    for i, model in enumerate(models[1:], 1):
        if form(model) != first:
            raise ValueError(f"members 0 and {i} differ in structure, shape, precision or what is frozen")
    names = [id(p) for p in models[0].parameters()]
    if len(names) != sum(1 for _ in models[0].named_parameters(remove_duplicate=False)):
        raise ValueError(f"{type(models[0]).__name__} ties parameters between layers")


def tiny(model: nn.Module, example: Tensor, batch_size: int) -> bool:
    """Whether `model`'s time goes into the number of its operations, not into them: little work in each layer, on a CPU.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
    >>> tiny(net, torch.zeros(1, 3, 8, 8), batch_size=16), tiny(net, torch.zeros(1, 3, 64, 64), batch_size=16)
    (True, False)
    """
    with evaluating(model), torch.no_grad(), _Work() as work:
        model(example)
    return example.device.type == "cpu" and work.total * batch_size < TINY * max(work.layers, 1) * len(example)


class _Work(TorchFunctionMode):
    """Counts floating-point operations of convolutions and linear layers. (`measure.flops` counts all, but needs seconds to be imported.)"""

    total = layers = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.conv2d, F.linear):
            self.total, self.layers = self.total + 2 * result.numel() * args[1][0].numel(), self.layers + 1
        return result
