"""How the tensors of a supported module form local problems: matrices ``[N, K]`` and rows ``[B, K]``, one per group."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locoprop_kernels.patches import Patches, Rows

__all__ = [
    "GroupedLinear",
    "Layout",
    "join_state",
    "laid_out",
    "layout_of",
    "number_of_groups",
    "split_state",
    "supported_modules",
    "tied_layers",
]


class GroupedLinear(nn.Module):
    """``G`` linear layers side by side, as in mixtures of experts and block MLPs: ``y[g] = x[g] W[g]ᵀ + b[g]``.

    Args:
        groups: ``G``.
        in_features: ``K``.
        out_features: ``N``.
        bias: whether there is a bias.

    Shapes: input ``[G, ..., K]``, output ``[G, ..., N]``, weight ``[G, N, K]``, bias ``[G, N]``.
    """

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.in_features, self.out_features = groups, in_features, out_features
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(groups, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``: uniform within ``±1/√K``."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[G, ..., K]`` to ``[G, ..., N]``."""
        if x.dim() < 2 or x.shape[0] != self.groups or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [{self.groups}, ..., {self.in_features}], got {list(x.shape)}")
        rows = x.reshape(self.groups, -1, self.in_features)
        if self.bias is None:
            y = torch.bmm(rows, self.weight.mT)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.mT)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"groups={self.groups}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class Layout(ABC):
    """One kind of module. Every method returns one entry per group."""

    #: Dimension of the output, not counting from the end where positive, that holds the features ``N``.
    feature_dim = -1

    @abstractmethod
    def weights(self, tensor: Tensor) -> list[Tensor]:
        """Views ``[N, K]`` of a tensor with the weight's shape and strides."""

    @abstractmethod
    def biases(self, tensor: Tensor) -> list[Tensor]:
        """Views ``[N]`` of a tensor with the bias's shape."""

    @abstractmethod
    def inputs(self, x: Tensor) -> list[Tensor | Rows]:
        """Rows ``[B, K]`` of an input of the module."""

    @abstractmethod
    def outputs(self, a: Tensor) -> list[Tensor]:
        """Rows ``[B, N]`` of an output of the module."""

    def split(self, kind: str) -> Callable[[Tensor], list[Tensor]]:
        """:meth:`weights` or :meth:`biases`, by ``kind``: ``"weight"`` or ``"bias"``."""
        return self.weights if kind == "weight" else self.biases


