/* 16-bit floats in plain C, rounding half to even; after the FP16 library's formulas (MIT, M. Dukhan). */
#ifndef ANYBIT_FLOATS_H
#define ANYBIT_FLOATS_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint32_t bits_of_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline float half_to_float(uint16_t half) {
    const uint32_t word = (uint32_t)half << 16, twice = word + word;
    const float normal = float_of_bits((twice >> 4) + 0x70000000u) * 0x1p-112f;
    const float subnormal = float_of_bits((twice >> 17) | 0x3f000000u) - 0.5f;
    return float_of_bits((word & 0x80000000u) | bits_of_float(twice < 0x08000000u ? subnormal : normal));
}

static inline uint16_t float_to_half(float f) {
    const uint32_t word = bits_of_float(f), twice = word + word;
    const float magnitude = float_of_bits(word & 0x7fffffffu) * 0x1p112f * 0x1p-110f;
    const uint32_t exponent = twice & 0xff000000u;
    const uint32_t least = exponent < 0x71000000u ? 0x71000000u : exponent;
    const float shifted = float_of_bits((least >> 1) + 0x07800000u) + magnitude;
    const uint32_t bits = bits_of_float(shifted), finite = ((bits >> 13) & 0x7c00u) + (bits & 0xfffu);
    return (uint16_t)((word >> 16 & 0x8000u) | (twice > 0xff000000u ? 0x7e00u : finite));
}

static inline float bfloat_to_float(uint16_t b) { return float_of_bits((uint32_t)b << 16); }

static inline uint16_t float_to_bfloat(float f) {
    const uint32_t bits = bits_of_float(f);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded);
}

#endif
