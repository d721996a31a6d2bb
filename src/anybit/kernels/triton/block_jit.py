# mypy: ignore-errors
"""Device code of what lies between the products of a decoder block, for few tokens. Launched by `block.py`.

Every rounding is the host's: norms and activations in float32, rounded to the dtype of the activations where torch's
own operations round. A kernel that makes the input of a product quantizes it in passing, by the rules of
`quantizers_jit.py`, which decide every bit. Always launched with `enable_fp_fusion=False`, as those are.
"""

import triton
import triton.language as tl

from anybit.kernels.triton.quantizers_jit import corrected_quotient, encode, magnitude_bits, scale_of, to_fnuz


@triton.jit
def waits(WAITS: tl.constexpr):
    """The kernel was launched while the one before it ends, and waits for that here (programmatic dependent launch).

    Then the next one may be launched: a product, which copies its first weights meanwhile, or what follows a product.
    """
    if WAITS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def store_input(
    x, m, group, column, out_ptr, scale_ptr, outer_ptr, given_ptr, M, K, KP, G,
    MODE: tl.constexpr, RULE: tl.constexpr, EXPONENT: tl.constexpr, DIVIDE: tl.constexpr, BOUND: tl.constexpr,
    IS_INTEGER: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, EMAX: tl.constexpr, TOP: tl.constexpr,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, BITS: tl.constexpr, NAN_CODE: tl.constexpr, HAS_GIVEN: tl.constexpr,
    READS_ROW: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, VALUES: tl.constexpr, OWN: tl.constexpr,
    FNUZ: tl.constexpr, NATIVE: tl.constexpr, BG: tl.constexpr, GS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile x [BG, GS] of row m (float32 of 16 bit numbers, 0 beyond K) as the input of a product.

    MODE       0: as it is; 1: one scale a row, the tile is the row; 2: one scale a group of GS
    READS_ROW  the rule reads the row's largest magnitude; the tile is the row
    SCALES     MODE 2: float32 scales [G, M], all levels combined
    OUTER      the global scale that multiplies afterwards, float32 [M]
    VALUES     values instead of codes, with OWN times their group's own scale, without the global one
    WHOLE      the program has the row for itself
    """
    place = m.to(tl.int64) * KP + column
    inside = column < KP
    if MODE == 0:
        tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        given = 0.0
        if HAS_GIVEN:
            given = tl.load(given_ptr).to(tl.float32)
        if MODE == 1:
            most = tl.max(tl.max(magnitude_bits(x), 1), 0)
            bad = most > 0x7F800000
            largest = tl.where(bad, 0, most).to(tl.float32, bitcast=True)
            scale, factor, own, _code = scale_of(largest, given, RULE, EXPONENT, DIVIDE, BOUND, MANTISSA, MINIMUM,
                                                MAXIMUM, EMAX, TOP)
            if RULE == "static":
                if IS_INTEGER:
                    scale = tl.where(bad, float("nan"), scale)
            else:
                scale = tl.where(bad, float("nan"), scale)
                factor = tl.where(bad, float("nan"), factor)
            tl.store(scale_ptr + m, scale)
            if DIVIDE:
                is_tame = (tl.abs(factor) > 7.9e-31) & (tl.abs(factor) < 1.3e36)
                if is_tame:
                    v = corrected_quotient(x, factor, tl.div_rn(1.0, factor), 2)
                else:
                    v = tl.div_rn(x, tl.where(x == x, factor, factor))
            else:
                v = x * factor
        else:
            is_bad = tl.max((x != x).to(tl.int32), 1) > 0
            a = tl.max(tl.where(x == x, tl.abs(x), 0.0), 1)
            if READS_ROW:
                given = tl.where(tl.max(is_bad.to(tl.int32), 0) > 0, float("nan"), tl.max(a, 0))
                is_bad = tl.where(given == given, is_bad, given != given)
            if RULE == "torchao_nvfp4":
                is_bad = tl.where(given == given, is_bad, given != given)
                given = tl.where(given == 0, 1.0, given)
            scale, factor, own, _code = scale_of(a, given, RULE, EXPONENT, DIVIDE, BOUND, MANTISSA, MINIMUM, MAXIMUM,
                                                EMAX, TOP)
            scale = tl.where(is_bad, float("nan"), scale)
            factor = tl.where(is_bad, float("nan"), factor)
            own = tl.where(is_bad, float("nan"), own)
            if SCALES:
                tl.store(scale_ptr + group * M + m, scale, mask=group < G)
            if OUTER:  # noqa: SIM102 - one branch is compiled, the other is run
                if WHOLE or tl.program_id(1) == 0:
                    if RULE == "nvfp4":
                        outer = tl.div_rn(1.0, given)
                    elif RULE == "nvfp4_reciprocal":
                        outer = tl.div_rn(1.0, tl.div_rn(1.0, given))
                    elif RULE == "nvfp4_token":
                        g = tl.div_rn(2688.0, given)
                        outer = tl.div_rn(1.0, tl.where(g == float("inf"), 1.0, g))
                    else:
                        outer = given
                    tl.store(outer_ptr + m, outer)
            v = tl.div_rn(x, tl.broadcast_to(factor[:, None], (BG, GS))) if DIVIDE else x * factor[:, None]
        if NATIVE:
            clamped = tl.where(v == v, tl.minimum(tl.maximum(v, MINIMUM), MAXIMUM), v)
            codes = clamped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            tl.store(out_ptr + place, tl.where(column < K, codes, 0), mask=inside)
        else:
            codes, value = encode(v, 0, IS_INTEGER, False, MANTISSA, SMALLEST, MINIMUM, MAXIMUM, BITS, NAN_CODE)
            if VALUES:
                if OWN:
                    value = value * own[:, None]
                value = tl.where(column < K, value, 0.0)
                tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)
            else:
                if FNUZ:
                    codes = to_fnuz(codes)
                codes = tl.where(column < K, codes, 0)
                tl.store(out_ptr + place, codes.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def norm_rows(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, scale_ptr, outer_ptr, given_ptr, count_ptr, M, K, KP, G, x_stride,
    delta_stride, eps, added,
    HAS_DELTA: tl.constexpr, COUNTS: tl.constexpr,
    MODE: tl.constexpr, RULE: tl.constexpr, EXPONENT: tl.constexpr, DIVIDE: tl.constexpr, BOUND: tl.constexpr,
    IS_INTEGER: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, EMAX: tl.constexpr, TOP: tl.constexpr,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, BITS: tl.constexpr, NAN_CODE: tl.constexpr, HAS_GIVEN: tl.constexpr,
    READS_ROW: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, VALUES: tl.constexpr, OWN: tl.constexpr,
    FNUZ: tl.constexpr, NATIVE: tl.constexpr, BG: tl.constexpr, GS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """The root-mean-square norm of rows x [M, K] (plus delta, the sum stored as the new residual), for a product.

    One program a row. COUNTS: the cache's count of tokens grows by `added`, now that its readers have run.
    WAITS: as `waits` says.
    """
    m = tl.program_id(0)
    group = tl.arange(0, BG)
    column = group[:, None] * GS + tl.arange(0, GS)[None, :]
    counts = column < K
    D: tl.constexpr = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=counts, other=0.0)
    waits(WAITS)
    x = tl.load(x_ptr + m.to(tl.int64) * x_stride + column, mask=counts, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + m.to(tl.int64) * delta_stride + column, mask=counts, other=0.0)
        x = (x + delta.to(tl.float32)).to(D)
        tl.store(sum_ptr + m.to(tl.int64) * K + column, x, mask=counts)
        x = x.to(tl.float32)
    mean = tl.sum(tl.sum(x * x, 1), 0) / K
    normed = (x * tl.rsqrt(mean + eps)).to(D).to(tl.float32)
    y = (weight.to(tl.float32) * normed).to(D).to(tl.float32)
    if COUNTS:  # noqa: SIM102 - one branch is compiled, the other is run
        if m == 0:
            tl.store(count_ptr, tl.load(count_ptr) + added)
    store_input(y, m, group, column, out_ptr, scale_ptr, outer_ptr, given_ptr, M, K, KP, G, MODE, RULE, EXPONENT,
                DIVIDE, BOUND, IS_INTEGER, MANTISSA, SMALLEST, EMAX, TOP, MINIMUM, MAXIMUM, BITS, NAN_CODE, HAS_GIVEN,
                READS_ROW, SCALES, OUTER, VALUES, OWN, FNUZ, NATIVE, BG, GS, True)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gate_rows(
    gate_ptr, up_ptr, out_ptr, scale_ptr, outer_ptr, given_ptr, M, K, KP, G, gate_stride, up_stride,
    MODE: tl.constexpr, RULE: tl.constexpr, EXPONENT: tl.constexpr, DIVIDE: tl.constexpr, BOUND: tl.constexpr,
    IS_INTEGER: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, EMAX: tl.constexpr, TOP: tl.constexpr,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, BITS: tl.constexpr, NAN_CODE: tl.constexpr, HAS_GIVEN: tl.constexpr,
    READS_ROW: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, VALUES: tl.constexpr, OWN: tl.constexpr,
    FNUZ: tl.constexpr, NATIVE: tl.constexpr, BG: tl.constexpr, GS: tl.constexpr, WHOLE: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of [M, K], for a product. Program (row, BG groups of columns); WHOLE: all of them."""
    waits(WAITS)
    m = tl.program_id(0)
    group = tl.program_id(1) * BG + tl.arange(0, BG)
    column = group[:, None] * GS + tl.arange(0, GS)[None, :]
    counts = column < K
    D: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + m.to(tl.int64) * gate_stride + column, mask=counts, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + m.to(tl.int64) * up_stride + column, mask=counts, other=0.0).to(tl.float32)
    lit = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(D).to(tl.float32)
    y = (lit * up).to(D).to(tl.float32)
    store_input(y, m, group, column, out_ptr, scale_ptr, outer_ptr, given_ptr, M, K, KP, G, MODE, RULE, EXPONENT,
                DIVIDE, BOUND, IS_INTEGER, MANTISSA, SMALLEST, EMAX, TOP, MINIMUM, MAXIMUM, BITS, NAN_CODE, HAS_GIVEN,
                READS_ROW, SCALES, OUTER, VALUES, OWN, FNUZ, NATIVE, BG, GS, WHOLE)  # fmt: skip


