"""What is stored of objects that hold modules: arrays, names of classes and plain attributes.

Whatever stores arrays can then store a fitted estimator (skops, joblib, dask), and equal fits have
equal bytes, which modules of torch have not.
"""

import copy
import importlib
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["ModulesAsArrays", "from_arrays", "to_arrays"]

STORED = ("skebm.", "torch.nn.modules.")
"""Where the classes live whose modules are stored as arrays; those of others stay modules."""

_BLANK = vars(nn.Module())
_KEY = "_modules_as_arrays"


def to_arrays(module: nn.Module) -> list[dict[str, Any]]:
    """Take a module apart.

    Parameters
    ----------
    module : nn.Module

    Returns
    -------
    list of dict
        One for every module in it, itself first: the name of its class, its `parameters` and
        `buffers` as arrays, the places of its `modules` in this list, and its other `attributes`
        as they are. Of a class of users there is the `module` itself, on the CPU as the arrays, so
        that a machine without another device can load it.
    """
    places, parts = {}, []

    def place(part):
        if part is None:
            return None
        if id(part) not in places:
            places[id(part)] = len(parts)
            parts.append({})
            parts[places[id(part)]].update(describe(part))
        return places[id(part)]

    def describe(part):
        cls = type(part)
        # a class that says how its modules are made has its reasons
        if not cls.__module__.startswith(STORED) or cls.__reduce__ is not object.__reduce__:
            return {"module": _on_cpu(part)}
        state = dict(part.__getstate__())
        own = {name: state.pop(f"_{name}") for name in ("parameters", "buffers", "modules")}
        attributes = {
            name: value
            for name, value in state.items()
            if name not in _BLANK or value != _BLANK[name]
        }
        tensors = (*own["parameters"].values(), *own["buffers"].values())
        # a tensor that is neither parameter nor buffer, or that numpy does not know
        if _holds_tensors(attributes) or not all(t is None or _is_plain(t) for t in tensors):
            return {"module": _on_cpu(part)}
        return {
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "parameters": {name: _array(p) for name, p in own["parameters"].items()},
            "buffers": {name: _array(b) for name, b in own["buffers"].items()},
            "modules": {name: place(m) for name, m in own["modules"].items()},
            "attributes": attributes,
        }

    place(module)
    return parts


def from_arrays(parts: list[dict[str, Any]]) -> nn.Module:
    """Put a module together again that :func:`to_arrays` has taken apart.

    Raises
    ------
    ValueError
        For the name of anything else than a module of skebm or torch: what is stored may come from
        others, and is not to choose what runs here.
    """
    made = [part["module"] if "module" in part else _blank(part["class"]) for part in parts]
    # what stands in a module comes after it
    for module, part in reversed(list(zip(made, parts, strict=True))):
        if "module" in part:
            continue
        places = part["modules"]
        state = {
            "_parameters": {n: a and _parameter(*a) for n, a in part["parameters"].items()},
            "_buffers": {n: a and _tensor(*a) for n, a in part["buffers"].items()},
            "_modules": {n: None if i is None else made[i] for n, i in places.items()},
        }
        module.__setstate__(part["attributes"] | state)
    return made[0]


def _on_cpu(module):
    tensors = chain(module.parameters(), module.buffers())
    return module if all(t.device.type == "cpu" for t in tensors) else copy.deepcopy(module).cpu()


def _holds_tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, torch.Tensor | nn.Module)


def _is_plain(tensor):
    known = tensor.layout is torch.strided and tensor.dtype is not torch.bfloat16
    return known and type(tensor) in (torch.Tensor, nn.Parameter)


def _array(tensor):
    """Array of a tensor, and whether it asks for a gradient."""
    if tensor is None:
        return None
    # in one order, so that what has been loaded equals what was stored
    return np.asarray(tensor.detach().cpu().numpy(), order="C"), tensor.requires_grad


def _tensor(array, requires_grad):
    # a memory map that cannot be written to, as joblib hands to its workers, is copied
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.requires_grad_(requires_grad)


def _parameter(array, requires_grad):
    return nn.Parameter(_tensor(array, requires_grad), requires_grad)


def _blank(name):
    where, _, cls = name.rpartition(".")
    found = None
    if where.startswith(STORED):
        found = getattr(importlib.import_module(where), cls, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name!r} is no module of skebm or torch; the stored model is damaged.")
    module = found.__new__(found)
    nn.Module.__init__(module)
    return module


class ModulesAsArrays:
    """For objects with modules among their attributes, which are stored as arrays.

    Stands before :class:`~sklearn.base.BaseEstimator` among the bases of a class.
    """

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        modules = {name: value for name, value in state.items() if isinstance(value, nn.Module)}
        plain = {name: value for name, value in state.items() if name not in modules}
        return plain | {_KEY: {name: to_arrays(module) for name, module in modules.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plain = {name: value for name, value in state.items() if name != _KEY}
        modules = {name: from_arrays(parts) for name, parts in state.get(_KEY, {}).items()}
        vars(self).update(plain | modules)

    def __dask_tokenize__(self) -> Any:
        from dask.base import normalize_token

        return normalize_token((type(self), self.__getstate__()))
