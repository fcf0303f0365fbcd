"""The data of a page: what the judge found, what a survey of the files shows, and what calibration saw."""

from collections.abc import Mapping
from typing import Any

import quantplug
from quantplug.calibration.show.grids import expert_grids, label
from quantplug.calibration.statistics import CalibrationTable
from quantplug.html_report.histograms import Histogram
from quantplug.html_report.survey import QuantizedWeight, Survey
from quantplug.verify import Severity, VerifyReport
from quantplug.verify.inventory import names
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.readers import readers


def content(
    report: VerifyReport, inventory: Inventory, survey: Survey, table: CalibrationTable | None
) -> dict[str, Any]:
    """Plain data of finite size for each thing that the page shows; tables by columns' names and rows of values."""
    scheme = inventory.scheme
    return {
        "version": quantplug.__version__,
        "directory": report.directory,
        "source": report.source,
        "quantization": report.quantization,
        "architecture": inventory.known.name if inventory.known is not None else None,
        "ok": report.ok,
        "errors": report.count(Severity.ERROR),
        "warnings": report.count(Severity.WARNING),
        "notes": report.count(Severity.NOTE),
        "tensors": report.tensors,
        "bytes": report.export_bytes,
        "sourceBytes": report.source_bytes,
        "kvCache": scheme.kv_cache or None,
        "servingTp": str(report.serving_tp).partition(": ")[2],
        "servingLimits": [[it.what, it.size, it.whole, list(it.refused)] for it in report.serving_tp.limits],
        "readers": [
            [str(it.reader), str(it.answer), it.how, ", ".join(map(str, it.sizes)), "; ".join(it.against)]
            for it in readers(inventory, report.findings, report.serving_tp)
        ],
        "excludes": list(scheme.excludes.patterns),
        "findings": [
            [str(finding.severity), str(finding.check), finding.subject, finding.message] for finding in report.findings
        ],
        "sizes": [[size.kind, size.export_bytes, size.source_bytes] for size in report.sizes],
        "weights": _weights(report, survey),
        "kept": [[kept.kind, kept.why, kept.tensors, kept.nbytes] for kept in survey.kept],
        "codes": _histograms(survey.codes),
        "scales": _histograms(survey.scales),
        "experts": [] if table is None else _experts(table),
    }


def _weights(report: VerifyReport, survey: Survey) -> list[list[Any]]:
    """A row for each weight: module, kind, layer, expert, format, rows, columns, bytes, amax, and four errors.

    These are the relative one, its bound, the largest value's, and that by inputs.
    """
    by_module = {weight.module: weight for weight in survey.weights}
    rows = []
    for measured in report.errors_by_tensor:
        name, _, index = measured.name.removesuffix("]").partition("[")
        module = name if name in by_module else names.split(name)[0]
        weight = by_module.pop(module, None) if not index else by_module.get(module)
        if weight is None:
            continue
        # Of a tensor that holds all experts, errors are measured by expert, and the rest is said of all of them.
        expert = int(index) if index else weight.expert
        where = f"{weight.module}[{index}]" if index else weight.module
        errors = (measured.relative_error, measured.bound, measured.max_error, measured.input_error)
        rows.append([*_of(weight, where, expert), *errors])
    in_parts = {row[0].partition("[")[0] for row in rows if "[" in row[0]}
    unmeasured = (weight for weight in by_module.values() if weight.module not in in_parts)
    return rows + [[*_of(weight, weight.module, weight.expert), None, None, None, None] for weight in unmeasured]


def _of(weight: QuantizedWeight, name: str, expert: int | None) -> list[Any]:
    where = [name, weight.kind, weight.layer, expert, weight.format]
    return [*where, *weight.shape, weight.nbytes, weight.amax]


def _histograms(found: Mapping[tuple[str, str], Histogram]) -> list[dict[str, Any]]:
    return [
        {"format": form, "kind": kind, "bars": histogram.sorted(), "counted": histogram.counted, "of": histogram.of}
        for (form, kind), histogram in sorted(found.items())
    ]


def _experts(table: CalibrationTable) -> list[dict[str, Any]]:
    """For each module that every expert has: [layer, expert, amax, tokens] of its quantizer."""
    return [
        {
            "module": label(grid.module),
            "cells": [[layer, expert, row.amax, row.tokens] for (layer, expert), row in sorted(grid.rows.items())],
        }
        for grid in expert_grids(table)
    ]
