// Products of many rows, for AVX-512: bfloat16 weights that were decoded a panel at a time, and stay in cache meanwhile.
//
// A tile is 6 rows times 4 outputs, 24 sums in registers; a step multiplies 32 neighbouring columns of all of them, with ten
// loads for 24 products. Lanes are columns, as in the products of few rows, so that weights need no further order.
#pragma once

#include "target.h"

#include "avx512_scales.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

constexpr int kTileRows = 6, kTileOutputs = 4;
constexpr int64_t kPanelColumns = 2048;  // 4 outputs are 16 KB, in the first-level cache
constexpr int64_t kRowsAhead = 8;        // of codes that are fetched: parts of rows are too short for the processor to follow

// y [M, 4] = or += x [M, columns] w [4, columns]^T.
template <int M>
void multiply_panel_tile(const uint16_t *x, int64_t x_stride, const uint16_t *w, int64_t w_stride, int64_t columns, float *y,
                         int64_t y_stride, __mmask8 outputs, bool add) {
    __m512 sums[M][kTileOutputs];
    unrolled<M * kTileOutputs>([&](auto i) QL_INLINED { sums[i / kTileOutputs][i % kTileOutputs] = _mm512_setzero_ps(); });
    for (int64_t k = 0; k < columns; k += 32) {
        __m512bh weights[kTileOutputs];
        unrolled<kTileOutputs>([&](auto n) QL_INLINED { weights[n] = (__m512bh)_mm512_load_si512(w + n * w_stride + k); });
        unrolled<M>([&](auto m) QL_INLINED {
            const __m512bh activations = (__m512bh)_mm512_load_si512(x + m * x_stride + k);
            unrolled<kTileOutputs>([&](auto n) QL_INLINED {
                sums[m][n] = _mm512_dpbf16_ps(sums[m][n], activations, weights[n]);
            });
        });
    }
    unrolled<M>([&](auto m) QL_INLINED {
        __m128 sum = add_lanes(sums[m]);
        float *to = y + m * y_stride;
        if (add) sum = _mm_add_ps(sum, _mm_maskz_loadu_ps(outputs, to));
        _mm_mask_storeu_ps(to, outputs, sum);
    });
}

// y [rows, outputs] = or += x [rows, columns] w [outputs, columns]^T, with `w` readable up to a multiple of four outputs.
// Columns are a multiple of 32, and every row begins on a cache line.
inline void multiply_panel(const uint16_t *x, int64_t x_stride, int64_t rows, const uint16_t *w, int64_t w_stride,
                           int64_t outputs, int64_t columns, float *y, int64_t y_stride, bool add) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;  // none is much smaller
        for (int64_t n = 0; n < outputs; n += kTileOutputs) {
            const __mmask8 there = outputs - n >= kTileOutputs ? 0xf : __mmask8((1 << (outputs - n)) - 1);
            const auto multiply = [&](auto m) QL_INLINED {
                multiply_panel_tile<decltype(m)::value>(x + first * x_stride, x_stride, w + n * w_stride, w_stride, columns,
                                                        y + first * y_stride + n, y_stride, there, add);
            };
            switch (count) {
                case 6: multiply(std::integral_constant<int, 6>()); break;
                case 5: multiply(std::integral_constant<int, 5>()); break;
                case 4: multiply(std::integral_constant<int, 4>()); break;
                case 3: multiply(std::integral_constant<int, 3>()); break;
                case 2: multiply(std::integral_constant<int, 2>()); break;
                default: multiply(std::integral_constant<int, 1>());
            }
        }
    }
}

