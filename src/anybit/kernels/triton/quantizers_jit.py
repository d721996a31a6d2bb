# mypy: ignore-errors
"""Device code of the activation quantizers: every recipe of `recipes.py`, equal bit for bit to numerics/activations.py.

Launched by `quantizers.py`, always with `enable_fp_fusion=False`: a product contracted into the addition that rounds it
would be another number. Divisions are IEEE (`div_rn`; a plain `/` is approximate on CUDA). Maxima are taken over
finite and infinite values, NaN is carried beside them as a flag: hardware maxima drop it.
The arithmetic of each rule, in its order, is that of the function of the same name in numerics/activations.py.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

_HALF_ULP_IS_ONE_HALF = tl.constexpr(8388608.0)  # 2^23: a float32 of at least this is an integer
_ULP_IS_ONE = tl.constexpr(12582912.0)  # 1.5 * 2^23: sums with |v| <= 2^22 round v to an integer, which their bits show
_ULP_IS_ONE_BITS = tl.constexpr(0x4B400000)


@triton.jit
def rint(v):
    """Nearest integer, ties to even, any float32."""
    magnitude = tl.abs(v)
    whole = (magnitude + _HALF_ULP_IS_ONE_HALF) - _HALF_ULP_IS_ONE_HALF
    whole = tl.where(magnitude < _HALF_ULP_IS_ONE_HALF, whole, magnitude)
    return tl.where(v < 0, -whole, whole)


@triton.jit
def near_integer(v):
    """Nearest integer, ties to even, as int32, for |v| <= 2^22."""
    return (v + _ULP_IS_ONE).to(tl.int32, bitcast=True) - _ULP_IS_ONE_BITS


@triton.jit
def encode_integer(v, MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr):
    """Saturating integer codes as int32; NaN becomes 0."""
    v = tl.where(v == v, v, 0.0)
    return near_integer(tl.minimum(tl.maximum(v, MINIMUM), MAXIMUM))


@triton.jit
def encode_shifted(v, zero_point, MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr):
    """saturate(round(v) + zero_point) as int32, without leaving int32 for |zero_point| <= 2^30."""
    v = tl.where(v == v, rint(v), 0.0)
    whole = tl.minimum(tl.maximum(v, -2147483520.0), 2147483520.0).to(tl.int32)
    low: tl.constexpr = MINIMUM
    high: tl.constexpr = MAXIMUM
    return tl.minimum(tl.maximum(whole, low - zero_point), high - zero_point) + zero_point


@triton.jit
def as_zero_point(v):
    """A rounded zero point as int32, with room for subtraction; NaN becomes 0."""
    v = tl.where(v == v, v, 0.0)
    return tl.minimum(tl.maximum(v, -1073741824.0), 1073741824.0).to(tl.int32)


@triton.jit
def encode_float(v, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, MAXIMUM: tl.constexpr, BITS: tl.constexpr,
                 NAN_CODE: tl.constexpr):
    """Code (int32) and value (float32) of the nearest small float, saturating; NaN gives NAN_CODE and the value NaN.

    codec._encode_float in the same steps: |v| is q * 2^(E - MANTISSA), the code (E - SMALLEST) * 2^MANTISSA + q.
    """
    is_nan = v != v
    magnitude = tl.minimum(tl.where(is_nan, 0.0, tl.abs(v)), MAXIMUM)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, SMALLEST)
    up = ((127 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    q = (magnitude * up + _HALF_ULP_IS_ONE_HALF) - _HALF_ULP_IS_ONE_HALF
    down = ((127 - MANTISSA + exponent) << 23).to(tl.float32, bitcast=True)
    code = ((exponent - SMALLEST) << MANTISSA) + q.to(tl.int32)
    is_negative = v.to(tl.int32, bitcast=True) < 0
    code = tl.where(is_negative, code | (1 << (BITS - 1)), code)
    value = tl.where(is_negative, -(q * down), q * down)
    return tl.where(is_nan, NAN_CODE, code), tl.where(is_nan, float("nan"), value)


@triton.jit
def round_float(v, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, MAXIMUM: tl.constexpr):
    """Value (float32) of the nearest small float, saturating, as encode_float gives it with its code; NaN stays NaN.

    1.5 * 2^(E + 23 - MANTISSA) added and taken away rounds to multiples of 2^(E - MANTISSA).
    """
    v = tl.minimum(tl.maximum(v, -MAXIMUM, propagate_nan=tl.PropagateNan.ALL), MAXIMUM,
                   propagate_nan=tl.PropagateNan.ALL)
    bits = v.to(tl.int32, bitcast=True)
    step = tl.maximum(bits & 0x7F800000, (SMALLEST + 127) << 23) + (((23 - MANTISSA) << 23) | 0x400000)
    step = step.to(tl.float32, bitcast=True)
    value = (v + step) - step
    return (value.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)  # -0 stays -0


@triton.jit
def encode(v, zero_point, IS_INTEGER: tl.constexpr, IS_SHIFTED: tl.constexpr, MANTISSA: tl.constexpr,
           SMALLEST: tl.constexpr, MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, BITS: tl.constexpr,
           NAN_CODE: tl.constexpr):
    """Code (int32) and value without scale (float32) of v for any element; shifted codes lose their zero point."""
    if IS_INTEGER:
        if IS_SHIFTED:
            code = encode_shifted(v, zero_point, MINIMUM, MAXIMUM)
            value = (code - zero_point).to(tl.float32)
        else:
            code = encode_integer(v, MINIMUM, MAXIMUM)
            value = code.to(tl.float32)
    else:
        code, value = encode_float(v, MANTISSA, SMALLEST, MAXIMUM, BITS, NAN_CODE)
    return code, value


@triton.jit
def to_fnuz(code):
    """e4m3fn codes as e4m3fnuz codes of half the value: -0 becomes 0, NaN stays NaN (docs/formats/numerics.md §3)."""
    return tl.where(code == 0x80, 0, tl.where((code & 0x7F) == 0x7F, 0x80, code))


@triton.jit
def power_of_two(code):
    """The float32 of an e8m0 code below 255; code 0 is the subnormal 2^-127."""
    return tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)


@triton.jit
def log2(v):
    """The vendor's float32 log2, as torch calls it on this device; subnormals are not flushed."""
    return tl.where(v < 1.1754943508222875e-38, libdevice.log2(v * 16777216.0) - 24.0, libdevice.log2(v))


