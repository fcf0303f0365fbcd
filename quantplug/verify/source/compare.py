"""Holds a quantized checkpoint against the one it was made from: all tensors there, all values in bounds."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from quantplug.checkpoint.moments_file import weight_name
from quantplug.checkpoint.safetensors.dtypes import DTYPES
from quantplug.checkpoint.untrusted.json_reader import as_object, as_text
from quantplug.mappings.shapes.kinds import is_recomputed, kind_of
from quantplug.verify.checks import Check
from quantplug.verify.inventory import names
from quantplug.verify.inventory.checkpoint import (
    ITEM_BYTES,
    PLAIN_FLOATS,
    Checkpoint,
    TensorInfo,
    UnreadableTensorError,
)
from quantplug.verify.inventory.fused import FusedExperts
from quantplug.verify.inventory.layouts import KV_SUFFIXES, SCALE_SUFFIXES, WEIGHT_SUFFIXES, is_plain
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.inventory.tied_head import is_tied
from quantplug.verify.journal import Form, Journal, findings_of_json, findings_to_json, in_journal
from quantplug.verify.report import Finding, Size, TensorError, error
from quantplug.verify.source import originals
from quantplug.verify.source.by_inputs import by_inputs
from quantplug.verify.source.input_moments import InputMoments
from quantplug.verify.source.matrices import Matrix
from quantplug.verify.source.measure import Meter, meter_for
from quantplug.verify.source.originals import ExpertPart, Original, Originals
from quantplug.verify.source.verdict import findings_on, tensor_error

OnBytes = Callable[[int], None]
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16"}
_INTEGER_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bytes_to_read(source: Checkpoint) -> int:
    return sum(info.nbytes for info in source.tensors.values())


def compare(
    inventory: Inventory,
    source: Originals,
    experts: FusedExperts,
    moments: InputMoments | None,
    on_bytes: OnBytes,
    journal: Journal | None,
) -> tuple[list[TensorError], list[Finding]]:
    """The error of every quantized weight, and all findings on names, shapes and values.

    Args:
        experts: The source's tensors that hold all experts of a layer; the export may have these one by one.
        moments: Of the inputs of the export's weights, where they are given.
    """
    # Found before the threads begin: what the export has too much is told from all names together.
    tensors = source.source.tensors
    apart = {name: _apart(inventory, experts, info) for name, info in tensors.items()}
    findings = [
        *_source_findings(source),
        *_extra(inventory, source, {part.name for p in apart.values() for part in p}),
    ]
    measured: list[TensorError] = []
    meter = meter_for(bytes_to_read(source.source), moments)

    def judged(info: TensorInfo) -> tuple[list[TensorError], list[Finding]]:
        # A list of its own for each tensor: threads then share nothing, and the report has the order of the source.
        errors: list[TensorError] = []
        return errors, list(_tensor(inventory, source, info, apart[info.name], meter, errors))

    for info, (errors, found) in in_journal(journal, "source", judged, tensors.values(), _FORM):
        measured.extend(errors)
        findings.extend(found)
        on_bytes(info.nbytes)
    return measured, findings


def _to_json(judged: tuple[list[TensorError], list[Finding]]) -> Any:
    errors, findings = judged
    return [[asdict(it) for it in errors], findings_to_json(findings)]


def _of_json(kept: Any) -> tuple[list[TensorError], list[Finding]]:
    errors, findings = kept
    return [TensorError(**it) for it in errors], findings_of_json(findings)


_FORM = Form(_to_json, _of_json)


def _tensor(
    inventory: Inventory,
    source: Originals,
    info: TensorInfo,
    apart: Collection[ExpertPart],
    meter: Meter,
    measured: list[TensorError],
) -> Iterator[Finding]:
    """All findings on one tensor of the source."""
    try:
        for part in apart:
            yield from _part(inventory, part, source, meter, measured)
        if not apart:
            yield from _one(inventory, source, info, meter, measured)
    except UnreadableTensorError as problem:
        yield error(Check.FILES, info.name, f"its data cannot be read: {problem}")


def _source_findings(source: Originals) -> Iterator[Finding]:
    if source.undecoded:
        message = f"the source is itself quantized ({source.scheme.label}): give the BF16, FP16 or FP32 original"
        yield error(Check.SOURCE, "config.json", message)


def _target(inventory: Inventory, info: TensorInfo) -> str:
    """Where the export keeps the values of a source tensor."""
    module, suffix = names.split(info.name)
    # Norms, biases and routers keep their names in every dialect; only a weight may be packed under another.
    if suffix != "weight" and not originals.is_mxfp4(info):
        return info.name
    return _stored_weight(inventory, module)


def _stored_weight(inventory: Inventory, module: str) -> str:
    """Name of a module's weight in the export's dialect."""
    held = (f"{module}.{suffix}" for suffix in WEIGHT_SUFFIXES if f"{module}.{suffix}" in inventory.checkpoint.tensors)
    return next(held, f"{module}.weight")


def _apart(inventory: Inventory, experts: FusedExperts, info: TensorInfo) -> tuple[ExpertPart, ...]:
    """The tensors of single experts that the export has in place of one of the source; none where it has that too."""
    module, suffix = names.split(info.name)
    transposed = experts.is_transposed(module)
    if transposed is None or suffix != "weight" or len(info.shape) != 3 or module in inventory.modules:
        return ()
    return tuple(
        ExpertPart(name, info, expert, transposed, place, len(expert_names))
        for expert in range(info.shape[0])
        for expert_names in (experts.apart(module, expert),)
        for place, name in enumerate(expert_names)
    )


def _part(
    inventory: Inventory, part: ExpertPart, source: Originals, meter: Meter, measured: list[TensorError]
) -> Iterator[Finding]:
    """A tensor of one expert, against its share of the source's tensor of all."""
    name = names.split(part.name)[0]
    module, target = inventory.modules.get(name), inventory.checkpoint.tensors.get(_stored_weight(inventory, name))
    if module is None or target is None:
        yield error(
            Check.SOURCE_NAMES, part.name, f"its values are in the source's {part.info.stored}, not in the export"
        )
    elif (original := source.of_part(part)) is None:
        yield error(Check.SOURCE, part.info.name, f"is {part.info.dtype} in the source, no floating-point original")
    elif not module.quantized:
        yield from _decoded(inventory, original, target, module)
    elif module.sound:
        yield from _quantized(inventory, original, module, meter, measured)


