"""The names of modules that a config lists: those that are quantized, and those that stay plain."""

from collections import defaultdict
from collections.abc import Sequence

from quantplug.export.plan.types import ExportTask
from quantplug.formats.names import Scheme
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family


def quantized_modules(tasks: Sequence[ExportTask], dims: ModelDimensions) -> dict[str, Scheme]:
    """The scheme of each quantized module by its exact name; of experts in one tensor that of the module of all."""
    found: dict[str, Scheme] = {}
    for task in tasks:
        if task.scheme is None:
            continue
        for part in task.all_outputs:
            if part.placement is not None:
                experts = task.mapping.experts_module(task.source.key, dims)
                assert experts is not None, "only experts are placed in a tensor of all"
                found[experts] = task.scheme
            elif part.format is not None:
                found[part.name.removesuffix(".weight")] = task.scheme
    return found


def excluded_modules(
    tasks: Sequence[ExportTask], family: Family, dims: ModelDimensions, *, globs: bool
) -> tuple[str, ...]:
    """Names of the modules with a matrix product that stay unquantized, exact but for whole layers.

    A tied lm_head has no tensor of its own, but servers build the module and look it up. Of experts, which are plain in
    all of a layer or in none, they build one module and look up its name; as of some linears, which they merge.

    Args:
        globs: Whether the dialect's list may hold shell patterns.
    """
    multiplying = [task for task in tasks if task.mapping.role.multiplies]
    parts = [part for task in multiplying for part in task.all_outputs]
    plain = {part.name for part in parts if part.format is None and part.placement is None}
    packed = {part.name for part in parts if part.format is not None}
    names = {name.removesuffix(".weight") for name in (*plain, *(family.tied.keys() - packed))}
    # What servers merge they look up by the name of the merged module, which is on no disk. It stays plain only if all
    # that it is made of is plain.
    merged = (found for task in multiplying for found in task.mapping.merged_names(task.source.key, dims))
    names |= {name for name, merged_parts in merged if plain.issuperset(merged_parts)}
    experts = {task.mapping.experts_module(task.source.key, dims) for task in multiplying if task.format is None}
    names |= {name for name in experts if name is not None}
    return tuple(sorted(_with_whole_layers(names, multiplying, dims) if globs else names))


def _with_whole_layers(names: set[str], multiplying: Sequence[ExportTask], dims: ModelDimensions) -> set[str]:
    """The names, those of a layer of multi-token prediction that is plain throughout as one `model.layers.N.*`.

    vLLM calls the head of such a layer `model.layers.N.head`, which is on no disk, and looks that name up. SGLang
    compares no more than the last segment of MLA's projections (`is_layer_excluded` in its modelopt_quant.py), so that
    their exact names would leave those of every layer unquantized.
    """
    quantized: defaultdict[str, bool] = defaultdict(bool)
    for task in multiplying:
        layer = task.mapping.mtp_layer_module(task.source.key, dims)
        if layer is not None:
            quantized[layer] |= task.format is not None
    # With the dot: in vLLM and SGLang a pattern `model.layers.1*` would hit layers 10 to 19 as well.
    plain = tuple(f"{layer}." for layer, is_quantized in quantized.items() if not is_quantized)
    return {name for name in names if not name.startswith(plain)} | {f"{layer}*" for layer in plain}
