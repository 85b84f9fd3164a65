// Rows of activations as bytes with a scale each, for schemes that want them so; the numbers are those of
// quantlab_kernels.quantize_rows, which says what they are.
#include "target.h"

#include "avx512_scales.h"
#include "quantize.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

constexpr float kLeast = 1.17549435e-38f;  // the smallest scale that float32 holds with all its digits

void round_row(const void *x, int type, int64_t first, int64_t columns, int8_t *out, float *scale) {
    *scale = bits_to_float(largest_magnitude(x, type, first, columns)) / 127.0f;
    if (*scale < kLeast) *scale = 0.0f;
    if (!(*scale > 0.0f) || *scale > 3.0e38f) {  // zeros; not finite
        memset(out, 0, size_t(columns));
        return;
    }
    const __m512 step = _mm512_set1_ps(*scale);
    for (int64_t k = 0; k < columns; k += 16) {
        const __mmask16 there = first_lanes(columns - k);
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_div_ps(load_floats(x, type, first + k, there), step));
        _mm_mask_storeu_epi8(out + k, there, _mm512_cvtepi32_epi8(rounded));
    }
}

}  // namespace

bool avx512_round_rows(const void *x, int type, int64_t begin, int64_t end, int64_t columns, int8_t *out, float *scales) {
    for (int64_t m = begin; m < end; m++) round_row(x, type, m * columns, columns, out + m * columns, scales + m);
    return true;
}

}  // namespace quantlab

QL_TARGET_END

#else

namespace quantlab {
bool avx512_round_rows(const void *, int, int64_t, int64_t, int64_t, int8_t *, float *) { return false; }
}  // namespace quantlab

#endif
