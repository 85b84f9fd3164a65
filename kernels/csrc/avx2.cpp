// AVX2: codes become float32 by register tables, eight at a time, whatever their width: eight codes of b bits are b whole
// bytes, and pdep spreads them to a byte each.
#include "target.h"

#include "job.h"

#if QL_X86
#include <immintrin.h>

QL_TARGET_BEGIN("avx2,bmi2,fma,f16c")

namespace quantlab {
namespace {

float sum_of(__m256 lanes) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// `bits` bytes, and no more.
inline uint64_t load_bytes(const uint8_t *at, int bits, bool whole) {
    uint64_t word = 0;
    if (whole) memcpy(&word, at, 8);
    else memcpy(&word, at, size_t(bits));
    return word;
}

// What codes mean. Integers that follow each other are computed; others are looked up.
template <int BITS, bool INTEGERS>
struct Table {
    __m256 low, high, first;
    const float *values;

    explicit Table(const float *of) : first(_mm256_set1_ps(of[0])), values(of) {
        float repeated[16];
        for (int i = 0; i < 16; i++) repeated[i] = of[i & ((1 << (BITS < 4 ? BITS : 4)) - 1)];
        low = _mm256_loadu_ps(repeated);
        high = _mm256_loadu_ps(repeated + 8);
    }

    __m256 weights(uint64_t word) const {
        const uint64_t bytes = _pdep_u64(word, 0x0101010101010101ull * ((1u << BITS) - 1));
        const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes)));
        if constexpr (INTEGERS) return _mm256_add_ps(_mm256_cvtepi32_ps(index), first);
        if constexpr (BITS <= 3) return _mm256_permutevar8x32_ps(low, index);
        if constexpr (BITS == 4)
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
        return _mm256_i32gather_ps(values, index, 4);
    }
};

// Calls `function` with the weight's table.
template <int BITS, typename Function>
void with_table(const ql_weight &weight, const Function &function) {
    bool integers = true;
    for (int i = 1; i < weight.table_size; i++) integers = integers && weight.table[i] == weight.table[0] + float(i);
    if (integers) function(Table<BITS, true>(weight.table));
    else function(Table<BITS, false>(weight.table));
}

struct Row {
    const uint8_t *codes;
    int64_t bytes;

    // Whether eight bytes from `at` on can be read.
    bool whole(int64_t at) const { return at + 8 <= bytes; }
};

template <int BITS, int M, typename T>
void multiply_rows(const Job &job, const T &table, int64_t begin, int64_t end) {
    constexpr int kSums = M == 1 ? 4 : 1;  // under way at a time: a product waits for the sum that it is added to
    const ql_weight &weight = *job.weight;
    const float *x = static_cast<const float *>(job.x);
    Buffer<float> scales(weight.groups), zeros(weight.groups);
    for (int64_t output = begin; output < end; output++) {
        load_floats(weight.scales, weight.scale_type, scale_row(weight, output), weight.groups, scales.data);
        if (weight.zeros)
            load_floats(weight.zeros, weight.zero_type, scale_row(weight, output), weight.groups, zeros.data);
        const Row row = {weight.codes + output * job.row_bytes, job.row_bytes};
        __m256 total[M];
        float shift[M] = {};
        for (int m = 0; m < M; m++) total[m] = _mm256_setzero_ps();
        for (int64_t g = 0, k = 0; g < weight.groups; g++) {
            __m256 part[kSums][M];
            for (int i = 0; i < kSums * M; i++) part[i / M][i % M] = _mm256_setzero_ps();
            const auto add = [&](__m256 (&to)[M], int64_t from, bool whole) QL_INLINED {
                const int64_t at = from / 8 * BITS;
                const int left = int(row.bytes - at < BITS ? row.bytes - at : BITS);
                const __m256 weights = table.weights(load_bytes(row.codes + at, left, whole));
                for (int m = 0; m < M; m++)
                    to[m] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + m * job.x_stride + from), to[m]);
            };
            const int64_t stop = k + job.group;
            for (; k + 8 * kSums <= stop && row.whole((k / 8 + kSums - 1) * BITS); k += 8 * kSums) {
#pragma GCC unroll 4
                for (int i = 0; i < kSums; i++) add(part[i], k + 8 * i, true);
            }
            for (; k < stop; k += 8) add(part[0], k, row.whole(k / 8 * BITS));
            const __m256 scale = _mm256_set1_ps(scales[g]);
            for (int m = 0; m < M; m++) {
                for (int i = 1; i < kSums; i++) part[0][m] = _mm256_add_ps(part[0][m], part[i][m]);
                total[m] = _mm256_fmadd_ps(part[0][m], scale, total[m]);
                if (weight.zeros) shift[m] += scales[g] * zeros[g] * job.sums[m * weight.groups + g];
            }
        }
        for (int m = 0; m < M; m++) job.y[m * weight.outputs + output] = sum_of(total[m]) - shift[m];
    }
}

