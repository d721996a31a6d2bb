"""Checkpoint layers into a transformers model: which module each replaces, then the tensors, one layer at a time.

Two phases, because transformers' own loader may run between them (the take-over door): `assign` decides from names
and puts placeholders into the model; `fill` reads, canonicalizes, prepares and installs. Nothing is left random:
`demand_filled` names every parameter that no tensor reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from anybit.checkpoints.checkpoint import Checkpoint
from anybit.errors import Inconsistent, Unsupported
from anybit.hosts.meter import release_freed
from anybit.hosts.modules import AnybitEmbedding, AnybitExperts, AnybitLinear, TiedHead
from anybit.hosts.naming import Naming
from anybit.hosts.preparing import Preparing
from anybit.kernels.catalogue import Stored
from anybit.kernels.linear.planes_unit import as_unit
from anybit.kernels.product import product_of
from anybit.kernels.request import Request
from anybit.planning.choose import Choice, Refusal, choose
from anybit.planning.plan import Plan
from anybit.planning.units import SAME_INPUT
from anybit.schemes import Layer
from anybit.weights import Dense, Weight

_RELEASE_BYTES = 64 * 2**20  # read between two releases of freed memory: a call costs a millisecond
DeviceOf = Callable[[str], torch.device]
Quantizer = Callable[[Layer, Weight], Weight]
Progress = Callable[[str, int], None]


@dataclass
class Assignment:
    """What goes where, from names alone.

    modules  module path -> layer: replaced by a module of ours
    experts  experts module -> role -> expert index (-1: a stack) -> layer
    tensors  parameter of a weight -> layer: filled as an ordinary parameter, its bias beside it
    plain    parameter -> name in the checkpoint's `plain`
    unused   layers and tensors of the checkpoint that the model has no place for
    naming   the names of the model as it was
    """

    naming: Naming

    modules: dict[str, str] = field(default_factory=dict)
    experts: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


class Placeholder(nn.Module):
    """Stands where a module of ours will be: no parameters, so that no loader fills or initialises anything."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = [original]  # unregistered
        for name in ("in_features", "out_features", "num_embeddings", "embedding_dim"):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))


def assign(model: nn.Module, checkpoint: Checkpoint, plan: Plan, *, only_quantized: bool = False) -> Assignment:
    """Decide the place of every layer and tensor, and put placeholders where modules of ours will be.

    With `only_quantized` unquantized layers stay the host's own modules, whatever kernel the plan has for them.
    """
    naming = Naming(model)
    found = Assignment(naming)
    for layer in checkpoint.layers.values():
        _assign_layer(found, layer, plan, only_quantized)
    _join_experts(found)
    _keep_plain_experts(found, naming, checkpoint)
    for name in checkpoint.plain:
        parameter = naming.parameter(name)
        if parameter:
            found.plain[parameter] = name
        else:
            found.unused.append(name)
    for path in (*found.modules, *found.experts):
        model.set_submodule(path, Placeholder(naming.modules[path]))
    return found


def _assign_layer(found: Assignment, layer: Layer, plan: Plan, only_quantized: bool) -> None:
    naming = found.naming
    direct = naming.parameter(layer.name)  # stacked experts carry the name of the parameter itself
    unit = plan.unit_of(layer.name)
    # the host's own product is torch's, for every M and without a promise about batches
    is_hosts = unit.choice.names.used == {"torch-dense"} and not plan.policy.batch_invariant
    is_ours = unit.scheme.is_quantized or not (is_hosts or only_quantized)
    if direct and not unit.scheme.is_quantized:
        found.tensors[direct] = layer.name
        return
    place = naming.place(layer.name)
    if place is None or (place.module == naming.tied_head and not layer.scheme.is_quantized):
        # the config decides that a head is tied, whatever is stored beside; tools that quantize it untie it silently
        found.unused.append(layer.name)
    elif place.role:
        found.experts.setdefault(place.module, {}).setdefault(place.role, {})[place.expert] = layer.name
    elif is_ours and _is_replaceable(naming.modules[place.module]):
        found.modules[place.module] = layer.name
    else:
        found.tensors[f"{place.module}.weight"] = layer.name


# the hosts' own classes that compute what nn.Linear does; Conv1D (GPT-2) stores its weight [K, N]
_LINEAR_LIKE = ("Conv1D", "FalconLinear")


