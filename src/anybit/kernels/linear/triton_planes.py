"""Specs of the weight-only Triton family on packed planes: layout "triton-planes", three kernels.

`triton-matvec` and `triton-fused` decode operands in registers and round nothing; `triton-expand` decodes rows to a
scratch of at most 256 MiB and leaves prefill to torch's product. Activation quantization is carried out exactly in
front of them: codes times their block scale are exact in bfloat16, factors of rows go into the epilogue. What the
layout holds: `kernels/triton/planes_form.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, Final

from anybit.kernels.compiling import CompileCase, overlap
from anybit.kernels.linear.triton_endings import finish_cases
from anybit.kernels.linear.triton_experts import experts_case
from anybit.kernels.linear.triton_gemm16_hopper import gemm16_cases
from anybit.kernels.linear.triton_hopper import hopper_case, roles_cases
from anybit.kernels.request import KernelSpec, Reason, Request, Verdict, gather
from anybit.kernels.triton import planes_form, planes_launch
from anybit.kernels.triton.planes_form import Form, form_of
from anybit.kernels.triton.planes_hopper_launch import hopper_config, hopper_parts, hopper_seconds
from anybit.kernels.triton.planes_one_launch import ONE_ARCHS, OneConfig, one_constants, planned_one
from anybit.kernels.triton.recipes import can_fake_quantize
from anybit.platforms import Platform
from anybit.platforms.archs import ARCHS
from anybit.schemes import CHANNEL, Offset, ScaleLevel, Scheme, group

_LAUNCH_SECONDS: Final = 3e-6
_RAMP_SECONDS: Final = 2.5e-6  # filling and draining the chip, which short products show
_QUANTIZE_SECONDS: Final = 2.5e-6  # the quantizer kernel in front
_TORCH_QUANTIZE_SECONDS: Final = 60e-6  # torch's operations in its place: some twenty launches
# share of the memory's rate that decoding reaches, by form: measured on sm_90 (docs/results), M = 1 and 16
_MEMORY_SHARE: Final[Mapping[str, float]] = {"fold": 0.65, "group": 0.7, "row": 0.7, "decode": 0.3}
_FINE_SHARE: Final = 0.5  # scales of groups of 16
_MORE_TOKENS_SHARE: Final = 0.87  # of that beyond 8 tokens
_TABLE_SHARE: Final = 0.3  # a look-up for each weight
# where pairs are decoded in PTX: that share for each bit of a code, as many weights a second whatever their width
# (H200, M = 1): codes in one plane; in several, or looked up; operands of several pieces
_SHARE_OF_BIT: Final = 0.165
_SHARE_OF_BIT_HARDER: Final = 0.105
_SHARE_OF_BIT_IN_PIECES: Final = 0.06
# share of the matrix rate of the fused kernel, and of torch's product after expansion
_FUSED_SHARE: Final = 0.35
# where decoding runs beside the products: sums of groups, folded scales, those of groups of 16 (H200, M = 256 and 512)
_GLUON_SHARE: Final[Mapping[str, float]] = {"group": 0.45, "row": 0.45, "fold": 0.53}
_FINE_GLUON_SHARE: Final = 0.4
_EXPANDED_SHARE: Final = 0.75
_EXPAND_BYTES_SHARE: Final = 0.75


def _cannot(request: Request, platform: Platform) -> list[Reason]:
    reasons = []
    if platform.vendor not in ("nvidia", "amd"):
        reasons.append(Reason("vendor", f"runs on a GPU, this is {platform.vendor} {platform.arch}",
                              {"wanted": "nvidia or amd", "found": platform.vendor}))
    else:
        refused = planes_launch.refused_arch(platform)
        if refused is not None:
            reasons.append(Reason("arch", refused, {"found": platform.arch}))
        if "triton" not in platform.providers:
            reasons.append(Reason("provider", "Triton is not installed", {"wanted": "triton"}))
    if request.kind == "embedding":
        reasons.append(Reason("kind", "a lookup multiplies nothing", {"kind": request.kind}))
    if request.dtype not in ("bfloat16", "float16"):
        text = f"activations of {request.dtype}: matrix units would round them"
        reasons.append(Reason("dtype", text, {"found": request.dtype, "wanted": "bfloat16 or float16"}))
    reasons += [Reason("scheme", text, {"scheme": str(request.scheme)})
                for text in planes_form.reasons_against(request.scheme)]
    return reasons


def can_matvec(request: Request, platform: Platform) -> Verdict:
    """Few tokens of a scheme that the layout holds."""
    many = Reason("regime", "made for few tokens", {"tokens": request.tokens}) if request.regime != "decode" else None
    return gather(*_cannot(request, platform), many)


def can_fused(request: Request, platform: Platform) -> Verdict:
    """Any M of a scheme that the layout holds."""
    return gather(*_cannot(request, platform))


def can_expand(request: Request, platform: Platform) -> Verdict:
    """Many tokens of a scheme that the layout holds."""
    few = Reason("regime", "made for many tokens: all weights are written out first", {"tokens": request.tokens})
    operand = _operand(request)
    narrow = Reason("dtype", f"weights would be rounded to {operand}, the dtype of quantized activations here; x has a "
                             f"finer one, {request.dtype}", {"found": operand, "wanted": request.dtype})
    is_coarse = request.dtype == "float16" and operand != request.dtype and not expands_exactly(request.scheme, operand)
    return gather(*_cannot(request, platform), few if request.regime != "prefill" else None,
                  narrow if is_coarse else None)


def _operand(request: Request) -> str:
    """What the matrix unit is given: x, or in bfloat16 what a kernel's quantizer makes of it."""
    spec = request.scheme.activation
    return request.dtype if spec is None or can_fake_quantize(spec) is not None else "bfloat16"