template <int BITS, typename T>
void multiply(const Job &job, const T &table, int64_t begin, int64_t end) {
    Job part = job;
    for (int64_t done = 0; done < job.rows; done += part.rows) {
        part.x = static_cast<const float *>(job.x) + done * job.x_stride;
        part.y = job.y + done * job.weight->outputs;
        part.sums = job.sums ? job.sums + done * job.weight->groups : nullptr;
        part.rows = job.rows - done >= 4 ? 4 : 1;
        if (part.rows == 4) multiply_rows<BITS, 4>(part, table, begin, end);
        else multiply_rows<BITS, 1>(part, table, begin, end);
    }
}

template <int BITS, typename T>
void decode(const ql_weight &weight, const T &table, void *out, int type, int64_t begin, int64_t end) {
    const int64_t row_bytes = (weight.columns * BITS + 7) / 8, group = weight.columns / weight.groups;
    for (int64_t output = begin; output < end; output++) {
        const Row row = {weight.codes + output * row_bytes, row_bytes};
        for (int64_t k = 0; k < weight.columns; k += 8) {
            const int64_t at = k / 8 * BITS, scale_at = scale_row(weight, output) + k / group;
            const int left = int(row.bytes - at < BITS ? row.bytes - at : BITS);
            const float scale = load_as_float(weight.scales, weight.scale_type, scale_at);
            const float zero = weight.zeros ? load_as_float(weight.zeros, weight.zero_type, scale_at) : 0.0f;
            float values[8];
            _mm256_storeu_ps(values, _mm256_mul_ps(_mm256_sub_ps(table.weights(load_bytes(row.codes + at, left,
                                                                                          row.whole(at))),
                                                                 _mm256_set1_ps(zero)),
                                                   _mm256_set1_ps(scale)));
            const int64_t count = weight.columns - k < 8 ? weight.columns - k : 8;
            for (int64_t i = 0; i < count; i++)
                store_float(out, type, (output - begin) * weight.columns + k + i, values[i]);
        }
    }
}

float dot(const void *row, int type, int64_t first, const float *x, int64_t count) {
    __m256 sum = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        float values[8];
        load_floats(row, type, first + i, 8, values);
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(values), _mm256_loadu_ps(x + i), sum);
    }
    float total = sum_of(sum);
    for (; i < count; i++) total += load_as_float(row, type, first + i) * x[i];
    return total;
}

}  // namespace

const Kernel *avx2_kernel() {
    static const Kernel kernel = {
        /* input */ Input::kFloats,
        /* supports */
        [](const ql_weight &weight) { return weight.groups == 1 || weight.columns / weight.groups % 8 == 0; },
        /* padded */ [](const ql_weight &weight) { return (weight.columns + 7) / 8 * 8; },
        /* permute */ nullptr,
        /* quantize */ nullptr,
        /* multiply */
        [](const Job &job, int64_t begin, int64_t end) {
            with_bits(job.weight->bits, [&](auto bits) {
                constexpr int kBits = decltype(bits)::value;
                with_table<kBits>(*job.weight, [&](const auto &table) { multiply<kBits>(job, table, begin, end); });
            });
        },
        /* decode */
        [](const ql_weight &weight, void *out, int type, int64_t begin, int64_t end) {
            with_bits(weight.bits, [&](auto bits) {
                constexpr int kBits = decltype(bits)::value;
                with_table<kBits>(weight, [&](const auto &table) { decode<kBits>(weight, table, out, type, begin, end); });
            });
        },
        dot,
    };
    return &kernel;
}

}  // namespace quantlab

QL_TARGET_END

#else

namespace quantlab {
const Kernel *avx2_kernel() { return nullptr; }
}  // namespace quantlab

#endif
