"""Spec of humming's weight-only products (vllm-project/humming, Apache-2.0): CUDA kernels, compiled where they run.

humming writes C++ for a layer's very shape and scheme and has it compiled by nvcc or NVRTC; all of that happens when a
weight is prepared, nothing at a call. The source that is compiled is part of the installed package; nothing of a
checkpoint enters it but N, K, the group size and the names of number formats.

A weight is decoded in registers to the dtype of the activations, where a code times an 8 bit scale is exact and times
a 16 bit scale is not; parts of a sum that several blocks make meet in that dtype too (stream-K), so a sum is rounded
more than once: `rounds` says both. Quantized activations are made by our own exact quantizer in front: 4 and 6 bits as
the 16-bit values that they are, fp8 beside integer weights of 4 bits as codes for the matrix unit. Layers of 8 bits on
both sides are left to our own kernels, which nothing of humming's beat on an H200.
Source: humming-kernels 0.1.19, include/humming/arith/mainloop_arith.cuh, epilogue/gmem_writer.cuh, config/config.py.
Torch-free; the implementation is `humming_run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from anybit.kernels.linear.triton_planes import expands_exactly
from anybit.kernels.request import NARROW_ADDER, KernelSpec, Reason, Request, Verdict, gather
from anybit.kernels.triton.recipes import ARITHMETIC, can_fake_quantize, can_quantize
from anybit.numerics.formats import number_format
from anybit.platforms import Platform
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Block, ScaleLevel, Scheme, group

__all__ = ["SPEC", "Settings", "input_factor", "settings_of"]

NAME: Final = "humming"
ARCHS: Final = ("sm_90",)  # humming is made for all from sm_75; there its kernels are others, which we have not run
DTYPES: Final = ("bfloat16", "float16")
ROWS: Final = 128  # N is a multiple of it: the widest tile of a small product
COLUMNS: Final = 128  # K likewise
LOCKS: Final = 2048  # int32 that order the parts of a sum; zero between calls

# our name of an element -> humming's; its integers are offset binary: ours plus half of the range where they are signed
_ELEMENTS: Final[Mapping[str, str]] = {
    **{f"int{bits}": f"uint{bits}" for bits in (2, 3, 4, 5, 6, 8)}, "uint3": "uint3", "uint4": "uint4",
    "fp4_e2m1": "float4e2m1", "fp6_e2m3": "float6e2m3", "fp6_e3m2": "float6e3m2",
    "fp8_e4m3fn": "float8e4m3", "fp8_e5m2": "float8e5m2",
}  # fmt: skip
_SMALL_SCALES: Final[Mapping[str, str]] = {"e8m0": "float8e8m0", "fp8_e4m3fn": "float8e4m3"}
_WIDE_SCALES: Final = ("bfloat16", "float16", "float32")
_WIDE: Final = "wide"  # any of them: they are cast to the dtype of the activations


class _Tried(NamedTuple):
    """A kind of weight whose kernels ran on an H200, every result within its bound; others are refused.

    scale   format of the scales, or _WIDE
    blocks  what has one scale
    halves  blocks that ran with float16 activations too
    """

    element: str
    scale: str
    blocks: tuple[Block, ...]
    halves: tuple[Block, ...] = ()


_TRIED: Final = (
    *(_Tried(f"int{bits}", _WIDE, (group(128),)) for bits in (2, 3, 5, 6)),
    _Tried("int4", _WIDE, (group(16), group(32), group(64), group(128), group(256)), (group(128),)),
    _Tried("int8", _WIDE, (group(128), CHANNEL)),
    _Tried("uint3", _WIDE, (group(64),)),
    _Tried("uint4", _WIDE, (group(32), group(128)), (group(128),)),
    _Tried("fp4_e2m1", "fp8_e4m3fn", (group(16),), (group(16),)),
    _Tried("fp4_e2m1", "e8m0", (group(32),), (group(32),)),
    _Tried("fp6_e2m3", "e8m0", (group(32),)),
    _Tried("fp6_e3m2", "e8m0", (group(32),)),
    _Tried("fp8_e4m3fn", "e8m0", (group(32),)),
    _Tried("fp8_e4m3fn", _WIDE, (CHANNEL, TENSOR, (128, 128)), ((128, 128),)),
    _Tried("fp8_e5m2", _WIDE, (CHANNEL,)),
)
_CODES: Final = "float8e4m3"  # of activations that are multiplied as codes
_GROUPS_BESIDE_CODES: Final = (32, 64, 128)
_KINDS: Final[Mapping[str, str]] = {
    "embedding": "a lookup multiplies nothing",
    "experts": "experts would run one by one; another layout has all of a layer in one launch",
}


@dataclass(frozen=True)
class Settings:
    """A scheme in humming's words.

    element      its name of the codes' format
    shift        what is added to a signed code, and to its zero point
    scale        its name of the scales' format; "" for those in the dtype of the activations
    group_size   inputs with one scale; 0: the row, or the matrix
    block_rows   rows with one scale where that is more than one, else 0
    is_tensor    one float32 scale for the matrix
    has_zeros    integer zero points
    factor       what a float32 factor of the matrix does beside the scales: "", "multiply", "divide"
    codes        its name of the format of the input's codes; "" for 16-bit values
    """

    element: str
    shift: int
    scale: str
    group_size: int
    block_rows: int = 0
    is_tensor: bool = False
    has_zeros: bool = False
    factor: str = ""
    codes: str = ""

    @property
    def bits(self) -> int:
        """Width of a code."""
        return next(int(c) for c in self.element if c.isdigit())

    def weight_config(self) -> dict[str, object]:
        """The keywords of humming's weight schema."""
        found: dict[str, object] = {"dtype": self.element, "group_size": self.group_size}
        found |= {"scale_dtype": self.scale} if self.scale else {}
        found |= {"group_size_n": self.block_rows} if self.block_rows else {}
        found |= {"scale_type": "tensor"} if self.is_tensor else {}
        found |= {"has_zero_point": True} if self.has_zeros else {}
        return found | ({"scale_2_type": "tensor"} if self.factor else {})


