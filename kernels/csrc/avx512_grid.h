// Rounding to a grid, 16 numbers at a time: the code of the nearest entry, and the entry itself.
#pragma once

#include "target.h"

#include "avx512_scales.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

// Consecutive integers: no table is needed.
struct Integers {
    explicit Integers(const ql_grid &grid)
        : low(_mm512_set1_ps(grid.values[0])), high(_mm512_set1_ps(grid.values[grid.count - 1])) {}

    QL_INLINE __m512 round(__m512 x) const {
        const __m512 rounded = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_min_ps(_mm512_max_ps(rounded, low), high);  // max gives its second operand for what is not a number
    }
    QL_INLINE __m512i code(__m512 x) const { return _mm512_cvtps_epi32(_mm512_sub_ps(round(x), low)); }
    QL_INLINE __m512 value(__m512i code) const { return _mm512_add_ps(_mm512_cvtepi32_ps(code), low); }

    const __m512 low, high;
};

// Up to 16, 32 or 64 entries: borders and values stay in registers, and a code is found a bit at a time.
template <int REGISTERS>
struct SmallTable {
    explicit SmallTable(const ql_grid &grid) {
        alignas(64) float below[16 * REGISTERS], entries[16 * REGISTERS];
        for (int i = 0; i < 16 * REGISTERS; i++) {
            below[i] = i > 0 && i < grid.count ? grid.borders[i - 1] : __builtin_inff();
            entries[i] = grid.values[i < grid.count ? i : grid.count - 1];
        }
        for (int i = 0; i < REGISTERS; i++) {
            borders[i] = _mm512_load_ps(below + 16 * i);
            values[i] = _mm512_load_ps(entries + 16 * i);
        }
    }

    static QL_INLINE __m512 looked_up(const __m512 (&table)[REGISTERS], __m512i at) {
        if constexpr (REGISTERS == 1) return _mm512_permutexvar_ps(at, table[0]);
        else if constexpr (REGISTERS == 2) return _mm512_permutex2var_ps(table[0], at, table[1]);
        else {
            const __mmask16 upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
            const __m512 low = _mm512_permutex2var_ps(table[0], at, table[1]);
            return _mm512_mask_mov_ps(low, upper, _mm512_permutex2var_ps(table[2], at, table[3]));
        }
    }
    QL_INLINE __m512i code(__m512 x) const {
        __m512i code = _mm512_setzero_si512();
        for (int bit = 8 * REGISTERS; bit; bit /= 2) {
            const __m512i higher = _mm512_or_si512(code, _mm512_set1_epi32(bit));
            code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(x, looked_up(borders, higher), _CMP_GT_OQ), higher);
        }
        return code;
    }
    QL_INLINE __m512 value(__m512i code) const { return looked_up(values, code); }
    QL_INLINE __m512 round(__m512 x) const { return value(code(x)); }

    __m512 borders[REGISTERS];  // the one below each entry: infinite below the first and behind the last, and nothing is above
    __m512 values[REGISTERS];
};

// Up to 256 entries: the upper four bits of a code as above, the others by gathering.
struct LargeTable {
    explicit LargeTable(const ql_grid &grid) {
        float coarse[16];
        for (int i = 0; i < 256; i++) {
            borders[i] = i > 0 && i < grid.count ? grid.borders[i - 1] : __builtin_inff();
            values[i] = grid.values[i < grid.count ? i : grid.count - 1];
            if (i % 16 == 0) coarse[i / 16] = borders[i];
        }
        sixteenths = _mm512_loadu_ps(coarse);
    }

    QL_INLINE __m512i code(__m512 x) const {
        __m512i code = _mm512_setzero_si512();
        for (int bit = 8; bit; bit /= 2) {
            const __m512i higher = _mm512_or_si512(code, _mm512_set1_epi32(bit));
            const __m512 border = _mm512_permutexvar_ps(higher, sixteenths);
            code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(x, border, _CMP_GT_OQ), higher);
        }
        code = _mm512_slli_epi32(code, 4);
        for (int bit = 8; bit; bit /= 2) {
            const __m512i higher = _mm512_or_si512(code, _mm512_set1_epi32(bit));
            const __m512 border = _mm512_i32gather_ps(higher, borders, 4);
            code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(x, border, _CMP_GT_OQ), higher);
        }
        return code;
    }
    QL_INLINE __m512 value(__m512i code) const { return _mm512_i32gather_ps(code, values, 4); }
    QL_INLINE __m512 round(__m512 x) const { return value(code(x)); }

    __m512 sixteenths;
    float borders[256], values[256];
};

// Calls `function` with the grid in the form that is quickest for it.
template <typename Function>
void with_grid(const ql_grid &grid, const Function &function) {
    if (!grid.borders) return function(Integers(grid));
    if (grid.count <= 16) return function(SmallTable<1>(grid));
    if (grid.count <= 32) return function(SmallTable<2>(grid));
    if (grid.count <= 64) return function(SmallTable<4>(grid));
    return function(LargeTable(grid));
}

}  // namespace
}  // namespace quantlab

QL_TARGET_END
#endif
