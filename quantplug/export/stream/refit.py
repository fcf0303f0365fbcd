"""A planned stream in the forms in which servers take new weights: vLLM's weight transfer, SGLang's flat buckets.

Neither is imported: both ask for attributes alone. vLLM 0.32 and 0.33 `distributed/weight_transfer/base.py`; SGLang
0.5.23 `srt/weight_sync/tensor_bucket.py`, whose `supports_multi_dtypes` says that a bucket may hold several types.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from quantplug.errors import ArgumentError, Offender
from quantplug.export.plan.pieces import BUCKET_BYTES
from quantplug.export.stream.api import StreamPlan
from quantplug.formats import TensorSpec


class RefitSource:
    """The weights of a model as vLLM's trainer engines ask for them, packed: its `WeightSource`.

    The NCCL and IPC engines take it as it is. For one that wants groups of layers, such as that of sharded RDT, inherit
    from both: `class Source(quantplug.RefitSource, WeightSource): ...`; groups are then made by vLLM's rules.

    All ranks of the trainer must have one and run through it, as a stream is a collective; ranks that are no receivers
    get nothing from it, so that vLLM's sender, rank 0, must be one.

    Args:
        plan: What `plan_stream` gave. The model is read anew each time that the source is run through.
    """

    def __init__(self, plan: StreamPlan) -> None:
        self._plan = plan
        self._metadata = list(plan.expected().values())

    def metadata(self) -> list[TensorSpec]:
        """Name, shape and dtype of every tensor, in the order in which they come; made once, without any data."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The (name, tensor) pairs of `StreamPlan.tensors`, of the model as it is now; raises what that raises."""
        return self._plan.tensors()

    def held_names(self) -> None:
        """None: every receiver holds every tensor, whatever the parallel layout of the trainer is."""
        return


@dataclass(frozen=True)
class FlattenedTensor:
    """Where a tensor lies in a bucket: the fields of SGLang's `FlattenedTensorMetadata`.

    Attributes:
        start_idx: Its first byte.
        end_idx: The byte behind its last.
        numel: Bytes, as SGLang counts them.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


@dataclass(frozen=True)
class FlattenedBucket:
    """Tensors of several types in one, for `update_weights_from_tensor(load_format="flattened_bucket")`.

    Attributes:
        flattened_tensor: U8 [bytes], where the weights are.
        metadata: What lies where, without gaps.
    """

    flattened_tensor: torch.Tensor
    metadata: tuple[FlattenedTensor, ...]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors again, as views of the bucket: what a receiver makes of it."""
        for place in self.metadata:
            yield place.name, self.flattened_tensor[place.start_idx : place.end_idx].view(place.dtype).view(place.shape)

    @property
    def names(self) -> list[str]:
        """For `update_weights_from_distributed`, which wants three lists, and the bucket sent as it is."""
        return [place.name for place in self.metadata]

    @property
    def dtypes(self) -> list[str]:
        """As that spells them: `uint8`, `float8_e4m3fn`."""
        return [str(place.dtype).removeprefix("torch.") for place in self.metadata]

    @property
    def shapes(self) -> list[list[int]]:
        """Of the tensors."""
        return [list(place.shape) for place in self.metadata]


def flattened_buckets(plan: StreamPlan, bucket_bytes: int = BUCKET_BYTES) -> Iterator[FlattenedBucket]:
    """A stream, bucket by bucket.

    What servers put together stays together: all tensors of one weight of Megatron's (gate and up of an expert; q, k
    and v; each with its scales) are in one bucket, so that a receiver never waits for the other half of a linear. All
    ranks must run through it to the end.

    Args:
        plan: What `plan_stream` gave.
        bucket_bytes: Of a bucket. A weight whose tensors are larger together has one of its own.

    Raises:
        ArgumentError: `bucket_bytes` is not positive.
        QuantplugError: What `StreamPlan.tensors` raises.
    """
    if bucket_bytes < 1:
        offender = Offender("bucket_bytes", f"is {bucket_bytes}")
        raise ArgumentError("A bucket has no room.", [offender], "Pass a number of bytes above zero.")
    return _buckets(plan, bucket_bytes)


def _buckets(plan: StreamPlan, bucket_bytes: int) -> Iterator[FlattenedBucket]:
    family = plan.families()
    together: list[tuple[str, torch.Tensor]] = []
    size = 0
    for _, named in groupby(plan.tensors(), key=lambda pair: family[pair[0]]):
        tensors = list(named)
        nbytes = sum(tensor.nbytes for _, tensor in tensors)
        if together and size + nbytes > bucket_bytes:
            yield _flattened(together)
            together, size = [], 0
        together += tensors
        size += nbytes
        del tensors  # Two buckets are in memory at the most: this one, and its copy.
    if together:
        yield _flattened(together)


def _flattened(tensors: list[tuple[str, torch.Tensor]]) -> FlattenedBucket:
    """A copy of the tensors, one behind the other, those of wider types first.

    A receiver views bytes as a tensor's type, which torch does only where its size divides their offset: behind an odd
    number of codes a scale would lie askew. Gaps would mend that too, but SGLang, where it makes the bucket to receive
    into, knows of none (`FlattenedTensorBucket.empty`).
    """
    flat = torch.empty(sum(tensor.nbytes for _, tensor in tensors), dtype=torch.uint8, device=tensors[0][1].device)
    places: list[FlattenedTensor] = []
    start = 0
    for name, tensor in sorted(tensors, key=lambda pair: -pair[1].element_size()):
        stop = start + tensor.nbytes
        flat[start:stop] = tensor.reshape(-1).view(torch.uint8)
        places.append(FlattenedTensor(name, tensor.shape, tensor.dtype, start, stop, tensor.nbytes))
        start = stop
    return FlattenedBucket(flat, tuple(places))