def settings_of(scheme: Scheme) -> Settings | tuple[str, ...]:
    """The scheme in humming's words, or every reason why humming has none."""
    reasons = tuple(_reasons_against(scheme))
    if reasons:
        return reasons
    first = scheme.scales[0]
    rows, columns = first.block
    factor = "" if len(scheme.scales) == 1 else "divide" if scheme.scales[1].divide else "multiply"
    bits = number_format(scheme.element).bits
    is_block = first.block not in (CHANNEL, TENSOR) and rows != 1
    return Settings(
        element=_ELEMENTS[scheme.element], shift=2 ** (bits - 1) if scheme.element.startswith("int") else 0,
        scale=_SMALL_SCALES.get(first.format, ""), group_size=columns, block_rows=rows if is_block else 0,
        is_tensor=first.block == TENSOR, has_zeros=scheme.offset is not None, factor=factor,
        codes=_CODES if _multiplies_codes(scheme) else "",
    )  # fmt: skip


def _reasons_against(scheme: Scheme) -> Iterator[str]:
    if scheme.element not in _ELEMENTS:
        yield f"no codes of {scheme.element}"
        return
    if scheme.act_order:
        yield "columns in groups by a map (act-order)"
    if scheme.pre_scale:
        yield "an input that is scaled first is float32, and would be rounded"
    if scheme.round_to not in (None, "float32"):
        yield f"weights rounded to {scheme.round_to} by the format itself"
    if not scheme.scales:
        yield "codes without a scale"
        return
    yield from _scale_reasons(scheme)
    yield from _offset_reasons(scheme)
    yield from _activation_reasons(scheme, scheme.activation)


def _scale_reasons(scheme: Scheme) -> Iterator[str]:
    first, *others = scheme.scales
    if any(level.placement != "grid" for level in scheme.scales):
        yield "scales by position in the flattened matrix, or gathered"
    if first.divide:
        yield "scales that divide"
    tried = _tried(scheme)
    if tried is None or first.block not in tried.blocks:
        yield f"{scheme.element} under scales of {first.format} by {first.block} has not been tried"
    elif _is_float32(first) and first.format != "float32":
        yield f"scales of {first.format} by {first.block}: humming keeps these in float32"
    if others and not (len(others) == 1 and _is_factor(others[0]) and first.format == "fp8_e4m3fn"):
        yield "a second level of scales that is not one float32 for the matrix above e4m3"


def _tried(scheme: Scheme) -> _Tried | None:
    kind = scheme.scales[0].format
    kind = _WIDE if kind in _WIDE_SCALES else kind
    return next((row for row in _TRIED if (row.element, row.scale) == (scheme.element, kind)), None)


def _is_float32(level: ScaleLevel) -> bool:
    return level.block == TENSOR or level.block[0] > 1


def _is_factor(level: ScaleLevel) -> bool:
    return level.block == TENSOR and level.format == "float32"


