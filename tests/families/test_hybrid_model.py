"""Every family as Megatron-Core's HybridModel: the same parameters, bytes and logits as its GPTModel.

Nemotron-H, whose one class a HybridModel is, is shown in test_families.py.
"""

from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from quantplug import (
    export_checkpoint,
    export_hf_weights_quant,
    export_mcore_gpt_to_hf,
    import_mcore_gpt_from_hf,
    save_checkpoint,
)
from quantplug.calibration.collect import gather_statistics
from quantplug.mappings.amax import (
    AmaxPlacement,
    amaxes_to_hf,
    amaxes_to_megatron,
    convert_to_amax_map,
    read_amaxes,
    write_amaxes,
)
from quantplug.mappings.hybrid_pattern import parse
from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.models.build import LayerSpec
from quantplug.megatron.parameters import LanguageModel, iter_parameters
from quantplug.megatron.releases.hybrid import PATTERN, HybridModel, hybrid_stack_spec
from quantplug.plugins import quant_cfg
from tests.export.checkpoints import assert_same_export, build, load, one_rank, quantize, read, same_bytes
from tests.families.cases import CASES
from tests.families.served import serves_experts
from tests.families.test_families import PADDED_VOCABULARY, family_of
from tests.logits import VOCABULARY, megatron_logits, transformers_logits
from tests.megatron.hybrid import hybrid_config, load_hybrid, needs_hybrid_model
from tests.ranks import run_ranks

Checkpoint = Callable[[str], Path]
Export = Callable[..., Path]

WORKER = Path(__file__).with_name("hybrid_worker.py")
OF_PAIRS = [name for name in CASES if not name.startswith("nemotron_h")]

every_family = pytest.mark.parametrize("name", OF_PAIRS)


def trained(model: LanguageModel, directory: Path) -> Path:
    """As trainers save: the experts of a layer are one tensor."""
    directory.mkdir()
    with cpu.checkpointing(), results_within_process():
        dist_checkpointing.save(model.sharded_state_dict(), str(directory), validate_access_integrity=False)
    return directory


@needs_hybrid_model
@every_family
def test_the_bytes_of_the_gpt_model(name: str, checkpoint: Checkpoint, export: Export, tmp_path: Path) -> None:
    """Plain and in NVFP4; live, and straight from what a trainer saves and from what quantplug saves."""
    source = checkpoint(name)
    with one_rank(), torch.no_grad():
        model = load_hybrid(source)
        keys = {(parameter.key, parameter.shard) for parameter in iter_parameters(model)}
        assert keys == {(parameter.key, parameter.shard) for parameter in iter_parameters(build(source))}
        export_mcore_gpt_to_hf(model, source, tmp_path / "plain")
        trained(model, tmp_path / "trained")
        quantize(model, "w4a16_nvfp4", source, keep_experts=not serves_experts(name, "w4a16_nvfp4"))
        export_mcore_gpt_to_hf(model, source, tmp_path / "nvfp4")
        save_checkpoint(model, tmp_path / "quantized", extra={})
    export_checkpoint(tmp_path / "trained", tmp_path / "plain_again", source)
    export_checkpoint(tmp_path / "quantized", tmp_path / "nvfp4_again", source)

    for made, scheme in (("plain", None), ("nvfp4", "w4a16_nvfp4")):
        assert_same_export(tmp_path / made, export(name, scheme))
        assert_same_export(tmp_path / f"{made}_again", export(name, scheme))


