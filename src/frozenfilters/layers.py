"""Linear combinations of frozen random filters, in three exact forms.

Paper: Gavrikov & Keuper, "The Power of Linear Combinations: Learning with Random Convolutions", arXiv 2301.11360. A k x k
convolution is replaced by a frozen k x k convolution F into M = rate * out_channels maps and a learned 1 x 1 convolution P
with nothing in between:

    y = P * (F * x) = W * x,      W[o, i] = sum_m P[o, m] F[m, i]      (W = P F with the filters as rows)

The last equality is ours to use: the block *is* one convolution. `execution` says how it is run, never what it computes:

    sequential   two convolutions, as the paper writes it (the reference)
    composed     W = P F first, then one convolution; exact for every optimiser
    gram         W itself is the parameter and its gradient is multiplied by S = F^T F; exact for SGD with momentum, Nesterov
                 and weight decay, since these are linear: dP = G F^T, hence dW = G F^T F = G S. Cost independent of the rate.
    auto         sequential or composed, whichever `plan` says is cheaper at this batch and image size
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import filters
from .algebra import Compose, TimesGram, bank_image, compose, plan, sample_gram

EXECUTIONS = ("auto", "sequential", "composed", "gram")
BETWEEN = (None, "relu", "bn", "bn_relu")


class LCConv2d(nn.Module):
    """A convolution whose filters are learned linear combinations of frozen ones (LC block; arXiv 2301.11360, section 3).

    Takes `nn.Conv2d`'s arguments and replaces one: input (N, in_channels, H, W), output (N, out_channels, H', W').

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `nn.Conv2d`. The bias sits on P.
        rate: the LC rate E; the bank has M = round(rate * out_channels) filters (with `depthwise`, `rate` per input channel).
        bank: what F is drawn from (a name in `filters.BANKS`, a tensor or a callable; see `filters.draw_`).
        frozen: False lets F learn too (the paper's learnable LC).
        between: None, "relu", "bn" or "bn_relu" between F and P. Anything but None can only run sequentially.
        execution: "auto", "sequential", "composed" or "gram" (see the module's text). "auto" never picks "gram".
        depthwise: F filters single channels (multiplier `rate`), P mixes all maps.
        shared: one frozen tensor (>= M, >= in_channels/groups, k, k) for many layers, entries of order 1: this layer's F is
            `in_channels^-1/2 / k` times its leading corner, and the weight aliases the shared storage.
        generator: random numbers for F and P; None uses torch's global generator, as `nn.Conv2d` does.

    Raises:
        ValueError: for an impossible combination, naming the argument and the alternative.

    >>> layer = LCConv2d(3, 8, 3, padding=1, rate=4, generator=torch.Generator().manual_seed(0))
    >>> x = torch.randn(2, 3, 6, 6)
    >>> torch.allclose(layer(x), layer.with_execution("sequential")(x), atol=1e-5)
    True
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['mix.weight']
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = False,
        *,
        rate: float = 1,
        bank="random",
        frozen: bool = True,
        between: str | None = None,
        execution: str = "auto",
        depthwise: bool = False,
        shared: Tensor | None = None,
        generator: torch.Generator | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if execution not in EXECUTIONS:
            raise ValueError(f"execution={execution!r} is not one of {EXECUTIONS}")
        if between not in BETWEEN:
            raise ValueError(f"between={between!r} is not one of {BETWEEN}")
        if not rate > 0:
            raise ValueError(f"rate={rate!r} must be positive: the bank has rate * out_channels filters")
        if between is not None and execution not in ("auto", "sequential"):
            raise ValueError(f"execution={execution!r} needs a linear block, but between={between!r}; use execution='sequential'")
        if depthwise and groups != 1:
            raise ValueError(f"depthwise=True mixes all channels and needs groups=1, not groups={groups}")
        self.rate, self.between, self.execution, self.depthwise, self.frozen = rate, between, execution, depthwise, frozen
        self.bank_groups = in_channels if depthwise else groups
        width = round(rate) * in_channels if depthwise else groups * max(1, round(rate * out_channels / groups))
        place = {"device": device, "dtype": dtype}
        if execution == "gram":
            self._init_gram(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, width, bank, generator, shared, place
            )
            return
        self.spatial = nn.Conv2d(in_channels, width, kernel_size, stride, padding, dilation, self.bank_groups, bias=False, **place)
        self.mix = nn.Conv2d(width, out_channels, 1, groups=groups, bias=bias, **place)
        self.norm = nn.BatchNorm2d(width, **place) if between in ("bn", "bn_relu") else None
        self.scale = 1.0
        if shared is not None:
            self._alias(shared)
        elif bank != "random" or generator is not None:
            filters.draw_(self.spatial.weight, bank, generator=generator)
        if generator is not None:
            filters.draw_(self.mix.weight, "random", generator=generator)
        self.spatial.weight.requires_grad_(not frozen)
        self._bank = self._cache = (None, None)  # what was last made of F, and of P and F

    def _alias(self, shared: Tensor) -> None:
        w = self.spatial.weight
        if shared.shape[0] < w.shape[0] or shared.shape[1] < w.shape[1] or shared.shape[2:] != w.shape[2:]:
            raise ValueError(f"shared={tuple(shared.shape)} is smaller than this layer's bank {tuple(w.shape)}")
        self.spatial.weight = nn.Parameter(shared.detach()[: w.shape[0], : w.shape[1]], requires_grad=False)
        self.scale = 1 / math.sqrt(w[0].numel())

    def _init_gram(
        self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, width, bank, generator, shared, place
    ):
        if not self.frozen:
            raise ValueError("execution='gram' keeps no bank, so frozen=False cannot be run; use execution='composed'")
        if groups != 1 or self.depthwise or shared is not None:
            raise ValueError("execution='gram' is for dense layers with a bank of their own; use execution='composed'")
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias, **place)
        self.mix = self.spatial = self.norm = None
        self.conv, n = conv, conv.weight[0].numel()
        if width <= 4 * n or bank not in ("random", "uniform", "normal"):
            bank_ = filters.draw_(
                conv.weight.new_empty(width, *conv.weight.shape[1:]),
                bank,
                generator=generator or torch.Generator().manual_seed(int(torch.randint(2**62, ()))),
            )
            P = filters.draw_(
                conv.weight.new_empty(out_channels, width, 1, 1),
                "random",
                generator=generator or torch.Generator().manual_seed(int(torch.randint(2**62, ()))),
            )
            W, S = compose(P, bank_), bank_.flatten(1).T @ bank_.flatten(1)
        else:
            W, S = sample_gram(out_channels, width, conv.weight.shape[1:], generator, conv.weight)
        conv.weight = nn.Parameter(W.detach().clone(memory_format=torch.channels_last))
        self.register_buffer("gram", S)
        _GRAM_LAYERS.add(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.execution == "gram":
            return self.conv._conv_forward(x, TimesGram.apply(self.conv.weight, self.gram), self.conv.bias)
        if self.between is not None or self._chosen(x) == "sequential":
            h = self.spatial(x)
            h = h if self.norm is None else self.norm(h)
            h = F.relu(h) if self.between in ("relu", "bn_relu") else h
            return self.mix(h) if self.scale == 1 else F.conv2d(h, self.mix.weight * self.scale, self.mix.bias, groups=self.mix.groups)
        s = self.spatial
        return F.conv2d(x, self.weight, self.mix.bias, s.stride, s.padding, s.dilation, self.mix.groups)

    def _chosen(self, x: Tensor) -> str:
        if self.execution != "auto":
            return self.execution
        s = self.spatial
        positions = x.shape[0] * x.shape[-2] * x.shape[-1] // (s.stride[0] * s.stride[1])
        return plan(self.rate, self.mix.out_channels, s.in_channels // self.mix.groups * s.weight[0, 0].numel(), positions, self.depthwise)

    @property
    def weight(self) -> Tensor:
        """The one convolution's filters W = P F, (out_channels, in_channels/groups, k, k), in the graph of P (and F if it learns).

        Computed once for each value of P and F in eval mode and while gradients accumulate. A change through `.data`, which torch
        does not count, is seen after the next `train()` or `eval()`.
        """
        if self.execution == "gram":
            return self.conv.weight
        if self.between is not None:
            raise ValueError(f"between={self.between!r} is not linear: this block has no single weight")
        P, F_ = self.mix.weight, self.spatial.weight
        bank, now = _version(F_), (_version(P), _version(F_))
        image, keep = self._bank[1], not torch.is_inference_mode_enabled()
        if bank != self._bank[0]:
            dense = self.frozen and not F_.requires_grad and self.bank_groups == 1
            image = bank_image(F_) if dense else None
            if keep:
                self._bank = (bank, image)
        again = not self.training or P.grad is not None  # in eval, and while gradients accumulate
        cached = self._cache[1] if again and self._cache[0] == now else None
        with torch.autocast(P.device.type, enabled=False):  # composed in the parameters' own precision
            if self.scale != 1:
                P = P * self.scale
            W = Compose.apply(P, F_, self.bank_groups, self.depthwise, image, cached)
        if keep:
            self._cache = (now, W.detach())
        return W

    def train(self, mode: bool = True) -> LCConv2d:
        """As `nn.Module.train`; forgets the composed filters."""
        if self.execution != "gram":
            self._bank = self._cache = (None, None)
        return super().train(mode)

    def fold(self) -> nn.Conv2d:
        """The plain `nn.Conv2d` of the same function, for inference, attacks and saliency. BatchNorm in between folds in eval mode.

        >>> layer = LCConv2d(3, 4, 3, rate=2, bias=True)
        >>> x = torch.randn(1, 3, 5, 5); torch.allclose(layer.fold()(x), layer(x), atol=1e-5)
        True
        """
        if self.between in ("relu", "bn_relu"):
            raise ValueError(f"between={self.between!r}: a nonlinear block is not one convolution and cannot be folded")
        if self.execution == "gram":
            source, W, bias = self.conv, self.conv.weight, self.conv.bias
        else:
            source, bias = self.spatial, self.mix.bias
            if self.norm is None:
                W = self.weight
            else:
                if self.norm.training:
                    raise ValueError("between='bn' folds only in eval mode: in training the statistics are the batch's; call .eval() first")
                s = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
                W = compose(self.mix.weight, self.spatial.weight * s.view(-1, 1, 1, 1), self.bank_groups, self.depthwise)
                shift = F.conv2d(
                    (self.norm.bias - self.norm.running_mean * s).view(1, -1, 1, 1), self.mix.weight, groups=self.mix.groups
                ).flatten()
                bias = shift if bias is None else bias + shift
        groups = 1 if self.execution == "gram" else self.mix.groups
        conv = nn.Conv2d(
            W.shape[1] * groups,
            W.shape[0],
            W.shape[2:],
            source.stride,
            source.padding,
            source.dilation,
            groups,
            bias is not None,
            device=W.device,
            dtype=W.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(W)
            if bias is not None:
                conv.bias.copy_(bias)
        return conv.train(self.training)

    def with_execution(self, execution: str) -> LCConv2d:
        """The same function in another form. Sequential, composed and auto share this layer's parameters; gram copies.

        Raises:
            ValueError: from "gram" there is no way back (the mixing weights are gone), nor from a block that is not linear.
        """
        if execution not in EXECUTIONS:
            raise ValueError(f"execution={execution!r} is not one of {EXECUTIONS}")
        if self.execution == "gram" and execution != "gram":
            raise ValueError(
                f"with_execution({execution!r}): a 'gram' layer holds no mixing weights any more, there is no way back; keep the "
                "sequential or composed layer's state_dict and load that"
            )
        if self.between is not None and execution not in ("auto", "sequential"):
            raise ValueError(f"with_execution({execution!r}): between={self.between!r} is not linear; only 'sequential' can run it")
        other = LCConv2d.__new__(LCConv2d)
        nn.Module.__init__(other)
        for name in ("rate", "between", "depthwise", "frozen", "bank_groups"):
            setattr(other, name, getattr(self, name))
        other.execution, other.training = execution, self.training
        if execution != "gram":
            other.spatial, other.mix, other.norm, other.scale, other._cache = self.spatial, self.mix, self.norm, self.scale, (None, None)
            other._bank = (None, None)
            return other
        if not self.frozen or self.mix.groups != 1 or self.depthwise:
            raise ValueError("with_execution('gram') needs a dense layer with a frozen bank; use 'composed'")
        if self.execution == "gram":
            other.conv, S = self.conv, self.gram
        else:
            f = self.spatial.weight.detach().flatten(1) * self.scale
            other.conv, S = self.fold(), f.T @ f
        other.mix = other.spatial = other.norm = None
        other.register_buffer("gram", S)
        _GRAM_LAYERS.add(other)
        return other

    def _load_from_state_dict(self, state, prefix, local, strict, missing, unexpected, errors):
        if self.execution == "gram" and f"{prefix}mix.weight" in state:  # a sequential or composed layer's state
            f, P = state.pop(f"{prefix}spatial.weight"), state.pop(f"{prefix}mix.weight")
            state[f"{prefix}conv.weight"], state[f"{prefix}gram"] = compose(P, f), f.flatten(1).T @ f.flatten(1)
            if f"{prefix}mix.bias" in state:
                state[f"{prefix}conv.bias"] = state.pop(f"{prefix}mix.bias")
        elif self.execution != "gram" and f"{prefix}gram" in state:
            errors.append(
                f"{prefix[:-1]}: this state dict was saved by execution='gram', which keeps no mixing weights: a layer with "
                f"execution={self.execution!r} cannot load it; build the layer with execution='gram'"
            )
        super()._load_from_state_dict(state, prefix, local, strict, missing, unexpected, errors)

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.execution == "gram":
            _GRAM_LAYERS.add(self)

    @classmethod
    def like(cls, conv: nn.Conv2d, **options) -> LCConv2d:
        """An LC block with the interface of `conv`: same channels, stride, padding, dilation, groups, bias, device and dtype."""
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode={conv.padding_mode!r} is not supported: LCConv2d pads with zeros")
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )

    def extra_repr(self) -> str:
        return f"rate={self.rate}, execution={self.execution!r}, between={self.between!r}, frozen={self.frozen}"


def _version(t: Tensor) -> tuple:
    """Changes whenever the tensor's values may have changed."""
    return t.data_ptr(), t._version, t.dtype, t.device, t.requires_grad


_GRAM_LAYERS: weakref.WeakSet[LCConv2d] = weakref.WeakSet()


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise if `optimizer` would train a gram layer by a rule for which G -> G S is not exact (anything but SGD).

    Called by `fit`, and before each step of every torch optimiser by a global hook.
    """
    if isinstance(optimizer, torch.optim.SGD) or not _GRAM_LAYERS:
        return
    held = {id(layer.conv.weight) for layer in _GRAM_LAYERS}
    if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"execution='gram' is exact for SGD (momentum, Nesterov, weight decay) only, not for {type(optimizer).__name__}; "
            "use execution='composed', which is exact for every optimiser"
        )


register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: check_optimizer(optimizer))
