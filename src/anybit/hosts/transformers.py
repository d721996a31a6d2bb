"""The two doors into Hugging Face transformers.

Main door: `load(name)` builds the model from its config, fills it with our reader and gives an ordinary transformers
model. Take-over door: `enable()` makes plain `from_pretrained` hand checkpoints of our dialects to us, which it would
refuse or silently misread. Both verify that every parameter received data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anybit.checkpoints import open as open_checkpoint
from anybit.checkpoints.checkpoint import Checkpoint
from anybit.checkpoints.online import Online, Quantization, online, quantizer
from anybit.checkpoints.online_rules import Targets
from anybit.errors import DeviceProblem, Unsupported
from anybit.hosts import kv_cache as cache_quantization
from anybit.hosts.building import build
from anybit.hosts.filling import Filler, Progress, assign, demand_filled
from anybit.hosts.meter import Meter
from anybit.hosts.plans import Written, make_plan
from anybit.hosts.shortening import shorten
from anybit.planning.plan import Plan
from anybit.platforms import Platform, detect


@dataclass(frozen=True)
class Loading:
    """How a model was loaded: attached to it as `model.anybit`."""

    checkpoint: Checkpoint
    plan: Plan
    unused: tuple[str, ...]
    held_bytes: int
    peak_bytes: int


def _device(wanted: str | int | torch.device | None) -> tuple[torch.device, Platform]:
    """torch's device and our platform for what the user asked for; a GPU that this torch cannot use is refused."""
    name = "auto" if wanted is None else f"cuda:{wanted}" if isinstance(wanted, int) else str(wanted)
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or not (number.isdigit() or not number):
        raise DeviceProblem(f"no such device: {name!r}", found=name, wanted="cpu, cuda or cuda:N",
                            remedy="--device cpu, or `anybit doctor`")
    platform = detect(name)
    usable = platform.vendor == "cpu" or (torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count())
    if not usable and wanted is None:
        platform, usable = detect("cpu"), True  # a GPU is here, but this build of torch has no use for it
    if not usable:
        raise DeviceProblem(
            f"torch cannot use {name}", found=f"torch {torch.__version__}, {torch.cuda.device_count()} GPUs",
            wanted="a build of torch for this GPU and its driver", remedy="`anybit doctor`, or --device cpu",
        )
    if platform.vendor == "cpu":
        return torch.device("cpu"), platform
    return torch.device(f"cuda:{number}" if number else "cuda"), platform


def load(
    path: str | os.PathLike[str] | Checkpoint,
    dtype: str | torch.dtype | None = None,
    device: str | int | torch.device | None = None,
    *,
    quantization: Quantization | None = None,
    targets: Targets = (),
    ignore: Sequence[str] = (),
    kernel: str | Sequence[str] | None = None,
    kv_cache: str = "auto",
    strict: bool = False,
    batch_invariant: bool = False,
    plan: Written | None = None,
    progress: Progress | None = None,
) -> Any:
    """An ordinary transformers causal language model whose quantized layers are ours.

    path          "smollm2", a folder, a .gguf file, a hub id, or an open Checkpoint
    dtype         of activations and plain tensors; default float32 on a CPU, the checkpoint's own on a GPU
    device        "cpu", "cuda", "cuda:1" or 1; default a GPU where there is one
    quantization  quantize layers while loading: a name, text with rules, or an Online (docs/quantization.md)
    targets       {rule: name} for layers with another scheme, or rules that alone get `quantization`
    ignore        rules whose layers stay as they are
    kernel        rules such as "torch-tiled" or "re:.*down_proj=NAME": use this kernel, or refuse with its reasons
    kv_cache      "auto" carries out a quantized key-value cache that the checkpoint declares, "none" leaves it
    strict        refuse to run any layer otherwise than the checkpoint declares
    batch_invariant   one kernel for all M: a product's row is the same bits in every batch
    plan          a plan made before (its file, its document, or a Plan): exactly its kernels, or a refusal

    The model carries `model.anybit`, a Loading. Raises AnybitError for whatever is wrong with the checkpoint or the
    device; never leaves a parameter random.

    >>> model = anybit.load("smollm2")
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    checkpoint.demand_loadable()
    target, platform = _device(device)
    asked = online(quantization, targets, ignore)
    chosen = make_plan(
        checkpoint, platform, dtype=dtype, quantization=asked, kernel=kernel, kv_cache=kv_cache, strict=strict,
        batch_invariant=batch_invariant, plan=plan,
    )
    chosen.demand_complete()
    if chosen.quantization is not None and asked is None:
        asked = online(chosen.quantization)  # a plan made before says so
    with Meter(target) as meter:
        model, unused = _build_and_fill(checkpoint, chosen, target, asked, progress)
    _set_generation(model, checkpoint)
    model.anybit = Loading(checkpoint, chosen, tuple(unused), meter.held_bytes, meter.peak_bytes)
    model.save_pretrained = _refuse_saving
    return model


def _refuse_saving(*_: Any, **__: Any) -> None:
    """transformers' own would write our packed buffers under names that no tool reads."""
    raise Unsupported(
        "a model in packed form is not saved by save_pretrained", wanted="the checkpoint that it was loaded from",
        remedy="copy that folder; it is unchanged",
    )


