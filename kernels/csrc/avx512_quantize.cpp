// Making a quantized weight: scales, codes, errors, packed bits. Each row by itself, 16 weights at a time, in float32 whatever
// the weight is stored as; no copy of it is made but for a row.
#include "target.h"

#include "avx512_grid.h"
#include "quantize.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

// The rows of a weight as float32, one at a time.
class Rows {
  public:
    explicit Rows(const ql_groups &weight)
        : weight(weight), columns(weight.groups * weight.size), floats(weight.type == QL_FLOAT32 ? 0 : columns + 16, false) {}

    const float *operator[](int64_t row) {
        if (weight.type == QL_FLOAT32) return static_cast<const float *>(weight.values) + row * columns;
        load_row(weight.values, weight.type, row * columns, columns, floats.data);
        return floats.data;
    }
    bool failed() const { return !floats.block; }

  private:
    const ql_groups &weight;
    const int64_t columns;
    Buffer<float> floats;
};

QL_INLINE int64_t scale_row(const ql_groups &weight, int64_t row) {
    return weight.scale_rows == 1 ? 0 : row * weight.groups;
}

// What the squares of 16 inputs count.
QL_INLINE __m512 counted(const float *importance, int64_t first, __mmask16 there) {
    return importance ? _mm512_maskz_loadu_ps(there, importance + first) : _mm512_set1_ps(1.0f);
}

QL_INLINE float peak(const float *group, int64_t size) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i largest = _mm512_set1_epi32(int(largest_magnitude(group, QL_FLOAT32, 0, size)));
    for (int64_t k = 0; k < size; k += 16) {
        const __mmask16 there = first_lanes(size - k);
        const __m512i x = _mm512_castps_si512(_mm512_maskz_loadu_ps(there, group + k));
        const __mmask16 found = _mm512_mask_cmpeq_epu32_mask(there, _mm512_and_si512(x, magnitude), largest);
        if (found) return group[k + __builtin_ctz(found)];
    }
    return 0.0f;
}

// The scale that fits a group's codes best, of those tried so far.
//
// With codes that mean v, the best scale is <w, v> / <v, v> (in the metric of the importance), and the squared error that it
// leaves is <w, w> - <w, v>^2 / <v, v>: the larger that gain, the smaller the error. Four scales are tried at a time, which
// share what is loaded and how lanes are added up.
template <typename Grid>
struct Search {
    const Grid &grid;
    const float *group, *weighted, *importance;  // [size]; weighted: times the importance
    const int64_t size;
    float scale, gain;

    QL_INLINE void attempt(const float (&inverses)[4]) {
        importance ? attempt<true>(inverses) : attempt<false>(inverses);
    }

  private:
    template <bool IMPORTANCE>
    QL_INLINE void attempt(const float (&inverses)[4]) {
        __m512 dots[4] = {}, norms[4] = {};
        int64_t k = 0;
        for (; k + 16 <= size; k += 16) add<IMPORTANCE, false>(inverses, k, 0xffff, dots, norms);
        if (k < size) add<IMPORTANCE, true>(inverses, k, first_lanes(size - k), dots, norms);
        float dot[4], norm[4];
        _mm_storeu_ps(dot, add_lanes(dots));
        _mm_storeu_ps(norm, add_lanes(norms));
        for (int i = 0; i < 4; i++) {
            const float found = norm[i] > 0.0f ? dot[i] * dot[i] / norm[i] : 0.0f;
            if (!(found > gain)) continue;
            gain = found;
            if (norm[i] > 0.0f) scale = dot[i] / norm[i];
        }
    }

    template <bool IMPORTANCE, bool MASKED>
    QL_INLINE void add(const float (&inverses)[4], int64_t k, __mmask16 there, __m512 (&dots)[4], __m512 (&norms)[4]) const {
        const auto load = [&](const float *from) QL_INLINED {
            return MASKED ? _mm512_maskz_loadu_ps(there, from + k) : _mm512_loadu_ps(from + k);
        };
        const __m512 x = load(group), w = load(weighted), counts = IMPORTANCE ? load(importance) : zero();
        for (int i = 0; i < 4; i++) {
            __m512 v = grid.round(_mm512_mul_ps(x, _mm512_set1_ps(inverses[i])));
            if (MASKED) v = _mm512_maskz_mov_ps(there, v);
            dots[i] = _mm512_fmadd_ps(w, v, dots[i]);
            norms[i] = _mm512_fmadd_ps(IMPORTANCE ? _mm512_mul_ps(v, counts) : v, v, norms[i]);
        }
    }
};

QL_INLINE float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Calls function(x, first, there, step, shift) for 16 weights of a row at a time: they begin at input `first`, and those of a
// group share a scale and a zero.
template <typename Function>
QL_INLINE void for_scaled(const ql_groups &weight, int64_t n, const float *row, const Function &function) {
    for (int64_t g = 0; g < weight.groups; g++) {
        const int64_t at = scale_row(weight, n) + g;
        const __m512 step = _mm512_set1_ps(weight.scales[at]);
        const __m512 shift = _mm512_set1_ps(weight.zeros ? weight.zeros[at] : 0.0f);
        for (int64_t k = 0; k < weight.size; k += 16) {
            const __mmask16 there = first_lanes(weight.size - k);
            const int64_t first = g * weight.size + k;
            function(_mm512_maskz_loadu_ps(there, row + first), first, there, step, shift);
        }
    }
}

}  // namespace

bool avx512_peaks(const ql_groups &weight, int64_t begin, int64_t end, float *peaks) {
    Rows rows(weight);
    if (rows.failed()) return false;
    for (int64_t n = begin; n < end; n++) {
        const float *row = rows[n];
        for (int64_t g = 0; g < weight.groups; g++) peaks[n * weight.groups + g] = peak(row + g * weight.size, weight.size);
    }
    return true;
}

