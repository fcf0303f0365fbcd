"""The Triton kernels without a GPU: their bits in Triton's interpreter, and the instructions that they become."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from quantplug.formats import encoding as encodings
from quantplug.formats.kernels import reference
from quantplug.formats.kernels.cuda import loops as triton_loops
from quantplug.formats.search import triton_loops as search_loops
from tests.formats.kernels.calls import Call, empty
from tests.formats.kernels.values import E4M3_SCALES, all_values, every_block
from tests.formats.weights import DTYPES, bits, heavy_tailed

REPOSITORY = Path(__file__).parents[3]

INTERPRETED = """
import signal, sys, torch
from triton.runtime import interpreter
from tests.formats.kernels.fused import fused_multiply_add
# The interpreter's own rounds the product too, which no GPU does.
interpreter.InterpreterBuilder.create_fma = lambda self, x, y, z: interpreter.TensorHandle(
    fused_multiply_add(x.data, y.data, z.data), z.dtype.scalar
)
from quantplug.formats.kernels.cuda import kernels as cuda
blocks, tile, in_groups = cuda._BLOCKS, cuda._TILE, cuda._IN_GROUPS
for line in sys.stdin:
    signal.alarm(300)
    file = line.rstrip()
    calls, large = torch.load(file, weights_only=False)
    cuda._BLOCKS, cuda._TILE, cuda._IN_GROUPS = blocks * large, tile * large, in_groups * large
    torch.save([call.made_by(cuda) for call in calls], file)
    signal.alarm(0)
    print("made", flush=True)
