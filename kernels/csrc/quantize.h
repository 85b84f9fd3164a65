// Quantizing, for AVX-512: rows begin..end, declared where it is implemented and where it is called.
#pragma once

#include "quantlab_cpu.h"

namespace quantlab {

// False where there was no memory for a row, or where they were compiled for another processor.
bool avx512_peaks(const ql_groups &weight, int64_t begin, int64_t end, float *peaks);
bool avx512_search(const ql_groups &weight, const ql_grid &grid, const ql_search_steps &steps, int64_t begin, int64_t end,
                   float *scales);
bool avx512_nearest(const ql_groups &weight, const ql_grid &grid, int64_t begin, int64_t end, uint8_t *codes);
bool avx512_errors(const ql_groups &weight, const ql_grid &grid, const float *importance, const uint8_t *codes, int64_t begin,
                   int64_t end, float *errors, float *energies);
bool avx512_pack(const uint8_t *codes, int64_t columns, int bits, int64_t begin, int64_t end, uint8_t *packed);
bool avx512_round_rows(const void *x, int type, int64_t begin, int64_t end, int64_t columns, int8_t *out, float *scales);

}  // namespace quantlab
