"""How the tensors of a supported module form a local problem: ``[N, K]`` on rows ``[B, K]``, or ``G`` of them."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locoprop_kernels.patches import CHUNK_BYTES, Patches, Rows
from locoprop_torch.masks import trained_parameters, trained_weight
from locoprop_torch.modules import GroupedLinear

__all__ = [
    "Layout",
    "laid_out",
    "layout_class",
    "layout_of",
    "number_of_groups",
    "supported_modules",
    "tied_layers",
]


class Layout(ABC):
    """How one kind of module forms a local problem: ``[N, K]`` on ``[B, K]``, or ``G`` of them side by side."""

    #: Dimension of the output, not counting from the end where positive, that holds the features ``N``.
    feature_dim = -1
    #: Whether the parameters of the problem have other shapes than the module's.
    reshapes = False

    def weight(self, tensor: Tensor) -> Tensor:
        """A tensor with the weight's shape and strides as a view ``[N, K]`` or ``[G, N, K]``."""
        return tensor

    def bias(self, tensor: Tensor) -> Tensor:
        """A tensor with the bias's shape as a view ``[N]`` or ``[G, N]``."""
        return tensor

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor | Rows:
        """Rows ``[B, K]`` or ``[G, B, K]`` of an input of the module."""

    @abstractmethod
    def outputs(self, a: Tensor) -> Tensor | Rows:
        """Rows ``[B, N]`` or ``[G, B, N]`` of an output of the module."""

    def rows(self, x: Tensor, a: Tensor) -> tuple[Tensor | Rows, Tensor | Rows]:
        """:meth:`inputs` and :meth:`outputs` of one call of the module."""
        return self.inputs(x), self.outputs(a)

    def features(self, a: Tensor, some: slice) -> Tensor:
        """Some of the features of an output of the module."""
        return a[..., some]

    def view(self, kind: str, tensor: Tensor) -> Tensor:
        """:meth:`weight` or :meth:`bias`, by ``kind``: ``"weight"`` or ``"bias"``."""
        return self.weight(tensor) if kind == "weight" else self.bias(tensor)


class _LinearLayout(Layout):
    """A linear layer: the examples are all but the last dimension."""

    def __init__(self, module: nn.Linear) -> None:
        pass

    def inputs(self, x: Tensor) -> Tensor:
        return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def outputs(self, a: Tensor) -> Tensor:
        return self.inputs(a)


class _GroupedLinearLayout(Layout):
    """Linear layers side by side: the examples are all but the first and the last dimension."""

    def __init__(self, module: GroupedLinear) -> None:
        pass

    def inputs(self, x: Tensor) -> Tensor:
        return x if x.dim() == 3 else x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])

    def outputs(self, a: Tensor) -> Tensor:
        return self.inputs(a)


class _ConvLayout(Layout):
    """A convolution: the examples are the positions of the output, the inputs their patches."""

    feature_dim = 1
    reshapes = True

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.module = module
        weight = trained_weight(module)
        self.channels_last = not weight.is_contiguous()
        if self.channels_last and not weight.movedim(1, -1).is_contiguous():
            raise ValueError(
                f"weight of a convolution must be contiguous or channels-last, got strides {weight.stride()}: "
                "assign weight.contiguous() to it"
            )

    def weight(self, tensor: Tensor) -> Tensor:
        columns = tensor.movedim(1, -1) if self.channels_last else tensor
        groups = self.module.groups
        rows = len(tensor) // groups
        return columns.view(groups, rows, -1) if groups > 1 else columns.view(rows, -1)

    def bias(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.module.groups, -1) if self.module.groups > 1 else tensor

    def features(self, a: Tensor, some: slice) -> Tensor:
        return a.movedim(-1 - len(self.module.kernel_size), 0)[some].movedim(0, -1 - len(self.module.kernel_size))

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == 2 + len(self.module.kernel_size) else x.unsqueeze(0)

    def inputs(self, x: Tensor) -> Rows:
        return _PaddedPatches(self.module, self._batched(x), self.channels_last)

    def outputs(self, a: Tensor) -> Rows:
        return _Positions(self._batched(a), self.module.groups)


