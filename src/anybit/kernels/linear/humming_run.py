"""humming's products at run time: see `humming.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from anybit.errors import AnybitError, DeviceProblem, Unsupported
from anybit.kernels.linear.humming import LOCKS, Settings, input_factor, settings_of
from anybit.kernels.linear.humming_layout import codes_of, plain_of, scales_of, unfit, zeros_of
from anybit.kernels.linear.humming_library import RUNGS, Kernels, Library, library
from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.request import Regime
from anybit.kernels.triton.devices import on_device
from anybit.kernels.triton.opaque import Opaque
from anybit.numerics.codec import decode
from anybit.weights import Dense, QuantizedWeight, Weight, spread

__all__ = ["Humming", "StoredHumming"]

PARTS: Final = ("weight", "weight_scale", "zero_point", "weight_scale_2", "locks")
_ACTIVATION: Final = "activation_"  # of the names of static activation tensors
_ALIGNED: Final = 16  # bytes: what humming asks of x


class StoredHumming(Opaque):
    """A weight [N, K] in humming's order, with the quantization of its input in front.

    The factor that static quantization of the input leaves is part of the matrix's own.
    """

    def __init__(
        self, weight: QuantizedWeight, settings: Settings, dtype: torch.dtype, kernels: Kernels,
        tensors: dict[str, Tensor], factor: float,
    ) -> None:  # fmt: skip
        """`tensors` as humming ordered them, on the device that they run on; `factor` is the input's part of theirs."""
        super().__init__()
        self.shape = weight.shape
        self._spec = weight.scheme.activation
        self.quantizes_input = self._spec is not None
        self._scheme, self._settings, self._dtype = weight.scheme.weight_only(), settings, dtype
        self._kernels, self._factor = kernels, factor
        self._takes_codes = bool(settings.codes)
        self._scales_rows = input_factor(self._spec) == "rows"
        self._activation = dict(weight.activation) if self._spec is not None else {}
        self._tensors = tensors
        self._dtypes = {name: t.dtype for name, t in self._held().items()}
        self._take()

    def _held(self) -> dict[str, Tensor]:
        return self._tensors | {f"{_ACTIVATION}{name}": t for name, t in self._activation.items()}

    def _take(self) -> None:
        self._parts = [self._tensors.get(name) for name in PARTS]
        self._quantizer = None
        if self._spec is not None:
            from anybit.kernels.triton.quantizers import Quantizer  # needs Triton

            given: dict[str, Any] = {} if self._takes_codes else {"values": torch.bfloat16, "own": True}
            self._quantizer = Quantizer(self._spec, self._activation, self.shape[1], **given)

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, floats as bit patterns."""
        return {name: as_bits(t) for name, t in self._held().items()}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        real = {name: tensors[name].view(dtype) for name, dtype in self._dtypes.items()}
        self._tensors = {name: real[name] for name in self._tensors}
        self._activation = {name: real[f"{_ACTIVATION}{name}"] for name in self._activation}
        self._take()

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] times W^T, then factors of rows and the bias in float32 on the rounded product: [M, N]."""
        if torch.compiler.is_compiling():
            return self._as_operator(x, regime, bias, self.shape[0], out_dtype)
        out = torch.empty((x.shape[0], self.shape[0]), dtype=self._dtype, device=x.device)
        factors = self._multiply(x, out) if x.shape[0] else None
        if factors is not None:
            return _finished(out, factors, bias, out_dtype)
        if bias is not None:
            out = out.add_(bias) if out_dtype == out.dtype else out.float() + bias.float()
        return out if out.dtype == out_dtype else out.to(out_dtype)

    def _multiply(self, x: Tensor, out: Tensor) -> Tensor | None:
        """out = x, quantized if the layer says so, times W^T; factors [M] of rows where they are still to be met."""
        scale = factors = None
        if self._quantizer is not None:
            found = self._quantizer(x)
            x = found.codes
            if self._takes_codes:
                assert found.scale is not None
                x, scale = x.view(torch.float8_e4m3fn), found.scale[:, None]
            elif self._scales_rows:
                factors = found.factor
        x = x.to(torch.float8_e4m3fn if self._takes_codes else self._dtype).contiguous()
        x = x if x.data_ptr() % _ALIGNED == 0 else x.clone()
        with on_device(x.device):
            library().launch(self._kernels.table, x, scale, self._parts, out)
        return factors

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight's rows [.., K] for integer `index` [..]."""
        return self.dequantize()[index].to(dtype)

    def dequantize(self) -> Tensor:
        """The float32 weight [N, K], of codes and scales as the kernels read them."""
        made, config, held, scheme = library(), self._kernels.config, self._tensors, self._scheme
        n, k = self.shape
        codes = codes_of(made, config, held["weight"], self._settings, (n, k), self._dtype)
        scale = scales_of(made, config, held["weight_scale"], self._settings, self._dtype).float()
        if self._settings.shift or scheme.offset is not None:
            value = codes.float() - self._zeros()
        else:
            value = decode(scheme.element, codes)
        if "weight_scale_2" in held:
            scale = scale * (held["weight_scale_2"] / self._factor)
        elif self._settings.is_tensor:
            scale = scale / self._factor
        return value * spread(scale, scheme.scales[0].block, (n, k), "grid", None)

    def _zeros(self) -> Tensor | float:
        if self._scheme.offset is None:
            return float(self._settings.shift)
        zeros = zeros_of(library(), self._tensors["zero_point"], self._settings, self.shape[0]).float()
        return spread(zeros, self._scheme.offset.block, self.shape, "grid", None)


def _finished(y: Tensor, factors: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """y [M, N] times float32 factors [M] of rows, plus the bias."""
    from anybit.kernels.triton.launching import launch
    from anybit.kernels.triton.planes_kernels import finish_kernel

    (tokens, rows), columns = y.shape, 1024
    out = y if y.dtype == out_dtype else torch.empty_like(y, dtype=out_dtype)
    launch(
        finish_kernel, (tokens, -(-rows // columns)),
        [y, factors, y if bias is None else bias, out, tokens, rows, out.stride(0), 1.0],
        y.device, TOKENS=True, BIAS=bias is not None, BN=columns, num_warps=4,
    )  # fmt: skip
    return out


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
    with on_device(device):
        tensors = made.stored(config, plain_of(weight, settings, dtype, factor))
        tensors["locks"] = torch.zeros(LOCKS, dtype=torch.int32, device=device)
        kernels = made.compile(config, device)
        _load(made, kernels, tensors, settings, k, n, dtype)
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


def _load(
    made: Library, kernels: Kernels, tensors: dict[str, Tensor], settings: Settings, k: int, n: int, dtype: torch.dtype
) -> None:
    """One row through each kernel: their code is loaded here and not at a first call, which may be under capture."""
    device = tensors["weight"].device
    x, out = torch.zeros(1, k, dtype=dtype, device=device), torch.empty(1, n, dtype=dtype, device=device)
    scale = None
    if settings.codes:
        x, scale = x.to(torch.float8_e4m3fn), torch.ones(1, 1, device=device)
    for largest in RUNGS:
        made.launch(kernels.table, x, scale, [tensors.get(name) for name in PARTS], out, as_tokens=largest)
