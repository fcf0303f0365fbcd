"""Holds the settings of an export's config.json against its source's: all that decides what a server computes.

Whatever differs is an error, unless it is named below: a setting that nobody thought of is found too.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from quantplug.checkpoint.untrusted.json_reader import Json, as_object
from quantplug.printable import shown
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import Checkpoint
from quantplug.verify.inventory.tied_head import said_tied
from quantplug.verify.report import Finding, error, warning

# What tools write for themselves, and what only training or generation through transformers reads.
MAY_DIFFER = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "attention_dropout", "attn_implementation",
    "auto_map", "aux_loss_alpha", "chunk_size_feed_forward", "compression_config", "hidden_dropout", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states", "output_router_logits",
    "problem_type", "quantization_config", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "seq_aux",
    "torchscript", "transformers_version", "use_bfloat16", "use_cache",
})  # fmt: skip
# Of layers of multi-token prediction that the source counts and does not have, an export counts none. Layers that are
# lost are told by the tensors.
_DRAFTS = frozenset({"num_nextn_predict_layers", "mtp_num_hidden_layers"})
# Keys under which transformers 4 and 5 write the same.
_RENAMED = {"torch_dtype": "dtype"}
# What changes a model where it is set, and is off where a config does not have it. Any other setting that the source
# leaves out may be written out by a newer transformers with the value it had by default, so that is no error.
_SWITCHES = frozenset({
    "attention_bias", "attention_chunk_size", "attention_multiplier", "attn_logit_softcapping", "embedding_multiplier",
    "final_logit_softcapping", "logit_scale", "logits_scaling", "mlp_bias", "partial_rotary_factor",
    "residual_multiplier", "rope", "rope_scaling", "rope_theta", "routed_scaling_factor", "sliding_window",
    "torch_dtype", "use_sliding_window",
})  # fmt: skip
# What transformers leaves out of a file where it is off (`PretrainedConfig.to_diff_dict`), since every config class has
# it off by default. Of any other setting a class may have a default that is on: without `sliding_window: null` readers
# give a Mistral a window of 4096, and without `norm_topk_prob: false` a GLM-4.5 weights that sum to one.
_OFF_BY_DEFAULT = frozenset({
    "add_cross_attention", "begin_suppress_tokens", "bos_token_id", "cross_attention_hidden_size",
    "decoder_start_token_id", "do_sample", "early_stopping", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "is_decoder", "is_encoder_decoder",
    "output_scores", "pad_token_id", "prefix", "pruned_heads", "remove_invalid_values", "return_dict_in_generate",
    "rope_scaling", "sep_token_id", "suppress_tokens", "task_specific_params", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class",
})  # fmt: skip
# Whole numbers, and lists of them, by who stops at one with a point, of the configs of all families
# (tests/verify/test_whole_numbers.py). Others may be written either way, such as a base of rotary embeddings.
# Config classes of transformers 5 declare these as whole, those of some architectures at least, and refuse all else.
# Where a class does not, modules take them as sizes, or count by them.
DECLARED_WHOLE = frozenset({
    "attention_chunk_size", "boi_token_index", "bos_token_id", "chunk_size", "conv_kernel", "decoder_sparse_step",
    "deepstack_visual_indexes", "depth", "eoi_token_index", "eos_token_id", "expand", "first_k_dense_replace",
    "floor_scale", "head_dim", "hidden_size", "image_end_token_id", "image_size", "image_start_token_id",
    "image_token_id", "image_token_index", "in_channels", "interleave_moe_layer_step", "intermediate_size",
    "intermediate_size_mlp", "kv_lora_rank", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_value_head_dim", "mamba_head_dim", "mamba_num_heads", "max_position_embeddings",
    "max_window_layers", "mlp_only_layers", "moe_intermediate_size", "moe_latent_size", "moe_layers",
    "moe_shared_expert_intermediate_size", "n_group", "n_groups", "n_routed_experts", "n_shared_experts",
    "no_rope_layer_interval", "no_rope_layers", "num_attention_heads", "num_channels", "num_experts",
    "num_experts_per_tok", "num_heads", "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "num_logits_to_keep", "num_nextn_predict_layers", "num_position_embeddings", "out_hidden_size", "pad_token_id",
    "patch_size", "pretraining_tp", "projector_input_dim", "projector_output_dim", "q_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "shared_expert_intermediate_size", "sliding_window", "spatial_merge_size", "ssm_state_size",
    "temporal_patch_size", "topk_group", "v_head_dim", "video_end_token_id", "video_start_token_id", "video_token_id",
    "vision_end_token_id", "vision_output_dim", "vision_start_token_id", "vocab_size",
})  # fmt: skip
# No class of transformers' declares these. vLLM 0.32 makes as many layers of the first; the parts of rotary embeddings
# are cut by the second, there and in transformers.
_USED_AS_WHOLE = frozenset({"mtp_num_hidden_layers", "mrope_section"})
_COUNTS = DECLARED_WHOLE | _USED_AS_WHOLE
# Numbers with a point that config classes of transformers 5 declare as such, those of some architectures at least, and
# refuse without it: 1.0 may be written as 1 by tools that know one kind of number alone, as JavaScript does.
DECLARED_FRACTION = frozenset({
    "attention_dropout", "attn_scale", "initializer_range", "layer_norm_epsilon", "norm_eps", "pixel_shuffle_ratio",
    "rms_norm_eps", "routed_scaling_factor", "router_aux_loss_coef", "router_jitter_noise", "time_step_floor",
    "time_step_max", "time_step_min",
})  # fmt: skip
_ROPE = "rope"  # what both spellings become
_DEEPEST = 8  # objects within objects; no config known to us has more than three
_FLOAT_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class _Absent:
    """Stands for the value of a setting that is not there."""

    def __repr__(self) -> str:
        return "not set"


_ABSENT = _Absent()


def settings(export: Checkpoint, source: Checkpoint) -> Iterator[Finding]:
    """Settings of the source that the export has with another value, or not at all, or has beside."""
    here, there = dict(_flat(export.config)), dict(_flat(source.config))
    added = []
    for name in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(name, _ABSENT), there.get(name, _ABSENT)
        last = name.rpartition(".")[2]
        # A list says it of each layer: one that is too short or too long is refused.
        lengths = {len(value) for value in (ours, theirs) if isinstance(value, list)}
        both_off = _is_off(ours) and _is_off(theirs) and not _is_lost(last, ours, theirs) and len(lengths) < 2
        if _is_no_count(last, ours, theirs):
            message = f"is {shown(ours)}, in the source {shown(theirs)}: readers want a whole number, and stop"
            yield error(Check.SETTINGS, f"config.json {name}", message)
            continue
        both_off = both_off and (ours is _ABSENT or theirs is _ABSENT or not _is_of_another_type(ours, theirs))
        # Text, though there is none of it, is no window and no token: config classes that allow null stop at it.
        both_off = both_off and not (ours == "" and theirs is None)
        if same(ours, theirs) or both_off or (last in _DRAFTS and ours == 0):
            continue
        if last == "dtype" and _has_type(export, here, ours, theirs):
            continue
        if theirs is _ABSENT and last not in _SWITCHES:
            added.append(f"{name} {shown(ours)}")
        elif last == "tie_word_embeddings" and (_ABSENT in (ours, theirs) or _repeats_the_top(name, ours, here)):
            # By default it depends on the architecture, and transformers 5 reads it at the top alone: an export writes
            # the same for the language model inside, where a source may hold a default that nothing reads. Whether the
            # head is there is told by the tensors, and whether it is said anywhere, below.
            continue
        else:
            yield error(Check.SETTINGS, f"config.json {name}", f"is {shown(ours)}, in the source {shown(theirs)}")
    yield from _of_other_types(export.config, source.config)
    if said_tied(source.config) is not None and said_tied(export.config) is None:
        message = f"is {_ABSENT!r}, in the source {shown(said_tied(source.config))}: readers have defaults of their own"
        yield error(Check.SETTINGS, "config.json tie_word_embeddings", message)
    if added:
        message = (
            f"{len(added)} settings are not in the source's: {', '.join(added[:6])}: right where they are defaults"
        )
        yield warning(Check.SETTINGS, "config.json", message)


def _of_other_types(ours: Json, theirs: Json, prefix: str = "", depth: int = 0) -> Iterator[Finding]:
    """Settings that are the same, or may differ, and are not of the source's type: transformers 5 refuses them."""
    for key in sorted(ours.keys() & theirs.keys()):
        here, there, name = ours[key], theirs[key], f"{prefix}{key}"
        if key in DECLARED_FRACTION and type(here) is int and isinstance(there, float) and here == there:
            message = f"is {shown(here)}, in the source {shown(there)}: readers want a number with a point, and stop"
            yield error(Check.SETTINGS, f"config.json {name}", message)
        elif key in MAY_DIFFER and _is_of_another_type(here, there):
            message = f"is {shown(here)}, in the source {shown(there)}: readers want a value of that type, and stop"
            yield error(Check.SETTINGS, f"config.json {name}", message)
        elif key not in MAY_DIFFER and depth < _DEEPEST:
            yield from _of_other_types(as_object(here), as_object(there), f"{name}.", depth + 1)


