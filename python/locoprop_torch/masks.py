"""Which parameters of a module are trained, and the masks that keep some of their elements where they are.

``torch.nn.utils.prune`` and parametrizations (``torch.nn.utils.parametrize``) that multiply by zeros and ones are
found, the latter where they train nothing themselves and do the same whenever they are called. The trained parameter is
then the one behind the mask.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["TrainedParameter", "present_mask", "trained_parameters", "trained_weight"]

_masking: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class TrainedParameter(NamedTuple):
    """A parameter that a layer trains.

    Attributes:
        parameter: the parameter.
        mask: returns the mask at present, of the parameter's shape and zero where it stays; ``None`` without one.
    """

    parameter: nn.Parameter
    mask: Callable[[], Tensor] | None


def present_mask(found: TrainedParameter, what: str) -> Tensor | None:
    """The mask of a parameter at present, ``None`` without one.

    Raises:
        ValueError: it is no longer one; ``what`` names it.
    """
    if found.mask is None:
        return None
    mask = found.mask()
    # A capture of a CUDA graph could not wait for the answer.
    capturing = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    if mask.shape != found.parameter.shape or not (capturing or _is_binary(mask)):
        raise ValueError(
            f"the mask of {what} must be of zeros and ones and have shape {list(found.parameter.shape)}, got shape "
            f"{list(mask.shape)} with values {mask.detach().unique()[:5].tolist()}: such a layer cannot be trained by "
            "LocoProp, build a new optimiser with its parameters in aux"
        )
    return mask


def trained_weight(module: nn.Module) -> nn.Parameter:
    """The weight that a supported module trains."""
    found = _trained(module, "weight")
    assert found is not None
    return found.parameter


def trained_parameters(module: nn.Module) -> dict[str, TrainedParameter] | None:
    """``{"weight": ..., "bias": ...}``, the bias only where there is one.

    ``None`` if one of them is computed from parameters in a way that is not a mask, weight normalisation for instance.
    """
    weight = _trained(module, "weight")
    if weight is None:
        return None
    if "bias" in module._parameters and module._parameters["bias"] is None:
        return {"weight": weight}
    bias = _trained(module, "bias")
    return None if bias is None else {"weight": weight, "bias": bias}


def _trained(module: nn.Module, kind: str) -> TrainedParameter | None:
    plain = module._parameters.get(kind)
    if plain is not None:
        return TrainedParameter(plain, None)
    original = module._parameters.get(f"{kind}_orig")
    mask = module._buffers.get(f"{kind}_mask")
    # torch.nn.utils.prune keeps the parameter and the mask under these names.
    if original is not None and mask is not None:
        return TrainedParameter(original, lambda: mask)
    if parametrize.is_parametrized(module, kind):
        chain: Any = module.parametrizations[kind]  # type: ignore[index]
        if len(chain) == 1 and isinstance(getattr(chain, "original", None), nn.Parameter):
            mask_of, parameter = chain[0], chain.original
            if _is_mask(mask_of, parameter):
                return TrainedParameter(parameter, lambda: _mask_of(mask_of, parameter))
    return None


def _mask_of(parametrization: nn.Module, parameter: Tensor) -> Tensor:
    with torch.no_grad():
        return parametrization(torch.ones_like(parameter))


def _is_binary(mask: Tensor) -> bool:
    return bool(((mask == 0) | (mask == 1)).all())


def _is_mask(parametrization: nn.Module, parameter: Tensor) -> bool:
    """Whether a parametrization multiplies by zeros and ones; tried once, on a copy of it."""
    if any(p.requires_grad for p in parametrization.parameters()):
        return False
    known = _masking.get(parametrization)
    if known is None:
        known = _masking[parametrization] = _acts_as_mask(parametrization, parameter.detach())
    return known


def _acts_as_mask(parametrization: nn.Module, parameter: Tensor) -> bool:
    rising = torch.linspace(-2, 3, parameter.numel(), device="cpu").reshape(parameter.shape)
    try:
        devices = [parameter.device] if parameter.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            trial = copy.deepcopy(parametrization)
            ones = torch.ones_like(parameter)
            mask = trial(ones)
            if not isinstance(mask, Tensor) or mask.shape != parameter.shape or not _is_binary(mask):
                return False
            values = [ones, rising.to(parameter), parameter]
            # Dropout is the identity in eval(), and draws anew in each call otherwise.
            trials = [trial.train(mode)(value) for mode in (True, True, False) for value in values]
            return all(map(torch.equal, trials, [value * mask for value in values] * 3))
    except Exception:
        # The user's code may raise anything; a mask would not have.
        return False