@triton.jit
def shared_exponent(a, EXPONENT: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr, MAXIMUM: tl.constexpr,
                    TOP: tl.constexpr):
    """The e8m0 code (int32) of groups with largest magnitude a, finite or infinite; scales.SHARED_EXPONENTS."""
    bits = a.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127  # of a subnormal -127: its code is 0 in every rule all the same
    fraction = tl.where(bits == 0x7F800000, float("inf"), ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True))
    if EXPONENT == "even":
        x = ((bits + (1 << (22 - MANTISSA))) >> 23).to(tl.float32) - (127.0 + EMAX)
    elif EXPONENT == "floor":
        x = tl.where(a == 0, -127.0, exponent.to(tl.float32) - EMAX)
    elif EXPONENT == "ceil":
        x = tl.where(a == 0, -127.0, exponent.to(tl.float32) + tl.where(fraction > 1.0, 1.0, 0.0) - EMAX)
    elif EXPONENT == "rceil":
        x = tl.where(a == 0, -127.0, exponent.to(tl.float32) - EMAX + tl.where(fraction > TOP, 1.0, 0.0))
    elif EXPONENT == "quark_floor":
        x = tl.where(a == 0, -23.0, tl.floor(log2(a)) - EMAX)
    elif EXPONENT == "quark_ceil":
        x = tl.where(a == 0, -23.0, tl.ceil(log2(a)) - EMAX)
    elif EXPONENT == "autoround_floor":
        x = tl.floor(log2(tl.where(a == 0, 1.0, a))) - EMAX
    elif EXPONENT == "torchao_rceil":
        x = tl.ceil(log2(tl.div_rn(a, MAXIMUM)))
    elif EXPONENT == "vllm_mxfp8":
        x = tl.ceil(log2(tl.div_rn(tl.maximum(a, 1.1754943508222875e-38), MAXIMUM)))
    else:
        tl.static_assert(EXPONENT == "ue8m0")
        x = tl.ceil(log2(tl.maximum(tl.div_rn(tl.maximum(a, 1e-10), 448.0), 1e-10)))
    return (tl.minimum(tl.maximum(x, -127.0), 127.0) + 127.0).to(tl.int32)