@triton.jit
def turned(low, high, cos_low, cos_high, sin_low, sin_high, D: tl.constexpr):
    """The two halves of rotated heads: x cos + rotate_half(x) sin with the host's three roundings to D, as float32."""
    first = (low * cos_low).to(D).to(tl.float32) + (-high * sin_low).to(D).to(tl.float32)
    second = (high * cos_high).to(D).to(tl.float32) + (low * sin_high).to(D).to(tl.float32)
    return first.to(D).to(tl.float32), second.to(D).to(tl.float32)


@triton.jit
def head_norm(low, high, factor_low, factor_high, eps, DIM: tl.constexpr, D: tl.constexpr):
    """The root-mean-square norm of each head, [.., HALF] twice, in the host's roundings."""
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM
    root = tl.rsqrt(mean + eps)[:, None]
    low = (factor_low * (low * root).to(D).to(tl.float32)).to(D).to(tl.float32)
    high = (factor_high * (high * root).to(D).to(tl.float32)).to(D).to(tl.float32)
    return low, high


@triton.jit(do_not_specialize=["held"])
def decode_attention(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, keys_ptr, values_ptr, mask_ptr, count_ptr, out_ptr,
    part_ptr, peak_ptr, arrived_ptr, q_stride, k_stride, v_stride, turn_batch, turn_token, key_batch, key_head,
    value_batch, value_head, mask_batch, mask_token, held, room, heads, scaling, eps,
    T: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, MASK: tl.constexpr, COUNTED: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """T new tokens a sequence: rotated, put into the cache, and attending to it; out [B T, heads GROUP DIM].

    Program (sequence and head of the cache, part of its tokens). q, k, v are rows of a product. `keys` and `values`
    [B, heads, room, DIM] hold `held` tokens, or as many as `count` says (COUNTED), so that a captured graph goes on
    from where the cache is. MASK: bool [B, .., T, room], which positions a token sees; else all held ones and the new
    ones up to itself. Scores, softmax and sums are float32; weights of values go in as two numbers of D.
    The last part takes the new tokens. The last program of a sequence and head to arrive adds the parts in their order.
    """
    waits(WAITS)
    D: tl.constexpr = out_ptr.dtype.element_ty
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // heads
    h = pair % heads
    if COUNTED:
        held = tl.load(count_ptr).to(tl.int32)
    r = tl.arange(0, ROWS)
    t = r % T
    g = r // T
    real = r < GROUP * T
    half = tl.arange(0, HALF)
    inside = half < DIM // 2
    dim = tl.arange(0, 2 * HALF)
    # the queries of the heads that share this one: normed, turned
    turn = b * turn_batch + t[:, None] * turn_token + half[None, :]
    shown = real[:, None] & inside[None, :]
    q_at = (b * T + t).to(tl.int64)[:, None] * q_stride + (h * GROUP + g)[:, None] * DIM + half[None, :]
    q_low = tl.load(q_ptr + q_at, mask=shown, other=0.0).to(tl.float32)
    q_high = tl.load(q_ptr + q_at + DIM // 2, mask=shown, other=0.0).to(tl.float32)
    if Q_NORM:
        w_low = tl.load(q_norm_ptr + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        w_high = tl.load(q_norm_ptr + DIM // 2 + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        q_low, q_high = head_norm(q_low, q_high, w_low, w_high, eps, DIM, D)
    c_low = tl.load(cos_ptr + turn, mask=shown, other=0.0).to(tl.float32)
    c_high = tl.load(cos_ptr + turn + DIM // 2, mask=shown, other=0.0).to(tl.float32)
    s_low = tl.load(sin_ptr + turn, mask=shown, other=0.0).to(tl.float32)
    s_high = tl.load(sin_ptr + turn + DIM // 2, mask=shown, other=0.0).to(tl.float32)
    q_low, q_high = turned(q_low, q_high, c_low, c_high, s_low, s_high, D)
    q_low_d, q_high_d = q_low.to(D), q_high.to(D)

    keys = keys_ptr + b.to(tl.int64) * key_batch + h.to(tl.int64) * key_head
    values = values_ptr + b.to(tl.int64) * value_batch + h.to(tl.int64) * value_head
    width = 1 if COUNTED else held + T  # a growing cache's mask is as wide as the cache is long
    masks = mask_ptr + (b.to(tl.int64) * mask_batch + t.to(tl.int64) * mask_token) * width
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, 2 * HALF), tl.float32)
    blocks = tl.cdiv(held, BN)
    per = tl.cdiv(blocks, SPLITS)
    for block in range(split * per, tl.minimum(split * per + per, blocks)):
        n = block * BN + tl.arange(0, BN)
        there = n < held
        at = n.to(tl.int64)[:, None] * DIM + half[None, :]
        kept = there[:, None] & inside[None, :]
        k_low = tl.load(keys + at, mask=kept, other=0.0)
        k_high = tl.load(keys + at + DIM // 2, mask=kept, other=0.0)
        score = tl.dot(q_high_d, tl.trans(k_high), tl.dot(q_low_d, tl.trans(k_low))) * scaling
        seen = there[None, :] & real[:, None]
        if MASK:
            seen = seen & (tl.load(masks[:, None] + n[None, :], mask=seen, other=0) != 0)
        score = tl.where(seen, score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)  # of rows that have seen nothing yet
        p = tl.exp(score - safe[:, None])
        fade = tl.exp(peak - safe)
        total = total * fade + tl.sum(p, 1)
        v_at = n.to(tl.int64)[:, None] * DIM + dim[None, :]
        value = tl.load(values + v_at, mask=there[:, None] & (dim < DIM)[None, :], other=0.0)
        p_first = p.to(D)
        p_rest = (p - p_first.to(tl.float32)).to(D)
        acc = tl.dot(p_rest, value, tl.dot(p_first, value, acc * fade[:, None]))
        peak = top
    if split == SPLITS - 1:
        for j in tl.static_range(T):
            row = (b * T + j).to(tl.int64)
            one = tl.zeros((1, HALF), tl.int32) + half[None, :]
            k_at = row * k_stride + h * DIM + one
            lit = one < DIM // 2
            k_low = tl.load(k_ptr + k_at, mask=lit, other=0.0).to(tl.float32)
            k_high = tl.load(k_ptr + k_at + DIM // 2, mask=lit, other=0.0).to(tl.float32)
            if K_NORM:
                w_low = tl.load(k_norm_ptr + one, mask=lit, other=0.0).to(tl.float32)
                w_high = tl.load(k_norm_ptr + DIM // 2 + one, mask=lit, other=0.0).to(tl.float32)
                k_low, k_high = head_norm(k_low, k_high, w_low, w_high, eps, DIM, D)
            angle = b * turn_batch + j * turn_token + one
            k_low, k_high = turned(
                k_low, k_high, tl.load(cos_ptr + angle, mask=lit, other=0.0).to(tl.float32),
                tl.load(cos_ptr + angle + DIM // 2, mask=lit, other=0.0).to(tl.float32),
                tl.load(sin_ptr + angle, mask=lit, other=0.0).to(tl.float32),
                tl.load(sin_ptr + angle + DIM // 2, mask=lit, other=0.0).to(tl.float32), D)  # fmt: skip
            fits = r * 0 + held + j < room
            put = (held + j).to(tl.int64) * DIM
            stays = lit & (one * 0 + held + j < room)
            tl.store(keys + put + one, k_low.to(D), mask=stays)
            tl.store(keys + put + DIM // 2 + one, k_high.to(D), mask=stays)
            v_new = tl.load(v_ptr + row * v_stride + h * DIM + dim, mask=dim < DIM, other=0.0)
            tl.store(values + put + dim, v_new, mask=(dim < DIM) & (dim * 0 + held + j < room))
            score = (tl.sum(q_low * k_low, 1) + tl.sum(q_high * k_high, 1)) * scaling
            seen = real & (t >= j)
            if MASK:
                seen = seen & (tl.load(masks + held + j, mask=seen & fits, other=0) != 0)
            score = tl.where(seen, score, float("-inf"))
            top = tl.maximum(peak, score)
            safe = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp(score - safe)
            fade = tl.exp(peak - safe)
            total = total * fade + p
            acc = acc * fade[:, None] + p[:, None] * v_new.to(tl.float32)[None, :]
            peak = top
    out_at = (b * T + t).to(tl.int64)[:, None] * (heads * GROUP * DIM) + (h * GROUP + g)[:, None] * DIM + dim[None, :]
    goes = real[:, None] & (dim < DIM)[None, :]
    if SPLITS == 1:
        total = tl.where(total == 0, 1.0, total)  # a token of padding that sees nothing: 0, as torch says
        tl.store(out_ptr + out_at, (acc / total[:, None]).to(D), mask=goes)
    else:
        place = (pair * SPLITS + split) * ROWS + r
        tl.store(part_ptr + place[:, None] * (2 * HALF) + dim[None, :], acc, cache_modifier=".cg")
        tl.store(peak_ptr + place * 2, peak, cache_modifier=".cg")
        tl.store(peak_ptr + place * 2 + 1, total, cache_modifier=".cg")
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            tl.store(arrived_ptr + pair, 0)  # ready for the next call
            start = pair * SPLITS * ROWS + r
            top = tl.full((ROWS,), float("-inf"), tl.float32)
            for other in range(SPLITS):
                top = tl.maximum(top, tl.load(peak_ptr + (start + other * ROWS) * 2, cache_modifier=".cg"))
            top = tl.where(top == float("-inf"), 0.0, top)
            sum_all = tl.zeros((ROWS,), tl.float32)
            all_parts = tl.zeros((ROWS, 2 * HALF), tl.float32)
            for other in range(SPLITS):
                one_place = start + other * ROWS
                share = tl.exp(tl.load(peak_ptr + one_place * 2, cache_modifier=".cg") - top)
                sum_all += share * tl.load(peak_ptr + one_place * 2 + 1, cache_modifier=".cg")
                all_parts += share[:, None] * tl.load(part_ptr + one_place[:, None] * (2 * HALF) + dim[None, :],
                                                      cache_modifier=".cg")
            sum_all = tl.where(sum_all == 0, 1.0, sum_all)
            tl.store(out_ptr + out_at, (all_parts / sum_all[:, None]).to(D), mask=goes)
