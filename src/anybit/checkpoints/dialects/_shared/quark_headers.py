"""The layers of a Quark checkpoint as tensor headers tell them: which layer config a module has, its scheme.

Torch-free. The tensors decide: saved configs have their patterns in another order than the user meant, so the first
layer config is taken whose weight fits them (`quark_layouts.py`). Rules: docs/formats/quark.md §2, §6, §8, §10.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need_all
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents
from anybit.checkpoints.dialects._shared.quark_activations import asks_for_scales, input_spec
from anybit.checkpoints.dialects._shared.quark_config import Config, LayerConfig
from anybit.checkpoints.dialects._shared.quark_layouts import LAYOUTS, REFUSED, SCALAR, Fit, Module, fit_of
from anybit.checkpoints.dialects.plain import EMBEDDINGS
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Inconsistent, Unsupported
from anybit.schemes import Layer, LayerKind, Scheme

ROLES: Final = (
    "weight", "weight_scale", "weight_zero_point", "weight_scale_2", "weight_zero_point_2", "input_scale",
    "input_zero_point", "input_scale_2", "output_scale", "output_zero_point", "bias", "bias_scale", "bias_zero_point",
)
_CODE_DTYPES: Final = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2")
_ONLINE: Final = (".input_rotation", ".input_prescale")  # ends of tensor names that a run-time rotation leaves
_SVDQUANT: Final = (".correction.l1.weight", ".correction.l2.weight", ".smooth_factor")
_WRONG_CONFIG: Final = "use the config.json that was written with these weights"


# --- the layers ----------------------------------------------------------------------------------------------------

def quantized_layers(contents: Contents, config: Config) -> dict[str, Layer]:
    """Layers with codes; raises Unsupported or Inconsistent, naming the module, where one cannot be read."""
    _refuse_run_time_parts(contents, config)
    choice = _Choice(config)
    codes = (n for n, info in contents.tensors.items() if n.endswith(".weight") and info.dtype in _CODE_DTYPES)
    need_all(contents, (f"{name}_scale" for name in codes))
    layers = {}
    for name, info in contents.tensors.items():
        module, _, leaf = name.rpartition(".")
        has_scale = f"{module}.weight_scale" in contents.tensors
        if leaf == "weight" and (info.dtype in _CODE_DTYPES or (has_scale and info.dtype not in FLOAT_DTYPES)):
            layers[module] = _layer(contents, module, config, choice)
        elif leaf == "weight" and has_scale and not choice.keeps_wide(module):
            raise Unsupported("an unquantized weight beside a scale", where=module, found=info.dtype,
                              wanted=" · ".join(_CODE_DTYPES), remedy="export the model again as real_quantized")
    return layers


def _layer(contents: Contents, name: str, config: Config, choice: _Choice) -> Layer:
    found = {role: info for role in ROLES if (info := contents.tensors.get(f"{name}.{role}")) is not None}
    module = Module(contents, name, config, found)
    weight = found["weight"]
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise Unsupported("codes that are no matrix", where=weight.name, found=str(list(weight.shape)),
                          wanted="[rows, columns]", remedy="export the experts one by one, as Quark does")
    chosen, fit = choice.fitting(module)
    _check_outputs(module, chosen, choice)
    _check_small_tensors(module, fit.shape[0])
    is_embedding = name.rpartition(".")[2] in EMBEDDINGS
    kind: LayerKind = "embedding" if is_embedding else "linear"
    activation, roles, remark = input_spec(() if is_embedding else chosen.inputs, found)
    for role in roles:
        expect_shape(found[role], *SCALAR)
        expect_dtype(found[role], *(("I8", "U8", "I32") if role.endswith("zero_point") else FLOAT_DTYPES))
    scheme = Scheme(fit.element, fit.scales, "code_first" if fit.is_code_first else "scales_first", fit.offset,
                    activation=activation)
    names = {role: info.name for role, info in found.items()}
    storage = {"codes": fit.codes, "order": fit.order, "zeros": fit.zeros, "activation": roles,
               "has_transposed_scales": fit.has_transposed_scales}
    notes = (remark,) if remark else ()
    return Layer(name, kind, fit.shape, scheme, names, storage, contents.bytes_of(*names.values()), notes)


def _check_small_tensors(module: Module, rows: int) -> None:
    bias, scale = module.tensors.get("bias"), module.tensors.get("bias_scale")
    if bias is None:
        return
    expect_shape(bias, (rows,))
    expect_dtype(bias, *(FLOAT_DTYPES if scale is None else ("I8", "U8", "I32", "F8_E4M3")))
    if scale is not None:
        expect_dtype(scale, *FLOAT_DTYPES)
        for role in ("bias_scale", "bias_zero_point"):
            if role in module.tensors:
                expect_shape(module.tensors[role], (), (1,), (rows,))


def _check_outputs(module: Module, chosen: LayerConfig, choice: _Choice) -> None:
    """Refuse quantized outputs that are neither the key-value cache's nor the attention's queries (§8)."""
    if not chosen.outputs:
        return
    spec = chosen.outputs[0]
    is_fp8 = len(chosen.outputs) == 1 and (spec.dtype, spec.qscheme, spec.dynamic) == ("fp8_e4m3", "per_tensor", False)
    is_attention = choice.is_cache(module.name) or module.name.endswith("q_proj")
    if not (is_fp8 and is_attention):
        raise Unsupported("quantized outputs outside the key-value cache", where=module.name,
                          found=f"output_tensors {' + '.join(map(str, chosen.outputs))}",
                          wanted="fp8_e4m3 per_tensor, on the layers of export.kv_cache_group",
                          remedy="quantize the model without output_tensors")


def _refuse_run_time_parts(contents: Contents, config: Config) -> None:
    """Refuse by name what a runtime would have to apply beside the weights (§10)."""
    for name in contents.tensors:
        if name.endswith(_ONLINE) or name.rpartition(".")[2].startswith("shared_input_rotation"):
            raise Unsupported("rotation: online rotations are applied at run time and not read", where=name,
                              found=name.rpartition(".")[2], wanted="offline rotations only (r1, r2)",
                              remedy="quantize the model without them")
        if name.endswith(_SVDQUANT):
            raise Unsupported("svdquant: a weight plus a low-rank branch is not read", where=name,
                              found=name.rpartition(".")[2], wanted="weights that stand alone",
                              remedy="quantize the model without svdquant")
    if config.unknown_algorithms:
        _refuse_extra_tensors(contents, config.unknown_algorithms)


def _refuse_extra_tensors(contents: Contents, algorithms: tuple[str, ...]) -> None:
    """Refuse an unknown algorithm that left tensors of its own beside quantized weights."""
    for name in contents.tensors:
        module, _, leaf = name.rpartition(".")
        if f"{module}.weight_scale" in contents.tensors and leaf not in ROLES:
            raise Unsupported("an unknown algorithm left tensors of its own", where=name,
                              found=f"algo_config {' · '.join(algorithms)}"[:80], wanted=" · ".join(ROLES),
                              remedy="a newer anybit may read it")


# --- which layer config a module has -------------------------------------------------------------------------------

class _Choice:
    """Layer configs in the order in which a module may have them; compiled once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.names = tuple(config.layers)
        self.patterns = Patterns.fnmatch(self.names, where="quantization_config.layer_quant_config")
        self.cache = Patterns.fnmatch(config.kv_patterns, where="quantization_config.export.kv_cache_group")

    def is_cache(self, module: str) -> bool:
        return any(self.cache.first(name) is not None for name in _spellings(module))

    def keeps_wide(self, module: str) -> bool:
        """True if the first config that may mean a module gives its weight a wide float as dtype."""
        first = next((candidate for tier in self._tiers(module) for candidate in tier), None)
        return first is not None and [spec.dtype for spec in first.weight] in (["float16"], ["bfloat16"])

    def fitting(self, module: Module) -> tuple[LayerConfig, Fit]:
        """The first config that fits; of one tier those first whose inputs agree with the stored input scales."""
        tried = []
        has_input_scale = any(role in module.tensors for role in ("input_scale", "input_scale_2"))
        for tier in self._tiers(module.name):
            fits = []
            for candidate in tier:
                fit = fit_of(module, candidate.weight)
                if isinstance(fit, str):
                    tried.append(f"{candidate.name}: {fit}")
                else:
                    fits.append((candidate, fit))
            agreeing = [found for found in fits if asks_for_scales(found[0].inputs) == has_input_scale]
            if fits:
                return (agreeing or fits)[0]
        raise _no_fit(module, tried)

    def _tiers(self, module: str) -> Iterator[list[LayerConfig]]:
        """Exact name, patterns in file order, layer type, global."""
        spellings = _spellings(module)
        yield [self.config.layers[name] for name in spellings if name in self.config.layers]
        matching = sorted({index for name in spellings for index in self.patterns.all(name)})
        yield [self.config.layers[self.names[index]] for index in matching]
        type_name = "Embedding" if module.rpartition(".")[2] in EMBEDDINGS else "Linear"
        yield [self.config.types[type_name]] if type_name in self.config.types else []
        yield [self.config.default]


def _spellings(module: str) -> tuple[str, ...]:
    """The name as stored, and with a leading "model." removed or added."""
    return module, module.removeprefix("model.") if module.startswith("model.") else f"model.{module}"


def _no_fit(module: Module, tried: list[str]) -> Unsupported | Inconsistent:
    stored = " · ".join(f"{role} {info.dtype} {list(info.shape)}" for role, info in module.tensors.items()
                        if role.startswith("weight"))
    refused = next((reason for reason in tried if REFUSED in reason), "")
    if refused:
        return Unsupported(refused.partition(REFUSED)[2], where=module.name, found=stored,
                           wanted=" · ".join(sorted({dtype for dtype, _ in LAYOUTS})), more=tried[:8],
                           remedy="quantize the model in a format that Quark can export")
    return Inconsistent("no layer config fits the stored tensors", where=module.name, found=stored,
                        wanted=" | ".join(tried)[:1000] or "a layer config", remedy=_WRONG_CONFIG)
