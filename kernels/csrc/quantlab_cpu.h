// The C interface of the CPU kernels: raw pointers in, raw pointers out, no Python and no torch.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

typedef enum { QL_FLOAT32, QL_FLOAT16, QL_BFLOAT16, QL_INT8, QL_E8M0 } ql_type;
// QL_AVX512_INT8 rounds activations to 8 bits, for tables of consecutive integers: faster, and less exact. It has to be asked
// for; all others round results only.
typedef enum { QL_SCALAR, QL_AVX2, QL_AVX512, QL_AVX512_INT8 } ql_isa;

// y = x W^T + (x right^T) left^T + bias, with W[n, k] = (table[code[n, k]] - zero[n, g]) * scale[n, g].
// Codes are dense little-endian bit streams, a row at a time; a group g is `columns / groups` neighbouring inputs.
typedef struct {
    const uint8_t *codes;   // [outputs, (columns * bits + 7) / 8]
    const void *scales;     // [scale_rows, groups], scale_rows 1 or outputs
    const void *zeros;      // like scales, or null
    const float *table;     // [table_size]
    const void *bias;       // [outputs], or null
    const void *left;       // [outputs, rank], or null
    const void *right;      // [rank, columns]
    int64_t outputs, columns, groups, scale_rows, rank;
    int32_t bits, table_size;
    int32_t scale_type, zero_type, bias_type, left_type, right_type;
} ql_weight;

// The best instruction set that this machine has and that was compiled, QL_AVX512_INT8 aside.
int ql_best_isa(void);

// The best one, `at_most` that, for this weight and so many rows of activations of this type. QL_SCALAR takes everything.
int ql_choose(const ql_weight *weight, int activation_type, int64_t rows, int at_most);

// x [rows, columns] times `count` weights, whose outputs stand side by side in y [rows, sum of outputs]; x and y are of
// `activation_type`. Each weight is run by what `ql_choose` says for it. Weights that are next to each other and stored alike
// share the preparation of x and are divided among the threads as one, so one call is faster than several; the result is the
// same, and does not depend on `threads`. Returns 0, or 1 where memory ran out.
int ql_linear(const ql_weight *weights, int count, const void *x, void *y, int64_t rows, int activation_type, int at_most,
              int threads);

// The most rows for which codes are multiplied as they are stored. For more it is faster to decode panels of the weight,
// rounded to what activations are.
int64_t ql_few_rows(const ql_weight *weight, int activation_type, int at_most);

// The most rows that `ql_linear` should be given: no limit where it decodes panels itself (QL_AVX512 and bfloat16), else
// `ql_few_rows`, and `ql_decode` is for whoever multiplies them. With a low-rank term always `ql_few_rows`: for many rows that
// is two products of its own.
int64_t ql_most_rows(const ql_weight *weight, int activation_type, int at_most);

// The weights of the outputs begin..end, [end - begin, columns] of `type`. For QL_SCALAR and QL_AVX2.
int ql_decode(const ql_weight *weight, void *out, int64_t begin, int64_t end, int type, int isa, int threads);

// The rest makes weights rather than running them. It returns 1, and does nothing, without QL_AVX512 (or without memory).

// What codes mean: ascending values, and what lies above border i has a code above i. Without borders the values are
// consecutive integers, and what lies between two is rounded to the even one.
typedef struct {
    const float *values;   // [count]
    const float *borders;  // [count - 1], or null
    int32_t count;         // 2 to 256
} ql_grid;

// A weight in groups of neighbouring inputs, each with a scale.
typedef struct {
    const void *values;   // [rows, groups * size] of `type`: one that activations have
    const float *scales;  // [scale_rows, groups], scale_rows 1 or rows; null where they are asked for
    const float *zeros;   // like scales, or null
    int64_t rows, groups, size, scale_rows;
    int32_t type;
} ql_groups;

// The element of largest magnitude of each group, with its sign; of several the first. [rows, groups]
int ql_peaks(const ql_groups *weight, float *peaks, int threads);

// How scales are searched for.
typedef struct {
    const float *importance;  // [groups * size], what the squared error of an input counts, or null: all alike
    const float *factors;     // [count], of the inverse of the scale that the search starts with
    int32_t count, refits;
} ql_search_steps;

// Scales [rows, groups] that leave a small squared error: the search starts with `weight->scales`, rounds with each of the factors,
// then with the best so far, and each time fits a scale to the codes by least squares. Without zeros; a scale of 0 stays.
int ql_search(const ql_groups *weight, const ql_grid *grid, const ql_search_steps *steps, float *scales, int threads);

// The code nearest to each weight / scale + zero. What is not a number gets code 0. [rows, groups * size]
int ql_nearest(const ql_groups *weight, const ql_grid *grid, uint8_t *codes, int threads);

// Of each row the sum of (w - (value - zero) * scale)^2 and of w^2, each square times `importance` [groups * size], if not null.
// [rows]
int ql_errors(const ql_groups *weight, const ql_grid *grid, const float *importance, const uint8_t *codes, float *errors,
              float *energies, int threads);

// Codes [rows, columns] of `bits` as dense little-endian bit streams [rows, (columns * bits + 7) / 8].
int ql_pack(const uint8_t *codes, int64_t rows, int64_t columns, int32_t bits, uint8_t *packed, int threads);

// x [rows, columns] as integers from -127 to 127 and a scale a row.
int ql_round_rows(const void *x, int type, int64_t rows, int64_t columns, int8_t *out, float *scales, int threads);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