def _bytes(request: Request) -> float:
    n, k = request.shape[-2:]
    return planes_form.stored_bytes(request.scheme, n, k) + 2.0 * request.tokens * (n + k)


def _rate(request: Request, platform: Platform) -> float:
    return max(platform.rates.get(request.dtype, platform.rates.get("bfloat16", 1e13)), 1e9)


def _quantize_seconds(request: Request, platform: Platform) -> float:
    """Quantization of x: one kernel, or torch's operations on float32 where the recipe has none."""
    spec = request.scheme.activation
    if spec is None:
        return 0.0
    elements = request.tokens * request.shape[-1] / max(platform.bandwidth, 1e9)
    if can_fake_quantize(spec) is None:
        return _QUANTIZE_SECONDS + 4.0 * elements
    return _TORCH_QUANTIZE_SECONDS + 100.0 * elements


def matvec_seconds(request: Request, platform: Platform) -> float:
    """Packed bytes at a share of the memory's rate."""
    return 0.97 * fused_seconds(request, platform)


def fused_seconds(request: Request, platform: Platform) -> float:
    """Packed bytes, decoded again for every 128 tokens, or the products, whichever takes longer."""
    form, (n, k) = form_of(request.scheme, request.shape[-1]), request.shape[-2:]
    modelled = hopper_seconds(form, n, k, request.tokens, platform.arch)
    if modelled is not None and request.kind != "experts":
        read = _bytes(request) / max(platform.bandwidth, 1e9)
        return _quantize_seconds(request, platform) + max(modelled, _LAUNCH_SECONDS + read)
    share = _read_share(form, platform)
    share *= _MORE_TOKENS_SHARE if request.tokens > 8 else 1.0
    passes = max(1.0, -(-request.tokens // 128) * 0.5)
    work = form.terms * (2 if form.addend != "none" else 1)
    read = passes * _bytes(request) / (share * max(platform.bandwidth, 1e9))
    multiply = work * request.flops / (_matrix_share(request, platform, form) * _rate(request, platform))
    return _quantize_seconds(request, platform) + _LAUNCH_SECONDS + _RAMP_SECONDS + max(read, multiply)


def _read_share(form: Form, platform: Platform) -> float:
    """Share of the memory's rate at which few tokens read packed bytes."""
    if form.scaling == "fold":
        return _FINE_SHARE if form.group == 16 else _MEMORY_SHARE["fold"]
    if platform.vendor != "nvidia" or not planes_launch.decodes_in_pairs(form):
        return _TABLE_SHARE if form.kind == "table" else _MEMORY_SHARE[form.scaling]
    is_easy = form.kind != "table" and len(form.widths) == 1
    of_bit = _SHARE_OF_BIT_IN_PIECES if form.terms > 1 else _SHARE_OF_BIT if is_easy else _SHARE_OF_BIT_HARDER
    return min(_MEMORY_SHARE["group"], of_bit * form.bits)


def _matrix_share(request: Request, platform: Platform, form: Form) -> float:
    n, k = request.shape[-2:]
    if request.kind == "experts" or hopper_config(form, n, k, request.tokens, platform.arch) is None:
        return _FUSED_SHARE
    return _FINE_GLUON_SHARE if form.group == 16 and form.scaling == "fold" else _GLUON_SHARE[form.scaling]


def expand_seconds(request: Request, platform: Platform) -> float:
    """Decoding to memory once, then torch's product."""
    n, k = request.shape[-2:]
    moved = _bytes(request) + 2.0 * n * k
    launches = 2 * -(-n // max(planes_launch.scratch_rows(n, k), 1)) * _LAUNCH_SECONDS
    bandwidth = max(platform.bandwidth, 1e9)
    multiply = max(request.flops / (_EXPANDED_SHARE * _rate(request, platform)), 2.0 * n * k / bandwidth)
    write = moved / (_EXPAND_BYTES_SHARE * bandwidth)
    return _quantize_seconds(request, platform) + launches + write + multiply


def stored_bytes(request: Request) -> int:
    """Bytes of the layout; [E, N, K] are E weights."""
    n, k = request.shape[-2:]
    return planes_form.stored_bytes(request.scheme, n, k) * (request.elements // max(n * k, 1))


def expansion_rounds(request: Request, platform: Platform) -> str | None:
    """Expanded weights are exact where code times block scale is, and all that is left is one factor."""
    operand = _operand(request)
    return None if expands_exactly(request.scheme, operand) else f"weights to {operand}"


def expands_exactly(scheme: Scheme, dtype: str) -> bool:
    """True if every weight, but for one factor of the matrix, is a number of `dtype` (docs/formats/numerics.md §4)."""
    if scheme.round_to not in (None, "float32"):
        return scheme.round_to == dtype
    if scheme.offset is not None and planes_form.form_of(scheme, 1).addend != "none":
        return False
    grouped = [lv for lv in scheme.scales if lv.block != (0, 0)]
    element = planes_form.element_of(scheme)
    if element.kind == "codebook" and scheme.element != "iq4_nl":
        return False
    if not grouped:
        return scheme.element != "fp8_e5m2fnuz" or dtype == "bfloat16"
    first = grouped[0]
    if len(grouped) > 1 or first is not scheme.scales[0] or first.divide:
        return False
    if first.format == "e8m0":
        return element.kind != "codebook"
    return element.kind == "float" and element.bits <= 6 and first.format in planes_form.SMALL_FLOATS and (
        dtype == "bfloat16" or first.format != "ue5m3")


def groups_are_alike(request: Request) -> str | None:
    """Columns are sorted by group, which needs groups of one size: seen when the map is read."""
    return "the act-order groups of the layer are of one size" if request.scheme.act_order else None


def scratch(request: Request) -> int:
    """The expanded rows, and the float32 product where a factor of rows is left to an epilogue."""
    n, k = request.shape[-2:]
    rows = planes_launch.scratch_rows(n, k)
    return 2 * rows * k + 2 * request.tokens * k + 4 * request.tokens * rows


def parts(request: Request) -> int:
    """Parts of split-K, on whichever architecture they are largest, and the quantized activations."""
    n, k = request.shape[-2:]
    sums = 16 * 4 * n * request.tokens if request.tokens <= 64 else 4 * n * request.tokens
    form = planes_form.form_of(request.scheme, k)
    return 6 * request.tokens * k + max(sums, hopper_parts(form, n, k, request.tokens))


# --- what the gate compiles -------------------------------------------------------------------------------------------

_CODES: Final = {8: "*u8", 4: "*i32", 2: "*i16", 1: "*u8"}
_FLOATS: Final = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_FP16, _BF16 = ScaleLevel("float16", group(128)), ScaleLevel("bfloat16", group(128))
_SAMPLES: Final[Mapping[str, Scheme]] = {
    "int4 g128": Scheme("int4", (_BF16,)),
    "uint4 g128 zp": Scheme("uint4", (_FP16,), offset=Offset("zero_point", "uint4", group(128))),
    "uint4 g64 float zp": Scheme("uint4", (ScaleLevel("bfloat16", group(64)),),
                                 offset=Offset("zero_point", "bfloat16", group(64))),
    "int3 g128": Scheme("int3", (_BF16,)),
    "int8 channel": Scheme("int8", (ScaleLevel("float32", CHANNEL),)),
    "q4_k": Scheme("uint4", (ScaleLevel("uint6", group(32)), ScaleLevel("float16", group(256))), offset=Offset(
        "minimum", "uint6", group(32), (ScaleLevel("float16", group(256)),), subtract=True)),
    "q6_k": Scheme("int6", (ScaleLevel("int8", group(16)), ScaleLevel("float16", group(256)))),
    "mxfp4": Scheme("fp4_e2m1", (ScaleLevel("e8m0", group(32)),)),
    "nvfp4": Scheme("fp4_e2m1", (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", (0, 0)))),
    "mxfp6_e2m3": Scheme("fp6_e2m3", (ScaleLevel("e8m0", group(32)),)),
    "fp8 block128": Scheme("fp8_e4m3fn", (ScaleLevel("float32", (128, 128)),)),
    "nf4 g64": Scheme("nf4", (ScaleLevel("float32", group(64)),)),
    "nf4 g64 to bf16": Scheme("nf4", (ScaleLevel("float32", group(64)),), round_to="bfloat16"),
}
# the samples that are compiled for more than one number of tokens and in float16
_MAIN: Final = ("int4 g128", "nvfp4")
_EVERY_M: Final = ("sm_100", "sm_103")  # where all are compiled so: large tiles of many sums have come out empty
_OF_EXPERTS: Final = ("int4 g128", "uint4 g128 zp", "mxfp4", "nvfp4", "q4_k")
_OF_HOPPER: Final[Mapping[str, Scheme]] = {name: _SAMPLES[name] for name in (
    "int4 g128", "uint4 g128 zp", "mxfp4", "nvfp4")} | {"uint4 g32 zp": Scheme("uint4", (
        ScaleLevel("float16", group(32)),), offset=Offset("zero_point", "uint4", group(32)))}
_QUANTIZED: Final = ("nvfp4",)  # compiled with factors of x's rows
_SHAPE: Final = (4096, 4096)
_LARGE_SHAPE: Final = (57344, 8192)  # compiled too where its tiles are others
# for the kernels of few tokens in Gluon, whose launches follow the shape: with these all that any weight has
_HOPPER_SHAPES: Final = (_SHAPE, (6144, 4096), _LARGE_SHAPE, (4096, 14336), (14336, 4096), (28672, 4096), (1024, 8192),
                         (32064, 4096))


def _types(form: Form, scheme: Scheme, dtype: str) -> dict[str, str]:
    first = scheme.scales[0] if scheme.scales else None
    planes = [_CODES[w] for w in form.widths]
    planes += planes[:1] * (3 - len(planes))
    kinds = {"e8": "*u8", "e53": "*u8", "e8m0": "*u8", "integer": "*i8" if form.signed_scales else "*u8"}
    scale = kinds.get(form.scale_kind) or _FLOATS.get(first.format if first else "float32", "*bf16")
    added = scheme.offset.format if scheme.offset is not None else "float32"
    addend = "*i32" if form.addend_words else _FLOATS.get(added, "*i8" if form.signed_addends else "*u8")
    pointers = {
        "x_ptr": _FLOATS[dtype], **{f"c{i}_ptr": t for i, t in enumerate(planes)},
        "s_ptr": "*fp32" if form.scaling == "row" else "*i32" if form.words else scale,
        "ss_ptr": "*fp16" if form.super_groups else "*fp32", "z_ptr": "*u8" if form.has_zeros else "*fp32",
        "a_ptr": addend if form.addend != "none" else "*fp32", "as_ptr": "*fp16" if form.addend_super else "*fp32",
        "row_ptr": "*fp32", "table_ptr": "*fp32", "token_ptr": "*fp32", "bias_ptr": _FLOATS[dtype],
        "o_ptr": _FLOATS[dtype], "part_ptr": "*fp32", "count_ptr": "*i32",
    }  # fmt: skip
    return pointers | dict.fromkeys(("M", "N", "NP", "K", "KP", "x_stride", "z_stride", "start", "rows"), "i32") | {
        "mult": "fp32"}


# what tl.dot of the product's dtype becomes, by architecture and kernel: `make gate` compiles them
def _matrix_instruction(arch: str) -> str:
    if ARCHS[arch].vendor == "nvidia":
        return r"(wgmma|mma|tcgen05)"
    return r"v_(mfma|wmma)_f32"


def _product_cases(kernel: str, arch: str, tokens: tuple[int, ...]) -> Iterator[CompileCase]:
    for name, scheme in _SAMPLES.items():
        for dtype in ("bfloat16", "float16") if name in _MAIN else ("bfloat16",):
            for m in tokens if name in _MAIN or arch in _EVERY_M else tokens[:1]:
                usual = _product_case(kernel, arch, name, scheme, dtype, m, _SHAPE)
                yield usual
                large = _product_case(kernel, arch, name, scheme, dtype, m, _LARGE_SHAPE)
                if _tile_of(large) != _tile_of(usual):
                    yield large


def _hopper_cases(kernel: str, arch: str, tokens: tuple[int, ...]) -> Iterator[CompileCase]:
    """The products that the kernels in Gluon take, where their launches differ; and those of any number of tokens."""
    seen = set()
    launches = [(m, False) for m in tokens] + [(m, True) for m in tokens if m == planes_launch.PINNED_TOKENS]
    for name, scheme in _OF_HOPPER.items():
        for dtype in ("bfloat16", "float16") if name in _MAIN else ("bfloat16",):
            for shape, (m, pinned) in product(_HOPPER_SHAPES, launches):
                case = hopper_case(_product_case(kernel, arch, name, scheme, dtype, m, shape),
                                   form_of(scheme, shape[1]), shape, m, pinned=pinned)  # fmt: skip
                key = case and (name, dtype, *case.constants.items(), case.num_warps, *case.options.items())
                if case is not None and key not in seen:
                    seen.add(key)
                    yield case


def _roles_cases(arch: str) -> Iterator[CompileCase]:
    """Every tile of more than 32 tokens, whichever a shape would have."""
    for name, scheme in _OF_HOPPER.items() if arch == "sm_90" else ():
        for dtype in ("bfloat16", "float16") if name in _MAIN else ("bfloat16",):
            case = _product_case("triton-fused", arch, name, scheme, dtype, 64, _SHAPE)
            yield from roles_cases(replace(case, label=f"{name} {dtype}"), form_of(scheme, _SHAPE[1]))


def _one_cases(kernel: str, arch: str) -> Iterator[CompileCase]:
    """The product of one token in Gluon, of each sample that it takes, where its launches differ."""
    for name, scheme in {**_SAMPLES, **_OF_HOPPER}.items() if arch in ONE_ARCHS else ():
        shapes: dict[OneConfig, tuple[int, int]] = {}
        for shape in _HOPPER_SHAPES:
            config = planned_one(form_of(scheme, shape[1]), *shape)
            if config is not None:
                shapes.setdefault(config, shape)
        for dtype in ("bfloat16", "float16") if name in _MAIN else ("bfloat16",):
            for config, shape in shapes.items():
                yield _one_case(_product_case(kernel, arch, name, scheme, dtype, 1, shape),
                                form_of(scheme, shape[1]), config, shape[1])  # fmt: skip


def _one_case(case: CompileCase, form: Form, config: OneConfig, columns: int) -> CompileCase:
    unused = ("M", "x_stride")
    constants = one_constants(form, config, columns, is_half=case.types["x_ptr"] == "*fp16",
                              has_factors=case.constants["TOKENS"], has_bias=True)
    return replace(
        case, function="anybit.kernels.triton.planes_one:one_kernel", label=f"registers, {case.label}",
        types={name: kind for name, kind in case.types.items() if name not in unused}, constants=constants,
        divisible=tuple(name for name in case.divisible if name not in unused), num_warps=config.warps, num_stages=1,
        options=overlap(True),
    )  # fmt: skip


def _tile_of(case: CompileCase) -> tuple[object, ...]:
    return case.constants["BM"], case.constants["BN"], case.constants["WAITS"], case.num_warps, case.num_stages


def _product_case(
    kernel: str, arch: str, name: str, scheme: Scheme, dtype: str, tokens: int, shape: tuple[int, int]
) -> CompileCase:
    n, k = shape
    form = form_of(scheme, k)
    config = planes_launch.configure(form, n, k, tokens, arch)
    is_half = dtype == "float16"
    waits = planes_launch.waits(form, tokens, arch, is_quantized=name in _QUANTIZED)
    fixed: dict[str, Any] = planes_launch.product_constants(form, k, arch) | {
        "TERMS": planes_launch.terms_of(form, is_half=is_half), "BM": config.tokens, "BN": config.rows,
        "SPLIT": config.split > 1, "TOKENS": name in _QUANTIZED, "BIAS": True,
        "EVEN": k == form.padded(k), "ASM": config.assembly,
        "WAITS": waits,
    }  # fmt: skip
    types = _types(form, scheme, dtype)
    for unused in ("start", "rows"):
        del types[unused]
    return CompileCase(
        kernel, "anybit.kernels.triton.planes_kernels:matmul_kernel", arch,
        f"{name} {dtype} M={tokens}" + ("" if shape == _SHAPE else f" N={n}"), types, fixed,
        divisible=("N", "NP", "K", "KP", "x_stride", "z_stride"), num_warps=config.warps, num_stages=config.stages,
        options=overlap(waits), expects=(_matrix_instruction(arch),),
        spills=_SPILLS_OF_WIDE if form.scaling == "group" and (config.rows, config.warps) == (128, 4) else _SPILLS,
    )  # fmt: skip


_SPILLS: Final = 8  # ptxas parks a few words on the stack by its own choice, far below the registers it may use
# sums of groups beside the accumulator: 4..6 % faster on an H200 than tiles that spill nothing
_SPILLS_OF_WIDE: Final = 16


def _claims(arch: str) -> bool:
    platform = Platform(arch, ARCHS[arch].vendor, arch)
    return planes_launch.refused_arch(platform) is None


def matvec_cases(arch: str) -> list[CompileCase]:
    """Decode."""
    if not _claims(arch):
        return []
    return [*_product_cases("triton-matvec", arch, (1,)), *_hopper_cases("triton-matvec", arch, (1,)),
            *_one_cases("triton-matvec", arch)]


def fused_cases(arch: str) -> list[CompileCase]:
    """Small batches and prefill without rounding."""
    if not _claims(arch):
        return []
    experts = [experts_case(_product_case("triton-fused", arch, name, _SAMPLES[name], "bfloat16", m, _SHAPE))
               for name in _OF_EXPERTS for m in (1, 64)]
    return [*_product_cases("triton-fused", arch, (16, 64, 512)), *experts,
            *_hopper_cases("triton-fused", arch, (16, 32)), *_roles_cases(arch)]


def expand_cases(arch: str) -> list[CompileCase]:
    """Decoding to memory, and the product after it."""
    if not _claims(arch):
        return []
    cases = []
    for name, scheme in _SAMPLES.items():
        form = form_of(scheme, _SHAPE[1])
        rows, blocks = planes_launch.expansion(form)
        types = _types(form, scheme, "bfloat16")
        for unused in ("x_ptr", "token_ptr", "bias_ptr", "part_ptr", "count_ptr", "M", "N", "x_stride"):
            del types[unused]
        fixed = planes_launch.constants(form) | {"ROW": True, "BN": rows, "NB": blocks}
        cases.append(CompileCase(
            "triton-expand", "anybit.kernels.triton.planes_kernels:expand_kernel", arch, f"{name} bfloat16", types,
            fixed, divisible=("start", "rows", "NP", "K", "KP", "z_stride"), num_stages=1,
        ))  # fmt: skip
    return [*cases, *finish_cases("triton-expand", arch), *gemm16_cases("triton-expand", arch)]


_IMPLEMENTATION: Final = "anybit.kernels.triton.planes:TritonPlanes"
MATVEC = KernelSpec(
    name="triton-matvec", layout="triton-planes", implementation=_IMPLEMENTATION, can_implement=can_matvec,
    seconds=matvec_seconds, stored_bytes=stored_bytes, workspace=parts, assumes=groups_are_alike, cases=matvec_cases,
    about="Triton: packed codes decoded in registers of the matrix unit, split-K for few tokens",
)  # fmt: skip
FUSED = KernelSpec(
    name="triton-fused", layout="triton-planes", implementation=_IMPLEMENTATION, can_implement=can_fused,
    seconds=fused_seconds, stored_bytes=stored_bytes, workspace=parts, assumes=groups_are_alike,
    is_batch_invariant=True, cases=fused_cases,
    about="Triton: packed codes decoded in registers of the matrix unit, any number of tokens, nothing rounded",
)  # fmt: skip
EXPAND = KernelSpec(
    name="triton-expand", layout="triton-planes", implementation=_IMPLEMENTATION, can_implement=can_expand,
    seconds=expand_seconds, stored_bytes=stored_bytes, rounds=expansion_rounds, workspace=scratch,
    assumes=groups_are_alike, cases=expand_cases,
    about="Triton: packed codes decoded to a scratch, then torch's matrix product",
)  # fmt: skip
SPECS: Final = (MATVEC, FUSED, EXPAND)