def _is_of_another_type(ours: Any, theirs: Any) -> bool:
    """Whether a value cannot stand where another does; null can, but for a number, true or false."""
    here, there = (float if type(value) is int else type(value) for value in (ours, theirs))
    return theirs is not None and here is not there and (ours is not None or there in (bool, float))


def _repeats_the_top(name: str, value: Any, settings_here: Mapping[str, Any]) -> bool:
    """Whether a setting of a model inside another has the value that the whole model has, which is compared too."""
    _, _, last = name.rpartition(".")
    return name != last and same(value, settings_here.get(last, _ABSENT))


def _flat(config: Json, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted names of all settings that matter, and their values; rotary embeddings in one spelling."""
    plain = {key: value for key, value in config.items() if key not in MAY_DIFFER}
    for key, value in _one_rope(_in_new_words(plain)).items():
        name = f"{prefix}{key}"
        if key == _ROPE and isinstance(value, Mapping):
            yield from ((f"{name}.{part}", said) for part, said in value.items())
        elif isinstance(value, Mapping) and value and depth < _DEEPEST:
            yield from _flat(value, f"{name}.", depth + 1)
        else:
            yield name, _without_prefix(value)


def _without_prefix(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _in_new_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 5; an old one is left beside a new one that says something else, as readers differ."""
    apart = {
        old
        for old, new in _RENAMED.items()
        if old in config and new in config and not same(*map(_without_prefix, (config[old], config[new])))
    }
    return {key if key in apart else _RENAMED.get(key, key): value for key, value in config.items()}


def _one_rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of transformers 4 as one object, like `rope_parameters` of transformers 5.

    Where two of them say two things they stay apart: readers differ in which one they take.
    """
    old, new = as_object(config.get("rope_scaling")), as_object(config.get("rope_parameters"))
    whole = {**old, **new}
    if any(isinstance(value, Mapping) for value in whole.values()):  # one object for each kind of layer
        return config
    if not all(same(old[key], new[key]) for key in old.keys() & new.keys()):
        return config
    # Where it is not there it is the default; at a null transformers stops.
    whole["rope_type"] = whole.get("rope_type", whole.get("type", "default"))
    whole.pop("type", None)
    moved = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    rope = {**moved, **whole}
    if rope == {"rope_type": "default"}:
        return config
    spelled = {"rope_scaling", "rope_parameters", *(key for key in moved if same(moved[key], rope[key]))}
    return {key: value for key, value in config.items() if key not in spelled} | {_ROPE: rope}


def same(ours: Any, theirs: Any) -> bool:
    """Equal as JSON, numbers by value: 1e-6 and 0.000001, 1 and 1.0, but not 1 and true."""
    if isinstance(ours, bool) or isinstance(theirs, bool) or not isinstance(ours, int | float):
        return type(ours) is type(theirs) and bool(ours == theirs)
    return isinstance(theirs, int | float) and math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=0.0)


def _is_no_count(name: str, ours: Any, theirs: Any) -> bool:
    """Whether a number that counts something is written with a point, by itself or in a list."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return any(_is_no_count(name, *pair) for pair in zip(ours, theirs, strict=False))
    whole = isinstance(theirs, int) and not isinstance(theirs, bool)
    return name in _COUNTS and whole and isinstance(ours, float)


def _is_off(value: Any) -> bool:
    """What a config says by leaving a setting out, also where each layer says it."""
    if isinstance(value, list):
        return not value or set(map(str, value)) == {"full_attention"}
    return value is _ABSENT or value is None or value is False or value in ({}, "", "default")


def _is_lost(name: str, ours: Any, theirs: Any) -> bool:
    """Whether the source switches something off in words, and the export leaves it to a default that may be on.

    Or says null where readers look for a name: transformers has no kind of rotary embeddings of that name.
    """
    if name == "rope_type" and ours is None:
        return True
    return ours is _ABSENT and (theirs is None or theirs is False) and name not in _OFF_BY_DEFAULT


def _has_type(export: Checkpoint, settings_here: Mapping[str, Any], ours: Any, theirs: Any) -> bool:
    """Whether the export's plain matrices are of the type that it names: it was cast, and says so."""
    if ours is _ABSENT or ours is None:
        # Said of the whole or of the language model inside. Where nothing says it, readers take FP16 or FP32.
        said = {name: value for name, value in settings_here.items() if name.rpartition(".")[2] == "dtype"}
        return any(value is not None for value in said.values())
    if theirs is _ABSENT:
        return True
    types = {_FLOAT_TYPES.get(info.dtype) for info in export.tensors.values() if len(info.shape) > 1}
    return isinstance(ours, str) and ours in types
