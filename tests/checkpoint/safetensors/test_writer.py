"""Files written tensor by tensor, read by the safetensors library."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantplug.checkpoint.safetensors.writer import SafetensorsFile, file_size
from quantplug.formats import TensorSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8]

tensor_specs = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=8
).map(lambda found: [TensorSpec(f"layer.{i}", tuple(shape), dtype) for i, (shape, dtype) in enumerate(found)])


def filled(spec: TensorSpec, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (math.prod(spec.shape) * spec.dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(spec.dtype).reshape(spec.shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(tensor_specs, st.randoms(use_true_random=False))
def test_the_library_reads_what_was_written_in_any_order(tmp_path_factory, specs, dice):
    """Whole tensors, or rows of them, a few at a time."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    tensors = {spec.name: filled(spec, seed) for seed, spec in enumerate(specs)}
    file = SafetensorsFile(path, specs)
    writes = []
    for name, tensor in tensors.items():
        step = dice.randint(1, 3)
        if tensor.numel() and tensor.ndim and dice.random() < 0.5:
            writes += [(name, tensor[row : row + step], row) for row in range(0, len(tensor), step)]
        else:
            writes.append((name, tensor, 0))
    for write in dice.sample(writes, len(writes)):
        assert not path.exists()
        file.write(*write)
    assert path.stat().st_size == file_size(specs)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].shape, read[name].dtype) == (tensor.shape, tensor.dtype)
        assert raw(read[name]) == raw(tensor)


def test_data_lies_as_the_librarys_own_writer_puts_it(tmp_path: Path):
    """Wide types first, each aligned; only the order of names inside the header is a writer's choice."""
    specs = [
        TensorSpec("a", (3,), torch.uint8),
        TensorSpec("b", (5,), torch.bfloat16),
        TensorSpec("c", (), torch.float32),
        TensorSpec("d", (7,), torch.float8_e4m3fn),
    ]
    tensors = {spec.name: filled(spec, seed) for seed, spec in enumerate(specs)}
    file = SafetensorsFile(tmp_path / "ours", specs)
    for name, tensor in tensors.items():
        file.write(name, tensor)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
    assert len(ours) == len(theirs)
    size = sum(spec.nbytes for spec in specs)
    assert sorted(ours[-size:]) == sorted(theirs[-size:])
    assert ours[-size : -size + 14] == theirs[-size : -size + 14]  # F32, then BF16


def test_an_unfinished_file_has_no_name(tmp_path: Path):
    specs = [TensorSpec("a", (4,), torch.float32), TensorSpec("b", (4,), torch.float32)]
    file = SafetensorsFile(tmp_path / "model.safetensors", specs)
    file.write("a", torch.ones(4))
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.part"]


@pytest.mark.parametrize("wrong", [torch.ones(5), torch.ones(4, dtype=torch.bfloat16), torch.ones(2, 2)])
def test_only_the_planned_tensor_is_taken(tmp_path: Path, wrong: torch.Tensor):
    file = SafetensorsFile(tmp_path / "model.safetensors", [TensorSpec("a", (4,), torch.float32)])
    with pytest.raises(AssertionError, match="not as planned"):
        file.write("a", wrong)
    file.close()


def test_rows_are_taken_once_and_where_they_fit(tmp_path: Path):
    specs = [TensorSpec("a", (4, 2), torch.float32), TensorSpec("b", (1,), torch.float32)]
    file = SafetensorsFile(tmp_path / "model.safetensors", specs)
    with pytest.raises(AssertionError, match="not as planned"):
        file.write("a", torch.ones(2, 2), 3)
    file.write("a", torch.ones(3, 2))
    with pytest.raises(AssertionError, match="written twice"):
        file.write("a", torch.ones(2, 2), 2)
    file.close()
