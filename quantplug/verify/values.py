"""Reads every value once: nothing NaN or Inf, scales positive; keeps the scalars for those on sharing."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from quantplug.mappings.shapes.kinds import kind_of
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import PLAIN_FLOATS, TensorInfo, UnreadableTensorError
from quantplug.verify.inventory.layouts import Int4Layout, Nvfp4Layout, exponents_of
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.inventory.names import FusedGroup, last, split
from quantplug.verify.journal import Form, Journal, findings_of_json, findings_to_json, in_journal
from quantplug.verify.report import Finding, error, note, ranges, warning

# Suffixes of floating-point scales: a multiplier or divisor that must be above zero.
_POSITIVE = frozenset({
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale", "input_scale", "input_global_scale",
    "k_scale", "v_scale",
})  # fmt: skip
_READ_DTYPES = PLAIN_FLOATS | {"F8_E4M3", "F8_E5M2", "F8_E8M0"}
OnBytes = Callable[[int], None]  # called with the number of bytes just read


@dataclass
class BlockScaleCount:
    """E4M3 block scales of one kind of module that lie below the normal range."""

    scales: int = 0
    subnormal: int = 0
    tensors: int = 0


@dataclass
class Values:
    """What reading all values left behind.

    Attributes:
        scales: How often each byte occurs in a tensor of scales of eight bits, int64 [256], by its name; not of tensors
            that were read in a run before this one.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    block_scales: dict[str, BlockScaleCount] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, other: "Values") -> None:
        self.scalars |= other.scalars
        self.scales |= other.scales
        for name, count in other.block_scales.items():
            total = self.block_scales.setdefault(name, BlockScaleCount())
            total.scales += count.scales
            total.subnormal += count.subnormal
            total.tensors += count.tensors


def bytes_to_read(inventory: Inventory) -> int:
    return sum(info.nbytes for info in inventory.checkpoint.tensors.values() if _type_of_values(inventory, info))


def read_values(inventory: Inventory, on_bytes: OnBytes, journal: Journal | None) -> tuple[Values, list[Finding]]:
    """All findings on single values, and what the rules on several tensors need."""
    values = Values()
    findings: list[Finding] = []
    read = (info for info in inventory.checkpoint.tensors.values() if _type_of_values(inventory, info))

    def judged(info: TensorInfo) -> tuple[Values, list[Finding]]:
        own = Values()
        try:
            return own, list(_tensor(inventory, info.name, own))
        except UnreadableTensorError as problem:
            return own, [error(Check.FILES, info.name, f"its data cannot be read: {problem}")]

    for info, (own, found) in in_journal(journal, "values", judged, read, _FORM):
        values.add(own)
        findings.extend(found)
        on_bytes(info.nbytes)
    findings.extend(_subnormal_findings(values))
    return values, findings


def _to_json(judged: tuple[Values, list[Finding]]) -> Any:
    values, findings = judged
    return [asdict(replace(values, scales={})), findings_to_json(findings)]


def _of_json(kept: Any) -> tuple[Values, list[Finding]]:
    values, findings = kept
    counts = {name: BlockScaleCount(**count) for name, count in values["block_scales"].items()}
    return Values(values["scalars"], counts), findings_of_json(findings)


_FORM = Form(_to_json, _of_json)


def _type_of_values(inventory: Inventory, info: TensorInfo) -> str:
    """What a tensor's values are, by the dtypes of safetensors; empty for what has no value that could be wrong."""
    module, suffix = split(info.name)
    # Exponents are stored as integers, and one of them is NaN.
    if suffix == exponents_of(inventory.modules[module].layout) and info.dtype == "U8":
        return "F8_E8M0"
    return info.dtype if info.dtype in _READ_DTYPES else ""


def _tensor(inventory: Inventory, name: str, values: Values) -> Iterator[Finding]:
    info = inventory.checkpoint.tensors[name]
    dtype = _type_of_values(inventory, info)
    module, suffix = split(name)
    is_scale, fused = suffix in _POSITIVE, inventory.modules[module].transposed is not None
    bad = low = tiny = 0
    spoiled: set[int] = set()
    for first, chunk in inventory.checkpoint.chunks(name):
        if dtype in PLAIN_FLOATS:
            broken = ~torch.isfinite(chunk)
            low += int((chunk <= 0).sum()) if is_scale else 0
            tiny += _count_tiny(chunk) if is_scale else 0
            # Kept for the rules on shared scales, so that no scalar is read twice.
            if chunk.numel() == 1:
                values.scalars[name] = float(chunk)
        else:
            codes = chunk.view(torch.uint8)
            broken = _non_finite_codes(codes, dtype)
            if is_scale or dtype == "F8_E8M0":
                counts = torch.bincount(codes.flatten(), minlength=256)
                values.scales[name] = values.scales[name] + counts if name in values.scales else counts
        if broken.any():
            bad += int(broken.sum())
            # The first axis of a tensor of all experts is the expert: a finding names those that are spoiled.
            if fused and broken.dim():
                spoiled.update((first + broken.flatten(1).any(dim=1).nonzero().flatten()).tolist())
    if dtype == "F8_E4M3" and is_scale:
        counts = values.scales.get(name, torch.zeros(256, dtype=torch.int64))
        # Negative numbers, by their sign bit. Zero is allowed: it is the scale of a block of zeros. 0xFF is a NaN and
        # counted as one.
        low = int(counts[0x81:0xFF].sum())
        _count_subnormal(values, inventory.modules[module], counts)
    if bad:
        where = f", in experts {ranges(sorted(spoiled))}" if spoiled else ""
        yield error(Check.FINITE, name, f"{bad} values are NaN or Inf{where}")
    if low:
        what = "below zero" if dtype == "F8_E4M3" else "zero or below"
        yield error(Check.SCALE_RANGE, name, f"{low} scales are {what}")
    if tiny:
        message = (
            f"{tiny} scales are below 2^-126 or above 2^126: a GPU flushes them, or what is divided by them, to zero"
        )
        yield error(Check.TINY_SCALES, name, f"{message}, or it overflows, and NaN spreads through the batch")


