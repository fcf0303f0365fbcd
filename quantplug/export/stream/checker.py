"""Which weights a caller's `quantization_checker` wants quantized: asked where they are, agreed by all ranks."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from quantplug.errors import Offender, UnsupportedQuantizationError
from quantplug.export.plan.types import WholeWeight
from quantplug.findings import Findings, Kind
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.agreement import all_or_none, gather_objects
from quantplug.selection.policy import Kept, Reason

QuantizationChecker = Callable[[str], bool]
"""Sees a global Megatron name such as `decoder.layers.3.mlp.experts.linear_fc1.weight69`; whether to quantize it."""

_RANKS = Kind(
    UnsupportedQuantizationError,
    "quantization_checker answers differently on ranks that hold the same weight.",
    "Let it decide by the name alone.",
)
_EXPERTS = Kind(
    UnsupportedQuantizationError,
    "quantization_checker answers differently for experts of one layer, which servers load alike.",
    "Let it answer alike for all experts of a layer, whatever rank holds them.",
)

_WIDENS = Kind(
    UnsupportedQuantizationError,
    "quantization_checker wants weights quantized that servers load in high precision.",
    "Let it answer False for them.",
)
_WIDENS_MTP = Kind(
    UnsupportedQuantizationError,
    "quantization_checker wants layers of multi-token prediction quantized, which are kept unless that is asked for.",
    "Pass quantize_mtp=True, or let it answer False for them.",
)
_WIDENS_PRESET = Kind(
    UnsupportedQuantizationError,
    "quantization_checker wants weights quantized that the preset leaves out.",
    "Pass preset='all', or let it answer False for them.",
)
_WIDENS_BY = {Reason.MTP: _WIDENS_MTP, Reason.PRESET: _WIDENS_PRESET, Reason.ACCURACY: _WIDENS_PRESET}


def refuse_widened(kept: Mapping[ParamKey, Kept]) -> None:
    """Refuses a checker that wants quantized what the policy keeps.

    Args:
        kept: Weights that it wants, and why they are kept.

    Raises:
        UnsupportedQuantizationError: There are some.
    """
    findings = Findings()
    for key, why in kept.items():
        findings.add(_WIDENS_BY.get(why.reason, _WIDENS), key.name, f"yes for a {why.words}", key.expert)
    findings.raise_if_any()


def chosen_weights(weights: Sequence[WholeWeight], checker: QuantizationChecker, rank: int) -> frozenset[ParamKey]:
    """The weights to quantize. A collective: each rank asks for the weights that it holds.

    Raises:
        UnsupportedQuantizationError: The checker raises, or answers differ between ranks or between experts of a layer.
    """
    # Only for weights that the rank holds: with expert parallelism that is what Megatron-Bridge asks.
    mine = all_or_none(lambda: _answers(weights, checker, rank))
    by_key: defaultdict[ParamKey, dict[int, bool]] = defaultdict(dict)
    of_ranks = gather_objects(mine)
    for number, answers in enumerate(of_ranks):
        for key, answer in answers.items():
            by_key[key][number] = answer
    findings = Findings(ranks=len(of_ranks) > 1)
    # Ranks that answer differently would pack different bytes of one weight, or wait for what another does not send.
    for key, answers_of_ranks in by_key.items():
        if len(set(answers_of_ranks.values())) > 1:
            no = [number for number, answer in answers_of_ranks.items() if not answer]
            findings.add(_RANKS, key.name, f"no on ranks {no}, yes on others", key.expert, no[0])
    _check_experts(by_key, findings)
    findings.raise_if_any()
    # All answers of a weight are alike by now.
    return frozenset(key for key, answers_of_ranks in by_key.items() if all(answers_of_ranks.values()))


def _answers(weights: Sequence[WholeWeight], checker: QuantizationChecker, rank: int) -> dict[ParamKey, bool]:
    held = [weight.key for weight in weights if any(rank in ranks for ranks in weight.replicas)]
    return {key: _ask(checker, key) for key in held}


def _ask(checker: QuantizationChecker, key: ParamKey) -> bool:
    try:
        return bool(checker(key.name))
    except Exception as error:  # The caller's code may raise anything, and other ranks wait for this one.
        raise UnsupportedQuantizationError(
            "quantization_checker cannot be used.",
            [Offender(key.name, f"raised {type(error).__name__}: {error}", key.expert)],
            "Let it answer True or False for every name.",
        ) from error


def _check_experts(answers: dict[ParamKey, dict[int, bool]], findings: Findings) -> None:
    layers: defaultdict[tuple[str, int | None], list[ParamKey]] = defaultdict(list)
    for key in answers:
        if key.expert is not None:
            layers[key.stack, key.layer].append(key)
    for (_, layer), keys in layers.items():
        refused = [key for key in keys if not all(answers[key].values())]
        # All experts refused is an answer as good as none refused.
        for key in refused if len(refused) < len(keys) else ():
            rank = next(number for number, answer in answers[key].items() if not answer)
            findings.add(_EXPERTS, key.name, f"no, yes for others of layer {layer}", key.expert, rank)