def _extra(inventory: Inventory, source: Originals, apart: Collection[str]) -> Iterator[Finding]:
    known = {
        _target(inventory, info)
        for info in source.source.tensors.values()
        if not source.is_no_weight(info) or originals.is_mxfp4(info)
    } | set(apart)
    for name in inventory.checkpoint.tensors:
        module, suffix = names.split(name)
        # Scales have no counterpart in the source, but the weight beside them has.
        belongs = not known.isdisjoint(f"{module}.{each}" for each in WEIGHT_SUFFIXES) or suffix in KV_SUFFIXES
        if name not in known and not (belongs and suffix in SCALE_SUFFIXES | KV_SUFFIXES):
            yield error(Check.SOURCE_NAMES, name, "not in the source")


def _one(
    inventory: Inventory, source: Originals, info: TensorInfo, meter: Meter, measured: list[TensorError]
) -> Iterator[Finding]:
    if source.is_no_weight(info) or is_recomputed(info.name):
        return
    target = inventory.checkpoint.tensors.get(_target(inventory, info))
    if target is None:
        # A tied head may be left out; whether it equals the embedding is judged elsewhere (`tied_head.py`).
        if not (is_tied(inventory.checkpoint.config) and names.is_head(names.split(info.name)[0])):
            yield error(Check.SOURCE_NAMES, info.name, "in the source, but not in the export")
        return
    module = inventory.modules[names.split(target.name)[0]]
    is_weight = names.split(target.name)[1] in WEIGHT_SUFFIXES
    if is_weight and (module.quantized or source.is_packed(info)):
        original = source.of(info, inventory.fused.is_transposed(module.name))
        if original is None:
            yield error(Check.SOURCE, info.name, f"is {info.dtype} in the source, no floating-point original")
        elif not module.quantized:
            yield from _decoded(inventory, original, target, module)
        elif module.sound:
            yield from _quantized(inventory, original, module, meter, measured)
    elif info.dtype != target.dtype and (_is_passthrough(inventory, info) or not (is_plain(info) and is_plain(target))):
        yield error(Check.SOURCE_VALUES, info.name, f"is {target.dtype}, in the source {info.dtype}")
    elif info.dtype not in ITEM_BYTES:
        yield error(Check.NOT_JUDGED, info.name, f"not judged: dtype {info.dtype}")
    elif _is_narrowed(inventory, info, target):
        message = f"is {target.dtype}, in the source {info.dtype}, and config.json does not name that type"
        yield error(Check.SOURCE_VALUES, info.name, message)
    elif target.shape != info.shape:
        yield error(Check.SOURCE_NAMES, info.name, f"is {list(target.shape)}, in the source {list(info.shape)}")
    elif differing := _differing(inventory.checkpoint, source.source, info.name):
        message = f"{differing} values are not the source's, cast from {info.dtype} to {target.dtype}"
        yield error(Check.SOURCE_VALUES, info.name, message)
    elif _is_wider_on_purpose(source, info, target) and (lost := _rounded(inventory.checkpoint, source, info)):
        message = (
            f"is {target.dtype}, which rounds {lost} of its values; the source keeps it in {info.dtype} beside weights "
            f"in {source.usual_type}"
        )
        yield error(Check.SOURCE_VALUES, info.name, message)


def _is_wider_on_purpose(source: Originals, info: TensorInfo, target: TensorInfo) -> bool:
    """Whether the source has a tensor, such as a router's bias, in a type of its own, and the export in a narrower."""
    is_narrower = info.dtype in PLAIN_FLOATS and target.dtype not in (info.dtype, "F32", "F64")
    return is_narrower and info.dtype != source.usual_type