def _count_tiny(scales: torch.Tensor) -> int:
    """Scales that are subnormal in FP32, or whose inverse is: kernels compute with both, and GPUs flush subnormals."""
    values = scales.double()
    return int((((values > 0) & (values < 2.0**-126)) | ((values > 2.0**126) & torch.isfinite(values))).sum())


def _non_finite_codes(codes: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "F8_E8M0":
        return codes == 0xFF
    # Without the sign. E4M3 has one NaN and no infinity, E5M2 has infinity at 0x7C and NaNs above it (OFP8, tables 1
    # and 2).
    return (codes & 0x7F) >= (0x7F if dtype == "F8_E4M3" else 0x7C)


def _count_subnormal(values: Values, module: Module, counts: torch.Tensor) -> None:
    """E4M3 codes 1 to 7 have exponent 0: below 2^-6."""
    count = values.block_scales.setdefault(kind_of(module.name), BlockScaleCount())
    subnormal = int(counts[1:8].sum())
    count.scales += int(counts.sum())
    count.subnormal += subnormal
    count.tensors += subnormal > 0


def _subnormal_findings(values: Values) -> Iterator[Finding]:
    for name, count in values.block_scales.items():
        if count.subnormal:
            message = (
                f"{count.subnormal} of {count.scales} block scales, in {count.tensors} tensors, are below 2^-6: "
                "vLLM's and SGLang's Marlin kernels (W4A16) may flush them to zero"
            )
            yield warning(Check.SUBNORMAL_SCALES, name, message)


def stored_shapes(inventory: Inventory) -> Iterator[Finding]:
    """`weight_shape` of INT4 says what the codes are: compressed-tensors and transformers cut them to it."""
    for module in inventory.quantized:
        if not isinstance(module.layout, Int4Layout) or not module.sound or module.codes is None:
            continue
        name = f"{module.name}.weight_shape"
        wanted = [module.codes.shape[0], module.layout.columns(module.codes)]
        try:
            found = inventory.checkpoint.read(name).tolist()
        except UnreadableTensorError as problem:
            yield error(Check.FILES, name, f"its data cannot be read: {problem}")
            continue
        if found != wanted:
            yield error(Check.TENSOR_LAYOUT, name, f"says {found}, the codes are of {wanted}")


def shared_scales(inventory: Inventory, values: Values) -> Iterator[Finding]:
    """Modules that servers merge have exactly equal per-tensor scales."""
    differing_fp8: dict[str, int] = {}
    for group in inventory.fused_groups:
        layouts = {inventory.modules[name].layout for name in group.members}
        layout = layouts.pop()
        # Parts of different layouts are found by another rule, and their scales need not be equal.
        if layouts or layout is None:
            continue
        for suffix in layout.scalars:
            found = {name: values.scalars.get(f"{name}.{suffix}") for name in group.members}
            # Without NaN, which equals nothing and has a finding of its own.
            numbers = {value for value in found.values() if value is not None and value == value}
            if len(numbers) <= 1:
                continue
            # Servers keep one such scale for all parts. FP8 linears outside of experts they decode and round anew,
            # which is only a little less exact.
            if isinstance(layout, Nvfp4Layout) or (group.in_expert and inventory.scheme.method == "modelopt"):
                shown = ", ".join(f"{last(name)} {value:.9g}" for name, value in found.items() if value is not None)
                yield error(Check.SHARED_SCALES, group.parent, f"{suffix} differs: {shown}; {_consequence(group)}")
            else:
                key = f"{kind_of(group.fused)}.{suffix}"
                differing_fp8[key] = differing_fp8.get(key, 0) + 1
    for key, count in differing_fp8.items():
        yield note(Check.SHARED_SCALES, key, f"{count} groups with different scales: servers requantize to the largest")


def _consequence(group: FusedGroup) -> str:
    if group.in_expert:
        return "servers use the first for both, TensorRT-LLM refuses"
    return "servers use the largest for all, TensorRT-LLM refuses"
