"""Digests of every tensor that a tree of quantplug writes, to prove that a refactoring keeps the bytes.

    PYTHONPATH=BEFORE python tools/export_digests.py record SOURCES before.json
    PYTHONPATH=AFTER python tools/export_digests.py record SOURCES after.json
    python tools/export_digests.py compare before.json after.json

`record` takes the tree on PYTHONPATH, and its own tests/families/cases.py, through every way there is from a
checkpoint to quantized tensors: the two examples on one rank and at TP 2, EP 2; a live model that is quantized by
ModelOpt's stock configs; `quantplug quantize`; and the stream, on one rank and at TP 2, EP 2. SOURCES is a directory in
which the families' checkpoints are made where they are not there yet, so that both trees read the same files. Families
that the digests hold already are left out, so that a run that was ended goes on where it was.

A way that a tree refuses is recorded as refused. `compare` lists every difference and exits with status 1 if any is
found: which of them were meant is for its reader to say.
"""

import hashlib
import json
import os
import queue
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

Digests = dict[str, Any]

# The public name of a format first, then the names that earlier trees had for the same.
NAMES: Mapping[str, tuple[str, ...]] = {
    "w4a16_nvfp4": ("w4a16_nvfp4", "nvfp4"),
    "w8a16_fp8": ("w8a16_fp8", "fp8"),
    "fp8_blockwise": ("fp8_blockwise",),
}
# By the flags of the example that Megatron-Bridge's users know, which all trees take.
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "w4a16_nvfp4": ("--export-quant-cfg", "nvfp4", "--weight-only", "--mtp", "quantized"),
    "w8a16_fp8": ("--export-quant-cfg", "fp8", "--weight-only"),
}
BLOCKS = "blocks"
"""A source beside the families of tests/families, whose weights all divide by 128."""

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def record(
    sources: Annotated[Path, typer.Argument(help="Where the families' checkpoints are, or will be made.")],
    out: Annotated[Path, typer.Argument(help="The file of digests; families that it holds are left out.")],
    family: Annotated[list[str] | None, typer.Option(help="Only this family; repeatable.")] = None,
) -> None:
    """Records what the tree on PYTHONPATH writes for every family."""
    from tests.families.cases import CASES

    sources, out = sources.resolve(), out.resolve()
    done: Digests = json.loads(out.read_text()) if out.exists() else {}
    for name in family or [*CASES, BLOCKS]:
        if name not in done:
            start = time.perf_counter()
            done[name] = _record(name, _source(name, sources))
            out.write_text(json.dumps(done, indent=1))
            typer.echo(f"{name}: {len(done[name])} ways, {time.perf_counter() - start:.0f} s")


def _source(name: str, sources: Path) -> Path:
    """The checkpoint of a family; moved to its name once it is whole."""
    from tests.export.made import make_source
    from tests.families.cases import make

    if not (sources / name).exists():
        sources.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=sources) as work:
            made = Path(work) / name
            make_source("wide_moe_blocks", made) if name == BLOCKS else make(name, made)
            made.rename(sources / name)
    return sources / name


def _record(name: str, source: Path) -> Digests:
    """All ways of one family: on one rank, then on two."""
    from tests.ranks import run_ranks

    found: Digests = {}
    os.chdir(_tree())  # Ranks import what is in the working directory before what is on PYTHONPATH.
    with TemporaryDirectory() as work:
        for ranks in (1, 2):
            ended = run_ranks(ranks, Path(__file__).resolve(), "rank", source, work, timeout=1800)
            if not ended.ok:
                raise SystemExit(f"{name} on {ranks} rank(s) ended with {ended.statuses}:\n{ended.output[-9000:]}")
            found |= json.loads((Path(work) / f"{ranks}.json").read_text())
    return found


def _tree() -> Path:
    """The tree that is recorded."""
    from tests import ranks

    return Path(ranks.__file__).parents[1]


@app.command(hidden=True)
def rank(source: Path, work: Path) -> None:
    """One rank of those that `record` starts: rank 0 writes the digests of all of them."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    ranks, is_first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    # Every example ends the process group it has made, and gloo does not make another one in the same store.
    torch.distributed.destroy_process_group = lambda *_: None
    # What Megatron's save tells itself of its files goes through a process that first imports everything once more.
    filesystem_async._results_queue = queue.SimpleQueue()
    ways = {**_examples(source, work, ranks), **_streams(source, ranks)}
    if ranks == 1:
        ways |= {**_live(source, work), **_model_free(source, work)}
    if is_first:
        (work / f"{ranks}.json").write_text(json.dumps(ways))


def _sizes(source: Path, ranks: int) -> dict[str, int]:
    """Tensor parallel size, and expert parallel size where there are experts."""
    return {"tp": ranks, "ep": ranks if any(".experts." in name for name, _ in _tensors(source)) else 1}


def _examples(source: Path, work: Path, ranks: int) -> Digests:
    """examples/quantize.py to a Megatron checkpoint, examples/export.py to a Hugging Face checkpoint."""
    examples = _tree() / "examples"
    sys.path.insert(0, str(examples))
    sizes = [word for name, size in _sizes(source, ranks).items() for word in (f"--{name}", str(size))]

    def run(script: str, *arguments: str) -> None:
        sys.argv = [script, "--hf-model-id", str(source), *arguments, *sizes]
        try:
            runpy.run_path(str(examples / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise ValueError(f"{script} ended with status {end.code}") from end

    def through(name: str, flags: Iterable[str]) -> Digests:
        megatron, out = work / f"{name}-{ranks}-megatron", work / f"{name}-{ranks}"
        run("quantize.py", *flags, "--megatron-save-path", str(megatron))
        run("export.py", "--megatron-load-path", str(megatron), "--export-dir", str(out))
        return _digests(out)

    return {
        f"examples {name} at {ranks}": _or_refused(lambda name=name, flags=flags: through(name, flags))
        for name, flags in EXAMPLES.items()
    }


def _live(source: Path, work: Path) -> Digests:
    """A live model on one rank, as it is and quantized by ModelOpt's stock configs."""
    import modelopt.torch.quantization as mtq

    from quantplug import export_mcore_gpt_to_hf
    from tests.export.checkpoints import input_amax, load

    configs = {
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "w4a16_nvfp4": mtq.W4A16_NVFP4_CFG,
        "fp8": mtq.FP8_DEFAULT_CFG,
        "fp8_blockwise": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    }

    def export(name: str) -> Digests:
        model = load(source)
        if name in configs:
            mtq.quantize(model, configs[name])
            for path, module in model.named_modules():
                if path.endswith(".input_quantizer") and module.is_enabled:
                    module.amax = torch.tensor(input_amax(path.removesuffix(".input_quantizer")))
        export_mcore_gpt_to_hf(model, source, work / f"live-{name}")
        return _digests(work / f"live-{name}")

    return {f"live {name}": _or_refused(lambda name=name: export(name)) for name in ("plain", *configs)}


