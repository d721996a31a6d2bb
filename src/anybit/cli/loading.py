"""From a name on the command line to a loaded model: what `run`, `chat` and `eval` share.

torch and transformers take most of the start; they are imported on a thread while headers are read and planned.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from anybit.checkpoints import Checkpoint
from anybit.checkpoints import open as open_checkpoint
from anybit.cli.explain import UnitGroup, cache_rows, declared_arithmetic, fold_units
from anybit.cli.output import Output, shown, size

if TYPE_CHECKING:
    from anybit.checkpoints.online import Online
    from anybit.hosts.transformers import Loading

# heaviest first; each is needed by every model
_HEAVY: Final = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "anybit.hosts.transformers",
    "anybit.hosts.gguf_tokenizer",
)


@dataclass(frozen=True)
class Choices:
    """How to load: the options of the same names."""

    device: str | None = None
    dtype: str | None = None
    quantization: Online | None = None
    kernel: Sequence[str] | None = None
    threads: int | None = None
    kv_cache: str = "auto"
    strict: bool = False
    batch_invariant: bool = False
    plan: Path | None = None


def warm_up() -> threading.Thread:
    """Import what loading needs on a thread, and keep the libraries quiet; errors come again where it is used."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that wait by spinning starve each other as soon as other processes run: smollm2 on 2 busy cores, 3 to 48
    # tokens/s spinning, 33 to 53 sleeping (10 runs each); alone, sleeping costs a short prompt 13 % and decode nothing
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    thread = threading.Thread(target=_import_heavy, daemon=True)
    thread.start()
    return thread


def _import_heavy() -> None:
    gc.disable()  # imports make no garbage, and looking for it is a sixth of their time
    try:
        for name in _HEAVY:
            import_module(name)
    except Exception:  # noqa: S110 - the main thread meets the same error where it needs the module, and reports it
        pass
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules look for what is still alive at exit, and complain
        gc.enable()


def open_for_running(model: str, output: Output, *, tokenizer: bool = True) -> Checkpoint:
    """The checkpoint, refused before anything is loaded if it lacks a tokenizer."""
    checkpoint = open_checkpoint(model, output.remark)
    if tokenizer:
        from anybit.hosts.tokenizers import demand_tokenizer

        demand_tokenizer(checkpoint)
    return checkpoint


def load(checkpoint: Checkpoint, choices: Choices, output: Output) -> tuple[Any, Any]:
    """The model and its tokenizer, with a progress bar on a terminal. Raises AnybitErrors."""
    from anybit.hosts.tokenizers import tokenizer_for
    from anybit.hosts.transformers import load as load_model

    if choices.threads is not None:
        import torch

        torch.set_num_threads(choices.threads)
    tokenizer = tokenizer_for(checkpoint)
    total = sum(layer.stored_bytes for layer in checkpoint.layers.values())
    with output.progress(f"loading {shown(checkpoint.path.name)}", total) as advance:
        model = load_model(
            checkpoint, choices.dtype, choices.device, quantization=choices.quantization, kernel=choices.kernel,
            kv_cache=choices.kv_cache, strict=choices.strict, batch_invariant=choices.batch_invariant,
            plan=choices.plan, progress=lambda _, done: advance(done),
        )
    return model, tokenizer


def print_summary(output: Output, name: str, loading: Loading) -> None:
    """What was loaded and how it runs, in a few lines on stderr."""
    plan, checkpoint = loading.plan, loading.checkpoint
    facts = [name, plan.dialect, str(checkpoint.config.get("model_type")), size(checkpoint.stored_bytes),
             f"on {plan.platform.title}", f"activations {plan.dtype}"]
    output.remark(" · ".join(shown(fact) for fact in facts))
    groups = list(fold_units(plan.units, by_kernels=False))
    rows: list[tuple[str, ...]]
    rows = [("declared", text) for text in _merged((g.units[0].declared.element, declared_arithmetic(g.units[0]))
                                                   for g in groups)]
    rows += [("executed", text) for text in _merged((g.units[0].scheme.element, g.units[0].executed) for g in groups)]
    rows += [("kernels", why(group)) for group in groups]
    rows += cache_rows(plan)
    memory = plan.memory
    predicted = memory.weights + memory.plain
    rows.append(("memory", f"predicted {size(predicted)} held, {size(predicted + memory.loading)} at most; "
                 f"measured {size(loading.held_bytes)} held, {size(loading.peak_bytes)} at most"))
    output.remark_rows([*rows, *(("note", shown(note)) for note in plan.notes)])
    if plan.quantization is not None:
        output.warning(f"other arithmetic than the checkpoint declares, as asked: --quantization {plan.quantization}")
    quantized = {unit.layers for unit in plan.units if unit.scheme != unit.declared}
    for what in dict.fromkeys(change.what for change in plan.changes if change.layers not in quantized):
        output.warning(f"other arithmetic than the checkpoint declares: {shown(what)}")
    output.remark()


def _merged(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Sentences that differ in their leading element only, as one: `uint4, int8 weights, ...`."""
    elements: dict[str, list[str]] = {}
    for element, sentence in dict.fromkeys(pairs):
        elements.setdefault(sentence.removeprefix(element), []).append(element if sentence.startswith(element) else "")
    return [", ".join(filter(None, names)) + rest for rest, names in elements.items()]


def why(group: UnitGroup) -> str:
    """One line: the kernels of a group and the reason for them."""
    first = group.units[0]
    by_regime = {r: "/".join(dict.fromkeys(u.kernel(r) for u in group.units)) for r in first.choice.kernels}
    same = len(set(by_regime.values())) == 1
    kernels = first.kernel("decode") if same else ", ".join(f"{r} {name}" for r, name in by_regime.items())
    slower = group.slower()
    reason = "the only layout that fits"
    if slower:
        reason = f"least modelled time of {len(slower) + 1} layouts; " + "; ".join(
            f"layout {name} {times:.1f}× slower" for name, times in slower.items())
    return f"{first.kind} ×{len(group.layers)} {shown(first.scheme)} → {kernels}: {reason}"
