"""`anybit inspect`: what a checkpoint is, from headers alone. Torch-free."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

import anybit
from anybit.checkpoints import Checkpoint
from anybit.cli import options
from anybit.cli.folding import bits, fold
from anybit.cli.output import Output, counted, make_output, shown, size
from anybit.schemes import Layer

_MAX_NOTES = 20


def inspect(
    model: options.Model,
    layers: Annotated[
        bool, typer.Option("--layers", help="every layer on its own line", rich_help_panel=options.OUTPUT)
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What is this file: dialect, schemes, bits per weight, sizes.

    anybit inspect smollm2

    anybit inspect ./qwen3-8b-w4a16 --layers

    anybit inspect model.gguf --json
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    checkpoint = anybit.open(model)
    if json:
        output.document("inspect", to_dict(model, checkpoint))
        return
    _print(output, model, checkpoint, every_layer=layers)
    output.hint(f"next: anybit explain {shown(model)}")


def _print(output: Output, model: str, checkpoint: Checkpoint, *, every_layer: bool) -> None:
    facts = [model, checkpoint.dialect, model_type(checkpoint), f"{_files(checkpoint)}, {size(file_bytes(checkpoint))}"]
    output.line(" · ".join(shown(fact) for fact in facts))
    if every_layer:
        output.rows([_layer_row(layer) for layer in checkpoint.layers.values()])
    else:
        folds = [(str(len(f.layers)), f.scheme, shown(f.names), f"{bits(f.stored_bytes, f.elements):.2f} bits a weight",
                  size(f.stored_bytes)) for f in fold(checkpoint.layers.values())]
        output.rows([*folds, _plain_row(checkpoint)] if checkpoint.plain else folds, right=(0,))
    output.rows([(label, text) for label, text in _remarks(checkpoint)], indent=0)


def _layer_row(layer: Layer) -> tuple[str, ...]:
    shape = " x ".join(str(n) for n in layer.shape)
    return shown(layer.name), layer.kind, shape, str(layer.scheme), size(layer.stored_bytes)


def _plain_row(checkpoint: Checkpoint) -> tuple[str, ...]:
    stored = [checkpoint.contents.tensors[name] for name in checkpoint.plain.values()]
    dtypes = Counter(info.dtype for info in stored)
    return (str(len(stored)), " ".join(shown(d) for d in dtypes), "norms, biases and other plain tensors", "",
            size(sum(info.nbytes for info in stored)))


def _remarks(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    quantized, whole = bits_per_weight(checkpoint)
    weights = f"{quantized:.2f} in quantized layers, {whole:.2f} in all"
    found = [("bits a weight", weights), ("weights", f"{weight_count(checkpoint):,}")]
    activations = declared_activations(checkpoint)
    found.append(("activations", ", ".join(activations) or "not quantized"))
    cache = checkpoint.kv_cache
    if cache is not None:
        scales = f"scales for {counted(len(cache.scales), 'layer')}" if cache.scales else "no scales"
        found.append(("key-value cache", f"{cache}, {scales}"))
    notes = all_notes(checkpoint)
    found += [("note", shown(note)) for note in notes[:_MAX_NOTES]]
    if len(notes) > _MAX_NOTES:
        found.append(("note", f"and {len(notes) - _MAX_NOTES} more: --json has all"))
    return found


def model_type(checkpoint: Checkpoint) -> str:
    """The config's model_type."""
    return str(checkpoint.config.get("model_type") or "no model_type")


def file_bytes(checkpoint: Checkpoint) -> int:
    """Size of the files that hold tensors."""
    return sum(path.stat().st_size for path in checkpoint.files)


def _files(checkpoint: Checkpoint) -> str:
    return counted(len(checkpoint.files), "file")


def weight_count(checkpoint: Checkpoint) -> int:
    """Number of weights, plain tensors included."""
    return sum(layer.elements for layer in checkpoint.layers.values()) + checkpoint.plain_elements


def bits_per_weight(checkpoint: Checkpoint) -> tuple[float, float]:
    """Stored bits for each weight, scales included: of the quantized layers, and of everything."""
    quantized = [layer for layer in checkpoint.layers.values() if layer.scheme.is_quantized]
    part = bits(sum(layer.stored_bytes for layer in quantized), sum(layer.elements for layer in quantized))
    return part, bits(checkpoint.stored_bytes, weight_count(checkpoint))


def declared_activations(checkpoint: Checkpoint) -> list[str]:
    """Declared activation quantization, each kind once."""
    specs = [layer.scheme.activation for layer in checkpoint.layers.values() if layer.scheme.activation is not None]
    return [str(spec) for spec in dict.fromkeys(specs)]


def all_notes(checkpoint: Checkpoint) -> list[str]:
    """Remarks of the checkpoint, then those of its layers with their number."""
    counts: dict[str, list[str]] = {}
    for layer in checkpoint.layers.values():
        for note in layer.notes:
            counts.setdefault(note, []).append(layer.name)
    layered = [f"{note} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"
               for note, names in counts.items()]
    return [*checkpoint.notes, *layered]


def to_dict(model: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """The whole answer as data."""
    quantized, whole = bits_per_weight(checkpoint)
    cache = checkpoint.kv_cache
    return {
        "model": model,
        "path": str(checkpoint.path),
        "dialect": checkpoint.dialect,
        "model_type": model_type(checkpoint),
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in checkpoint.files],
        "file_bytes": file_bytes(checkpoint),
        "stored_bytes": checkpoint.stored_bytes,
        "weights": weight_count(checkpoint),
        "bits_per_weight": {"quantized_layers": quantized, "all": whole},
        "schemes": [
            {"count": len(f.layers), "kind": f.kind, "scheme": f.scheme, "parts": f.names,
             "bits_per_weight": bits(f.stored_bytes, f.elements), "stored_bytes": f.stored_bytes}
            for f in fold(checkpoint.layers.values())
        ],
        "activations": declared_activations(checkpoint),
        "kv_cache": None if cache is None else {"element": cache.element, "layers_with_scales": len(cache.scales),
                                                "dynamic": cache.dynamic},
        "plain": {"count": len(checkpoint.plain), "elements": checkpoint.plain_elements},
        "layers": [
            {"name": layer.name, "kind": layer.kind, "shape": list(layer.shape), "scheme": str(layer.scheme),
             "stored_bytes": layer.stored_bytes, "tensors": dict(layer.tensors), "notes": list(layer.notes)}
            for layer in checkpoint.layers.values()
        ],
        "notes": all_notes(checkpoint),
    }
