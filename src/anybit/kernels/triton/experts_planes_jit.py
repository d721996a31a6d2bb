# mypy: ignore-errors
"""Device code of the experts of a layer: `matmul_kernel` of planes_kernels.py for segments of rows, each of one expert.

A segment is a run of x's rows that one expert multiplies; which expert, where the run begins and how long it is are
read from memory, so that a captured graph follows what the router says. Launched by `experts.py`.
"""

import triton
import triton.language as tl

from anybit.kernels.triton.planes_kernels import matmul_kernel


@triton.jit
def experts_kernel(
    x_ptr, c0_ptr, c1_ptr, c2_ptr, s_ptr, ss_ptr, z_ptr, a_ptr, as_ptr, row_ptr, table_ptr, token_ptr, bias_ptr, o_ptr,
    part_ptr, count_ptr, expert_ptr, first_ptr, length_ptr, N, NP, K, KP, x_stride, z_stride, mult,
    c0_step, c1_step, c2_step, s_step, ss_step, z_step, a_step, as_step,
    DECODE: tl.constexpr, BITS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, P: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, G: tl.constexpr, SCALING: tl.constexpr, SKIND: tl.constexpr,
    SSUPER: tl.constexpr, SWORDS: tl.constexpr, SSIGNED: tl.constexpr, ZERO: tl.constexpr, ZEROS: tl.constexpr,
    ADD: tl.constexpr, AKIND: tl.constexpr, ASUPER: tl.constexpr, AWORDS: tl.constexpr, ASIGNED: tl.constexpr,
    MANTISSA: tl.constexpr, BIAS_E: tl.constexpr, SPECIAL: tl.constexpr, ROUND: tl.constexpr, TERMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out [rows of all segments, N]: program (tile of rows of W, part of K, segment).

    expert_ptr, first_ptr, length_ptr   int32, a segment's expert (negative: none), first row and rows, at most BM
    *_step   elements from one expert's tensor to the next one's; rows, biases: NP, N
    """
    segment = tl.program_id(2)
    expert = tl.load(expert_ptr + segment)
    length = tl.load(length_ptr + segment)
    if (expert >= 0) & (length > 0):
        e = expert.to(tl.int64)
        first = tl.load(first_ptr + segment).to(tl.int64)
        matmul_kernel(
            x_ptr + first * x_stride, c0_ptr + e * c0_step, c1_ptr + e * c1_step, c2_ptr + e * c2_step,
            s_ptr + e * s_step, ss_ptr + e * ss_step, z_ptr + e * z_step, a_ptr + e * a_step, as_ptr + e * as_step,
            row_ptr + e * NP, table_ptr, token_ptr + first, bias_ptr + e * N, o_ptr + first * N,
            part_ptr + first * N * tl.num_programs(1), count_ptr + segment * tl.num_programs(0), length, N, NP, K, KP,
            x_stride, z_stride, mult,
            DECODE, BITS, W0, W1, W2, P, F, R, G, SCALING, SKIND, SSUPER, SWORDS, SSIGNED, ZERO, ZEROS, ADD, AKIND,
            ASUPER, AWORDS, ASIGNED, MANTISSA, BIAS_E, SPECIAL, ROUND, TERMS, BM, BN, SPLIT, TOKENS, BIAS, EVEN, ASM,
            False,
        )  # fmt: skip