@triton.jit
def scale_of(a, given, RULE: tl.constexpr, EXPONENT: tl.constexpr, DIVIDE: tl.constexpr, BOUND: tl.constexpr,
             MANTISSA: tl.constexpr, MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, EMAX: tl.constexpr,
             TOP: tl.constexpr):
    """Scale, factor for x, own scale without globals, and its 8 bit code, of groups with largest magnitude a.

    `given` is the recipe's static number, or a statistic of the row or call; what it is, each rule says.
    """
    code = tl.where(a == a, 0, 0)
    if RULE == "static":  # given: the scale
        scale = tl.where(a == a, given, given)
        factor = scale if DIVIDE else tl.div_rn(1.0, scale)
        own = scale
    elif RULE == "int8_token":
        scale = tl.div_rn(a, 127.0)
        factor = tl.where(a == 0, 0.0, tl.div_rn(127.0, a))
        own = scale
    elif RULE == "torchao_int8":
        scale = tl.maximum(tl.div_rn(a, (MAXIMUM - MINIMUM) / 2), 1.1920928955078125e-07)
        factor = tl.div_rn(1.0, scale)
        own = scale
    elif RULE == "int4_group":
        scale = tl.div_rn(a, 7.5)
        scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
        factor = scale
        own = scale
    elif RULE == "fp8_tensor":
        scale = tl.div_rn(a, 448.0)
        factor = tl.where(scale == 0, 0.0, tl.div_rn(1.0, scale))
        own = scale
    elif RULE == "fp8_token":
        scale = tl.maximum(tl.div_rn(tl.minimum(a, BOUND), 448.0), 1.0 / (448 * 512))
        factor = scale
        own = scale
    elif RULE == "fp8_group":
        scale = tl.div_rn(tl.maximum(a, 1e-10), 448.0)
        factor = scale if DIVIDE else tl.div_rn(1.0, scale)
        own = scale
    elif RULE == "torchao_fp8":  # given: the bound from below
        scale = tl.div_rn(tl.minimum(tl.maximum(a, given), BOUND), MAXIMUM)
        factor = tl.where(scale == 0, 1.0, scale)
        own = scale
    elif RULE == "mx" or RULE == "mx_zero_dies" or RULE == "mx_zero_is_one" or RULE == "mx_normal":
        code = shared_exponent(a, EXPONENT, EMAX, MANTISSA, MAXIMUM, TOP)
        scale = power_of_two(code)
        own = scale
        # x * 2^-X is x / 2^X, also where the result is subnormal; "mx_normal": x over 2^-126 where the scale is 2^-127
        factor = power_of_two(tl.minimum(254 - code, 253 if RULE == "mx_normal" else 254))
        if RULE == "mx_zero_dies":
            factor = tl.where(code == 0, 0.0, factor)
        if RULE == "mx_zero_is_one":
            factor = tl.where(code == 0, 1.0, factor)
    elif RULE == "nvfp4" or RULE == "nvfp4_reciprocal" or RULE == "nvfp4_token":
        if RULE == "nvfp4":  # given: G
            g = tl.where(a == a, given, given)
        elif RULE == "nvfp4_reciprocal":  # given: 1 / G
            g = tl.div_rn(1.0, tl.where(a == a, given, given))
        else:  # given: the largest magnitude of the row
            g = tl.div_rn(2688.0, tl.where(a == a, given, given))
            g = tl.where(g == float("inf"), 1.0, g)
        code, own = encode_float(g * (a * 0.16666667163372040), 3, -6, 448.0, 8, 0x7F)
        step = own * tl.div_rn(1.0, g)
        vanished: tl.constexpr = 1e-8 if RULE == "nvfp4_reciprocal" else 0.0
        factor = tl.where(step == 0, vanished, tl.div_rn(1.0, step))
        scale = tl.div_rn(own, g)
    elif RULE == "torchao_nvfp4":  # given: s2
        s2 = tl.where(a == a, given, given)
        wanted = tl.div_rn(tl.div_rn(a, 6.0), s2)
        code, own = encode_float(tl.minimum(tl.maximum(wanted, 0.015625), 448.0), 3, -6, 448.0, 8, 0x7F)
        factor = tl.div_rn(tl.div_rn(1.0, s2), own)
        scale = own * s2
    else:
        tl.static_assert(RULE == "fp4_ue5m3")
        sixth = tl.div_rn(a, 6.0) if EXPONENT == "divide" else a * 0.16666667163372040
        code, own = encode_float(sixth, 3, -14, 114688.0, 9, 0xFF)
        own = tl.where(own == 0, 1.1920928955078125e-07, own)
        scale = own
        factor = scale
    return scale, factor, own, code