// A lane's two weights share its scale: the even ones are the lower halves of 32 bits, the odd ones the upper halves.
template <typename C>
QL_INLINE void store_steps(const C &codes, __m512i block, __m512 scale, __m512 shift, __m512i together,
                           uint16_t *out) {
    unrolled<C::kSteps>([&](auto step) QL_INLINED {
        __m512 even = zero(), odd = zero();
        unrolled<C::kTerms>([&](auto term) QL_INLINED {
            const __m512i words = codes.weights(block, step, term);
            const __m512 lower = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
            const __m512 upper = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))));
            even = term ? _mm512_add_ps(even, lower) : lower;
            odd = term ? _mm512_add_ps(odd, upper) : upper;
        });
        const __m512bh apart = _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(odd, scale, shift), _mm512_fmadd_ps(even, scale, shift));
        _mm512_storeu_si512(out + 32 * step, _mm512_permutexvar_epi16(together, (__m512i)apart));
    });
}

// What brings 16 even and 16 odd weights into their places.
QL_INLINE __m512i even_odd() {
    uint16_t from[32];
    for (int i = 0; i < 32; i++) from[i] = uint16_t(i / 2 + i % 2 * 16);
    return _mm512_loadu_si512(from);
}

// Decodes some blocks of some outputs to bfloat16, in the order of the activations.
template <typename C>
struct Decoder {
    Decoder(const ql_weight &weight, const C &codes)
        : weight(weight),
          codes(codes),
          scaling(weight),
          scales(weight, weight.scales, weight.scale_type, 1),
          zeros(weight, weight.zeros, weight.zero_type, 1) {}

    void decode(int64_t begin, int64_t end, int64_t first_block, int64_t blocks, uint16_t *out, int64_t stride) {
        for (int64_t output = begin; output < end; output++, out += stride)
            decode_row(output, first_block, first_block + blocks, out - first_block * C::kBlock);
    }

    void decode_row(int64_t output, int64_t first_block, int64_t end_block, uint16_t *out) {
        const int64_t row_bytes = (weight.columns * C::kBits + 7) / 8;
        const float *row_scales = scales.of(output, 1), *row_zeros = zeros.of(output, 1);
        const uint8_t *row = weight.codes + output * row_bytes;
        for (int64_t block = first_block; block < end_block; block++) {
            _mm_prefetch(reinterpret_cast<const char *>(row + kRowsAhead * row_bytes + block * C::kBytes), _MM_HINT_T1);
            const int64_t left = row_bytes - block * C::kBytes;
            const __m512i loaded = left >= C::kBytes ? C::load(row + block * C::kBytes)
                                                     : C::load(row + block * C::kBytes, left);
            const __m512 scale = lane_scales(scaling, row_scales, block);
            const __m512 shift =
                weight.zeros ? _mm512_fnmadd_ps(scale, lane_scales(scaling, row_zeros, block), zero()) : zero();
            store_steps<C>(codes, codes.prepare(loaded), scale, shift, together, out + block * C::kBlock);
        }
    }

    const ql_weight &weight;
    const C codes;
    const ScalingOf<C> scaling;
    const __m512i together = even_odd();
    ScaleRows scales, zeros;
};

// Outputs begin..end, no more than a panel has: decoded into cache some columns at a time, and multiplied there.
template <typename C>
void multiply_panels(const Job &job, const C &codes, int64_t begin, int64_t end) {
    constexpr int64_t kStride = kPanelColumns + 32;  // rows a power of two apart fall onto each other in the cache
    Decoder<C> decoder(*job.weight, codes);
    Buffer<uint16_t> panel(kPanelOutputs * kStride, false);
    const auto *x = static_cast<const uint16_t *>(job.x);
    const int64_t all = padded<C>(*job.weight);
    for (int64_t first = 0; first < all; first += kPanelColumns) {
        const int64_t columns = all - first < kPanelColumns ? all - first : kPanelColumns;
        decoder.decode(begin, end, first / C::kBlock, columns / C::kBlock, panel.data, kStride);
        multiply_panel(x + first, job.x_stride, job.rows, panel.data, kStride, end - begin, columns, job.y + begin,
                       job.weight->outputs, first > 0);
    }
}

}  // namespace
}  // namespace quantlab

QL_TARGET_END
#endif
