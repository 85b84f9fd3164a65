// How packed codes of each width become vectors of bfloat16, for AVX-512.
#pragma once

#include "target.h"

#include "job.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

// How codes of BITS are taken apart: kBlock codes a load, in kSteps vectors of 32 weights; float32 lane m of a product
// belongs to the codes from `first(m)` to `first(m) + kGrain - 1` of the block, and `permute` brings a
// block of activations into the same order.
template <int BITS, bool SHIFTS = (BITS == 1 || BITS == 2 || BITS == 4 || BITS == 8)>
struct Codes;

template <int BITS>
struct Codes<BITS, true> {
    static constexpr int kSteps = 16 / BITS, kBlock = 32 * kSteps, kGrain = 2 * kSteps, kBytes = 64;
    static int first(int lane) { return lane * kGrain; }
    static void permute(const uint16_t *x, uint16_t *out) {
        for (int step = 0; step < kSteps; step++)
            for (int lane = 0; lane < 32; lane++) out[32 * step + lane] = x[lane * kSteps + step];
    }

    __m512i table[BITS == 8 ? 8 : 1];

    explicit Codes(const uint16_t *values) {
        uint16_t repeated[BITS == 8 ? 256 : 32];
        constexpr int kSize = sizeof repeated / sizeof *repeated;
        for (int i = 0; i < kSize; i++) repeated[i] = values[i & ((1 << BITS) - 1)];
        for (int i = 0; i < kSize / 32; i++) table[i] = _mm512_loadu_si512(repeated + 32 * i);
    }

    static __m512i load(const uint8_t *codes) { return _mm512_loadu_si512(codes); }
    static __m512i load(const uint8_t *codes, int64_t bytes) {
        return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, unsigned(bytes)), codes);
    }
    static __m512i prepare(__m512i block) { return block; }

    template <int STEP>
    __m512i weights(__m512i block) const {
        __m512i index = STEP == 0 ? block : _mm512_srli_epi16(block, STEP * BITS);
        if constexpr (BITS < 8) {
            return _mm512_permutexvar_epi16(index, table[0]);
        } else {
            __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
            __mmask32 odd = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
            __m512i low = _mm512_mask_blend_epi16(odd, _mm512_permutex2var_epi16(table[0], index, table[1]),
                                                  _mm512_permutex2var_epi16(table[2], index, table[3]));
            __m512i high = _mm512_mask_blend_epi16(odd, _mm512_permutex2var_epi16(table[4], index, table[5]),
                                                   _mm512_permutex2var_epi16(table[6], index, table[7]));
            return _mm512_mask_blend_epi16(upper, low, high);
        }
    }
};

template <int BITS>
struct Codes<BITS, false> {
    static constexpr int kSteps = 2, kBlock = 64, kGrain = 16, kBytes = 8 * BITS;
    static int first(int lane) { return lane / 4 * kGrain; }
    // vpunpck works in quarters of 16 bytes: the first step has the lower 8 codes of each, the second the upper 8.
    static void permute(const uint16_t *x, uint16_t *out) {
        for (int step = 0; step < kSteps; step++)
            for (int quarter = 0; quarter < 4; quarter++)
                memcpy(out + 32 * step + 8 * quarter, x + 16 * quarter + 8 * step, 8 * sizeof *x);
    }

    __m512i gather, shifts;
    __m512i table[BITS == 7 ? 4 : 2];  // the low and the high bytes of 64 values; 7 bits: 128 values

    explicit Codes(const uint16_t *values) {
        uint8_t from[64], by[64];
        for (int i = 0; i < 64; i++) {
            from[i] = uint8_t(i / 8 * BITS + i % 8);  // eight codes take BITS bytes
            by[i] = uint8_t(i % 8 * BITS);
        }
        gather = _mm512_loadu_si512(from);
        shifts = _mm512_loadu_si512(by);
        if constexpr (BITS == 7) {
            for (int i = 0; i < 4; i++) table[i] = _mm512_loadu_si512(values + 32 * i);
        } else {
            uint8_t low[64], high[64];
            for (int i = 0; i < 64; i++) {
                low[i] = uint8_t(values[i & ((1 << BITS) - 1)]);
                high[i] = uint8_t(values[i & ((1 << BITS) - 1)] >> 8);
            }
            table[0] = _mm512_loadu_si512(low);
            table[1] = _mm512_loadu_si512(high);
        }
    }

    static __m512i load(const uint8_t *codes) { return _mm512_maskz_loadu_epi8(~0ull >> (64 - kBytes), codes); }
    static __m512i load(const uint8_t *codes, int64_t bytes) {
        return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, unsigned(bytes)), codes);
    }
    __m512i prepare(__m512i block) const {
        return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(gather, block));
    }

    template <int STEP>
    __m512i weights(__m512i block) const {
        if constexpr (BITS == 7) {
            __m512i index = STEP == 0 ? _mm512_unpacklo_epi8(block, block) : _mm512_unpackhi_epi8(block, block);
            __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
            return _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(table[0], index, table[1]),
                                           _mm512_permutex2var_epi16(table[2], index, table[3]));
        } else {
            __m512i low = _mm512_permutexvar_epi8(block, table[0]), high = _mm512_permutexvar_epi8(block, table[1]);
            return STEP == 0 ? _mm512_unpacklo_epi8(low, high) : _mm512_unpackhi_epi8(low, high);
        }
    }
};

template <int BITS>
int64_t padded(const ql_weight &weight) {
    constexpr int kBlock = Codes<BITS>::kBlock;
    return (weight.columns + kBlock - 1) / kBlock * kBlock;
}

// Activations in the order of the codes.
template <int BITS>
void permute(const ql_weight &weight, const uint16_t *x, uint16_t *out) {
    using C = Codes<BITS>;
    int64_t first = 0;
    for (; first + C::kBlock <= weight.columns; first += C::kBlock) C::permute(x + first, out + first);
    if (first == weight.columns) return;
    uint16_t last[C::kBlock] = {};
    memcpy(last, x + first, size_t(weight.columns - first) * sizeof *x);
    C::permute(last, out + first);
}

}  // namespace
}  // namespace quantlab

QL_TARGET_END
#endif