def _build_and_fill(
    checkpoint: Checkpoint, chosen: Plan, target: torch.device, asked: Online | None, progress: Progress | None
) -> tuple[Any, list[str]]:
    dtype = getattr(torch, chosen.dtype)
    model = build(checkpoint.config, dtype)
    assignment = assign(model, checkpoint, chosen)
    filler = Filler(
        model, checkpoint, chosen, assignment, dtype, device_of=lambda _: target, progress=progress,
        quantize=quantizer(asked) if asked is not None else None,
    )
    with torch.no_grad():
        filler.fill()
    demand_filled(model, assignment.unused)
    unused = list(assignment.unused)
    if chosen.kv_cache is not None and chosen.kv_cache["is_executed"]:
        unused += cache_quantization.install(model, checkpoint, assignment.naming, lambda _: target)
    if target.type != "cpu":
        model.to(target)  # rotary tables and other buffers; the weights are there already
    shorten(model, chosen, target)
    return model, unused


def _set_generation(model: Any, checkpoint: Checkpoint) -> None:
    """generation_config.json of the folder, or the special tokens of the config."""
    from transformers import GenerationConfig

    folder = checkpoint.path if checkpoint.path.is_dir() else None
    if folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return
    made = GenerationConfig.from_model_config(model.config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = checkpoint.config.get(key)
        if value is not None:
            setattr(made, key, value)
    model.generation_config = made


METHOD = "anybit"


def enable(*, strict: bool = False) -> None:
    """Make plain `AutoModelForCausalLM.from_pretrained` read the checkpoints of our dialects through us.

    strict  refuse to run any layer otherwise than the checkpoint declares

    Calling it again changes `strict` alone; plain (unquantized) checkpoints and `gguf_file=` are left to transformers.
    """
    import transformers.modeling_utils as modeling
    from transformers.quantizers import auto

    from anybit.hosts.quantizer import AnybitConfig, AnybitQuantizer

    auto.AUTO_QUANTIZER_MAPPING[METHOD] = AnybitQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = AnybitConfig
    original: Callable[..., Any] = modeling.get_hf_quantizer  # type: ignore[attr-defined]
    if getattr(original, "is_anybit", False):
        original.strict = strict  # type: ignore[attr-defined]
        return

    def take_over(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("gguf_file") is None:
            asked = quantization_config if isinstance(quantization_config, AnybitConfig) else AnybitConfig()
            source = _source_of(config, or_plain=asked.quantization is not None)
            if source is not None:
                strict = take_over.strict or asked.strict  # type: ignore[attr-defined]
                made = AnybitConfig(str(source), strict, asked.quantization, asked.kv_cache)
                config.quantization_config = made.to_dict()
                _name_weights(config, source)
                quantization_config = None
        return original(config, quantization_config, *args, **kwargs)

    take_over.is_anybit = True  # type: ignore[attr-defined]
    take_over.strict = strict  # type: ignore[attr-defined]
    modeling.get_hf_quantizer = take_over  # type: ignore[attr-defined]


def _name_weights(config: Any, folder: Path) -> None:
    """Tell transformers the name of the one weight file where a tool chose its own (AutoGPTQ does)."""
    files = [file.name for file in folder.glob("*.safetensors")]
    if len(files) == 1 and files[0] != "model.safetensors":
        config.transformers_weights = files[0]


def _source_of(config: Any, *, or_plain: bool = False) -> Path | None:
    """The folder of a quantized checkpoint, `or_plain`, that `config` was read from, if one of our dialects has it."""
    from transformers.utils.hub import cached_file

    name = getattr(config, "_name_or_path", "") or ""
    if not name:
        return None
    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False, local_files_only=True)
        if found is None:
            return None
        folder = Path(found).parent
    try:
        checkpoint = open_checkpoint(folder)
    except Unsupported:
        return None  # a method that only transformers knows is its own business
    quantized = any(layer.scheme.is_quantized for layer in checkpoint.layers.values())
    return folder if or_plain or quantized or checkpoint.kv_cache is not None else None
