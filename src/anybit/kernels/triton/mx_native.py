"""Block-scaled products on chips that have them: the layout "mx-rows". Spec: `linear/triton_mx.py`.

Codes and their 8 bit scales go to the matrix unit as they are; global scales (NVFP4) multiply in the epilogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.linear.triton_mx import PAD, PINNED_M, configure, constants_of, pair_of
from anybit.kernels.request import Regime
from anybit.kernels.triton import mx_native_jit as jit
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.launching import Argument, Call, Launch, Piece
from anybit.kernels.triton.opaque import Launched, Run
from anybit.kernels.triton.quantizers import Quantizer
from anybit.numerics.packing import PackedCodes, pack_stream
from anybit.schemes import Scheme
from anybit.weights import Dense, QuantizedWeight, Weight

__all__ = ["MxRows", "StoredMx"]

_ONE_FP4: Final = 2  # the code of 1.0
_NEUTRAL_SCALE: Final = {32: 127, 16: 0x38}  # of groups beyond K: 1.0 as e8m0, as e4m3
_VIEW: Final = {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class StoredMx(Launched):
    """A micro-scaled weight as the matrix unit reads it."""

    quantizes_input = True

    def __init__(self, weight: QuantizedWeight, *, pinned: bool = False) -> None:
        """`weight` [N, K] of a scheme that `pair_of` knows; `pinned` gives every M the same tiles."""
        super().__init__()
        self._pinned = pinned
        pair = pair_of(weight.scheme)
        assert pair is not None and len(weight.shape) == 2
        self.shape, self._pair = weight.shape, pair
        k = weight.shape[1]
        beyond = -k % PAD
        codes = pad(weight.codes, (0, beyond))
        self._codes = pack_stream(codes, 4, torch.uint8) if pair.w == "e2m1" else codes.contiguous()
        scale = weight.scales[0].view(torch.uint8)
        self._scale = pad(scale, (0, (k + beyond) // pair.group - scale.shape[1]), value=_NEUTRAL_SCALE[pair.group])
        self._coarse = weight.scales[1:]
        self._factor = _row_factors(weight) if self._coarse else None
        self._static = dict(weight.activation)
        self._weight = replace(weight, stored_codes=torch.empty(0), scales=(), bias=None, pre_scale=None, activation={})
        self._dtypes = {name: t.dtype for name, t in self._parts().items()}
        self._take()

    def _take(self) -> None:
        """What calls share."""
        self._calls = {}
        spec, pair = self._weight.scheme.activation, self._pair
        assert spec is not None
        width = self._codes.shape[1] * (2 if pair.w == "e2m1" else 1)
        self._quantizer = Quantizer(spec, self._static, width, packed=pair.x == "e2m1")

    def _parts(self) -> dict[str, Tensor]:
        parts = {"codes": self._codes, "scale": self._scale}
        parts |= {f"coarse_{i}": t for i, t in enumerate(self._coarse)}
        parts |= {f"static_{name}": t for name, t in self._static.items()}
        if self._factor is not None:
            parts["factor"] = self._factor
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, floats as bit patterns."""
        return {name: as_bits(t) for name, t in self._parts().items()}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        real = {name: tensors[name].view(dtype) for name, dtype in self._dtypes.items()}
        self._codes, self._scale, self._factor = real["codes"], real["scale"], real.get("factor")
        self._coarse = tuple(real[f"coarse_{i}"] for i in range(len(self._coarse)))
        self._static = {name: real[f"static_{name}"] for name in self._static}
        self._take()

    def _prepared(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Run:
        """The launches for calls like this one: Q(x) times W^T, plus bias in float32."""
        if 0 in (x.shape[0], self.shape[0]):
            return lambda x, bias: torch.empty((x.shape[0], self.shape[0]), dtype=out_dtype, device=x.device)
        (m, n), pair, codes, device = (x.shape[0], self.shape[0]), self._pair, self._codes, x.device
        k = self._quantizer.columns
        plan = self._quantizer.plan(x)
        config = configure(k, PINNED_M if self._pinned else m, arch_of(device), pair)
        kind = torch.float8_e4m3fn if pair.group == 16 else torch.uint8
        outer = plan.pieces.get("outer")
        constants = constants_of(pair, config, has_outer=outer is not None, has_factor=self._factor is not None,
                                 has_bias=bias is not None)
        # what a specialization does not read is given the place of the codes
        arguments: list[Argument] = [
            Piece(plan.pieces["codes"].offset, _VIEW[pair.x]), Piece(plan.pieces["scale_codes"].offset, kind),
            codes.view(_VIEW[pair.w]), self._scale.view(kind), outer or codes,
            codes if self._factor is None else self._factor, codes if bias is None else bias.dtype, out_dtype,
            int, n, k,
        ]  # fmt: skip
        made = Launch(jit.mx_matmul, arguments, constants, device, num_warps=config.warps, num_stages=config.stages)
        tiles = -(-m // config.bm) * -(-n // config.bn)
        return Call((m, n), out_dtype, device, m, plan.scratch_bytes, plan, made, (tiles, 1))

    def _canonical(self) -> QuantizedWeight:
        k = self.shape[1]
        codes: Tensor | PackedCodes = self._codes[:, :k]
        if self._pair.w == "e2m1":
            codes = PackedCodes(self._codes, 4, self._codes.shape[1] * 2, "stream", "unsigned").unpack()[:, :k]
        scale = self._scale[:, : -(-k // self._pair.group)]
        return replace(self._weight, stored_codes=codes, scales=(scale, *self._coarse))

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded rows [.., K] for integer `index` [..]."""
        found = self._canonical().take_rows(index.reshape(-1)).dequantize()
        return found.to(dtype).reshape(*index.shape, self.shape[1])

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        return self._canonical().dequantize()


class MxRows:
    """Implementation of `triton-mx-native`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredMx:
        """Codes and scales by row, K padded to 128; `dtype` plays no part."""
        if isinstance(weight, Dense):
            raise TypeError("a Dense weight belongs to torch-dense")
        return StoredMx(weight, pinned=pinned)


def _row_factors(weight: QuantizedWeight) -> Tensor:
    """All levels above the finest, combined: float32 [N]. The reference weight of one column of codes 1.0."""
    n = weight.shape[0]
    scheme = Scheme(weight.scheme.element, weight.scheme.scales[1:], weight.scheme.order)
    one = _ONE_FP4 if weight.scheme.element == "fp4_e2m1" else 0x38
    ones = torch.full((n, 1), one, dtype=torch.uint8, device=weight.scales[0].device)
    return replace(weight, scheme=scheme, shape=(n, 1), stored_codes=ones,
                   scales=weight.scales[1:]).dequantize()[:, 0].contiguous()
