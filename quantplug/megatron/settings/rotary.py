"""Rotary embeddings as what they do: how fast each pair of entries of a head turns, and how large it comes out."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from quantplug.mappings.table import MegatronConfig
from quantplug.megatron import cpu
from quantplug.megatron.parameters import LanguageModel

_CLOSE = 1e-5  # Relative. Powers in FP32 differ by less between devices, and two bases that anybody has by more.


@dataclass(frozen=True)
class Rotary:
    """What a rotary embedding does.

    Attributes:
        frequencies: By how many radians each pair of entries turns from one position to the next.
        scale: What the turned entries are multiplied with (YaRN's attention factor, arXiv 2309.00071, section 3.4).
        unread: Class of an embedding that is not Megatron-Core's, so that nobody knows what it does; else None.
        interleaved: Whether entries 2i and 2i + 1 of a head are a pair, or i and i + n of 2n. Attention asks the config
            the same once more, and a HybridModel does not hand it on to the embedding.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    unread: str | None = None
    interleaved: bool = False

    @property
    def base(self) -> float | None:
        """The base whose powers base^(-i/n) the n frequencies are (arXiv 2104.09864); None where they are scaled."""
        count = len(self.frequencies)
        if count < 2 or not self.frequencies[1] > 0:
            return None
        base = float(self.frequencies[1]) ** -count
        powers = (base ** (-i / count) for i in range(count))
        return base if all(map(_close, self.frequencies, powers)) else None


def live_rotaries(chunk: LanguageModel) -> tuple[Rotary | None, ...]:
    """What a chunk of a model turns queries and keys by, each once; None where it does not. Empty if nobody can tell.

    The model is left as it is.
    """
    if chunk.config.multi_latent_attention:
        # Each attention has one of its own, whatever the model has. A stage without layers has none.
        modules = [module for module in chunk.modules() if isinstance(module, MultiLatentAttention)]
        return tuple(dict.fromkeys(_read(module.rotary_pos_emb) for module in modules))
    if chunk.position_embedding_type not in ("rope", "yarn", "mrope"):
        return (None,)
    return (_read(chunk.rotary_pos_emb),)


def expected_rotary(family_config: MegatronConfig, config: TransformerConfig) -> Rotary | None:
    """What a model of a family's settings turns queries and keys by; None where it does not.

    Args:
        config: `family_config` as Megatron has it.
    """
    # What a family from outside leaves to GPTModel has GPTModel's defaults.
    arguments = {"position_embedding_type": "none", "rotary_percent": 1.0, "rotary_base": 10000, **family_config.model}
    # Megatron's own modules, made as its models make them; on the current device, which may be a GPU.
    with cpu.construction():
        if config.multi_latent_attention:
            return _read(_latent_rotary(config))
        match arguments["position_embedding_type"]:
            case "rope":
                rotary = RotaryEmbedding(
                    config.kv_channels,
                    arguments["rotary_percent"],
                    rotary_base=arguments["rotary_base"],
                    rotary_interleaved=config.rotary_interleaved,
                    rope_scaling=bool(arguments.get("rope_scaling")),
                    rope_scaling_factor=arguments.get("rope_scaling_factor", 8.0),
                )
                if family_config.rope_scaling:
                    rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **family_config.rope_scaling)
                return _read(rotary)
            case "yarn":
                settings = {name.removeprefix("yarn_"): value for name, value in family_config.yarn.items()}
                factor = settings.pop("rotary_scaling_factor")
                return _read(
                    YarnRotaryEmbedding(
                        config.kv_channels,
                        rotary_base=arguments["rotary_base"],
                        rotary_interleaved=config.rotary_interleaved,
                        scaling_factor=factor,
                        **settings,
                    )
                )
    return None


def _latent_rotary(config: TransformerConfig) -> RotaryEmbedding:
    width, base = config.qk_pos_emb_head_dim, config.rotary_base
    if config.rope_type == "rope":
        return RotaryEmbedding(width, config.rotary_percent, rotary_base=base)
    return YarnRotaryEmbedding(
        width,
        rotary_base=base,
        scaling_factor=config.rotary_scaling_factor,
        original_max_position_embeddings=config.original_max_position_embeddings,
        beta_fast=config.beta_fast,
        beta_slow=config.beta_slow,
        mscale=config.mscale,
        mscale_all_dim=config.mscale_all_dim,
    )


def _read(embedding: nn.Module) -> Rotary:
    if isinstance(embedding, YarnRotaryEmbedding):
        # It mixes its frequencies when it is asked for angles, and may move tensors of its own then: a shallow copy
        # moves its own references.
        with cpu.construction():
            angles, scale = copy.copy(embedding).get_emb(2)
        # Angles at position 1, each twice: in the second half of a row, or beside itself.
        once = angles[1, 0, 0, ::2] if embedding.rotary_interleaved else angles[1, 0, 0, : angles.shape[-1] // 2]
        return Rotary(tuple(once.tolist()), float(scale), interleaved=embedding.rotary_interleaved)
    if not isinstance(embedding, RotaryEmbedding | MultimodalRotaryEmbedding):
        return Rotary((), unread=type(embedding).__name__)
    # Positions are divided by the factor, which is the same.
    factor = embedding.seq_len_interpolation_factor or 1.0
    frequencies = tuple(frequency / factor for frequency in embedding.inv_freq.tolist())
    return Rotary(frequencies, interleaved=embedding.rotary_interleaved)


def differences(model: Rotary | None, config: Rotary | None) -> Iterator[tuple[str, str, str]]:
    """What two of them do otherwise: (setting that most likely differs, the model's value, the config's)."""
    if model is None or config is None or model.unread is not None:
        if model is not config:
            yield "position_embedding_type", _kind(model), _kind(config)
        return
    if model.interleaved is not config.interleaved:
        yield "rotary_interleaved", str(model.interleaved), str(config.interleaved)
    if len(model.frequencies) != len(config.frequencies):
        yield "rotary_percent", _turned(model), _turned(config)
    if model.base is not None and config.base is not None:
        if not _close(model.base, config.base):
            yield "rotary_base", f"{model.base:.6g}", f"{config.base:.6g}"
    elif len(model.frequencies) == len(config.frequencies) and not _all_close(model.frequencies, config.frequencies):
        pairs = zip(model.frequencies, config.frequencies, strict=True)
        place = next(i for i, pair in enumerate(pairs) if not _close(*pair))
        yield "rope_scaling", _scaled(model, place), _scaled(config, place)
    if not _close(model.scale, config.scale):
        yield "mscale", f"a factor of {model.scale:.6g}", f"a factor of {config.scale:.6g}"


def _kind(rotary: Rotary | None) -> str:
    if rotary is not None and rotary.unread is not None:
        return f"by a {rotary.unread}, which is not one of Megatron-Core's"
    return "without rotary positions" if rotary is None else "with rotary positions"


def _turned(rotary: Rotary) -> str:
    return f"{2 * len(rotary.frequencies)} entries of a head turn"


def _scaled(rotary: Rotary, place: int) -> str:
    base = "" if rotary.base is None else f", not scaled, of base {rotary.base:.6g}"
    return f"frequency {rotary.frequencies[place]:.6g} of pair {place}{base}"


def _close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=_CLOSE)


def _all_close(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(map(_close, first, second))
