"""Errors of the plan, which names weights as Megatron does, in the names of a checkpoint that never was there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from quantplug.errors import QuantplugError, ShapeError
from quantplug.export.plan.types import WholeWeight
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family

_WAY_OUT = "Without a model: choose another format, or exclude these modules."


@contextmanager
def errors_in_source_names(weights: Sequence[WholeWeight], family: Family, dims: ModelDimensions) -> Iterator[None]:
    """Around work on weights that names them as Megatron does: what it raises names their tensors."""
    try:
        yield
    except QuantplugError as error:
        table = family.by_megatron()
        names = {
            weight.key.name: " and ".join(table[weight.key.module].hf_names(weight.key, dims)) for weight in weights
        }
        offenders = [replace(found, parameter=names.get(found.parameter, found.parameter)) for found in error.offenders]
        remedy = f"{error.remedy} {_WAY_OUT}" if isinstance(error, ShapeError) else error.remedy
        raise type(error)(error.problem, offenders, remedy) from error