def _is_narrowed(inventory: Inventory, info: TensorInfo, target: TensorInfo) -> bool:
    """A tensor by itself in a type that does not hold the source's values: neither what the model is in, nor wider."""
    # A wider type holds every value of the source.
    if info.dtype == target.dtype or target.dtype in ("F32", "F64"):
        return False
    config = inventory.checkpoint.config
    named = (config.get("dtype"), config.get("torch_dtype"), as_object(config.get("text_config")).get("dtype"))
    types = {as_text(name).removeprefix("torch.") for name in named if name}
    # The whole model in the config's type is a choice; one tensor in another is an accident.
    return bool(types) and _TORCH_NAMES.get(target.dtype) not in types


def _is_passthrough(inventory: Inventory, info: TensorInfo) -> bool:
    """Whether an export gives it as it is, its type included."""
    return inventory.known is not None and inventory.known.carries(info.stored)


def _differing(export: Checkpoint, source: Checkpoint, name: str) -> int:
    """Elements whose bits differ after the source is cast to the stored dtype."""
    chunks = source.chunks(name)
    return sum(
        _unequal(original, export.rows(name, first, first + original.shape[0]) if original.dim() else export.read(name))
        for first, original in chunks
    )


def _rounded(export: Checkpoint, source: Originals, info: TensorInfo) -> int:
    """Values of a plain tensor that the export's type does not hold, where it is the source's but for its type."""
    return sum(
        int((rows.to(DTYPES[export.tensors[info.name].dtype]).to(rows.dtype) != rows).sum())
        for _, rows in source.source.chunks(info.name)
    )


def _unequal(original: torch.Tensor, stored: torch.Tensor) -> int:
    # Bits, not values: NaN equals itself then, and -0 differs from 0, which a copy never does.
    view = _INTEGER_VIEWS[stored.element_size()]
    return int((original.to(stored.dtype).view(view) != stored.view(view)).sum())


def _decoded(inventory: Inventory, original: Original, target: TensorInfo, module: Module) -> Iterator[Finding]:
    """An unquantized tensor whose original is packed: the same values after the cast."""
    matrix = module.matrix(target)
    if target.shape != original.shape or matrix is None or not is_plain(target):
        found = f"is {target.dtype} {list(target.shape)}"
        yield error(Check.SOURCE_NAMES, target.name, f"{found}, in the source packed, of {list(original.shape)}")
        return
    differing = sum(
        _unequal(rows, weight.rows(names.split(target.name)[1], first, first + rows.shape[0]))
        for weight in _weights(inventory, module)
        for first, rows in _chunks(original, weight, *matrix.shape)
    )
    if differing:
        message = f"{differing} values are not the source's, decoded and cast to {target.dtype}"
        yield error(Check.SOURCE_VALUES, target.name, message)


def _weights(inventory: Inventory, module: Module) -> Iterator[Matrix]:
    """The weight of a module, or those of all experts in one tensor; none of sizes of zero."""
    matrix = module.codes or module.plain_matrix
    if module.placement is None:
        yield Matrix(inventory.checkpoint, module.name)
        return
    for expert in range(module.placement.experts if matrix is not None and all(matrix.shape) else 0):
        yield Matrix(inventory.checkpoint, module.name, expert, module.placement.transposed)


def _chunks(original: Original, weight: Matrix, rows: int, columns: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, FP32 rows) of the original of a weight [rows, columns]."""
    step = original.step(columns)
    for first in range(0, rows, step):
        yield first, original.rows(weight.expert, first, min(first + step, rows))


def _quantized(
    inventory: Inventory, original: Original, module: Module, meter: Meter, measured: list[TensorError]
) -> Iterator[Finding]:
    layout, codes = module.layout, module.codes
    assert layout is not None
    assert codes is not None
    rows, columns = codes.shape[0], layout.columns(codes)
    # As it lies where it is plain, which the original is told by.
    shape = replace(module, transposed=inventory.fused.is_transposed(module.name)).stored_shape((rows, columns))
    if original.shape != shape:
        message = f"decodes to {list(shape)}, in the source {list(original.shape)}"
        yield error(Check.SOURCE_NAMES, original.info.name, message)
        return
    for weight in _weights(inventory, module):
        total = meter.measure(original, weight, layout, rows, columns)
        held = weight_name(module.name, weight.expert)
        tensor = f"{held}.weight" if weight.expert is None else held
        inputs = None if meter.moments is None else meter.moments.of(held, columns)
        seen = None if inputs is None else by_inputs(original, weight, layout, rows, columns, inputs)
        result = tensor_error(tensor, kind_of(module.name), layout.name, total, seen)
        measured.append(result)
        yield from findings_on(result, total, seen)


def sizes(export: Checkpoint, source: Checkpoint | None) -> Iterator[Size]:
    """Bytes of each kind of module, scales with the weight they belong to."""
    exported, original = _bytes_by_kind(export), _bytes_by_kind(source) if source is not None else {}
    for name in sorted(exported.keys() | original.keys()):
        yield Size(name, exported.get(name, 0), original.get(name, 0) if source is not None else None)


def _bytes_by_kind(checkpoint: Checkpoint) -> dict[str, int]:
    found: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        module = kind_of(names.split(info.name)[0] or info.name)
        found[module] = found.get(module, 0) + info.nbytes
    return found
