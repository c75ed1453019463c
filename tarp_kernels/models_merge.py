"""Fold what does not depend on the input into the weights of a model, and take it out again."""

from torch import nn

from tarp_kernels.nn.linear import TarpLayer


def merge_tarp(model: nn.Module) -> dict[str, str]:
    """Fold the static parts of every adapter into its weight, in place: they cost nothing at inference then.

    Static are Φ of multiplicative="static", and U V of the kinds "bilinear" and "kronecker". An update made from the
    input cannot be folded; it stays in force. Beside Φ(x) of multiplicative="dynamic" nothing is folded, because Φ(x)
    would multiply it. Returns {layer: what stays}, empty where the base layer alone is left.
    The original weights are kept beside the merged ones, so memory grows by them until `unmerge_tarp`.

    Raises ValueError, and changes nothing, for a model without adapter or with nothing static, for one that is merged
    already or inside task_parallel, and for a weight that is tied to another one, whose user would see the change.
    """
    layers = _layers(model)
    static = {name: layer for name, layer in layers.items() if layer.mergeable}
    if not static:
        stays = next(iter(layers.values())).unmergeable
        raise ValueError(f"merge_tarp: nothing can be folded into the weights; what stays is {stays}")
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, layer in static.items():
        own = f"{name}.weight" if name else "weight"
        others = [user for user in users[id(layer.weight)] if user != own]
        if others:
            raise ValueError(f"merge_tarp: {own} is tied to {others[0]}, which would change too; leave it unadapted")
        if (why := layer.cannot_merge()) is not None:
            raise ValueError(f"merge_tarp: {own} {why}")
    for layer in static.values():
        layer.merge()
    return {name: layer.unmergeable for name, layer in layers.items() if layer.unmergeable is not None}


def unmerge_tarp(model: nn.Module) -> None:
    """Give every merged weight its original bits back. Raises ValueError where nothing is merged."""
    merged = [layer for layer in _layers(model).values() if layer.original is not None]
    if not merged:
        raise ValueError("unmerge_tarp: nothing in this model is merged")
    for layer in merged:
        layer.unmerge()


def _layers(model: nn.Module) -> dict[str, TarpLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, TarpLayer)}
    if not found:
        raise ValueError("model: has no adapted layer; call apply_tarp(model, TarpConfig(...)) first")
    return found
