"""What is said of one quantized weight: how far it is from its original, and whether that is an error."""

import math
from collections.abc import Iterator
from dataclasses import replace

from quantplug.verify.checks import Check
from quantplug.verify.numbers import bounds
from quantplug.verify.numbers.damage import Damage
from quantplug.verify.report import Finding, TensorError, error, note, ranges, ratio, warning
from quantplug.verify.source.by_inputs import ByInputs

_UNSEEN = (
    ". If it was calibrated by weighted_mse, local_hessian or gptq, give --moments FILE, as "
    "quantplug.write_input_moments makes it of the model: it tells whether inputs explain that"
)


def tensor_error(name: str, kind: str, layout: str, total: bounds.ErrorSum, seen: ByInputs | None) -> TensorError:
    """What the report has of one weight, of the sums over it and, where they are given, of what its inputs say."""
    norm = math.sqrt(total.squared_norm)
    return TensorError(
        name=name,
        kind=kind,
        format=layout,
        relative_error=ratio(math.sqrt(total.squared_error), norm),
        bound=ratio(math.sqrt(total.squared_bound), norm),
        max_error=ratio(total.max_error, total.amax),
        squared_error=total.squared_error,
        squared_norm=total.squared_norm,
        gain=total.gain,
        input_error=None if seen is None else ratio(math.sqrt(seen.error), math.sqrt(seen.norm)),
        squared_input_error=None if seen is None else seen.error,
        squared_input_norm=None if seen is None else seen.norm,
    )


def findings_on(result: TensorError, total: bounds.ErrorSum, seen: ByInputs | None) -> Iterator[Finding]:
    """What is wrong with one weight, or looks so."""
    wrong = _wrong(result, total)
    if wrong is not None and seen is not None and _is_explained(total, seen):
        message = f"{wrong.message}; of its outputs errors are {result.input_error:.4g}, and of rounding"
        yield note(wrong.check, wrong.subject, message)
    elif wrong is not None and seen is None and total.squared_error < total.squared_norm:
        yield replace(wrong, message=f"{wrong.message}{_UNSEEN}")
    elif wrong is not None:
        yield wrong
    elif seen is not None and seen.has_wrong_scales:
        message = (
            f"decoded weights are {total.gain:.4f} times the source's, which is within bounds; but neither rounding by "
            "the stored scales nor error feedback gives these values, so scales are wrong"
        )
        yield error(Check.GAIN, result.name, message)
    # The weakest sign, said only where there is no stronger one: GPTQ moves values further than rounding does.
    elif total.beyond:
        message = (
            f"{total.beyond} of {total.values} values are further off than round to nearest can put them "
            "(expected of GPTQ or a scale search; otherwise scales are misplaced)"
        )
        yield warning(Check.VALUE_BOUND, result.name, message)


def _is_explained(total: bounds.ErrorSum, seen: ByInputs) -> bool:
    """Whether a weight that is beyond the bounds of weights is what some packer makes that knows its inputs."""
    if seen.has_wrong_scales:
        return False
    # What feedback makes up for may be a block of zeros; a row it does not make larger or smaller as a whole.
    if seen.is_made_up_for:
        return not (total.off_rows or total.damage)
    return seen.is_within and not (total.lost or total.damage)


def _wrong(result: TensorError, total: bounds.ErrorSum) -> Finding | None:
    """What no rounding of these values gives, all columns being alike."""
    if not total.squared_norm and total.squared_error:
        return error(Check.ERROR_BOUND, result.name, "the source is all zero, the export does not decode to zeros")
    if not total.squared_error <= total.squared_limit:  # NaN is beyond every bound
        most = f"rounding these values to {result.format} gives at most {result.bound:.4g}"
        return error(Check.ERROR_BOUND, result.name, f"relative error {result.relative_error:.4g}; {most}")
    if total.lost or total.broken_rows:
        return error(Check.ERROR_BOUND, result.name, _lost_message(result, total))
    if total.off or total.off_rows or total.misplaced:
        return error(Check.GAIN, result.name, _off_message(total))
    if total.damage is not None:
        return error(Check.VALUE_BOUND, result.name, _damage_message(result, total.damage))
    return None


def _off_message(total: bounds.ErrorSum) -> str:
    along = total.along / total.squared_error if total.squared_error else 0.0
    said = {
        f"decoded weights are {total.gain:.4f} times the source's": total.off,
        f"{total.off_rows} rows are too large or too small as a whole": total.off_rows,
        f"blocks are too large or too small, which is {along:.0%} of the squared error": total.misplaced,
    }
    return f"{'; '.join(text for text, is_so in said.items() if is_so)}: no rounding gives that, so scales are wrong"


def _damage_message(result: TensorError, damage: Damage) -> str:
    said = {
        f"{damage.values} values in rows {ranges(damage.rows)} are not the source's, though of all other rows nearly "
        f"every value is the source's, rounded to {result.format} by the stored scales": damage.rows,
        f"columns {ranges(damage.columns)} are lost, too large or too small as a whole, or others": damage.columns,
    }
    return f"{'; '.join(text for text, is_so in said.items() if is_so)}: codes or scales are damaged in part"


def _lost_message(result: TensorError, total: bounds.ErrorSum) -> str:
    said = {
        f"{total.lost} blocks decode to zeros, the source's are not, and {result.format} holds them": total.lost,
        f"{total.broken_rows} rows are off by more than any way of rounding to {result.format} gives": (
            total.broken_rows
        ),
    }
    return "; ".join(text for text, count in said.items() if count)
