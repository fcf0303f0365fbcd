from quantplug.calibration.show.grids import expert_grids, label, layer_rows
from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.mappings.keys import ParamKey

FC1 = "decoder.layers.*.mlp.experts.linear_fc1.weight*"
QKV = "decoder.layers.*.self_attention.linear_qkv.weight"


def row(module: str, layer: int | None = None, expert: int | None = None) -> StatisticsRow:
    return StatisticsRow(ParamKey(module, layer, expert), (4, 4), 1.0, AmaxSource.WEIGHT)


def test_experts_layers_and_the_rest_are_told_apart() -> None:
    experts = [row(FC1, layer, expert) for layer in (4, 0) for expert in (10, 2)]
    qkv = [row(QKV, layer) for layer in (3, 0)]
    table = CalibrationTable((row("output_layer.weight"), *experts, *qkv))

    (grid,) = expert_grids(table)

    assert (grid.module, grid.layers, grid.experts) == (FC1, (0, 4), (2, 10))
    assert grid.rows == {(row.key.layer, row.expert): row for row in experts}
    assert layer_rows(table) == [(QKV, qkv[::-1])]


def test_a_label_says_what_differs() -> None:
    assert label(FC1) == "mlp.experts.linear_fc1"
    assert label(QKV) == "self_attention.linear_qkv"
    assert label("decoder.layers.*.mlp.linear_fc1.input_quantizer") == "mlp.linear_fc1.input_quantizer"