class _LinearLayout(Layout):
    def __init__(self, module: nn.Linear) -> None:
        pass

    def weights(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def biases(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def inputs(self, x: Tensor) -> list[Tensor | Rows]:
        return [x.reshape(-1, x.shape[-1])]

    def outputs(self, a: Tensor) -> list[Tensor]:
        return [a.reshape(-1, a.shape[-1])]


class _GroupedLinearLayout(Layout):
    def __init__(self, module: GroupedLinear) -> None:
        pass

    def weights(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.unbind())

    def biases(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.unbind())

    def inputs(self, x: Tensor) -> list[Tensor | Rows]:
        return [rows.reshape(-1, x.shape[-1]) for rows in x.unbind()]

    def outputs(self, a: Tensor) -> list[Tensor]:
        return [rows.reshape(-1, a.shape[-1]) for rows in a.unbind()]


class _ConvLayout(Layout):
    """A convolution: the examples are the positions of the output, the inputs their patches."""

    feature_dim = 1

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.module = module
        weight = module.weight
        self.channels_last = not weight.is_contiguous()
        if self.channels_last and not weight.movedim(1, -1).is_contiguous():
            raise ValueError(
                f"weight of a convolution must be contiguous or channels-last, got strides {weight.stride()}: "
                "assign weight.contiguous() to it"
            )

    def weights(self, tensor: Tensor) -> list[Tensor]:
        columns = tensor.movedim(1, -1) if self.channels_last else tensor
        return list(columns.view(self.module.groups, tensor.shape[0] // self.module.groups, -1).unbind())

    def biases(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.view(self.module.groups, -1).unbind())

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == self.module.weight.dim() else x.unsqueeze(0)

    def inputs(self, x: Tensor) -> list[Tensor | Rows]:
        module = self.module
        x = self._pad(self._batched(x))
        parts = x.chunk(module.groups, 1) if module.groups > 1 else [x]
        return [Patches(part, module.kernel_size, module.stride, module.dilation, self.channels_last) for part in parts]

    def _pad(self, x: Tensor) -> Tensor:
        module = self.module
        if module.padding == "valid":
            return x
        amounts: list[int] = []  # of the last dimension first, as F.pad wants it
        for i in reversed(range(len(module.kernel_size))):
            if module.padding == "same":
                total = module.dilation[i] * (module.kernel_size[i] - 1)
                amounts += [total // 2, total - total // 2]
            else:
                amounts += [int(module.padding[i])] * 2
        if not any(amounts):
            return x
        return F.pad(x, amounts, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)

    def outputs(self, a: Tensor) -> list[Tensor]:
        rows = self._batched(a).movedim(1, -1).flatten(0, -2)
        return list(rows.chunk(self.module.groups, 1))


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedLinear)
_LAYOUTS: dict[type[nn.Module], Callable[[Any], Layout]] = {
    nn.Linear: _LinearLayout,
    nn.Conv1d: _ConvLayout,
    nn.Conv2d: _ConvLayout,
    nn.Conv3d: _ConvLayout,
    GroupedLinear: _GroupedLinearLayout,
}


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module that LocoProp can train, ``None`` for any other.

    A subclass counts where it has its parent's ``forward``; the weight must be a parameter of its own.

    Raises:
        ValueError: the module is of a supported kind, but its weight has strides that are not.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # MultiheadAttention reads its weight without calling it
    for kind, layout in _LAYOUTS.items():
        if (
            isinstance(module, kind)
            and type(module).forward is kind.forward
            and isinstance(module.weight, nn.Parameter)
        ):
            return layout(module)
    return None


def supported_modules(model: nn.Module) -> dict[str, Any]:
    """The modules of ``model`` that LocoProp can train, by name.

    Raises:
        ValueError: one of them has no shape yet, or strides that are not supported.
    """
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, _KINDS):
            if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
                raise ValueError(f"layer {name!r} is lazy: run a forward pass before you build the optimiser")
            if layout_of(module) is not None:
                modules[name] = module
    return modules


def tied_layers(modules: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``modules`` grouped by their weight: a group shares one parameter.

    Raises:
        ValueError: layers that share their weight have different biases or shapes of groups, or layers share a bias
            alone.
    """
    groups: dict[int, dict[str, Any]] = {}
    for name, module in modules.items():
        groups.setdefault(id(module.weight), {})[name] = module
    owners: dict[int, str] = {}
    for group in groups.values():
        name, first = next(iter(group.items()))
        for other, module in group.items():
            if module.bias is not first.bias:
                raise ValueError(f"layers {name!r} and {other!r} share their weight, so they must share their bias too")
            if type(module) is not type(first) or getattr(module, "groups", 1) != getattr(first, "groups", 1):
                raise ValueError(f"layers {name!r} and {other!r} share their weight, so they must be of one kind")
        for parameter in first.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(f"layers {other!r} and {name!r} share a bias, so they must share their weight too")
    return list(groups.values())


def laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor`` with the strides of ``parameter``, whose shape it has."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def number_of_groups(module: nn.Module) -> int:
    """How many local problems a supported module forms."""
    return module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedLinear)) else 1


def split_state(
    split: Callable[[Tensor], list[Tensor]], parameter: Tensor, state: dict[str, Any]
) -> list[dict[str, Any]]:
    """An update rule's state of ``parameter``, its slots shaped like it, as one state per group: views if possible."""
    states: list[dict[str, Any]] = [{} for _ in split(parameter)]
    for slot, value in state.items():
        fits = value.dim() and value.shape == parameter.shape
        parts = split(laid_out(value, parameter)) if fits else [value] * len(states)
        for group, part in zip(states, parts, strict=True):
            group[slot] = part
    return states


def join_state(
    split: Callable[[Tensor], list[Tensor]],
    parameter: Tensor,
    stored: dict[str, Any],
    states: Iterable[dict[str, Any]],
) -> dict[str, Any]:
    """The reverse of :func:`split_state`; a slot of ``stored`` that the groups have written into is kept as it is."""
    groups = list(states)
    joined: dict[str, Any] = {}
    for slot, first in groups[0].items():
        old = stored.get(slot)
        if first.dim() == 0 or first.shape == parameter.shape:
            joined[slot] = first
        elif old is not None and old.stride() == parameter.stride() and split(old)[0].data_ptr() == first.data_ptr():
            joined[slot] = old
        else:
            joined[slot] = torch.empty_like(parameter, dtype=first.dtype)
            for target, group in zip(split(joined[slot]), groups, strict=True):
                target.copy_(group[slot])
    return joined