@triton.jit
def range_scale(low, high, RULE: tl.constexpr, MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, FLOOR: tl.constexpr):
    """Scale, factor and zero point of an asymmetric row."""
    if RULE == "range":
        scale = tl.div_rn(high - low, 255.0)
        is_constant = scale == 0
        zero_point = as_zero_point(tl.where(is_constant, 0.0, rint(-128.0 - tl.div_rn(low, scale))))
        factor = tl.where(is_constant, 0.0, tl.div_rn(1.0, scale))
    else:
        tl.static_assert(RULE == "range_with_zero")
        low = tl.minimum(low, 0.0)
        high = tl.maximum(high, 0.0)
        scale = tl.maximum(tl.div_rn(high - low, MAXIMUM - MINIMUM), FLOOR)
        wanted = MINIMUM - rint(tl.div_rn(low, scale))
        wanted = tl.where(wanted == wanted, tl.minimum(tl.maximum(wanted, MINIMUM), MAXIMUM), 0.0)
        zero_point = as_zero_point(wanted)
        factor = tl.div_rn(1.0, scale)
    return scale, factor, zero_point


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, which are ordered as the magnitudes are; those of NaN lie above infinity's."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_of_row(row, K, BK: tl.constexpr):
    """Largest magnitude of a row of K values, NaN where it holds one."""
    largest = tl.zeros((BK,), tl.int32)
    for k in range(0, K, BK):
        column = k + tl.arange(0, BK)
        x = tl.load(row + column, mask=column < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(x))
    return tl.max(largest, 0).to(tl.float32, bitcast=True)


