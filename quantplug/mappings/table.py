"""Tables: all rows of an architecture, read in both directions, with what its config says in Megatron's words.

Whoever writes a table finds the words of its rows here too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from quantplug.mappings.keys import ParamKey as ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import LayerStack as LayerStack
from quantplug.mappings.rows import Merged as Merged
from quantplug.mappings.rows import Role as Role
from quantplug.mappings.rows import Scope as Scope
from quantplug.mappings.rows import WeightMapping as WeightMapping


class Activation(Enum):
    """Functions of Megatron's feed-forward networks, by name: this file is read where Megatron is not installed."""

    SILU = "silu"
    QUICK_GELU = "x * sigmoid(1.702 * x)"
    SQUARED_RELU = "relu(x) ** 2"


class ModelKind(Enum):
    """Megatron's classes of language models."""

    GPT = "GPTModel"
    HYBRID = "HybridModel of attention and networks in turn, two of whose layers are one of a GPTModel's"
    MAMBA = "MambaModel, each of whose layers is one mixer, attention or feed-forward network"


@dataclass(frozen=True)
class MegatronConfig:
    """A Hugging Face config in Megatron's words.

    Attributes:
        transformer: Keyword arguments of `TransformerConfig`.
        model: Keyword arguments of the model, `vocab_size` being the unpadded number of rows.
        activation: Function of the feed-forward networks.
        yarn: Attributes that `GPTModel` reads from the config for position embeddings of type yarn.
        rope_scaling: Arguments of Llama 3's scaling of rotary frequencies, where they are not those that Megatron has
            fixed: `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`.
        unit_norm_layers: Global ids of the layers that bring queries and keys to unit RMS, without weights.
        kind: Class of the model. A `HYBRID` has the settings of the GPTModel that it stands for.
    """

    transformer: Mapping[str, Any]
    model: Mapping[str, Any]
    activation: Activation = Activation.SILU
    yarn: Mapping[str, Any] = field(default_factory=dict)
    rope_scaling: Mapping[str, float] = field(default_factory=dict)
    unit_norm_layers: tuple[int, ...] = ()
    kind: ModelKind = ModelKind.GPT


@dataclass(frozen=True)
class SizeSetting:
    """A whole number in config.json that a family's dimensions are read from.

    Attributes:
        names: Its spellings; the first that is set counts.
        optional: It may be absent.
        nullable: It may be null.
        least: Its least value, 0 or 1.
    """

    names: tuple[str, ...]
    optional: bool = False
    nullable: bool = False
    least: int = 1


def _never(config: Mapping[str, Any]) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """One architecture: data only, read in both directions.

    Attributes:
        name: Short name for tables and messages.
        architectures: Values of `architectures` in config.json that it serves.
        mappings: The table.
        dimensions: Reads `ModelDimensions` from the config as a dict; raises UnsupportedModelError naming settings that
            no sizes can be read from.
        megatron_config: Converts the config; raises UnsupportedModelError for a setting we do not convert. None where
            Megatron has no such model: its checkpoints are quantized and verified, and no model is built.
        tied: Hugging Face name to the name whose data it shares when `tie_word_embeddings` is set.
        sizes: What `dimensions` reads beside the sizes of any decoder, or in place of one of the same name. A config
            of unknown origin is held against it before `dimensions` sees it.
        nested: Key of config.json under which those sizes are; None where they are at the top.
        mtp_setting: The setting of config.json that says how many layers of multi-token prediction there are.
        passthrough: Beginnings of names of tensors that are no part of Megatron's model, such as those of a vision
            model: they go from the source into what is written as they are.
        needs_source: Whether a model of this config must have such tensors, so that an export takes the whole source;
            where it only may, they are taken if the source has some.
        flags: Settings, where the sizes are, that publishers write as numbers and readers take for true or false.
        forms: Rows that stand for the same parameters as some of the table, in checkpoints that hold them otherwise.
        zero_centred: Whether the table is of a Megatron model whose norms multiply with 1 + weight, as what
            `megatron_config` gives says too (`layernorm_zero_centered_gamma`). A live model's may be otherwise: its
            values are converted.
        server_settings: Settings, where the sizes are, without which servers compute another model, and which
            transformers neither needs nor writes.
        shapes: Of tensors whose shapes by the sizes are not those that tensors of such names have elsewhere: by the
            name without numbers and without what its layers are in, such as `self_attn.q_norm`. None in a shape is a
            size that the config does not say.
    """

    name: str
    architectures: tuple[str, ...]
    mappings: tuple[WeightMapping, ...]
    dimensions: Callable[[Mapping[str, Any]], ModelDimensions]
    megatron_config: Callable[[Mapping[str, Any]], MegatronConfig] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    sizes: tuple[SizeSetting, ...] = ()
    nested: str | None = None
    mtp_setting: str = "num_nextn_predict_layers"
    passthrough: tuple[str, ...] = ()
    needs_source: Callable[[Mapping[str, Any]], bool] = _never
    flags: tuple[str, ...] = ()
    forms: tuple[tuple[WeightMapping, ...], ...] = ()
    zero_centred: bool = False
    server_settings: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Callable[[ModelDimensions], tuple[int | None, ...]]] = field(default_factory=dict)

    def expected(self, dims: ModelDimensions) -> Iterator[tuple[tuple[str, ...], ParamKey]]:
        """Every parameter of a whole model of these sizes, with its Hugging Face names, row by row."""
        return ((row.hf_names(key, dims), key) for row in self.mappings for key in row.keys(dims))

    def duplicates(self, dims: ModelDimensions, tied: bool = False) -> dict[str, str]:
        """Names under which Hugging Face may hold a tensor once more, each with the name of that tensor.

        Args:
            tied: Whether the output layer shares the data of the embedding, which is then the tensor of both.
        """
        # Only rows with one Hugging Face tensor, the embedding and the output layer, have copies.
        names = {copy: row.hf[0] for row in self.mappings for copy in row.duplicate_names(dims)}
        # A copy of a tied output layer is a copy of the embedding, the one tensor that is written.
        if not tied:
            return names
        return {copy: self.tied.get(name, name) for copy, name in names.items()} | dict(self.tied)

    @property
    def served_names(self) -> dict[str, str]:
        """Names of tensors that some tool writes and servers do not know, each with the name that they do."""
        rows = (row for form in self.forms for row in form if row.served)
        return {name: served for row in rows for name, served in zip(row.hf, row.served, strict=True)}

    def without_mtp(self) -> "Family":
        """The table of a model whose layers of multi-token prediction are left out, so that none are carried over."""
        return replace(self, passthrough=tuple(start for start in self.passthrough if not start.startswith("mtp.")))

    def by_megatron(self) -> dict[str, WeightMapping]:
        """Every Megatron spelling with its row."""
        return {name: mapping for mapping in self.mappings for name in mapping.megatron}
