"""The file of `verify --moments`: how large the inputs of a checkpoint's quantized weights are, by their names.

It is one of safetensors, with two tensors for each weight that is quantized:

- `<weight>.input_moments` F32 [in]: the mean square of each of its input channels over the data;
- `<weight>.input_sketch` BF16 [k, in]: random sums S of its inputs x. Of an error D [out, in] of the weight ||D S^T||^2
  is about the mean of ||D x||^2, the squared error of its outputs (`calibration/inputs/sketches.py`).

It belongs to the model as it is exported: after channels were folded, inputs are others.
"""

MOMENTS, SKETCH = "input_moments", "input_sketch"
"""Ends of the names of a weight's two tensors."""


def weight_name(module: str, expert: int | None) -> str:
    """`<module>`, or `<module>[3]` for expert 3 in a tensor that holds all experts of a layer."""
    return module if expert is None else f"{module}[{expert}]"


def tensor_name(weight: str, end: str) -> str:
    """Of a weight by its name in the file, and `MOMENTS` or `SKETCH`."""
    return f"{weight}.{end}"