class _PaddedPatches(Rows):
    """The patches of a convolution's unpadded input, which is padded when rows are asked for, and not before."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, channels_last: bool) -> None:
        self.module, self.x, self.channels_last = module, x, channels_last
        groups = module.groups
        positions = 1
        for i, (left, right) in enumerate(self._padding()):
            size = x.shape[2 + i] + left + right - module.dilation[i] * (module.kernel_size[i] - 1) - 1
            positions *= size // module.stride[i] + 1
        lead = (groups,) if groups > 1 else ()
        columns = x.shape[1] // groups * math.prod(module.kernel_size)
        super().__init__((*lead, len(x) * positions, columns), x.dtype, x.device)

    def _padding(self) -> list[tuple[int, int]]:
        """Left and right padding of each spatial dimension."""
        module = self.module
        if module.padding == "valid":
            return [(0, 0)] * len(module.kernel_size)
        if module.padding == "same":
            totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(int(amount), int(amount)) for amount in module.padding]

    def _patches(self, x: Tensor, groups: int) -> Patches:
        module = self.module
        # F.pad wants the last dimension first.
        amounts = [amount for pair in reversed(self._padding()) for amount in pair]
        if any(amounts):
            x = F.pad(x, amounts, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        sizes = (module.kernel_size, module.stride, module.dilation)
        return Patches(x, *sizes, self.channels_last, groups if groups > 1 else None)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        return self._patches(self.x, self.module.groups).chunks(max_bytes)

    def every(self, start: int, step: int) -> Tensor:
        return self._patches(self.x, self.module.groups).every(start, step)

    def several(self, starts: Sequence[int], step: int) -> Tensor:
        return self._patches(self.x, self.module.groups).several(starts, step)

    def group(self, index: int) -> Patches:
        return self._patches(self.x.chunk(self.module.groups, 1)[index], 1)


class _Positions(Rows):
    """The output of a convolution, one row per position; copied when rows are asked for, and not before."""

    def __init__(self, a: Tensor, groups: int) -> None:
        self.a, self.groups = a, groups
        rows, columns = len(a) * math.prod(a.shape[2:]), a.shape[1] // groups
        super().__init__((groups, rows, columns) if groups > 1 else (rows, columns), a.dtype, a.device)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        step = max(1, max_bytes // max(1, self.a[0].numel() * self.dtype.itemsize))
        for part in self.a.split(step):
            rows = part.movedim(1, -1).flatten(0, -2)
            yield rows.unflatten(1, (self.groups, -1)).movedim(1, 0) if self.groups > 1 else rows

    def every(self, start: int, step: int) -> Tensor:
        rows = torch.arange(min(start, self.shape[-2]), self.shape[-2], step, device=self.device)
        found = self.a.movedim(1, -1)[torch.unravel_index(rows, (len(self.a), *self.a.shape[2:]))]
        return found.unflatten(1, (self.groups, -1)).movedim(1, 0) if self.groups > 1 else found

    def group(self, index: int) -> _Positions:
        return _Positions(self.a.chunk(self.groups, 1)[index], 1)


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedLinear)
_LAYOUTS: dict[type[nn.Module], Callable[[Any], Layout]] = {
    nn.Linear: _LinearLayout,
    nn.Conv1d: _ConvLayout,
    nn.Conv2d: _ConvLayout,
    nn.Conv3d: _ConvLayout,
    GroupedLinear: _GroupedLinearLayout,
}


def _computes_as(kind: type[nn.Module], module: nn.Module) -> bool:
    """Whether a module of this kind computes what the kind does; ``functools.wraps`` is taken at its word."""
    for name in ("forward", "_conv_forward"):
        stock, own = getattr(kind, name, None), vars(module).get(name)
        if getattr(type(module), name, None) is not stock:
            return False
        if own is not None:
            # Engines wrap the forward of a model, which may be one layer, on the instance.
            innermost = inspect.unwrap(own)
            if getattr(innermost, "__func__", innermost) is not inspect.unwrap(stock):  # type: ignore[arg-type]
                return False
    return True


def layout_class(module: nn.Module) -> Callable[[Any], Layout] | None:
    """What makes the layout of a module that LocoProp can train, ``None`` for any other.

    A subclass counts where it has its parent's ``forward``, and an instance where it has that of its class, or one that
    says it wraps it; the weight must be a parameter of its own, or a masked one.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        # MultiheadAttention reads the weight of such a module without calling it, so no hook would run.
        return None
    for kind, layout in _LAYOUTS.items():
        if isinstance(module, kind) and _computes_as(kind, module):
            return layout if trained_parameters(module) is not None else None
    return None


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module that LocoProp can train, ``None`` for any other, see :func:`layout_class`.

    Raises:
        ValueError: the module is of a supported kind, but its weight has strides that are not.
    """
    layout = layout_class(module)
    return None if layout is None else layout(module)


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
    """``modules``, those together that share their weight.

    Raises:
        ValueError: layers that share their weight have different biases or shapes of groups, or layers share a bias
            alone.
    """
    trained = {name: trained_parameters(module) or {} for name, module in modules.items()}
    by_weight: dict[int, dict[str, Any]] = {}
    for name, module in modules.items():
        by_weight.setdefault(id(trained[name]["weight"].parameter), {})[name] = module
    owners: dict[int, str] = {}
    for tied in by_weight.values():
        name, first = next(iter(tied.items()))
        biases = {other: trained[other]["bias"].parameter if "bias" in trained[other] else None for other in tied}
        for other, module in tied.items():
            if biases[other] is not biases[name]:
                raise ValueError(f"layers {name!r} and {other!r} share their weight, so they must share their bias too")
            if type(module) is not type(first) or getattr(module, "groups", 1) != getattr(first, "groups", 1):
                raise ValueError(f"layers {name!r} and {other!r} share their weight, so they must be of one kind")
        for found in trained[name].values():
            other = owners.setdefault(id(found.parameter), name)
            if other != name:
                raise ValueError(f"layers {other!r} and {name!r} share a bias, so they must share their weight too")
    return list(by_weight.values())


def laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor`` with the strides of ``parameter``, whose shape it has."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def number_of_groups(module: nn.Module) -> int:
    """``G`` of a supported module, 1 where it has no groups."""
    return module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedLinear)) else 1