def _offset_reasons(scheme: Scheme) -> Iterator[str]:
    form, offset = number_format(scheme.element), scheme.offset
    if offset is None:
        if form.kind == "uint":
            yield "unsigned codes without zero points"
        return
    if offset.kind != "zero_point" or not number_format(offset.format).is_integer or form.kind != "uint":
        yield "an offset that is not an integer zero point of unsigned codes"
    elif offset.block != scheme.scales[0].block or offset.placement != "grid":
        yield f"zero points by blocks {offset.block} beside scales by {scheme.scales[0].block}"


def _activation_reasons(scheme: Scheme, spec: ActivationSpec | None) -> Iterator[str]:
    if spec is None or _multiplies_codes(scheme):
        return
    cannot = can_fake_quantize(spec)
    if cannot is not None:
        yield cannot
    elif not ARITHMETIC[spec.recipe].scale_codes:
        yield f"codes of {scheme.element} beside activations {spec}: kernels of 8 bits multiply them, or ours do"
    elif input_factor(spec) == "matrix" and not _is_factor(scheme.scales[-1]):
        yield f"activations with a factor ({spec}), and weights without one"


def _multiplies_codes(scheme: Scheme) -> bool:
    """True for fp8 activations by row beside int4 in groups: the one pair of unlike codes that we have tried."""
    spec, level = scheme.activation, scheme.scales[0]
    return (spec is not None and spec.element == "fp8_e4m3fn" and spec.granularity != "group"
            and can_quantize(spec) is None and scheme.element == "int4" and scheme.offset is None
            and len(scheme.scales) == 1 and level.block[0] == 1 and level.block[1] in _GROUPS_BESIDE_CODES)


def input_factor(spec: ActivationSpec | None) -> str:
    """What our quantizer leaves beside 16-bit values: "" nothing, "matrix" one static number, "rows" one for each."""
    if spec is None or ARITHMETIC[spec.recipe].scale_codes != "fp8_e4m3fn":
        return ""
    return "matrix" if ARITHMETIC[spec.recipe].given else "rows"


def can_implement(request: Request, platform: Platform) -> Verdict:
    """What was tried, on the architecture where it was, where humming is installed."""
    found = settings_of(request.scheme)
    reasons, size = (found, 0) if isinstance(found, tuple) else ((), found.group_size)
    n, k = request.shape[-2:]
    step = max(COLUMNS, size)
    return gather(
        *_chip_reasons(platform),
        Reason("kind", _KINDS[request.kind], {"kind": request.kind}) if request.kind in _KINDS else None,
        *(Reason("scheme", text, {"scheme": str(request.scheme)}) for text in reasons),
        Reason("shape", f"N is a multiple of {ROWS} and K of {step}, this is {n} x {k}",
               {"wanted": [ROWS, step], "found": [n, k]}) if n % ROWS or k % step or not n * k else None,
        Reason("dtype", f"activations of {request.dtype}", {"wanted": list(DTYPES), "found": request.dtype})
        if request.dtype not in DTYPES else None,
        Reason("dtype", f"{request.scheme.weight_name()} has not been tried with float16",
               {"wanted": "bfloat16", "found": request.dtype})
        if request.dtype == "float16" and not reasons and not _takes_halves(request.scheme) else None,
    )


def _takes_halves(scheme: Scheme) -> bool:
    """Tried with float16, which sums before scales of rows and values of quantized activations leave."""
    tried = _tried(scheme)
    return tried is not None and scheme.activation is None and scheme.scales[0].block in tried.halves


def _chip_reasons(platform: Platform) -> list[Reason]:
    if platform.vendor != "nvidia":
        return [Reason("vendor", f"runs on NVIDIA, this is {platform.vendor} {platform.arch}",
                       {"wanted": "nvidia", "found": platform.vendor})]
    reasons = []
    if platform.arch not in ARCHS:
        reasons.append(Reason("arch", f"tried on {', '.join(ARCHS)} only, this is {platform.arch}",
                              {"wanted": list(ARCHS), "found": platform.arch}))
    if NAME not in platform.providers:
        reasons.append(Reason("provider", "humming-kernels is not installed", {"wanted": "humming-kernels"}))
    return reasons


# --- price ------------------------------------------------------------------------------------------------------------