bool avx512_search(const ql_groups &weight, const ql_grid &grid, const ql_search_steps &steps, int64_t begin, int64_t end,
                   float *scales) {
    const int64_t size = weight.size;
    Rows rows(weight);
    Buffer<float> weighted(steps.importance ? size : 0, false);
    if (rows.failed() || !weighted.block) return false;
    with_grid(grid, [&](const auto &rounding) {
        for (int64_t n = begin; n < end; n++) {
            const float *row = rows[n];
            for (int64_t g = 0; g < weight.groups; g++) {
                const float *group = row + g * size, *counts = steps.importance ? steps.importance + g * size : nullptr;
                for (int64_t k = 0; counts && k < size; k++) weighted[k] = group[k] * counts[k];
                const float start = weight.scales[scale_row(weight, n) + g];
                Search<std::decay_t<decltype(rounding)>> search = {
                    rounding, group, counts ? weighted.data : group, counts, size, start, -1.0f};
                for (int i = 0; i < steps.count; i += 4) {
                    float inverses[4];  // the last again where there are no four: it changes nothing
                    for (int j = 0; j < 4; j++)
                        inverses[j] = inverse_of(start) * steps.factors[i + j < steps.count ? i + j : steps.count - 1];
                    search.attempt(inverses);
                }
                for (int i = 0; i < steps.refits; i++) {
                    const float inverse = inverse_of(search.scale);
                    search.attempt({inverse, inverse, inverse, inverse});
                }
                scales[n * weight.groups + g] = search.scale;
            }
        }
    });
    return true;
}

bool avx512_nearest(const ql_groups &weight, const ql_grid &grid, int64_t begin, int64_t end, uint8_t *codes) {
    Rows rows(weight);
    if (rows.failed()) return false;
    with_grid(grid, [&](const auto &rounding) {
        for (int64_t n = begin; n < end; n++) {
            uint8_t *out = codes + n * weight.groups * weight.size;
            for_scaled(weight, n, rows[n], [&](__m512 x, int64_t first, __mmask16 there, __m512 step, __m512 shift) QL_INLINED {
                const __m512i code = rounding.code(_mm512_add_ps(_mm512_div_ps(x, step), shift));
                _mm_mask_storeu_epi8(out + first, there, _mm512_cvtepi32_epi8(code));
            });
        }
    });
    return true;
}

bool avx512_errors(const ql_groups &weight, const ql_grid &grid, const float *importance, const uint8_t *codes, int64_t begin,
                   int64_t end, float *errors, float *energies) {
    Rows rows(weight);
    if (rows.failed()) return false;
    with_grid(grid, [&](const auto &rounding) {
        for (int64_t n = begin; n < end; n++) {
            const uint8_t *own = codes + n * weight.groups * weight.size;
            __m512 error = zero(), energy = zero();
            for_scaled(weight, n, rows[n], [&](__m512 x, int64_t first, __mmask16 there, __m512 step, __m512 shift) QL_INLINED {
                const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, own + first));
                const __m512 units = _mm512_sub_ps(rounding.value(code), shift);
                // Rounded as decoding rounds it: a compiler would fuse a plain product with the difference.
                const __m512 decoded = _mm512_mul_round_ps(units, step, _MM_FROUND_CUR_DIRECTION);
                const __m512 off = _mm512_maskz_sub_ps(there, x, decoded);
                const __m512 counts = counted(importance, first, there);
                error = _mm512_fmadd_ps(_mm512_mul_ps(off, off), counts, error);
                energy = _mm512_fmadd_ps(_mm512_mul_ps(x, x), counts, energy);
            });
            errors[n] = _mm512_reduce_add_ps(error);
            energies[n] = _mm512_reduce_add_ps(energy);
        }
    });
    return true;
}

bool avx512_pack(const uint8_t *codes, int64_t columns, int bits, int64_t begin, int64_t end, uint8_t *packed) {
    const uint64_t used = 0x0101010101010101u * ((1u << bits) - 1);
    const int64_t width = (columns * bits + 7) / 8;
    for (int64_t n = begin; n < end; n++) {
        const uint8_t *row = codes + n * columns;
        uint8_t *out = packed + n * width;
        for (int64_t k = 0; k < columns; k += 8) {  // eight codes fill exactly `bits` bytes
            uint64_t unit = 0;
            const int64_t there = columns - k < 8 ? columns - k : 8, bytes = (there * bits + 7) / 8;
            memcpy(&unit, row + k, size_t(there));
            unit = _pext_u64(unit, used);
            if (out + 8 <= packed + n * width + width)
                memcpy(out, &unit, 8);  // what is behind the unit is written next
            else
                memcpy(out, &unit, size_t(bytes));
            out += bytes;
        }
    }
    return true;
}

}  // namespace quantlab

QL_TARGET_END

#else

namespace quantlab {
bool avx512_peaks(const ql_groups &, int64_t, int64_t, float *) { return false; }
bool avx512_search(const ql_groups &, const ql_grid &, const ql_search_steps &, int64_t, int64_t, float *) { return false; }
bool avx512_nearest(const ql_groups &, const ql_grid &, int64_t, int64_t, uint8_t *) { return false; }
bool avx512_errors(const ql_groups &, const ql_grid &, const float *, const uint8_t *, int64_t, int64_t, float *, float *) {
    return false;
}
bool avx512_pack(const uint8_t *, int64_t, int, int64_t, int64_t, uint8_t *) { return false; }
}  // namespace quantlab

#endif
