"""torch modules over Products: a linear layer, a lookup table, the experts of a layer.

Weights are buffers of integer bit patterns: `model.to(torch.bfloat16)` casts float buffers, and a rounded scale would
be another weight. Each module binds its kernel again after its buffers have moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from anybit.errors import DeviceProblem
from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.product import Product
from anybit.kernels.request import REGIMES
from anybit.kernels.triton.devices import on_device
from anybit.planning.invariance import looks_at_all_rows

if TYPE_CHECKING:
    from anybit.kernels.native.experts import Experts
    from anybit.kernels.native.planes import Planes
    from anybit.kernels.triton.experts import Stack

_ROWS_OF_ONE: Final = 192  # rows of an expert from which on decoding its weights once and torch's product are faster
_OF_LIBRARY: Final = (torch.float32, torch.float16, torch.bfloat16)  # what its calls take
_PRODUCTS: weakref.WeakValueDictionary[int, _Bound] = weakref.WeakValueDictionary()
_EXPERTS: weakref.WeakValueDictionary[int, AnybitExperts] = weakref.WeakValueDictionary()


Place = tuple[Mapping[str, nn.Module | None], str, nn.Module]  # its parent's table, its name there, it


def are_in_place(places: Iterable[Place]) -> bool:
    """False while another module is in the place of one (an adapter), or one is hooked or patched."""
    return all(table.get(name) is module and not module._forward_hooks and not module._forward_pre_hooks
               and "forward" not in module.__dict__ for table, name, module in places)


class _Bound(nn.Module):
    """A Product whose tensors are buffers of a module."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self._take(product)

    def _take(self, product: Product) -> None:
        self.product = product
        self._stored_names = sorted(product.stored.tensors())
        for name, tensor in product.stored.tensors().items():
            self.register_buffer(f"packed_{name}", tensor)
        self._beside: dict[str, torch.dtype] = {}
        for name, found in self._loose().items():
            self._beside[name] = found.dtype
            self.register_buffer(name, as_bits(found))
        self.key = id(self)
        _PRODUCTS[self.key] = self

    def _loose(self) -> dict[str, Tensor]:
        product = self.product
        loose = {f"activation_{name}": t for name, t in product.activation.items()}
        if product.pre_scale is not None:
            loose["pre_scale"] = product.pre_scale
        if product.bias is not None:
            loose["bias"] = product.bias
        return loose

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move the buffers, then let the kernel take them again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        product = self.product
        product.stored.bind({name: cast("Tensor", getattr(self, f"packed_{name}")) for name in self._stored_names})
        real = {name: cast("Tensor", getattr(self, name)).view(dtype) for name, dtype in self._beside.items()}
        product.activation = {name: real[f"activation_{name}"] for name in product.activation}
        product.pre_scale = real.get("pre_scale")
        product.bias = real.get("bias")
        return self

    def rebind(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the same contents from elsewhere: `tensors` by the names of the kernel's layout, as bit patterns."""
        for name, tensor in tensors.items():
            setattr(self, f"packed_{name}", tensor)
        self.product.stored.bind({name: cast("Tensor", getattr(self, f"packed_{name}")) for name in self._stored_names})

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bound:
        raise DeviceProblem(
            "a packed layer cannot be copied", wanted="one copy of the weights", remedy="load the model a second time"
        )

    def __getstate__(self) -> dict[str, Any]:
        raise DeviceProblem(
            "a packed layer cannot be pickled", found="addresses that only this process knows",
            wanted="one model a process", remedy="load the checkpoint in the other process",
        )

    def multiply(self, x: Tensor) -> Tensor:
        """The product; through a custom operator where autograd or a compiler is watching."""
        if _is_watched(x):
            return cast("Tensor", torch.ops.anybit.product(x, self.key, self.product.stored.shape[-2]))
        return self.product(x)


class AnybitLinear(_Bound):
    """y = Q(x) W^T + b with W packed: takes the place of torch.nn.Linear.

    x [.., in_features] in any float dtype -> [.., out_features] in the same.
    """

    def __init__(self, product: Product) -> None:
        super().__init__(product)
        self.out_features, self.in_features = product.stored.shape[-2:]
        # a decode step calls hundreds of layers: a plain product of few tokens goes straight to the kernel
        self._step = getattr(product.stored, "step", None) if product.is_plain else None
        self._few = REGIMES["decode"][0] * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        if self._step is not None and x.numel() <= self._few and not _is_watched(x):
            return cast("Tensor", self._step(x))
        return self.multiply(x)

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return f"in={self.in_features}, out={self.out_features}, {self.product.scheme}"


@dataclass(frozen=True)
class Whereabouts:
    """What a host may ask of the weight of a packed table: where it is, its dtype, its shape; all else is an error."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


class AnybitEmbedding(_Bound):
    """Rows of a packed table: takes the place of torch.nn.Embedding. index [..] -> [.., embedding_dim] in `dtype`."""

    def __init__(self, product: Product, dtype: torch.dtype, factor: Tensor | float | None = None) -> None:
        super().__init__(product)
        self.num_embeddings, self.embedding_dim = product.stored.shape[-2:]
        self.dtype = dtype
        self.factor = factor  # some architectures scale their embeddings (Gemma)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As every module's; the rows take the dtype that `Module.to` gives to float tensors."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    @property
    def weight(self) -> Whereabouts:
        """Device and dtype: Llama 4 asks its table where to send the tokens."""
        held = next(iter(self.buffers()))
        return Whereabouts(held.device, self.dtype, torch.Size((self.num_embeddings, self.embedding_dim)))

    def forward(self, index: Tensor) -> Tensor:
        """The lookup."""
        if torch.compiler.is_compiling():
            found = cast("Tensor", torch.ops.anybit.rows(index, self.key, self.embedding_dim, self.dtype))
        else:
            found = self.product.stored.rows(index, self.dtype)
        return found if self.factor is None else found * self.factor

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return f"{self.num_embeddings} x {self.embedding_dim}, {self.product.scheme}"


class TiedHead(nn.Module):
    """The output head that is the embedding table: no tensors of its own."""

    def __init__(self, table: AnybitEmbedding) -> None:
        super().__init__()
        self._table = [table]  # in a list, so that it is not registered a second time
        self.out_features, self.in_features = table.num_embeddings, table.embedding_dim

    def forward(self, x: Tensor) -> Tensor:
        """Logits [.., vocabulary]."""
        return self._table[0].multiply(x)


class AnybitExperts(nn.Module):
    """The experts of one layer, packed: takes the place of transformers' fused experts module.

    Each expert has products of its own, since experts of one layer may differ in scheme: either gate_proj, up_proj and
    down_proj, or one fused gate_up_proj whose rows are laid out as the original module's.
    The original module stays as `host` (without its parameters) for its gating and its flags.
    """

    def __init__(self, host: nn.Module, experts: int, projections: Mapping[str, list[AnybitLinear]]) -> None:
        super().__init__()
        self.host = host
        self.num_experts = experts
        for expert in range(experts):  # paths as in most checkpoints: experts.3.gate_proj
            parts = {name: products[expert] for name, products in projections.items()}
            self.add_module(str(expert), nn.ModuleDict(parts))
        self.has_fused = "gate_up_proj" in projections
        self.is_concatenated = bool(getattr(host, "is_concatenated", True))
        self._projections = {name: list(products) for name, products in projections.items()}
        self._stacks = self._stacked()
        self._together_on_cpu = _callable_together(self._projections)
        self.key = id(self)
        _EXPERTS[self.key] = self

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [M, H], the experts of each token [M, T] and their weights [M, T] -> [M, H]."""
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # which experts run depends on data
            return cast("Tensor", torch.ops.anybit.experts(hidden_states, top_k_index, top_k_weights, self.key))
        if self._runs_at_once(hidden_states, top_k_index):
            return self._at_once(hidden_states, top_k_index, top_k_weights)
        if self._are_few(hidden_states):
            found = self._of_few(hidden_states, top_k_index, top_k_weights)
            if found is not None:
                return found
        result = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # the mark of an expert on another device
                continue
            token, place = torch.where(top_k_index == expert)
            gated = self._gate(self._together(partial(self._one, expert), hidden_states[token]))
            out = self._projection("down_proj", expert)(gated) * top_k_weights[token, place, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result

    # --- all experts of a projection as one launch, on a GPU ---

    def _stacked(self) -> dict[str, Stack]:
        """The projections as stacks; empty where a projection's experts are not alike or lie in another layout."""
        found = {name: _stack(products) for name, products in self._projections.items()}
        return {name: stack for name, stack in found.items() if stack is not None} if all(found.values()) else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As every module's; tensors that moved one by one are put behind each other again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._stacks = self._stacked()
        return self

    def _runs_at_once(self, x: Tensor, index: Tensor) -> bool:
        """True where one launch for all experts is the faster way, or the only one that a graph can record."""
        if torch.is_grad_enabled() and x.requires_grad:  # the loop's products know their gradients
            return False
        if not self._stacks or not x.is_cuda or not all(stack.takes(x.dtype) for stack in self._stacks.values()):
            return False
        is_faster = index.numel() < _ROWS_OF_ONE * self.num_experts or torch.cuda.is_current_stream_capturing()
        return is_faster and self._are_in_place(range(self.num_experts))

    def _at_once(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        from anybit.kernels.triton.segments import Segments

        segments = Segments.of(index, self.num_experts)
        chosen = index.shape[-1]
        token = torch.arange(index.numel(), device=x.device) if segments.order is None else segments.order
        rows = x.index_select(0, token // chosen)
        with on_device(x.device):
            gated = self._gate(self._together(lambda name, at: self._stacks[name](at, segments), rows))
            out = segments.back(self._stacks["down_proj"](gated, segments))
        out = out.view(x.shape[0], chosen, out.shape[-1])
        return (out.float() * weights[..., None]).sum(1).to(x.dtype)

    def _are_in_place(self, experts: Iterable[int]) -> bool:
        """False where a projection of these experts is not as it was loaded."""
        tables = ((expert, cast("nn.ModuleDict", self._modules[str(expert)])._modules) for expert in experts)
        return are_in_place((table, name, products[expert]) for expert, table in tables
                            for name, products in self._projections.items())

    # --- the experts of a few tokens in one call a projection, on a CPU ---

    def _are_few(self, x: Tensor) -> bool:
        """True where each chosen expert has a row or two, of which its weights are read once."""
        if torch.is_grad_enabled() and x.requires_grad:
            return False
        return bool(self._together_on_cpu) and x.shape[0] <= REGIMES["decode"][0] and x.dtype in _OF_LIBRARY

    def _of_few(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """What the loop gives: the same sums in the same order. None where a chosen expert is not as it was loaded."""
        chosen, numbers = index.shape[-1], index.flatten().tolist()
        here = (p for p, expert in enumerate(numbers) if 0 <= expert < self.num_experts)
        pairs = sorted(here, key=numbers.__getitem__)
        result = torch.zeros_like(x)
        if not pairs:
            return result
        experts: list[int] = []
        first: list[int] = []
        for place, pair in enumerate(pairs):
            if not experts or numbers[pair] != experts[-1]:
                experts.append(numbers[pair])
                first.append(place)
        first.append(len(pairs))
        if not self._are_in_place(experts):
            return None
        order = torch.tensor(pairs)
        token = order // chosen
        rows = token.to(torch.int32)
        products = self._together_on_cpu
        gated = self._gate(self._together(lambda name, at: products[name](at, experts, first, rows), x))
        out = products["down_proj"](gated, experts, first) * weights.flatten()[order, None]
        return result.index_add_(0, token, out.to(result.dtype))

    # --- what all ways share ---

    def _one(self, expert: int, name: str, x: Tensor) -> Tensor:
        return cast("Tensor", self._projection(name, expert)(x))

    def _projection(self, name: str, expert: int) -> AnybitLinear:
        return cast("AnybitLinear", cast("nn.ModuleDict", self._modules[str(expert)])[name])

    def _together(self, product: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        """Gate and up of rows x as the host's gating takes them; `product` multiplies by the named projection."""
        if self.has_fused:
            return product("gate_up_proj", x)
        gate, up = product("gate_proj", x), product("up_proj", x)
        if self.is_concatenated:
            return torch.cat([gate, up], dim=-1)
        return torch.stack([gate, up], dim=-1).flatten(-2)

    def _gate(self, gate_up: Tensor) -> Tensor:
        apply = getattr(self.host, "_apply_gate", None)
        if apply is not None:
            return cast("Tensor", apply(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return cast("Tensor", cast("Any", self.host).act_fn(gate)) * up


def _callable_together(projections: Mapping[str, list[AnybitLinear]]) -> dict[str, Experts]:
    """Each projection's experts for calls of the compiled library; empty where not all of them lie in its layout."""
    from anybit.kernels.native.experts import Experts

    found = {}
    for name, products in projections.items():
        packed = [_packed_for_library(p.product) for p in products]
        weights = [weight for weight in packed if weight is not None]
        if not weights or len(weights) != len(packed) or not Experts.are_alike(weights):
            return {}
        found[name] = Experts(weights)
    return found


def _packed_for_library(product: Product) -> Planes | None:
    """The weight in the compiled library's layout where nothing else happens to x or y."""
    packed = getattr(product.stored, "packed", None) if product.is_plain else None
    return packed[0] if isinstance(packed, list) and len(packed) == 1 else None


def _stack(products: list[AnybitLinear]) -> Stack | None:
    """The experts' weights behind each other, and the modules' buffers as parts of them; None where they are not alike.

    Only products on a GPU that do nothing which an expert's number does not decide.
    """
    from anybit.kernels.triton.experts import stack_of

    stored = [p.product.stored for p in products]
    biases = [p.product.bias for p in products]
    if not products or not next(iter(stored[0].tensors().values())).is_cuda or not all(map(_is_simple, products)):
        return None
    found = stack_of(stored, biases)
    if found is None:
        return None
    stack, tensors = found
    for product, own in zip(products, tensors, strict=True):
        for name, tensor in own.items():
            product.register_buffer(f"packed_{name}", tensor)
    return stack


def _is_simple(module: AnybitLinear) -> bool:
    product = module.product
    spec = product.scheme.activation
    # a statistic of a whole call would be taken over the rows of all experts
    is_by_row = spec is None or (product.stored.quantizes_input and not looks_at_all_rows(spec))
    return product.pre_scale is None and product.scheme.output is None and is_by_row


def _is_watched(x: Tensor) -> bool:
    """True where autograd or a compiler needs to see one operator."""
    return (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling()


@torch.library.custom_op("anybit::product", mutates_args=())
def _product(x: Tensor, key: int, out_features: int) -> Tensor:
    return _PRODUCTS[key].product(x)


@_product.register_fake
def _(x: Tensor, key: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("anybit::experts", mutates_args=())
def _experts(x: Tensor, index: Tensor, weights: Tensor, key: int) -> Tensor:
    return cast("Tensor", _EXPERTS[key](x, index, weights))


@_experts.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor, key: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("anybit::rows", mutates_args=())
def _rows(index: Tensor, key: int, columns: int, dtype: torch.dtype) -> Tensor:
    return _PRODUCTS[key].product.stored.rows(index, dtype)


@_rows.register_fake
def _(index: Tensor, key: int, columns: int, dtype: torch.dtype) -> Tensor:
    return index.new_empty((*index.shape, columns), dtype=dtype)


@torch.library.custom_op("anybit::input_gradient", mutates_args=())
def _input_gradient(grad: Tensor, key: int, in_features: int) -> Tensor:
    return _PRODUCTS[key].product.input_gradient(grad)


@_input_gradient.register_fake
def _(grad: Tensor, key: int, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # traced with fake tensors: the weight is real
    return torch.ops.anybit.input_gradient(grad, ctx.key, ctx.in_features), None, None


def _remember(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.key, ctx.in_features = inputs[1], inputs[0].shape[-1]


_product.register_autograd(_backward, setup_context=_remember)