# of an H200, humming's own choice of tiles (docs/gpu.md): what a call takes beside reading, and the share of
# the memory's rate that decoding in registers leaves
_FIXED_SECONDS: Final = 7.7e-6
_READ_SHARE: Final = 0.88
_DECODED_SHARE: Final[Mapping[str, float]] = {"zeros": 0.66, "small scales": 0.61, "3 bits": 0.5}
_MORE_TOKENS_SHARE: Final = 0.88  # of that beyond 8 tokens
_MATRIX_SHARE: Final = 0.74  # of the matrix rate
_CODES_SHARE: Final = 0.55  # of that of fp8
_QUANTIZE_SECONDS: Final = 2.5e-6  # and each kernel beside the product


def _share(settings: Settings) -> float:
    if settings.has_zeros:
        return _DECODED_SHARE["zeros"]
    if settings.bits == 3:
        return _DECODED_SHARE["3 bits"]
    return _DECODED_SHARE["small scales"] if settings.scale and settings.bits == 4 else _READ_SHARE


def seconds(request: Request, platform: Platform) -> float:
    """Reading the stored weight, or the products, whichever takes longer; our quantizer before it."""
    settings = settings_of(request.scheme)
    assert isinstance(settings, Settings), settings
    share = _share(settings)
    share *= _MORE_TOKENS_SHARE if request.tokens > 8 else 1.0
    n, k = request.shape[-2:]
    bandwidth = max(platform.bandwidth, 1e9)
    read = (_matrix_bytes(request) + 2.0 * request.tokens * (n + k)) / (share * bandwidth)
    rate = _MATRIX_SHARE * platform.rates.get(request.dtype, 1e13)
    if settings.codes:
        rate = max(rate, _CODES_SHARE * platform.rates.get("fp8", 1e13))
    multiply = request.flops / max(rate, 1e9)
    quantize = 0.0
    if request.scheme.activation is not None:
        quantize = _QUANTIZE_SECONDS + 4.0 * request.tokens * k / bandwidth
    if input_factor(request.scheme.activation) == "rows":
        quantize += _QUANTIZE_SECONDS + 4.0 * request.tokens * n / bandwidth
    return _FIXED_SECONDS + quantize + max(read, multiply)


def _matrix_bytes(request: Request) -> int:
    """Codes, scales and zero points of one matrix, as stored."""
    n, k = request.shape[-2:]
    found = settings_of(request.scheme)
    assert isinstance(found, Settings)
    groups = -(-k // (found.group_size or k))
    scales = 4 if found.is_tensor else 4 * groups * -(-n // found.block_rows) if found.block_rows else \
        n * groups * (1 if found.scale else 2)
    zeros = n * groups * (4 if found.bits <= 4 else 8) // 8 if found.has_zeros else 0
    return n * k * found.bits // 8 + scales + zeros + (4 if found.factor else 0)


def stored_bytes(request: Request) -> int:
    """Bytes of the layout with its locks; [E, N, K] are E weights."""
    n, k = request.shape[-2:]
    if not isinstance(settings_of(request.scheme), Settings):
        return 0
    return (_matrix_bytes(request) + 4 * LOCKS) * (request.elements // max(n * k, 1))


def workspace(request: Request) -> int:
    """The quantized activations; parts of sums meet in the output."""
    return 2 * request.tokens * request.shape[-1] if request.scheme.activation is not None else 0


def rounds(request: Request, platform: Platform) -> str:
    """Parts of a sum, and what they add up to, meet in the dtype of the activations; so do a code and a wide scale."""
    first = request.scheme.scales[0]
    words = ["partial sums", "their sums"]
    if first.block == CHANNEL:
        words = ["row scales", "partial sums", "their products", "sums of these"]
    elif _multiplies_codes(request.scheme):
        words = [f"sums of a group in {NARROW_ADDER}", *words]
        if first.format != request.dtype:
            words = ["scales", *words]
    elif not expands_exactly(request.scheme, request.dtype):
        is_cast = first.format in _WIDE_SCALES and first.format != request.dtype and first.block != TENSOR
        words = [*(["scales"] if is_cast else []), "weights", *words]
    if input_factor(request.scheme.activation) == "rows":
        words.append("sums before the factor of a row")
    return f"{', '.join(words[:-1])} and {words[-1]} to {request.dtype}"


SPEC: Final = KernelSpec(
    name=NAME, layout=NAME, implementation="anybit.kernels.linear.humming_run:Humming", can_implement=can_implement,
    seconds=seconds, stored_bytes=stored_bytes, workspace=workspace, rounds=rounds,
    about="humming's CUDA kernels, compiled for the layer's shape when it is loaded",
)  # fmt: skip
