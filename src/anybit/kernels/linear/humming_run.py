"""humming's products at run time: see `humming.py`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Final, cast

import torch
from torch import Tensor

from anybit.errors import AnybitError, DeviceProblem, Unsupported
from anybit.kernels.linear.humming import LOCKS, Settings, input_factor, settings_of
from anybit.kernels.linear.humming_layout import codes_of, plain_of, scales_of, unfit, zeros_of
from anybit.kernels.linear.humming_library import RUNGS, Kernels, Library, library
from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.request import Regime
from anybit.numerics.codec import decode
from anybit.schemes import ActivationSpec
from anybit.weights import Dense, QuantizedWeight, Weight, spread

__all__ = ["Humming", "StoredHumming"]

PARTS: Final = ("weight", "weight_scale", "zero_point", "weight_scale_2", "locks")
_ACTIVATION: Final = "activation_"  # of the names of static activation tensors
_ALIGNED: Final = 16  # bytes: what humming asks of x
_Quantizer = tuple[ActivationSpec, tuple[str, ...]]


class _Layer:
    """What an operator needs beside tensors: the kernels of a shape and scheme, and the quantizer of its input."""

    def __init__(self, kernels: Kernels, rows: int, dtype: torch.dtype, quantizer: _Quantizer | None) -> None:
        self.table, self.rows, self.dtype, self.quantizer = kernels.table, rows, dtype, quantizer
        self.scales_rows = quantizer is not None and input_factor(quantizer[0]) == "rows"


_LAYERS: list[_Layer] = []
_NUMBERS: dict[tuple[str, str, str, _Quantizer | None], int] = {}


def _multiply(x: Tensor, parts: list[Tensor | None], activation: list[Tensor], number: int) -> Tensor:
    """x [M, K] times the weight, quantized first where the layer says so: [M, N] in the dtype of the kernels."""
    layer = _LAYERS[number]
    out = torch.empty((x.shape[0], layer.rows), dtype=layer.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    factors = None
    if layer.quantizer is not None:
        from anybit.kernels.triton.quantizers import fake_quantize

        spec, names = layer.quantizer
        x, factors = fake_quantize(x, spec, dict(zip(names, activation, strict=True)))
    x = x.to(layer.dtype).contiguous()
    library().launch(layer.table, x if x.data_ptr() % _ALIGNED == 0 else x.clone(), parts, out)
    return out.mul_(factors[:, None]) if factors is not None and layer.scales_rows else out


def _fake_multiply(x: Tensor, parts: list[Tensor | None], activation: list[Tensor], number: int) -> Tensor:
    layer = _LAYERS[number]
    return x.new_empty((x.shape[0], layer.rows), dtype=layer.dtype)


_LIBRARY: Final = torch.library.Library("anybit", "FRAGMENT")  # type: ignore[no-untyped-call]
# locks are written and are zero again when a call ends: for whoever orders calls they do not change
_LIBRARY.define("humming_matmul(Tensor x, Tensor?[] parts, Tensor[] activation, int number) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("humming_matmul", _multiply, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("anybit::humming_matmul", _fake_multiply, lib=_LIBRARY)
_multiply_op = torch.ops.anybit.humming_matmul.default


class StoredHumming:
    """A weight [N, K] in humming's order, with the quantization of its input in front.

    The factor that static quantization of the input leaves is part of the matrix's own.
    """

    def __init__(
        self, weight: QuantizedWeight, settings: Settings, dtype: torch.dtype, kernels: Kernels,
        tensors: dict[str, Tensor], factor: float,
    ) -> None:  # fmt: skip
        """`tensors` as humming ordered them, on the device that they run on; `factor` is the input's part of theirs."""
        self.shape = weight.shape
        spec = weight.scheme.activation
        self.quantizes_input = spec is not None
        self._scheme, self._settings, self._dtype = weight.scheme.weight_only(), settings, dtype
        self._config = kernels.config
        self._factor = factor
        self._activation = dict(weight.activation) if spec is not None else {}
        self._tensors = tensors
        self._dtypes = {name: t.dtype for name, t in self._held().items()}
        quantizer = None if spec is None else (spec, tuple(self._activation))
        self._number = _number_of(kernels, self.shape[0], dtype, quantizer, tensors["weight"].device)

    def _held(self) -> dict[str, Tensor]:
        return self._tensors | {f"{_ACTIVATION}{name}": t for name, t in self._activation.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, floats as bit patterns."""
        return {name: as_bits(t) for name, t in self._held().items()}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        real = {name: tensors[name].view(dtype) for name, dtype in self._dtypes.items()}
        self._tensors = {name: real[name] for name in self._tensors}
        self._activation = {name: real[f"{_ACTIVATION}{name}"] for name in self._activation}

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N] in the dtype of the kernels, without a bias."""
        parts = [self._tensors.get(name) for name in PARTS]
        # outside a compiler the dispatcher would only cost time
        run = _multiply_op if torch.compiler.is_compiling() else _multiply
        return cast("Tensor", run(x, parts, list(self._activation.values()), self._number))

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T, then the bias, added in float32 to the rounded product: [M, N] in `out_dtype`."""
        y = self.product(x)
        if bias is not None:
            y = y.add_(bias) if out_dtype == y.dtype else y.float() + bias.float()
        return y.to(out_dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight's rows [.., K] for integer `index` [..]."""
        return self.dequantize()[index].to(dtype)

    def dequantize(self) -> Tensor:
        """The float32 weight [N, K], of codes and scales as the kernels read them."""
        made, held, scheme = library(), self._tensors, self._scheme
        n, k = self.shape
        codes = codes_of(made, self._config, held["weight"], self._settings, (n, k), self._dtype)
        scale = scales_of(made, self._config, held["weight_scale"], self._settings, self._dtype).float()
        if self._settings.shift or scheme.offset is not None:
            value = codes.float() - self._zeros(made, n)
        else:
            value = decode(scheme.element, codes)
        if "weight_scale_2" in held:
            scale = scale * (held["weight_scale_2"] / self._factor)
        elif self._settings.is_tensor:
            scale = scale / self._factor
        return value * spread(scale, scheme.scales[0].block, (n, k), "grid", None)

    def _zeros(self, made: Library, n: int) -> Tensor | float:
        if self._scheme.offset is None:
            return float(self._settings.shift)
        zeros = zeros_of(made, self._tensors["zero_point"], self._settings, n).float()
        return spread(zeros, self._scheme.offset.block, self.shape, "grid", None)


def _number_of(
    kernels: Kernels, rows: int, dtype: torch.dtype, quantizer: _Quantizer | None, device: torch.device
) -> int:
    """A number for a layer's kernels, the same one for equal layers of a device: what an operator takes."""
    key = (kernels.config.to_str(), str(dtype), str(device), quantizer)
    if key not in _NUMBERS:
        _NUMBERS[key] = len(_LAYERS)
        _LAYERS.append(_Layer(kernels, rows, dtype, quantizer))
    return _NUMBERS[key]


class Humming:
    """Implementation of `humming`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredHumming:
        """humming's tensors of the weight, and its kernels compiled, loaded and called once for every range of M.

        Raises DeviceProblem where the package does not load or its kernels do not compile, Unsupported for values that
        its arithmetic does not hold; `pinned` is never asked of this kernel.
        """
        if isinstance(weight, Dense):
            raise TypeError("a Dense weight belongs to torch-dense")
        settings = settings_of(weight.scheme)
        assert isinstance(settings, Settings), settings
        what = unfit(weight, settings, dtype)
        if what is not None:
            raise Unsupported("humming's arithmetic does not hold this weight", found=what, wanted=str(weight.scheme),
                              remedy="--kernel linear=triton-fused")
        try:
            return _prepared(library(), weight, settings, dtype)
        except (AnybitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a compiler, a driver, an assertion about a shape: none of them is the layer's end
            raise DeviceProblem(
                "humming's kernels do not build or start here",
                found=f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}",
                wanted=f"nvcc or NVRTC of CUDA 12 or later, and a cache that can be written ({weight.scheme})",
                remedy="--kernel linear=triton-fused",
            ) from error


def _prepared(made: Library, weight: QuantizedWeight, settings: Settings, dtype: torch.dtype) -> StoredHumming:
    (n, k), device = weight.shape, weight.scales[0].device
    factor = _input_factor(weight, device)
    config = made.config(settings, n, k, dtype, device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        tensors = made.stored(config, plain_of(weight, settings, dtype, factor))
        tensors["locks"] = torch.zeros(LOCKS, dtype=torch.int32, device=device)
        kernels = made.compile(config, device)
        _load(made, kernels, tensors, k, n, dtype)
    return StoredHumming(weight, settings, dtype, kernels, tensors, factor)


def _input_factor(weight: QuantizedWeight, device: torch.device) -> float:
    """The static factor of quantized activations beside their 16-bit values; 1 where there is none."""
    spec = weight.scheme.activation
    if spec is None or input_factor(spec) != "matrix":
        return 1.0
    from anybit.kernels.triton.quantizers import fake_quantize

    zeros = torch.zeros(1, weight.shape[1], dtype=torch.bfloat16, device=device)
    _, factors = fake_quantize(zeros, spec, weight.activation)
    return 1.0 if factors is None else float(factors[0])


def _load(made: Library, kernels: Kernels, tensors: dict[str, Tensor], k: int, n: int, dtype: torch.dtype) -> None:
    """One row through each kernel: their code is loaded here and not at a first call, which may be under capture."""
    device = tensors["weight"].device
    x, out = torch.zeros(1, k, dtype=dtype, device=device), torch.empty(1, n, dtype=dtype, device=device)
    for largest in RUNGS:
        made.launch(kernels.table, x, [tensors.get(name) for name in PARTS], out, as_tokens=largest)