def _is_replaceable(module: nn.Module) -> bool:
    """Plain linears and lookup tables, and tables that say the factor they scale by; other subclasses do more."""
    scaled = isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    return type(module) in (nn.Linear, nn.Embedding) or type(module).__name__ in _LINEAR_LIKE or scaled


def _join_experts(found: Assignment) -> None:
    """An unquantized projection that carries its parameter's name goes with the other projections of its experts."""
    for module, roles in found.experts.items():
        for parameter in [name for name in found.tensors if name.rpartition(".")[0] == module]:
            roles.setdefault(parameter.rpartition(".")[2], {})[-1] = found.tensors.pop(parameter)


def _keep_plain_experts(found: Assignment, naming: Naming, checkpoint: Checkpoint) -> None:
    """A model without fused experts (older architectures keep a ModuleList) takes the pieces as plain linears."""
    for module in [m for m in found.experts if m not in naming.modules]:
        found.unused += [name for by in found.experts.pop(module).values() for name in by.values()]


@dataclass
class Filler:
    """The second phase: reads layer by layer and installs.

    device_of  device for a module path
    quantize   quantizes a dense weight while loading (--quantization), or returns it
    progress   called with (layer, bytes read)
    """

    model: nn.Module
    checkpoint: Checkpoint
    plan: Plan
    assignment: Assignment
    dtype: torch.dtype
    device_of: DeviceOf
    quantize: Quantizer | None = None
    progress: Progress | None = None
    _read_bytes: int = 0

    def __post_init__(self) -> None:
        plan = self.plan
        is_named = bool(plan.kernels) or plan.is_replayed
        self._preparing = Preparing(plan.platform, plan.policy, self.dtype, is_named=is_named)

    def fill(self, *, with_plain: bool = True) -> None:
        """Install everything; without `with_plain` only modules of ours (transformers loaded the rest)."""
        found = self.assignment
        for unit in _units(found.modules):
            if not self._install_unit(unit):
                for path in unit:
                    self.model.set_submodule(path, self._module(path, found.modules[path]))
        for path, roles in found.experts.items():
            self.model.set_submodule(path, self._experts(path, roles))
        if with_plain:
            for parameter, name in found.tensors.items():
                is_turned = bool(self.checkpoint.layers[name].storage.get("transposed"))
                self._set_layer(parameter, self._read(name), is_turned)
            for parameter, name in found.plain.items():
                self._set(parameter, self.checkpoint.read_plain(name))
        self._tie()
        release_freed()

    def _read(self, name: str) -> Weight:
        layer = self.checkpoint.layers[name]
        weight = self.checkpoint.read(name)
        if self.quantize is not None:
            weight = self.quantize(layer, weight)
        if self.progress is not None:
            self.progress(name, layer.stored_bytes)
        self._read_bytes += layer.stored_bytes
        if self._read_bytes > _RELEASE_BYTES:
            self._read_bytes = 0
            release_freed()
        return weight

    def _original(self, path: str) -> nn.Module:
        """The host's module that a placeholder stands for."""
        return cast("Placeholder", self.model.get_submodule(path)).original[0]

    def _read_for(self, path: str, name: str) -> Weight:
        """The weight of a layer, of the shape that the module at `path` has by the config."""
        weight = self._read(name)
        _demand_shape(name, weight, _shape_of(self._original(path)))
        return weight

    def _linear(self, name: str, weight: Weight, device: torch.device) -> AnybitLinear:
        return AnybitLinear(product_of(weight, self._prepare(name, weight, device), device))

    def _prepare(self, name: str, weight: Weight, device: torch.device) -> Stored:
        """The weight in the layout that the plan chose, or that its real scheme wants.

        Headers do not show everything: whether a GPTQ g_idx really scatters columns is known when it is read.
        """
        unit = self.plan.unit_of(name)
        choice: Choice | tuple[Refusal, ...] = unit.choice
        if weight.scheme.weight_only() != unit.scheme.weight_only():
            request = Request(unit.kind, weight.scheme, tuple(weight.shape), unit.dtype)
            choice = choose(request, self.plan.platform, policy=self.plan.policy)
            if not isinstance(choice, Choice):
                raise Unsupported("no kernel runs this layer as it turned out to be", where=name,
                                  found=str(weight.scheme), wanted=str(unit.scheme))
        assert isinstance(choice, Choice)
        asked = Request(unit.kind, weight.scheme, tuple(weight.shape), unit.dtype)
        return self._preparing(choice, weight.to(device), asked)[0]

    def _install_unit(self, paths: tuple[str, ...]) -> bool:
        """Layers that read the same input as one product, where their kernel stores them so; False: one by one."""
        names = [self.assignment.modules[path] for path in paths]
        if not self.plan.runs_as_one(tuple(names)) or self.device_of(paths[0]).type != "cpu":
            return False
        weights = [self._read_for(path, name) for path, name in zip(paths, names, strict=True)]
        as_planned = all(w.scheme == self.plan.unit_of(n).scheme for n, w in zip(names, weights, strict=True))
        stored = as_unit(weights, self.plan.unit_of(names[0]).choice.names) if as_planned else None
        for i, (path, name, weight) in enumerate(zip(paths, names, weights, strict=True)):
            device = self.device_of(path)
            kept = self._prepare(name, weight, device) if stored is None else stored[i]
            self.model.set_submodule(path, AnybitLinear(product_of(weight, kept, device)))
        return True

    def _module(self, path: str, name: str) -> nn.Module:
        original = self._original(path)
        weight = self._read_for(path, name)
        device = self.device_of(path)
        if not isinstance(original, nn.Embedding):
            return self._linear(name, weight, device)
        stored = self._prepare(name, weight, device)
        return AnybitEmbedding(product_of(weight, stored, device), self.dtype, getattr(original, "embed_scale", None))

    def _experts(self, path: str, roles: Mapping[str, Mapping[int, str]]) -> AnybitExperts:
        host = self._original(path)
        count = int(cast("int", getattr(host, "num_experts", 0))) or 1 + max(i for by in roles.values() for i in by)
        _demand_roles(path, roles, count)
        device = self.device_of(path)
        self._demand_expert_shapes(host, roles)
        projections = {role: list(self._projection(by, count, device)) for role, by in roles.items()}
        for parameter in [n for n, _ in host.named_parameters(recurse=False)]:
            delattr(host, parameter)
        return AnybitExperts(host, count, projections)

    def _demand_expert_shapes(self, host: nn.Module, roles: Mapping[str, Mapping[int, str]]) -> None:
        """[N, K] of every expert against the fused parameters that the host has for them."""
        wanted: dict[str, tuple[int, int]] = {}
        for name, parameter in host.named_parameters(recurse=False):
            if parameter.dim() == 3:
                rows, columns = parameter.shape[-2:]
                wanted[name] = (columns, rows) if getattr(host, "is_transposed", False) else (rows, columns)
        if "gate_up_proj" in wanted:
            rows, columns = wanted["gate_up_proj"]
            wanted["gate_proj"] = wanted["up_proj"] = (rows // 2, columns)
        for role, by in roles.items():
            for name in by.values():
                shape = self.checkpoint.layers[name].shape
                if role in wanted and shape[-2:] != wanted[role]:
                    raise Inconsistent(
                        "the experts and the model's config disagree about the shape", where=name,
                        found=f"{list(shape)} in the checkpoint", wanted=f"{list(wanted[role])} by config.json",
                        remedy="the config belongs to another model: take both from one source",
                    )

    def _projection(self, by: Mapping[int, str], count: int, device: torch.device) -> Iterator[AnybitLinear]:
        if -1 in by:
            stack = self._read(by[-1])
            for index in range(count):
                yield self._linear(by[-1], stack.expert(index), device)
            return
        for index in range(count):
            yield self._linear(by[index], self._read(by[index]), device)

    def _set_layer(self, parameter: str, weight: Weight, is_turned: bool = False) -> None:
        """A layer as the host's own parameter, [in, out] if it `is_turned`, with its bias where the host has one."""
        stem = parameter.removesuffix(".weight")
        value = weight.tensor if isinstance(weight, Dense) else weight.dequantize()
        is_turned |= stem != parameter and type(self.model.get_submodule(stem)).__name__ == "Conv1D"
        self._set(parameter, value.mT if is_turned else value)
        bias = f"{stem}.bias" if stem != parameter else f"{parameter}_bias"  # stacked experts are bare parameters
        if weight.bias is not None and bias in self.assignment.naming.parameters:
            self._set(bias, weight.bias)
        elif weight.bias is not None and bool(weight.bias.any()):
            raise Inconsistent("the checkpoint has a bias and the model's config none", where=parameter,
                               found=f"{bias}, {int(weight.bias.count_nonzero())} numbers that are not 0",
                               wanted="a config with this bias", remedy="take both from one source")

    def _set(self, parameter: str, value: Tensor) -> None:
        path, _, name = parameter.rpartition(".")
        module = self.model.get_submodule(path)
        old = cast("Tensor", getattr(module, name))
        _demand_shape(parameter, value, tuple(old.shape))
        dtype = wanted_dtype(self.model, parameter, self.dtype) if value.is_floating_point() else value.dtype
        value = value.to(device=self.device_of(path), dtype=dtype)
        if name in module._buffers:
            module._buffers[name] = value
        else:
            setattr(module, name, nn.Parameter(value, requires_grad=False))

    def _tie(self) -> None:
        """A head without tensors of its own reads the embedding table."""
        model = cast("Any", self.model)
        table = model.get_input_embeddings()
        if getattr(model.config, "is_encoder_decoder", False):
            model.set_input_embeddings(table)  # encoder and decoder hold it a second and third time
        head = model.get_output_embeddings()
        if isinstance(head, AnybitLinear):
            return
        if not isinstance(table, AnybitEmbedding):
            model.tie_weights()
        elif self.assignment.naming.tied_head:
            model.set_output_embeddings(TiedHead(table))


def _units(paths: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The module paths, those of one complete unit together, in the order of the checkpoint."""
    made: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            continue
        parent, _, name = path.rpartition(".")
        group = next((names for names in SAME_INPUT if name in names), (name,))
        members = tuple(f"{parent}.{n}" if parent else n for n in group)
        unit = members if all(m in paths for m in members) else (path,)
        seen.update(unit)
        made.append(unit)
    return made


def _shape_of(module: nn.Module) -> tuple[int, int]:
    """[N, K] of a linear, [rows, columns] of a table, also where its parameters are elsewhere."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if type(module).__name__ == "Conv1D":
        return int(cast("int", module.nf)), int(cast("int", module.nx))
    return int(cast("int", module.out_features)), int(cast("int", module.in_features))


def _demand_shape(name: str, found: Weight | Tensor, wanted: tuple[int, ...]) -> None:
    """Raise Inconsistent if the checkpoint's tensor has another shape than the model's config makes it."""
    if tuple(found.shape) != wanted:
        raise Inconsistent(
            "the tensor and the model's config disagree about the shape",
            where=name,
            found=f"{list(found.shape)} in the checkpoint",
            wanted=f"{list(wanted)} by config.json",
            remedy="the config belongs to another model: take both from one source",
        )


def wanted_dtype(model: nn.Module, parameter: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 for the modules that the architecture keeps in it."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    in_half = getattr(model, "_keep_in_fp32_modules", None) or ()
    names = [*always, *(in_half if dtype == torch.float16 else ())]
    return torch.float32 if any(part in parameter for part in names) else dtype


def _demand_roles(path: str, roles: Mapping[str, Mapping[int, str]], count: int) -> None:
    fused = "gate_up_proj" in roles
    wanted = {"gate_up_proj", "down_proj"} if fused else {"gate_proj", "up_proj", "down_proj"}
    missing = sorted(wanted - set(roles))
    gaps = [f"{role}: {i}" for role, by in roles.items() if -1 not in by for i in range(count) if i not in by]
    beyond = [f"{role}: {i}" for role, by in roles.items() for i in by if i >= count]
    if missing or gaps or beyond:
        raise Inconsistent(
            "experts are missing or too many",
            where=path,
            found=", ".join([*missing, *gaps[:8], *beyond[:8]]),
            wanted=f"{count} experts in each of {', '.join(sorted(wanted))}",
            remedy="the checkpoint is incomplete, or its config belongs to another model",
        )


def demand_filled(model: nn.Module, unused: list[str]) -> None:
    """Raise Inconsistent naming every parameter that is still without data."""
    left = [name for name, p in model.named_parameters() if p.is_meta]
    left += [name for name, b in model.named_buffers() if b.is_meta]
    left += [name for name, m in model.named_modules() if isinstance(m, Placeholder)]
    if left:
        raise Inconsistent(
            "the checkpoint has no tensor for this part of the model",
            where=left[0],
            found="nothing" + (f"; not placed: {', '.join(unused[:4])}" if unused else ""),
            wanted="a tensor, or a config without this part",
            remedy="the checkpoint is incomplete, or its config belongs to another model",
            more=left[1:],
        )


def demand_known(model_type: object) -> None:
    """Raise Unsupported for a model type that transformers does not know."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise Unsupported(
            "this transformers does not know the model type",
            where="config.json",
            found=repr(model_type),
            wanted=f"a model type of transformers {transformers.__version__}",
            remedy="a newer transformers may know it; `anybit inspect` works without",
        )