@triton.jit
def wider(low, high, other_low, other_high):
    """The range of two ranges; NaN where either has one."""
    return (tl.minimum(low, other_low, propagate_nan=tl.PropagateNan.ALL),
            tl.maximum(high, other_high, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def corrected_quotient(x, y, r, STEPS: tl.constexpr):
    """x / y, correctly rounded, for r = 1 / y correctly rounded and 2^-100 < |y| < 2^120: two Newton steps.

    Those of a division in software, which finds r for each x again. Beyond float32's range, and for infinite x, the
    first product is the answer; where remainders are subnormal the quotient is far below any code's half step.
    One step is off by less than 2^-22 units in the last place before it is rounded. So a code could only be wrong
    beside a boundary of codes, which has 9 bits at most. The x of 11 bits (16 bit floats) and y that come so near to
    one are counted in tests/kernels/test_triton_quantizers.py: none goes wrong.
    """
    first = x * r
    q = first
    for _ in tl.static_range(STEPS):
        q = tl.fma(tl.fma(-q, y, x), r, q)
    return tl.where((tl.abs(first) < 1e38) & (first != 0), q, first)  # -0 keeps its sign


@triton.jit
def bounded_quotient(x, y, r):
    """corrected_quotient of x of 16 bits with one step, where |x / y| is below 2^127 and x is finite; CUDA.

    Its remainder is exact but where it is subnormal. Rounded downwards a remainder of zero is -0, so -0 keeps its sign.
    """
    q = x * r
    return tl.fma(libdevice.fma_rd(q, tl.broadcast_to(-y, q.shape), x), r, q)


@triton.jit
def read_row(row, column, K, EVEN: tl.constexpr):
    """Values of a row as float32, zeros beyond K."""
    x = tl.load(row + column) if EVEN else tl.load(row + column, mask=column < K, other=0.0)
    return x.to(tl.float32)


@triton.jit
def quantize_rows(
    x_ptr, out_ptr, scale_ptr, zero_ptr, sums_ptr, given_ptr, given_zero_ptr, K, KP, stride,
    RULE: tl.constexpr, EXPONENT: tl.constexpr, DIVIDE: tl.constexpr, IS_SHIFTED: tl.constexpr, BOUND: tl.constexpr,
    FLOOR: tl.constexpr, STATISTIC: tl.constexpr, HAS_GIVEN: tl.constexpr, HAS_ZERO: tl.constexpr,
    IS_INTEGER: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, EMAX: tl.constexpr, TOP: tl.constexpr,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, BITS: tl.constexpr, NAN_CODE: tl.constexpr,
    VALUES: tl.constexpr, FNUZ: tl.constexpr, NATIVE: tl.constexpr, SUMS: tl.constexpr, WHOLE: tl.constexpr,
    BK: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr, PADDED: tl.constexpr, LEADS: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """Rows of x [M, K] to codes [M, KP] (columns beyond K: code 0) with a scale, and a zero point, for each row.

    VALUES: instead of codes the values without scale, in the dtype of `out`. A program reads its whole row for the
    statistic, and writes PART columns of it, or with PART 0 all.
    SUMS: the sums of integer codes as well. WHOLE: a row is one block, read once.
    EVEN: KP is K, a multiple of BK and of PART. PADDED: KP is not K.
    STATISTIC "given": the largest magnitude (or, shifted, the two ends) of the call stand in `given`.
    LEADS: the next kernel may be launched at once; it waits for this one itself.
    FOLLOWS: launched while the kernel before it ends, which it waits for here (programmatic dependent launch).
    """
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
    if LEADS:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0)
    row = x_ptr + m.to(tl.int64) * stride
    given = 0.0
    if HAS_GIVEN:
        given = tl.load(given_ptr).to(tl.float32)

    LOOKED: tl.constexpr = STATISTIC == "absmax" or STATISTIC == "range" or (RULE == "static" and IS_INTEGER)
    largest = tl.zeros((BK,), tl.int32)
    low = tl.full((BK,), float("inf"), tl.float32)
    high = tl.full((BK,), float("-inf"), tl.float32)
    held = low
    if WHOLE:
        held = read_row(row, tl.arange(0, BK), K, EVEN)
    if LOOKED:
        for k in range(0, BK if WHOLE else K, BK):
            column = k + tl.arange(0, BK)
            x = held if WHOLE else read_row(row, column, K, EVEN)
            if STATISTIC == "range":
                low = tl.minimum(low, x if EVEN else tl.where(column < K, x, float("inf")),
                                 propagate_nan=tl.PropagateNan.ALL)
                high = tl.maximum(high, x if EVEN else tl.where(column < K, x, float("-inf")),
                                  propagate_nan=tl.PropagateNan.ALL)
            else:
                largest = tl.maximum(largest, magnitude_bits(x))

    zero_point = 0
    bad = False
    if STATISTIC == "range":
        lowest, highest = tl.reduce((low, high), 0, wider)
        bad = (lowest != lowest) | (highest != highest)
        scale, factor, zero_point = range_scale(tl.where(bad, 0.0, lowest), tl.where(bad, 0.0, highest), RULE, MINIMUM,
                                                MAXIMUM, FLOOR)
    elif STATISTIC == "call_range":
        highest = tl.load(given_ptr + 1).to(tl.float32)
        bad = (given != given) | (highest != highest)
        scale, factor, zero_point = range_scale(tl.where(bad, 0.0, given), tl.where(bad, 0.0, highest), RULE, MINIMUM,
                                                MAXIMUM, FLOOR)
    elif STATISTIC == "call_absmax":
        bad = given != given
        scale, factor, _own, _code = scale_of(tl.where(bad, 0.0, given), 0.0, RULE, EXPONENT, DIVIDE, BOUND, MANTISSA,
                                              MINIMUM, MAXIMUM, EMAX, TOP)
    else:
        most = 0
        if LOOKED:
            most = tl.max(largest, 0)
        bad = most > 0x7F800000
        most = tl.where(bad, 0, most)
        scale, factor, _own, _code = scale_of(most.to(tl.float32, bitcast=True), given, RULE, EXPONENT, DIVIDE, BOUND,
                                              MANTISSA, MINIMUM, MAXIMUM, EMAX, TOP)
    if RULE == "static":  # integer codes cannot hold NaN: the row's scale does; floats hold it themselves
        if IS_INTEGER:
            scale = tl.where(bad, float("nan"), scale)
        if HAS_ZERO:
            zero_point = tl.load(given_zero_ptr).to(tl.int32)
    else:
        zero_point = tl.where(bad, 0, zero_point)
        scale = tl.where(bad, float("nan"), scale)
        factor = tl.where(bad, float("nan"), factor)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + m, scale)
        if IS_SHIFTED and not VALUES:
            tl.store(zero_ptr + m, zero_point)

    out = out_ptr + m.to(tl.int64) * KP
    STEP: tl.constexpr = PART if PART > 0 else BK
    total = tl.zeros((STEP,), tl.int32)
    start = tl.program_id(1) * PART
    reciprocal = tl.div_rn(1.0, factor) if DIVIDE else factor
    is_tame = (tl.abs(factor) > 7.9e-31) & (tl.abs(factor) < 1.3e36)
    # the recipe's codes of finite rows lie in their range without being brought into it
    BOUNDED: tl.constexpr = (STATISTIC == "absmax" and float("inf") == BOUND
                             and (RULE == "fp8_token" or RULE == "int8_token"))
    is_plain = is_tame
    if BOUNDED and IS_INTEGER:
        is_plain = (factor < float("inf")) & (scale < float("inf"))
    is_near = False
    if STATISTIC == "range":  # what a row's own factor makes of it lies near the zero point, as a rule within 2^20
        is_near = (tl.abs(zero_point) < 1048576) & (factor < float("inf")) & (scale < float("inf"))
    for k in range(start, start + STEP if WHOLE or PART > 0 else KP, STEP):
        column = k + tl.arange(0, STEP)
        x = held if WHOLE else read_row(row, column, K, EVEN)
        if not DIVIDE:
            v = x * factor
        elif is_tame:
            if BOUNDED and NATIVE and x_ptr.dtype.element_ty != tl.float32:
                v = bounded_quotient(x, factor, reciprocal)
            else:
                v = corrected_quotient(x, factor, reciprocal, 2 if x_ptr.dtype.element_ty == tl.float32 else 1)
        else:
            v = tl.div_rn(x, tl.where(x == x, factor, factor))
        if NATIVE and not VALUES:  # the conversion saturates
            result = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        elif VALUES and not IS_INTEGER:
            result = round_float(v, MANTISSA, SMALLEST, MAXIMUM)
        else:
            if IS_SHIFTED and STATISTIC == "range":
                if is_near:
                    code = near_integer(v) + zero_point
                    code = tl.minimum(tl.maximum(code, MINIMUM), MAXIMUM)
                else:
                    code = encode_shifted(v, zero_point, MINIMUM, MAXIMUM)
                value = (code - zero_point).to(tl.float32)
            elif BOUNDED and IS_INTEGER:
                code = near_integer(v) if is_plain else encode_integer(v, MINIMUM, MAXIMUM)
                value = code.to(tl.float32)
            else:
                code, value = encode(v, zero_point, IS_INTEGER, IS_SHIFTED, MANTISSA, SMALLEST, MINIMUM, MAXIMUM, BITS,
                                     NAN_CODE)
            if FNUZ:
                code = to_fnuz(code)
            if SUMS:
                total += code if EVEN else tl.where(column < K, code, 0)
            result = value if VALUES else code
        if PADDED:
            result = tl.where(column < K, result, 0)
        if EVEN:
            tl.store(out + column, result.to(out_ptr.dtype.element_ty))
        else:
            tl.store(out + column, result.to(out_ptr.dtype.element_ty), mask=column < KP)
    if SUMS:
        tl.store(sums_ptr + m, tl.sum(total, 0))


@triton.jit(do_not_specialize=["M", "given_stride"])
def quantize_groups(
    x_ptr, out_ptr, scale_ptr, scale_code_ptr, outer_ptr, given_ptr, M, K, KP, G, stride, given_stride,
    RULE: tl.constexpr, EXPONENT: tl.constexpr, DIVIDE: tl.constexpr, BOUND: tl.constexpr, HAS_GIVEN: tl.constexpr,
    IS_INTEGER: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, EMAX: tl.constexpr, TOP: tl.constexpr,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, BITS: tl.constexpr, NAN_CODE: tl.constexpr, ROW: tl.constexpr,
    SCALES: tl.constexpr, SCALE_CODES: tl.constexpr, OUTER: tl.constexpr, VALUES: tl.constexpr, OWN: tl.constexpr,
    PACKED: tl.constexpr,
    FNUZ: tl.constexpr, NATIVE: tl.constexpr, SIZE: tl.constexpr, GS: tl.constexpr, BG: tl.constexpr,
    EVEN: tl.constexpr, PADDED: tl.constexpr, LEADS: tl.constexpr, FOLLOWS: tl.constexpr,
):
    """Groups of SIZE columns of x [M, K] to codes [M, KP]; one program takes BG groups of a row.

    ROW          the rule reads the largest magnitude of the row: found here ROW columns at a time, -1: the program's
                 groups are the row; 0: it does not
    SCALES       float32 scales [G, M], all levels combined
    SCALE_CODES  8 bit scales [M, G], without the global one
    OUTER        float32 [M], the global scale that multiplies afterwards
    VALUES       instead of codes their values, with OWN times their own (8 bit) scale, without the global one
    PACKED       two 4 bit codes a byte, the first in the low bits: [M, KP / 2]
    EVEN         KP is K, a multiple of the BG * GS columns of a program, and GS is SIZE
    PADDED       KP is not K, or K ends within a group
    LEADS, FOLLOWS    as in quantize_rows
    """
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
    if LEADS:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0)
    group = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = tl.arange(0, GS)
    column = group[:, None] * SIZE + inside[None, :]
    place = m.to(tl.int64) * stride + column
    if EVEN:
        x = tl.load(x_ptr + place).to(tl.float32)
    else:
        x = tl.load(x_ptr + place, mask=(inside < SIZE)[None, :] & (column < K), other=0.0).to(tl.float32)
    given = 0.0
    if HAS_GIVEN:
        given = tl.load(given_ptr + m * given_stride).to(tl.float32)

    most = tl.max(magnitude_bits(x), 1)
    bad = most > 0x7F800000
    if ROW > 0:
        given = largest_of_row(x_ptr + m.to(tl.int64) * stride, K, ROW)
    elif ROW < 0:
        given = tl.max(most, 0).to(tl.float32, bitcast=True)
    a = tl.where(bad, 0, most).to(tl.float32, bitcast=True)
    if RULE == "nvfp4_token" or RULE == "torchao_nvfp4":  # a row or call with NaN has a global scale of NaN
        bad = tl.where(given == given, bad, given != given)
    if RULE == "torchao_nvfp4":
        given = tl.where(given == 0, 1.0, given)
    scale, factor, own, code = scale_of(a, given, RULE, EXPONENT, DIVIDE, BOUND, MANTISSA, MINIMUM, MAXIMUM, EMAX, TOP)
    scale = tl.where(bad, float("nan"), scale)
    factor = tl.where(bad, float("nan"), factor)
    own = tl.where(bad, float("nan"), own)
    if SCALES:
        tl.store(scale_ptr + group * M + m, scale, mask=group < G)
    if SCALE_CODES:
        nan_scale: tl.constexpr = 0x7F if OUTER else 0xFF
        tl.store(scale_code_ptr + m.to(tl.int64) * G + group, tl.where(bad, nan_scale, code).to(tl.uint8),
                 mask=group < G)
    if OUTER:  # noqa: SIM102 - one branch is compiled, the other is run
        if tl.program_id(1) == 0:
            if RULE == "nvfp4":
                tl.store(outer_ptr + m, tl.div_rn(1.0, given))
            elif RULE == "nvfp4_reciprocal":
                tl.store(outer_ptr + m, tl.div_rn(1.0, tl.div_rn(1.0, given)))
            elif RULE == "nvfp4_token":
                g = tl.div_rn(2688.0, given)
                tl.store(outer_ptr + m, tl.div_rn(1.0, tl.where(g == float("inf"), 1.0, g)))
            else:
                tl.store(outer_ptr + m, given)

    STEPS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1
    if not DIVIDE:
        v = x * factor[:, None]
    elif RULE == "fp8_group":  # from 1e-10 / 448 on, and of an infinite one every quotient is the first product
        v = corrected_quotient(x, tl.broadcast_to(factor[:, None], (BG, GS)), tl.div_rn(1.0, factor)[:, None], STEPS)
    else:
        v = tl.div_rn(x, tl.broadcast_to(factor[:, None], (BG, GS)))
    place = m.to(tl.int64) * KP + column
    stores = (inside < SIZE)[None, :] & (column < KP)
    if NATIVE and not VALUES:  # the conversion saturates
        codes = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        if PADDED:
            codes = tl.where(column < K, codes, 0)
        tl.store(out_ptr + place, codes, mask=None if EVEN else stores)
    elif VALUES:
        if IS_INTEGER:
            value = encode_integer(v, MINIMUM, MAXIMUM).to(tl.float32)
        else:
            value = round_float(v, MANTISSA, SMALLEST, MAXIMUM)
        if OWN:
            value = value * own[:, None]
        if PADDED:
            value = tl.where(column < K, value, 0.0)
        tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=None if EVEN else stores)
    else:
        codes, value = encode(v, 0, IS_INTEGER, False, MANTISSA, SMALLEST, MINIMUM, MAXIMUM, BITS, NAN_CODE)
        if FNUZ:
            codes = to_fnuz(codes)
        if PADDED:
            codes = tl.where(column < K, codes, 0)
        if PACKED:
            low, high = tl.split(tl.reshape(codes, (BG, GS // 2, 2)))
            half = group[:, None] * (SIZE // 2) + tl.arange(0, GS // 2)[None, :]
            tl.store(out_ptr + m.to(tl.int64) * (KP // 2) + half, (low | (high << 4)).to(tl.uint8),
                     mask=(half < KP // 2) & (tl.arange(0, GS // 2) < SIZE // 2)[None, :])
        else:
            tl.store(out_ptr + place, codes.to(out_ptr.dtype.element_ty), mask=None if EVEN else stores)