@needs_hybrid_model
@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_a_kv_cache_is_that_of_the_gpt_model(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of attention and of latent attention; the cache of multi-token prediction is the one that all layers have."""
    source = checkpoint(name)
    with one_rank():
        for kind, make in (("gpt", load), ("hybrid", load_hybrid)):
            model = make(source)
            mtq.quantize(model, quant_cfg("w4a16_nvfp4", source, kv_cache="fp8_cast"))
            export_mcore_gpt_to_hf(model, source, tmp_path / kind)
    assert_same_export(tmp_path / "hybrid", tmp_path / "gpt")


@needs_hybrid_model
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_amaxes_have_the_names_of_hugging_face(name: str, checkpoint: Checkpoint) -> None:
    """And from these the HybridModel gets them back, those of multi-token prediction too."""
    source, (family, dims) = checkpoint(name), family_of(checkpoint(name))
    rows = convert_to_amax_map(family.mappings).mappings
    with one_rank():
        gpt, hybrid = (quantize(it(source), "w4a16_nvfp4") for it in (load, load_hybrid))
    of_gpt, of_hybrid = (
        {name: it for name, it in model.named_buffers() if name.endswith("_amax")} for model in (gpt, hybrid)
    )
    pattern = parse(hybrid.hybrid_layer_pattern)
    place = AmaxPlacement(layers=pattern.layers_of(0, len(pattern.decoder)))

    found = read_amaxes(rows, of_hybrid, dims, place)

    named, expected = amaxes_to_hf(rows, found, dims), amaxes_to_hf(rows, read_amaxes(rows, of_gpt, dims), dims)
    assert named.keys() == expected.keys()
    assert all(torch.equal(named[it], expected[it]) for it in expected)
    back = write_amaxes(rows, amaxes_to_megatron(rows, expected, dims), of_hybrid, dims, place)
    assert all(torch.equal(back[it], of_hybrid[it]) for it in of_hybrid)


@needs_hybrid_model
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2"])
def test_a_stream_has_the_tensors_of_an_export(name: str, checkpoint: Checkpoint, export: Export) -> None:
    with one_rank():
        stream = dict(
            export_hf_weights_quant(load_hybrid(checkpoint(name)), checkpoint(name), quant_format="w4a16_nvfp4")
        )
    expected = read(export(name, "w4a16_nvfp4"))
    assert stream.keys() == expected.keys()
    assert [it for it in expected if not same_bytes(stream[it], expected[it])] == []


@needs_hybrid_model
@every_family
def test_logits(name: str, checkpoint: Checkpoint) -> None:
    """Megatron's own forward of the HybridModel gives transformers' logits."""
    with one_rank():
        logits = megatron_logits(load_hybrid(checkpoint(name), LayerSpec.LOCAL, torch.float32))
    torch.testing.assert_close(logits[..., :VOCABULARY], transformers_logits(checkpoint(name)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("single_rank")
def test_a_model_that_a_user_builds(checkpoint: Checkpoint, export: Export, tmp_path: Path) -> None:
    """By Megatron-Core alone, of its own spec; before 0.18 the class is called MambaModel."""
    source = checkpoint("mixtral")
    gpt = build(source)
    settings = {**hybrid_config(source).transformer, "num_layers": 4, "moe_layer_freq": 1}
    arguments = {PATTERN: "*E*E", "vocab_size": PADDED_VOCABULARY, "max_sequence_length": 128}
    with cpu.construction():
        config = TransformerConfig(
            **settings,
            activation_func=functional.silu,
            bf16=True,
            params_dtype=torch.bfloat16,
            moe_grouped_gemm=True,
            moe_token_dispatcher_type="allgather",
            use_cpu_initialization=True,
        )
        model = HybridModel(
            config, hybrid_stack_spec, **arguments, position_embedding_type="rope", rotary_base=gpt.rotary_base
        )
    model.bfloat16()
    import_mcore_gpt_from_hf(model, source)
    quantize(model, "w4a16_nvfp4", source)
    table = gather_statistics(model)
    export_mcore_gpt_to_hf(model, source, tmp_path / "out")

    assert {row.key.layer for row in table.rows if row.key.expert is not None} == {0, 1}
    assert_same_export(tmp_path / "out", export("mixtral", "w4a16_nvfp4"))


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    """FAMILY/out, FAMILY/megatron, and of some FAMILY/virtual for every family, from TP 2, EP 2 and PP 2."""
    work = tmp_path_factory.mktemp("hybrid")
    for name in OF_PAIRS:
        (work / name).mkdir()
        (work / name / "hf").symlink_to(checkpoint(name))
    # Models keep their groups, and each group has threads: few models for each set of ranks.
    for few in (OF_PAIRS[first : first + 5] for first in range(0, len(OF_PAIRS), 5)):
        run = run_ranks(4, WORKER, work, *few, timeout=300)
        assert run.ok, run.output[-9000:]
    return work


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Byte for byte; in which files they are depends on the number of ranks."""
    tensors, others = read(found), read(expected)
    assert tensors.keys() == others.keys()
    assert [name for name in others if not same_bytes(tensors[name], others[name])] == []


@needs_hybrid_model
@pytest.mark.distributed
@pytest.mark.slow
@every_family
def test_the_same_bytes_from_four_ranks(
    name: str, of_four_ranks: Path, checkpoint: Checkpoint, export: Export, tmp_path: Path
) -> None:
    """Live, from virtual stages, by the examples, and straight from what they save."""
    made, expected = of_four_ranks / name, export(name, "w4a16_nvfp4")

    assert_same_tensors(made / "out", expected)
    for way in ("virtual", "examples"):
        if (made / way).exists():
            assert_same_tensors(made / way, expected)
    if (made / "megatron").exists():
        export_checkpoint(made / "megatron", tmp_path / "out", checkpoint(name))
        assert_same_export(tmp_path / "out", expected)
