// The C interface of quantizing: rows are divided among threads, and what becomes of one depends on nothing else.
#include "quantize.h"

#include <atomic>

#include "threads.h"

using namespace quantlab;

namespace {

// Calls function(begin, end) for parts of the rows; 1 where one of the calls failed.
template <typename Function>
int for_rows(int64_t rows, int64_t columns, int threads, const Function &function) {
    if (ql_best_isa() < QL_AVX512) return 1;
    std::atomic<bool> failed(false);
    divide(rows, threads, rows * columns, [&](int64_t begin, int64_t end) {
        if (!function(begin, end)) failed = true;
    });
    return failed;
}

int64_t columns_of(const ql_groups &weight) { return weight.groups * weight.size; }

}  // namespace

int ql_peaks(const ql_groups *weight, float *peaks, int threads) {
    return for_rows(weight->rows, columns_of(*weight), threads, [&](int64_t begin, int64_t end) {
        return avx512_peaks(*weight, begin, end, peaks);
    });
}

int ql_search(const ql_groups *weight, const ql_grid *grid, const ql_search_steps *steps, float *scales, int threads) {
    return for_rows(weight->rows, columns_of(*weight) * steps->count, threads, [&](int64_t begin, int64_t end) {
        return avx512_search(*weight, *grid, *steps, begin, end, scales);
    });
}

int ql_nearest(const ql_groups *weight, const ql_grid *grid, uint8_t *codes, int threads) {
    return for_rows(weight->rows, columns_of(*weight), threads, [&](int64_t begin, int64_t end) {
        return avx512_nearest(*weight, *grid, begin, end, codes);
    });
}

int ql_errors(const ql_groups *weight, const ql_grid *grid, const float *importance, const uint8_t *codes, float *errors,
              float *energies, int threads) {
    return for_rows(weight->rows, columns_of(*weight), threads, [&](int64_t begin, int64_t end) {
        return avx512_errors(*weight, *grid, importance, codes, begin, end, errors, energies);
    });
}

int ql_pack(const uint8_t *codes, int64_t rows, int64_t columns, int bits, uint8_t *packed, int threads) {
    return for_rows(rows, columns, threads, [&](int64_t begin, int64_t end) {
        return avx512_pack(codes, columns, bits, begin, end, packed);
    });
}

int ql_round_rows(const void *x, int type, int64_t rows, int64_t columns, int8_t *out, float *scales, int threads) {
    return for_rows(rows, columns, threads, [&](int64_t begin, int64_t end) {
        return avx512_round_rows(x, type, begin, end, columns, out, scales);
    });
}