"""

Compare = Callable[..., None]

IN_GROUPS = ("INT4_ENCODING", "INT4_32_ENCODING")


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], None]]:
    """Makes what the calls in a file make, in a process of its own: Triton reads the setting as a kernel is defined."""
    errors = tmp_path_factory.mktemp("interpreter") / "errors.txt"
    start = partial(subprocess.Popen, [sys.executable, "-c", INTERPRETED], cwd=REPOSITORY, text=True)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    pipe = subprocess.PIPE
    with errors.open("w") as written, start(env=environment, stdin=pipe, stdout=pipe, stderr=written) as process:
        assert process.stdin
        assert process.stdout

        def make(file: Path) -> None:
            # Where the process has died there is an error of its own to tell, not of the pipe to it.
            with suppress(BrokenPipeError):
                process.stdin.write(f"{file}\n")
                process.stdin.flush()
            assert process.stdout.readline() == "made\n", errors.read_text()

        yield make


@pytest.fixture
def assert_interpreted_as_the_reference(interpreter: Callable[[Path], None], tmp_path: Path) -> Compare:
    def compare(calls: Iterable[Call], large: int = 1) -> None:
        """By Triton's interpreter.

        Args:
            large: Times the work of one program; the interpreter is slow with many.
        """
        calls = list(calls)
        torch.save((calls, large), tmp_path / "calls.pt")
        interpreter(tmp_path / "calls.pt")
        for call, made in zip(calls, torch.load(tmp_path / "calls.pt"), strict=True):
            for mine, expected in zip(made, call.made_by(reference), strict=True):
                assert mine.shape == expected.shape, call.name
                assert torch.equal(comparable(mine), comparable(expected)), (call.name, call.encoding, mine.shape)

    return compare


def comparable(tensor: torch.Tensor) -> torch.Tensor:
    """Its bits, but those of NaN: which sign and payload an operation gives it, devices do not agree on."""
    wide = tensor.float()
    return bits(torch.where(wide.isnan(), torch.full_like(wide, float("nan")), wide))


POWERS = ("MXFP4_ENCODING", "MXFP8_ENCODING")


def packing(encoding: str, weights: list[torch.Tensor], scales: Sequence[float] = (1.0,)) -> Call:
    encoded = empty(getattr(encodings, encoding), weights[0].shape, scales)
    return Call("pack", encoding, weights, (encoded.codes, encoded.blocks, encoded.whole))


def nvfp4(weight: torch.Tensor, weight_scale_2: float) -> Call:
    return packing("NVFP4_ENCODING", [weight], (weight_scale_2,))


def fp8(weight: torch.Tensor, weight_scale: float) -> Call:
    return packing("FP8_ENCODING", [weight], (weight_scale,))


def fp8_row(weight: torch.Tensor) -> Call:
    return packing("FP8_ROW_ENCODING", [weight])


def fp8_block(weight: torch.Tensor) -> Call:
    return packing("FP8_BLOCK_ENCODING", [weight])


@pytest.mark.parametrize("weight_scale_2", [1.0, 1 / 3])
def test_nvfp4_of_every_bf16_value_under_some_scales(
    weight_scale_2: float, assert_interpreted_as_the_reference: Compare
) -> None:
    scales = E4M3_SCALES.flip(0)[::25]
    weights = [every_block(torch.bfloat16, scale, weight_scale_2) for scale in scales]
    assert_interpreted_as_the_reference([nvfp4(weight, weight_scale_2) for weight in weights], large=16)


def test_nvfp4_scale_of_every_amax_that_a_bf16_block_can_have(assert_interpreted_as_the_reference: Compare) -> None:
    weight = torch.zeros(2**16, 16, dtype=torch.bfloat16)
    weight[:, 5] = all_values(torch.bfloat16)
    assert_interpreted_as_the_reference([nvfp4(weight, 1 / 3)], large=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", POWERS)
def test_powers_of_two_of_every_amax_and_every_value_beside_some(
    encoding: str, dtype: torch.dtype, assert_interpreted_as_the_reference: Compare
) -> None:
    values = all_values(dtype)
    values = values[values.isfinite()]
    amaxes = torch.zeros(values[::3].numel(), 32, dtype=dtype)
    amaxes[:, 5] = values[::3]
    weights = [amaxes]
    for amax in (448.0, 1 / 3, 2.0**-130):
        inside = values[values.abs() <= amax][:: 1 if dtype.itemsize == 2 else 7]
        weights.append(torch.nn.functional.pad(inside, (0, -inside.numel() % 31)).view(-1, 31))
        weights[-1] = torch.nn.functional.pad(weights[-1], (1, 0), value=amax)
    assert_interpreted_as_the_reference([packing(encoding, [weight]) for weight in weights], large=16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_searched_and_given_scales(dtype: torch.dtype, assert_interpreted_as_the_reference: Compare) -> None:
    weight = heavy_tailed((32, 96), dtype)
    weight[3, 16:32] = 0
    weight[4, 5], weight[5, 6], weight[6, 7] = float("nan"), float("inf"), -0.0
    numbers = torch.arange(32 * 6) % 126 + 1
    codes, given = torch.zeros(1, 32, 48, dtype=torch.uint8), numbers.to(torch.uint8).view(torch.float8_e4m3fn)
    calls = [
        Call("pack", "NVFP4_ENCODING", [view], (codes, given.view(1, 32, 6), torch.tensor([scale])), search)
        for search in ("FOUR_OVER_SIX", "BY_ERROR", "GIVEN", "GIVEN_FOUR_OVER_SIX")
        for view, scale in ((weight, 1e-4), (weight.t().contiguous().t(), 1 / 3), (weight, 2.0**-126))
    ]
    # Weighted by the importance of columns: one weight, which far offsets are tried for too, and a group of two.
    importance = heavy_tailed((2, 96), torch.float32).abs()
    whole, pair = torch.tensor([1e-4, 1 / 3]), (codes.repeat(2, 1, 1), given.view(1, 32, 6).repeat(2, 1, 1))
    alone = (codes, given.view(1, 32, 6), whole[:1], importance[:1])
    calls += [
        Call("pack", "NVFP4_ENCODING", [weight], alone, "BY_WEIGHTED_ERROR"),
        Call("pack", "NVFP4_ENCODING", [weight, weight.flip(0)], (*pair, whole, importance), "BY_ERROR"),
    ]
    assert_interpreted_as_the_reference(calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_of_every_value(dtype: torch.dtype, assert_interpreted_as_the_reference: Compare) -> None:
    values = all_values(dtype)
    # With both signs and without NaN, whose code has the sign of the value, not of an operation.
    values = values[~values.isnan()][None]
    assert_interpreted_as_the_reference([fp8(values, scale) for scale in (1.0, 1 / 3, 2.0**-126)], large=16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_row_of_every_value_up_to_its_amax(
    dtype: torch.dtype, assert_interpreted_as_the_reference: Compare
) -> None:
    calls = []
    for amax in (448.0, 1 / 3, 3e-6, 2.0**-140):
        values = all_values(dtype)
        values = values[values.abs() <= amax][:: 1 if dtype.itemsize == 2 else 7]
        weight = torch.nn.functional.pad(values, (0, -values.numel() % 4097)).view(-1, 4097)
        weight[:, -1] = amax
        calls.append(fp8_row(weight))
    assert_interpreted_as_the_reference(calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_block_of_every_value_up_to_its_amax(
    dtype: torch.dtype, assert_interpreted_as_the_reference: Compare
) -> None:
    calls = []
    for amax in (448.0, 1 / 3, 3e-6, 2.0**-140):
        values = all_values(dtype)
        values = values[values.abs() <= amax]
        weight = torch.nn.functional.pad(values, (0, -values.numel() % (128 * 256))).view(-1, 256)
        weight[::128, ::128] = amax
        calls.append(fp8_block(weight[: 128 * 2]))
    assert_interpreted_as_the_reference(calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_of_every_value_up_to_its_amax(dtype: torch.dtype, assert_interpreted_as_the_reference: Compare) -> None:
    calls = []
    for amax in (448.0, 1 / 3, 3e-6, 2.0**-140):
        values = all_values(dtype)
        values = values[values.abs() <= amax][:: 1 if dtype.itemsize == 2 else 7]
        weight = torch.nn.functional.pad(values, (0, -values.numel() % 127)).view(-1, 127)
        weight = torch.nn.functional.pad(weight, (0, 1), value=amax)
        calls += [packing(encoding, [weight]) for encoding in IN_GROUPS]
    assert_interpreted_as_the_reference(calls, large=16)


def test_int4_scale_of_every_amax_that_a_bf16_group_can_have(assert_interpreted_as_the_reference: Compare) -> None:
    weight = torch.zeros(2**16, 32, dtype=torch.bfloat16)
    weight[:, 5] = all_values(torch.bfloat16)
    assert_interpreted_as_the_reference([packing("INT4_32_ENCODING", [weight])], large=16)


def test_fp8_block_with_partial_squares_at_the_edges(assert_interpreted_as_the_reference: Compare) -> None:
    weight = heavy_tailed((131, 200), torch.bfloat16)
    views = [weight, weight.t(), weight[:, :1], weight[:1], torch.cat((weight, weight), 1)[:, :129]]
    calls = [fp8_block(view) for view in views] + [packing("FP8_BLOCK_ENCODING", [weight[2:], weight[:-2]], (1.0, 1.0))]
    codes = torch.arange(256, dtype=torch.uint8)[:200].expand(2, 131, 200).contiguous().view(torch.float8_e4m3fn)
    squares = torch.tensor([[[1.0, -2.0], [1 / 3, 3e38]]]).repeat(2, 1, 1)
    calls.append(Call("unpack", "FP8_BLOCK_ENCODING", [torch.zeros(2, 131, 200)], (codes, squares)))
    assert_interpreted_as_the_reference(calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_strides_and_what_is_not_finite(
    dtype: torch.dtype, assert_interpreted_as_the_reference: Compare
) -> None:
    weight = heavy_tailed((45, 160), dtype)
    weight[3, 16:32] = 0
    weight[4, 5], weight[5, 6], weight[6, 7] = float("nan"), float("inf"), -0.0
    views = [weight, weight[:1, :16], weight.t().contiguous().t(), torch.cat((weight, weight), 1)[:, :160], weight[::2]]
    calls = [nvfp4(view, 1e-4) for view in views]
    calls += [fp8(view.nan_to_num(0.0), 1e-3) for view in (*views, weight.view(1, -1), weight.view(-1, 1))]
    calls += [fp8_row(view) for view in (*views, weight.view(1, -1), weight.view(-1, 1)[:49])]
    groups = torch.cat((weight, weight), 1)[:, :256]
    for view in (groups, groups[:1, :128], groups.t().contiguous().t(), groups[::2]):
        calls += [packing(encoding, [view]) for encoding in IN_GROUPS]
    calls += [packing(encoding, [view]) for encoding in POWERS for view in views if view.shape[1] % 32 == 0]
    calls += [
        Call("amax", "", [view]) for view in (*views, weight.nan_to_num(0.0), weight[0], weight.view(45, 2, 80).mT)
    ]
    assert_interpreted_as_the_reference(calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_weights_apart_in_memory(dtype: torch.dtype, assert_interpreted_as_the_reference: Compare) -> None:
    # Some rows short of a block of FP8, as the interpreter is slow.
    rows, columns = heavy_tailed((3 * 40 + 3, 2 * 128), dtype), heavy_tailed((128 + 5, 40), dtype)
    groups = [
        [rows[start : start + 40] for start in (0, 41, 83)],
        [columns[start : start + 128].t() for start in (5, 0)],
    ]
    calls: list[Call] = []
    for group in groups:
        scales = [1e-3, 2e-3, 1 / 3][: len(group)]
        for encoding in (
            "NVFP4_ENCODING",
            "FP8_ENCODING",
            "FP8_ROW_ENCODING",
            "FP8_BLOCK_ENCODING",
            *IN_GROUPS,
            *POWERS,
        ):
            calls.append(packing(encoding, group, scales))
    assert_interpreted_as_the_reference(calls, large=16)


def test_every_byte_unpacks_alike(assert_interpreted_as_the_reference: Compare) -> None:
    pairs = torch.arange(256, dtype=torch.uint8).expand(2, 256, 256).contiguous()
    block_scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(2, 256, 32).contiguous()
    codes = pairs[:, :128].contiguous().view(torch.float8_e4m3fn)
    values, halves = torch.zeros(2, 256, 512), torch.zeros(2, 128, 256)
    calls: list[Call] = []
    for scale in (1.0, 1 / 3, 2.0**-126, 3e38):
        scales, squares = torch.tensor([scale, scale / 2]), torch.tensor([[[scale, -scale]]]).repeat(2, 1, 1)
        nvfp4_tensors = (pairs, block_scales.view(torch.float8_e4m3fn), scales)
        calls.append(Call("unpack", "NVFP4_ENCODING", [values], nvfp4_tensors))
        calls.append(Call("unpack", "FP8_ENCODING", [halves], (codes, None, scales)))
        calls.append(Call("unpack", "FP8_BLOCK_ENCODING", [halves], (codes, squares)))
        of_rows = squares.reshape(2, 2, 1).repeat_interleave(64, dim=1)
        calls.append(Call("unpack", "FP8_ROW_ENCODING", [halves], (codes, of_rows)))
        for encoding, groups in zip(IN_GROUPS, (4, 16), strict=True):
            of_groups = torch.linspace(0.5, 1, 2 * 256 * groups).mul(scale).bfloat16().view(2, 256, groups)
            calls.append(Call("unpack", encoding, [values], (pairs, of_groups)))
    exponents = block_scales[..., :16].contiguous()
    calls.append(Call("unpack", "MXFP4_ENCODING", [values], (pairs, exponents)))
    calls.append(Call("unpack", "MXFP8_ENCODING", [halves], (codes, exponents[:, 64:192, :8].contiguous())))
    assert_interpreted_as_the_reference(calls, large=4)


WEIGHTS = {"*bf16": tl.bfloat16, "*fp16": tl.float16, "*fp32": tl.float32}
TARGETS = [("*bf16", 80), *((weight, 90) for weight in WEIGHTS), ("*bf16", 100)]
STRIDES = {"row_stride": "i32", "column_stride": "i32"}
BLOCKS = {"tensor_scales": "*fp32", "codes": "*u8", "block_scales": "*u8", "blocks_a_row": "i32", "blocks": "i32"}
MX = {"ROWS": False, "BLOCKS": 128, "WIDTH": 32, "POWERS": True, "tensor_scales": None}
FP8 = {"columns": "i32", "elements": "i32", "weight_scale": "*fp32", "codes": "*u8"}
FP8_ROW = {"codes": "*u8", "row_scales": "*fp32", "rows": "i32", "columns": "i32"}
SQUARES = {"rows": "i32", "columns": "i32", "squares_a_row": "i32"}
INT4 = {"codes": "*u8", "group_scales": "*i16", "groups_a_row": "i32", "groups": "i32"}
FP8_BLOCK = {"codes": "*u8", "block_scales": "*fp32", "squares": "i32"} | SQUARES
OF_A_WEIGHT: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "pack_blocks": (STRIDES | BLOCKS, {"ROWS": False, "BLOCKS": 128, "WIDTH": 16, "POWERS": False, "PAIRS": True}),
    "pack_fp8": (STRIDES | FP8, {"ROWS": False, "TILE": 4096}),
    "pack_fp8_row": (STRIDES | FP8_ROW, {"TILES": 1, "TILE": 1024}),
    "pack_fp8_block": (STRIDES | FP8_BLOCK, {"PARTIAL": False}),
    "pack_int4": (STRIDES | INT4, {"ROWS": False, "BLOCKS": 16, "GROUP": 128}),
}
OF_CODES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "unpack_blocks": (
        {"codes": "*u8", "block_scales": "*u8", "tensor_scale": "*fp32", "values": "*fp32", "blocks": "i32"},
        {"BLOCKS": 128, "WIDTH": 16, "POWERS": False, "PAIRS": True},
    ),
    "unpack_fp8": (
        {"codes": "*u8", "weight_scale": "*fp32", "values": "*fp32", "elements": "i32"},
        {"TILE": 4096},
    ),
    "unpack_fp8_row": (
        {"codes": "*u8", "row_scales": "*fp32", "values": "*fp32", "columns": "i32"},
        {"TILE": 1024},
    ),
    "unpack_int4": (
        {"codes": "*u8", "group_scales": "*i16", "values": "*fp32", "groups": "i32"},
        {"BLOCKS": 16, "GROUP": 128},
    ),
    "unpack_fp8_block": ({"codes": "*u8", "block_scales": "*fp32", "values": "*fp32"} | SQUARES, {"PARTIAL": False}),
}


def compiled(
    name: str, arguments: dict[str, str], constants: dict[str, Any], capability: int, source: Any = triton_loops
) -> CompiledKernel:
    """For a GPU that need not be there; pointers and sizes are multiples of 16, as they mostly are."""
    kernel = getattr(source, name)
    constants = {"column_stride": 1} | constants
    signature = {
        parameter: "constexpr" if parameter in constants else arguments[parameter] for parameter in kernel.arg_names
    }
    used = {(kernel.arg_names.index(key),): value for key, value in constants.items() if key in signature}
    sixteens = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind != "constexpr"
    }
    # As the search is launched; other loops leave nothing to fuse but what they fuse themselves.
    options = {"enable_fp_fusion": False} if source is search_loops else None
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(kernel, signature, used, sixteens), target=target, options=options)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def assert_ieee(ptx: str, fused: int = 0) -> None:
    """No approximation, no flush of subnormals, and no multiplication and addition fused but where the loop says so."""
    assert set(re.findall(r"\bdiv\.\S*f32", ptx)) <= {"div.rn.f32"}
    assert set(re.findall(r"\brcp\.\S*f32", ptx)) <= {"rcp.rn.f32"}  # 1 / x.
    assert re.findall(r"\S*(?:approx|ftz)\S*", ptx) == []
    pairs, all_of_them = re.findall(r"\bfma\.rn\.f32x2\b", ptx), re.findall(r"\S*fma\S*", ptx)
    assert set(all_of_them) <= {"fma.rn.f32", "fma.rn.f32x2"}
    assert len(all_of_them) + len(pairs) == fused


@pytest.mark.parametrize(("weight", "capability"), TARGETS)
@pytest.mark.parametrize("name", OF_A_WEIGHT)
@pytest.mark.parametrize("is_group", [False, True], ids=["one", "group"])
def test_packing_on_a_gpu_rounds_as_ieee_says_and_reads_16_bytes_at_once(
    name: str, weight: str, is_group: bool, capability: int, own_cache: None
) -> None:
    arguments, constants = OF_A_WEIGHT[name]
    source = {"ELEMENT": WEIGHTS[weight], "ALIGNED": True} if is_group else {"ELEMENT": None, "ALIGNED": False}
    arguments = {"weights": "*i64" if is_group else weight, **arguments}

    ptx = compiled(name, arguments, constants | source, capability).asm["ptx"]

    elements_of_a_thread = constants.get(
        "TILE", constants.get("BLOCKS", 0) * constants.get("GROUP", 16)
    ) // 128 or 128**2 // (4 * 32)
    assert_ieee(ptx, fused=0 if weight == "*fp32" else 2 * elements_of_a_thread)
    assert "div.rn.f32" in ptx
    loads = re.findall(r"ld\.global\S*\.v4\.b32", ptx)
    assert loads, sorted(set(re.findall(r"ld\.global\S*", ptx)))


@pytest.mark.parametrize(("weight", "capability"), TARGETS)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["alike", "weighted"])
def test_the_search_on_a_gpu_rounds_products_before_it_adds_them(
    weight: str, is_weighted: bool, capability: int, own_cache: None
) -> None:
    arguments = {"weights": weight, "multiples": "*fp32", "offsets": "*i32", "importance": "*fp32"} | STRIDES | BLOCKS
    constants = {"ROWS": False, "BLOCKS": 128, "ELEMENT": None, "ALIGNED": False, "MULTIPLES": 1, "OFFSETS": 11}
    constants |= {} if is_weighted else {"importance": None}

    ptx = compiled("pack_nvfp4", arguments, constants, capability, search_loops).asm["ptx"]

    assert_ieee(ptx, fused=0 if weight == "*fp32" else 2 * 16)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", OF_CODES)
def test_unpacking_on_a_gpu_rounds_as_ieee_says(name: str, capability: int, own_cache: None) -> None:
    arguments, constants = OF_CODES[name]
    ptx = compiled(name, arguments, constants, capability).asm["ptx"]
    assert_ieee(ptx)
    assert "div" not in ptx.replace("div.s", "").replace("div.u", "")


@pytest.mark.parametrize(("weight", "capability"), TARGETS)
@pytest.mark.parametrize("pairs", [False, True], ids=["mxfp8", "mxfp4"])
def test_powers_of_two_on_a_gpu_divide_nothing(weight: str, pairs: bool, capability: int, own_cache: None) -> None:
    arguments = {"weights": weight, **STRIDES, **BLOCKS}
    ptx = compiled("pack_blocks", arguments, MX | {"PAIRS": pairs, "ELEMENT": None, "ALIGNED": False}, capability)
    assert_ieee(ptx.asm["ptx"])
    assert "div.rn.f32" not in ptx.asm["ptx"]
    assert re.findall(r"ld\.global\S*\.v4\.b32", ptx.asm["ptx"])


@pytest.mark.parametrize(("weight", "capability"), TARGETS)
def test_the_amax_on_a_gpu_is_one_atomic_maximum_a_program(weight: str, capability: int, own_cache: None) -> None:
    arguments = {"weight": weight, "columns": "i32", "elements": "i32", "largest": "*i32", **STRIDES}
    ptx = compiled("amax", arguments, {"ROWS": False, "TILE": 4096}, capability).asm["ptx"]
    assert_ieee(ptx)
    assert len(re.findall(r"atom\.\S*max\.s32", ptx)) == 1