def _model_free(source: Path, work: Path) -> Digests:
    """`quantplug quantize` in every format."""
    from typer.testing import CliRunner

    from quantplug.cli import app as cli

    def quantize(name: str) -> Digests:
        out = work / f"model-free-{name}"
        result = CliRunner().invoke(cli, ["quantize", str(source), str(out), "--format", name])
        if result.exit_code:
            raise ValueError(result.output)
        return _digests(out)

    return {f"model-free {name}": _first(names, quantize) for name, names in NAMES.items()}


def _streams(source: Path, ranks: int) -> Digests:
    """What a stream brings to the first rank, in its order."""
    from quantplug import export_hf_weights_quant
    from quantplug.megatron.parallel import initialize_parallel
    from tests.export.checkpoints import load

    initialize_parallel(**_sizes(source, ranks))
    model = load(source)

    def stream(name: str) -> Digests:
        tensors = dict(export_hf_weights_quant(model, source, quant_format=name))
        order = hashlib.sha256("\n".join(tensors).encode()).hexdigest()
        return {"tensors": {name: _digest(tensor) for name, tensor in tensors.items()}, "order": order}

    return {f"stream {name} at {ranks}": _first(names, stream) for name, names in NAMES.items()}


def _first(names: Iterable[str], way: Callable[[str], Digests]) -> Digests:
    """By the first of some names that the tree does not refuse, which is recorded beside the digests."""
    results = [(name, _or_refused(lambda name=name: way(name))) for name in names]
    taken = next((result for result in results if "refused" not in result[1]), results[0])
    return {"name": taken[0], **taken[1]}


def _or_refused(way: Callable[[], Digests]) -> Digests:
    from quantplug import QuantplugError

    try:
        return way()
    except (QuantplugError, ValueError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}


def _digests(directory: Path) -> Digests:
    """Of every tensor, whatever file it is in, and of every other file; and what the config says of quantization."""
    files = [path for path in sorted(directory.iterdir()) if path.suffix != ".safetensors"]
    config = json.loads((directory / "config.json").read_text())
    return {
        "tensors": {name: _digest(tensor) for name, tensor in _tensors(directory)},
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "quantization_config": config.get("quantization_config"),
    }


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    for path in sorted(directory.glob("*.safetensors")):
        yield from load_file(path).items()


def _digest(tensor: torch.Tensor) -> str:
    """Type, shape and a hash of the bytes of a tensor."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


@app.command()
def compare(before: Path, after: Path) -> None:
    """Lists every difference of two files of digests."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    lines = list(_differences(old, new))
    for line in lines:
        typer.echo(line)
    same = sum(len(way.get("tensors", {})) for ways in old.values() for way in ways.values())
    typer.echo(f"{len(lines)} differences; {same} tensors before, in {sum(map(len, old.values()))} ways")
    raise typer.Exit(bool(lines))


def _differences(old: Digests, new: Digests) -> Iterator[str]:
    """One line for each family, way and kind of thing that differs."""
    for family, ways in _both(old, new):
        for way, (first, second) in _both(*ways) if all(ways) else [("all ways", ways)]:
            yield from (f"{family}, {way}: {what}" for what in _different_way(first or {}, second or {}))


def _different_way(first: Digests, second: Digests) -> Iterator[str]:
    if ("refused" in first) != ("refused" in second) or not first or not second:
        states = [way.get("refused", "written" if way else "not tried") for way in (first, second)]
        yield " | ".join(state.strip().partition("\n")[0] for state in states)
        return
    for kind in ("tensors", "files"):
        pairs = {name: pair for name, pair in _both(first.get(kind, {}), second.get(kind, {})) if pair[0] != pair[1]}
        for what, names in {
            "gone": [name for name, (_, now) in pairs.items() if now is None],
            "new": [name for name, (was, _) in pairs.items() if was is None],
            "other bytes": [name for name, pair in pairs.items() if all(pair)],
        }.items():
            if names:
                yield f"{len(names)} {kind} {what}, such as {', '.join(names[:6])}"
    if first.get("order") != second.get("order") and first["tensors"].keys() == second["tensors"].keys():
        yield "another order"


def _both(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in {**old, **new}:
        yield name, (old.get(name), new.get(name))


if __name__ == "__main__":
    app()
