"""The layers of a model that an optimiser trains, with what its user says about them by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from locoprop_kernels import transfers
from locoprop_kernels.sampling import Sampling
from locoprop_kernels.transfers import Transfer
from locoprop_torch.activations import ActivationHook
from locoprop_torch.capture import CapturedLayer
from locoprop_torch.checks import clean_name
from locoprop_torch.discovery import Found, find_transfers
from locoprop_torch.hooks import AttachedHook, attach
from locoprop_torch.layouts import number_of_groups, supported_modules, tied_layers
from locoprop_torch.masks import present_mask, trained_parameters
from locoprop_torch.sharding import check_layer, shape_of
from locoprop_torch.targets import Target
from locoprop_torch.unit import OutputGradient, PerExample

__all__ = ["ModelLayers", "table", "transfer_in_use"]


class ModelLayers:
    """The captured layers of a model.

    Args:
        model: the model.
        chosen: the user's transfer functions, by the name of a submodule.
        target: the user's target, or one by the name of a submodule.
        masks: the user's masks, by the name of a parameter.

    Attributes:
        captured: the layers by name; those that share their weight are one.
        output_gradient: the unit of activation learning rates per example.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Mapping[str, str | Transfer],
        target: Target | Mapping[str, Target],
        masks: Mapping[str, Tensor],
    ) -> None:
        self.captured: dict[str, CapturedLayer] = {}
        self._model = model
        self._chosen = {clean_name(name): transfer for name, transfer in chosen.items()}
        self._target = {clean_name(n): t for n, t in target.items()} if isinstance(target, Mapping) else target
        self._masks = _checked_masks(model, masks)
        self._activation_handles: list[AttachedHook] = []
        self._sampling = _Weak()
        self.output_gradient = OutputGradient()

    def sample_by(self, sampling: Callable[[], Sampling | None]) -> None:
        """Have the layers keep the rows that a method of the optimiser says, which is not kept alive for it."""
        self._sampling.method = weakref.WeakMethod(sampling)

    def want_unit(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Measure the unit of activation learning rates if one of these parameter groups has it."""
        self.output_gradient.wanted = any(isinstance(group["activation_lr"], PerExample) for group in groups)

    def owned(self) -> dict[int, nn.Parameter]:
        """The parameters of captured layers, by ``id``."""
        return {id(p): p for layer in self.captured.values() for p in layer.parameters.values()}

    def target(self, name: str) -> Target:
        """The target of a layer."""
        return self._target.get(name, "dual") if isinstance(self._target, dict) else self._target

    def check_whole(self, ids: Collection[int]) -> None:
        """Refuse parameters, given by their ``id``, that are a part of those of a layer."""
        for name, layer in self.captured.items():
            inside = [id(p) in ids for p in layer.parameters.values()]
            if any(inside) and not all(inside):
                raise ValueError(f"params must have all parameters of layer {name!r} or none, got only some")

    # --- hooks

    def attach(self, others: Collection[int], search: bool) -> None:
        """Capture the supported layers of the model that are not captured yet.

        Args:
            others: the ``id`` of every parameter that another optimiser trains: those layers are left to it.
            search: whether to look in the model for the transfer functions that the user has not named.

        Raises:
            ValueError: there are none, the user's names are not theirs, or layers that share their weight do not fit.
        """
        paths = {
            clean_name(path): path
            for path, module in supported_modules(self._model).items()
            if not _is_left(path, module, others)
        }
        modules: dict[str, Any] = {name: self._model.get_submodule(path) for name, path in paths.items()}
        if not modules:
            raise ValueError(
                "model must have at least one supported layer (nn.Linear, nn.Conv1d/2d/3d, GroupedLinear) "
                f"whose parameters are not in aux; got {type(self._model).__name__} without one"
            )
        targets = self._target if isinstance(self._target, dict) else {}
        for argument, given in (("transfers", self._chosen), ("target", targets)):
            unknown = set(given) - set(modules)
            if unknown:
                raise ValueError(f"{argument} must name captured layers ({', '.join(modules)}); got {sorted(unknown)}")
        found = self._found_transfers(modules, search)
        for tied in tied_layers(modules):
            name = next(iter(tied))
            if name not in self.captured:
                transfer, reason = _common_transfer([found[other] for other in tied], list(tied))
                self._capture(tied, paths, transfer, reason)
        self._watch_activations()

    def _capture(
        self, modules: Mapping[str, Any], paths: Mapping[str, str], transfer: Transfer, reason: str | None
    ) -> None:
        """Capture a layer: its modules by name, and where they are in the model."""
        name = next(iter(modules))
        found = trained_parameters(modules[name]) or {}
        check_layer(name, {kind: one.parameter for kind, one in found.items()})
        keep_gradients = self.target(name) != "dual"
        self.captured[name] = CapturedLayer(
            modules, paths, transfer, keep_gradients, reason, self._sampling, self.output_gradient
        )

    def detach(self) -> None:
        """Take all hooks off the model."""
        for layer in self.captured.values():
            layer.detach()
        for handle in self._activation_handles:
            handle.remove()

    def _found_transfers(self, modules: Mapping[str, nn.Module], search: bool) -> dict[str, Found]:
        """The transfer function of each module: the user's, or what is found in the model, or the identity."""
        unnamed = {name: module for name, module in modules.items() if name not in self._chosen}
        found = find_transfers(self._model, unnamed) if search else {}
        result = {name: Found(transfers.get(transfer)) for name, transfer in self._chosen.items()}
        result.update({name: found.get(name, Found(transfers.get("identity"))) for name in unnamed})
        return result

    def _watch_activations(self) -> None:
        """For primal targets: hooks on the modules that the layers' outputs may go through next."""
        layers = [layer for name, layer in self.captured.items() if self.target(name) == "primal"]
        for handle in self._activation_handles:
            handle.remove()
        self._activation_handles = [
            attach(module, ActivationHook(layers))
            for module in self._model.modules()
            # What comes out of a LogSoftmax is not the softmax that the layer's transfer function is.
            if layers and not list(module.children()) and not list(module.parameters())
            if not isinstance(module, nn.LogSoftmax)
        ]

    # --- what a step asks

    def masks(self, layer: CapturedLayer) -> dict[str, list[Tensor]]:
        """The masks of a layer's parameters at present, by kind.

        Raises:
            ValueError: the model has another module or parameter in its place.
        """
        masks: dict[str, list[Tensor]] = {}
        if self._masks:
            masks = {kind: [self._masks[id(p)]] for kind, p in layer.parameters.items() if id(p) in self._masks}
        module: nn.Module
        for name, module in layer.modules.items():
            if _submodule(self._model, layer.paths[name]) is not module:
                raise ValueError(
                    f"layer {name!r} is no longer the module that the optimiser was built with: build a new optimiser"
                )
            if not _has_plainly(module, layer.parameters):
                for kind, mask in _masks_of_module(name, module, layer.parameters).items():
                    masks.setdefault(kind, []).append(mask)
        return masks

    def forget(self) -> None:
        """Drop what was captured, see :meth:`CapturedLayer.forget`."""
        for layer in self.captured.values():
            layer.forget()

    def end_step(self) -> None:
        """Let go of all that was captured: a step has used it."""
        for layer in self.captured.values():
            layer.forget(release=True)
            layer.spent = False

    # --- copies and pickles: hooks and what they have captured stay behind

    def __getstate__(self) -> dict[str, Any]:
        captured = [
            (list(layer.modules), layer.paths, layer.transfer, layer.reason) for layer in self.captured.values()
        ]
        # Parameters are other objects in the copy, so their masks go by name.
        masks = [
            (clean_name(name), self._masks[id(p)]) for name, p in self._model.named_parameters() if id(p) in self._masks
        ]
        left_out: dict[str, Any] = {"_activation_handles": [], "_sampling": None}
        return {**self.__dict__, "captured": captured, "_masks": masks, **left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._sampling = _Weak()
        self.captured = {}
        self._masks = _checked_masks(self._model, dict(state["_masks"]))
        for names, paths, transfer, reason in state["captured"]:
            modules = {name: self._model.get_submodule(paths[name]) for name in names}
            self._capture(modules, paths, transfer, reason)
        self._watch_activations()


class _Weak:
    """Asks a method which rows the next step takes; all where there is none, or no longer its object."""

    def __init__(self) -> None:
        self.method: weakref.WeakMethod[Callable[[], Sampling | None]] | None = None

    def __call__(self) -> Sampling | None:
        found = None if self.method is None else self.method()
        return None if found is None else found()


def transfer_in_use(layer: CapturedLayer, chosen: str | Transfer | None, local_loss: str) -> Transfer:
    """The transfer function that a layer's local problem has.

    Args:
        layer: the layer.
        chosen: what its parameter group says, over the layer's own.
        local_loss: ``"matching"``, or ``"squared"``, for which every transfer function counts as the identity.

    Raises:
        ValueError: it acts on whole rows, and the layer has groups.
    """
    if local_loss == "squared":
        return transfers.get("identity")
    transfer = transfers.get(chosen or layer.transfer)
    if not transfer.elementwise and number_of_groups(layer.module) > 1:
        raise ValueError(
            f"layer {layer.name!r} has groups, so its transfer function must be elementwise, got {transfer}"
        )
    return transfer


def _described(layer: CapturedLayer, transfer: Transfer) -> str:
    """A layer's sizes, the transfer function that it has, and what else is to be known of it, as text."""
    *groups, n, k = shape_of(layer.layout, layer.weight)
    count = f"{groups[0]} x " if groups else ""
    tied = f"  (also {', '.join(list(layer.modules)[1:])})" if len(layer.modules) > 1 else ""
    reason = f"  ({layer.reason})" if layer.reason else ""
    return f"{count}{k} -> {n}  {transfer}{tied}{reason}"


def table(
    layers: Mapping[str, CapturedLayer], chosen: Mapping[int, str | Transfer | None], local_loss: str
) -> list[str]:
    """A line for each layer, by name.

    Args:
        layers: the layers.
        chosen: what parameter groups say about transfer functions, by ``id`` of a weight.
        local_loss: see :func:`transfer_in_use`.
    """
    width = max(map(len, layers))
    return [
        f"  {name:<{width}}  {_described(layer, transfer_in_use(layer, chosen.get(id(layer.weight)), local_loss))}"
        for name, layer in layers.items()
    ]


def _common_transfer(found: list[Found], names: list[str]) -> tuple[Transfer, str | None]:
    """The one transfer function of layers that share their weight, and why it could not be found, if so."""
    functions = {each.transfer for each in found}
    if len(functions) > 1:
        raise ValueError(
            f"layers {', '.join(names)} share their weight, so one transfer function must follow all of them, "
            f"got {', '.join(sorted(map(str, functions)))}: set it for each of them in transfers"
        )
    return functions.pop(), next((each.reason for each in found if each.reason), None)


def _is_left(name: str, module: nn.Module, others: Collection[int]) -> bool:
    """Whether another optimiser trains a module."""
    inside = [id(found.parameter) in others for found in (trained_parameters(module) or {}).values()]
    if any(inside) and not all(inside):
        raise ValueError(f"aux must have all parameters of layer {name!r} or none, got only some")
    return any(inside)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """``model.get_submodule(path)``, or ``None`` where there is none; in a fraction of the time."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _has_plainly(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether a module has these parameters and no masks."""
    own = module._parameters
    # A bias that is missing altogether may be one that is computed from others.
    return own.get("weight") is parameters["weight"] and own.get("bias", module) is parameters.get("bias")


def _masks_of_module(name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The masks that a module itself has, by kind.

    Raises:
        ValueError: the module has other parameters, or a mask that is none any more.
    """
    masks: dict[str, Tensor] = {}
    found = trained_parameters(module) or {}
    for kind in ("weight", "bias"):
        if (found[kind].parameter if kind in found else None) is not parameters.get(kind):
            raise ValueError(
                f"the {kind} of layer {name!r} is no longer the parameter that the optimiser was built with: "
                "build a new optimiser"
            )
        if kind in found and (mask := present_mask(found[kind], f"the {kind} of layer {name!r}")) is not None:
            masks[kind] = mask
    return masks


def _checked_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The user's masks by ``id`` of the parameter."""
    parameters = {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)} if masks else {}
    checked = {}
    for name, mask in masks.items():
        parameter = parameters.get(clean_name(name))
        if parameter is None:
            raise ValueError(f"masks must name parameters of the model ({', '.join(parameters)}); got {name!r}")
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask of {name!r} must be a torch.Tensor, got {type(mask).__name__}")
        if mask.shape != parameter.shape:
            raise ValueError(f"mask of {name!r} must have shape {list(parameter.shape)}, got {list(mask.shape)}")
        checked[id(parameter)] = mask
    return checked
