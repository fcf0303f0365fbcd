"""The table of formats by public name."""

import pytest

from quantplug.errors import ArgumentError, UnsupportedQuantizationError
from quantplug.formats.names import (
    SCHEMES,
    Activations,
    QuantFormat,
    in_groups,
    in_smaller_groups,
    scheme_named,
    scheme_of,
    scheme_without_data,
    without_input_scale,
)


def test_every_name_says_what_it_means() -> None:
    """As the vocabulary of the documents has it; a name of another meaning would be another checkpoint."""
    said = {name: (row.weight.name, row.weight_bits, row.activations) for name, row in SCHEMES.items()}
    assert said == {
        "w4a16_nvfp4": ("nvfp4", 4, Activations.PLAIN),
        "nvfp4": ("nvfp4", 4, Activations.STATIC),
        "fp8": ("fp8", 8, Activations.STATIC),
        "w8a16_fp8": ("fp8", 8, Activations.PLAIN),
        "fp8_blockwise": ("fp8_block", 8, Activations.DYNAMIC),
        "fp8_dynamic": ("fp8_row", 8, Activations.DYNAMIC),
        "int4": ("int4", 4, Activations.PLAIN),
        "mxfp8": ("mxfp8", 8, Activations.DYNAMIC),
        "mxfp4": ("mxfp4", 4, Activations.PLAIN),
    }


def test_every_name_has_a_row_of_its_own() -> None:
    assert list(SCHEMES) == list(QuantFormat)
    assert len({(row.weight, row.activations) for row in SCHEMES.values()}) == len(SCHEMES)


@pytest.mark.parametrize("name", QuantFormat)
def test_a_row_is_found_by_what_it_says(name: QuantFormat) -> None:
    row = scheme_named(name.value, "format")
    assert row.format is name
    assert scheme_of(row.weight, has_input_scale=row.has_input_scale) is row


@pytest.mark.parametrize("name", QuantFormat)
def test_input_scales_are_of_formats_that_have_them(name: QuantFormat) -> None:
    assert not SCHEMES[name].has_input_scale or SCHEMES[name].weight.static_activations


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("nvfp4", "w4a16_nvfp4"),
        ("w4a16_nvfp4", "w4a16_nvfp4"),
        ("fp8", "w8a16_fp8"),
        ("w8a16_fp8", "w8a16_fp8"),
        ("fp8_blockwise", "fp8_blockwise"),
        ("fp8_dynamic", "fp8_dynamic"),
        ("int4", "int4"),
        ("mxfp8", "mxfp8"),
        ("mxfp4", "mxfp4"),
    ],
)
def test_the_same_weights_without_data(name: str, instead: str) -> None:
    assert without_input_scale(scheme_named(name, "format")).format == instead
    if name == instead:
        assert scheme_without_data(name, "format").format == name
    else:
        with pytest.raises(UnsupportedQuantizationError, match=f"Use {instead}: the same weights"):
            scheme_without_data(name, "format")


@pytest.mark.parametrize("name", ["W4A16_NVFP4", "int3", "", "Activations"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(
        ArgumentError, match="Use one of: w4a16_nvfp4, nvfp4, fp8, w8a16_fp8, fp8_blockwise, fp8_dynamic, int4, mxfp8"
    ):
        scheme_named(name, "quant_format")


def test_a_name_may_have_groups_of_several_sizes() -> None:
    large, small = scheme_named("int4", "format"), scheme_named("int4", "format", 32)
    assert (large.group_size, small.group_size) == (128, 32)
    assert scheme_named("int4", "format", 128) is large
    assert scheme_of(small.weight, has_input_scale=False) is small
    assert without_input_scale(small) is small
    assert (in_smaller_groups(large), in_smaller_groups(small)) == ((small,), ())
    assert scheme_without_data("w4a16_nvfp4", "format", 16).group_size == 16


@pytest.mark.parametrize(
    ("name", "size", "remedy"),
    [
        ("int4", 64, "Use 128 or 32, or leave it out"),
        ("int4", 0, "Use 128 or 32"),
        ("nvfp4", 32, "Use 16, or leave it out"),
        ("fp8", 128, "Leave it out: fp8 has no groups"),
        ("fp8_blockwise", 128, "Leave it out: fp8_blockwise has no groups"),
    ],
)
def test_groups_that_a_format_has_not_are_refused_with_those_that_it_has(name: str, size: int, remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy) as caught:
        scheme_named(name, "format", size)
    assert [offender.parameter for offender in caught.value.offenders] == ["group_size"]


def test_a_size_of_groups_is_that_of_whichever_format_leaves_the_choice() -> None:
    mxfp8, int4, nvfp4 = (scheme_named(name, "format") for name in ("mxfp8", "int4", "w4a16_nvfp4"))
    small = scheme_named("int4", "format", 32)
    assert in_groups((mxfp8, int4), 32) == (mxfp8, small)
    assert in_groups((int4, nvfp4), 32) == (small, nvfp4)
    assert in_groups((int4, int4), 32) == (small, small)
    assert in_groups((mxfp8, nvfp4), 16) == (mxfp8, nvfp4)
    # One that leaves the choice has to have it: else the size would be that of nothing anybody can have meant.
    for pair in ((int4, nvfp4), (nvfp4, int4)):
        with pytest.raises(ArgumentError, match=r"is 16, with int4\n.*Use 128 or 32"):
            in_groups(pair, 16)
    with pytest.raises(ArgumentError, match=r"is 64, with mxfp8 and w4a16_nvfp4\n.*Use 32 or 16"):
        in_groups((mxfp8, nvfp4), 64)


def test_a_format_says_whether_it_needs_data_and_which_one_of_the_same_weights_does_not() -> None:
    assert [name for name in QuantFormat if name.needs_data] == ["nvfp4", "fp8"]
    assert [name.weight_only for name in QuantFormat] == [
        "w4a16_nvfp4", "w4a16_nvfp4", "w8a16_fp8", "w8a16_fp8", "fp8_blockwise", "fp8_dynamic", "int4",
        "mxfp8", "mxfp4",
    ]  # fmt: skip


@pytest.mark.parametrize("name", QuantFormat)
def test_what_a_name_says_of_data_is_what_the_table_says(name: QuantFormat) -> None:
    assert name.needs_data is SCHEMES[name].has_input_scale
    assert name.weight_only is without_input_scale(SCHEMES[name]).format
