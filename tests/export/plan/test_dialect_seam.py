"""What a dialect may do with a packed weight, by one of this file's own: no bytes but those it asks for change."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import pytest
import torch

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.build import ExportRequest, build_plan
from quantplug.export.plan.dialects.dialect import Dialect, Spelled
from quantplug.export.plan.dialects.table import DIALECTS, DialectName
from quantplug.export.plan.types import Constant, ExportPlan, QuantConfig, QuantizerState, WholeWeight
from quantplug.formats import NVFP4, TensorSpec
from quantplug.formats.names import KVCacheFormat, QuantFormat, Scheme
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import COLUMN, ModelDimensions
from quantplug.mappings.rows import Role, Scope, WeightMapping
from quantplug.mappings.table import Family, MegatronConfig
from quantplug.topology import ShardAxis
from tests.export.pipeline.test_slices import exported

STATE = QuantizerState("q", (2, 1), ((-1, 16),), (4, 3), dynamic_blocks=True)
DIMS = ModelDimensions(1, 64, 4, 2, 16, 0)
SHAPE = (8, 64)


class Turned(Dialect):
    """Codes in 32 bits with an axis more, the scale of the tensor inverted, and a tensor beside."""

    name = DialectName.MODELOPT
    fused_is_read = frozenset()
    reads_globs = False

    @property
    def formats(self) -> Set[QuantFormat]:
        return frozenset((QuantFormat.NVFP4, QuantFormat.W4A16_NVFP4))

    def cache_problem(self, kv_cache: KVCacheFormat, formats: Set[QuantFormat]) -> str | None:
        return "it has none"

    def mix_problem(self, formats: Set[QuantFormat]) -> str | None:
        return "mixes nothing"

    def stored(self, scheme: Scheme, weight: str, tensor: TensorSpec) -> Spelled:
        named = replace(tensor, name=f"{weight.removesuffix('weight')}{scheme.format}.{tensor.name}")
        if tensor.name == "weight":
            return Spelled(replace(named, shape=(SHAPE[0], 2, 4), dtype=torch.int32))
        return Spelled(replace(named, shape=tensor.shape or (1,)), reciprocal=not tensor.shape)

    def constants(self, scheme: Scheme, weight: str, shape: tuple[int, ...]) -> tuple[Constant, ...]:
        return (Constant(TensorSpec(f"{weight}_shape", (2,), torch.int64), shape),)

    def config(
        self, modules: Mapping[str, Scheme], excluded: Sequence[str], kv_cache: KVCacheFormat | None
    ) -> QuantConfig:
        return QuantConfig("turned", {name: scheme.format for name, scheme in modules.items()})


def planned(ranks: int = 1, amax: float = 3.0, input_amax: float | None = None, **asked: DialectName) -> ExportPlan:
    row = WeightMapping(("weight",), ("w.weight",), Scope.MODEL, COLUMN, Role.LINEAR)
    family = Family("one", ("One",), (row,), lambda config: DIMS, lambda config: MegatronConfig({}, {}))
    weight = WholeWeight(
        ParamKey("weight"),
        SHAPE,
        torch.bfloat16,
        ShardAxis.TP if ranks > 1 else None,
        (tuple(range(ranks)),),
        replace(STATE, amax=amax),
        None if input_amax is None else replace(STATE, amax=input_amax),
    )
    return build_plan([weight], family, DIMS, ExportRequest(**asked))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [1, 2**28])
def test_a_dialect_turns_what_is_packed_whatever_the_pieces(
    ranks: int, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DIALECTS, DialectName.MODELOPT, Turned())  # type: ignore[call-overload]
    plan = planned(ranks, input_amax=6.0)
    (task,) = plan.tasks
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()

    made = exported(task, list(weight.chunk(ranks)), DIMS, bucket_bytes)

    plain = NVFP4.pack(weight, torch.tensor(3.0)).tensors
    codes = made["w.nvfp4.weight"]
    assert (codes.shape, codes.dtype) == ((8, 2, 4), torch.int32)
    # Row for row the same bytes, in whatever pieces they have come.
    assert torch.equal(codes.view(torch.uint8).reshape(8, 32), plain["weight"])
    assert torch.equal(
        made["w.nvfp4.weight_scale"].view(torch.uint8), plain["weight_scale"].contiguous().view(torch.uint8)
    )
    # The scale in FP32 is amax / (6 * 448), and the reader of this dialect divides by what is stored.
    assert made["w.nvfp4.weight_scale_2"].tolist() == (1 / torch.tensor([3.0 / 2688], dtype=torch.float32)).tolist()
    assert made["w.nvfp4.input_scale"].tolist() == (1 / torch.tensor([6.0 / 2688], dtype=torch.float32)).tolist()
    assert made["w.weight_shape"].dtype == torch.int64
    assert made["w.weight_shape"].tolist() == [8, 64]
    assert plan.quant_config == QuantConfig("turned", {"w": "nvfp4"})


def test_the_dialect_that_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIALECTS, DialectName.COMPRESSED_TENSORS, Turned())  # type: ignore[call-overload]
    asked = planned(dialect=DialectName.COMPRESSED_TENSORS).quant_config
    assert asked == QuantConfig("turned", {"w": "w4a16_nvfp4"})
    default = planned().quant_config
    assert default is not None
    assert default.algorithm == "W4A16_NVFP4"


def test_a_dialect_without_a_name_for_the_format_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(UnsupportedQuantizationError, match="has no name for w4a16_nvfp4") as caught:
        planned(dialect=DialectName.DEEPSEEK)
    assert [offender.parameter for offender in caught.value.offenders] == ["dialect"]
    assert str(DialectName.MODELOPT) in caught.value.remedy
