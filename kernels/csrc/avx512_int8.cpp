// AVX-512 VNNI: activations are rounded to 8 bits, 32 inputs sharing a scale, and multiplied with codes as they are, by
// vpdpbusd: 64 products an instruction, no table. For tables of consecutive integers; the first of them is taken off at the
// end with the zeros, by the sums of the activations.
//
// What it computes is the exact product with rounded activations (each is off by up to 1/254 of the largest of its 32),
// summed in integers over 4 to 32 inputs and in float32 from there.
#include "target.h"

#include "avx512_scales.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

constexpr int kSharing = 32;  // inputs that share a scale

// How codes of BITS become bytes: each byte of a block holds kSteps neighbouring codes, one for each step. Widths that do not
// divide 8 are spread to bytes first.
template <int BITS>
struct Bytes {
    static constexpr bool kWhole = 8 % BITS == 0;
    static constexpr int kSteps = kWhole ? 8 / BITS : BITS == 3 ? 2 : 1;
    static constexpr int kBlock = 64 * kSteps, kGrain = 4 * kSteps, kBytes = kBlock * BITS / 8;
    static_assert(kSharing % kGrain == 0, "a lane has one scale");
    static int first(int lane) { return lane * kGrain; }

    __m512i gather, shifts;

    Bytes() : gather(_mm512_setzero_si512()), shifts(_mm512_setzero_si512()) {
        uint8_t from[64], by[64];
        for (int i = 0; i < 64; i++) {
            from[i] = uint8_t(i / 8 * BITS * kSteps + i % 8);
            by[i] = uint8_t(i % 8 * BITS * kSteps);
        }
        gather = _mm512_loadu_si512(from);
        shifts = _mm512_loadu_si512(by);
    }

    // `bytes` of a block, or all of them.
    __m512i load(const uint8_t *codes, int64_t bytes = kBytes) const {
        if (kBytes == 64 && bytes == 64) return _mm512_loadu_si512(codes);
        const __m512i loaded = _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, unsigned(bytes)), codes);
        if constexpr (kWhole) return loaded;
        return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(gather, loaded));
    }

    static __m512i codes(__m512i block, int step) {
        const __m512i shifted = step ? _mm512_srli_epi16(block, unsigned(step * BITS)) : block;
        return BITS == 8 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1));
    }
};

// ------------------------------------------------------------------------------------------------------------ activations

// The largest magnitude of 32; NaN, where there is one, is larger than any.
QL_INLINE float largest(__m512 left, __m512 right) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i bits = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(left), magnitude),
                                          _mm512_and_si512(_mm512_castps_si512(right), magnitude));
    return bits_to_float(_mm512_reduce_max_epu32(bits));
}

// Below that a block is zero: 127 divided by it would be infinite.
constexpr float kLeast = 0x1p-100f;

// Up to 32 activations as bytes. Returns what their scale is; `sum` is that of the bytes.
QL_INLINE float round_block(const float *x, int64_t count, int8_t *out, int32_t *sum) {
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(count), x);
    const __m512 high = _mm512_maskz_loadu_ps(count > 16 ? first_lanes(count - 16) : __mmask16(0), x + 16);
    const float most = largest(low, high);
    const __m512 by = _mm512_set1_ps(most < kLeast ? 0.0f : 127.0f / most);
    const __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(low, by)), right = _mm512_cvtps_epi32(_mm512_mul_ps(high, by));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtsepi32_epi8(left));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out + 16), _mm512_cvtsepi32_epi8(right));
    *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(left, right));
    return most < kLeast ? 0.0f : most * (1.0f / 127.0f);
}

template <int BITS>
void quantize(const ql_weight &weight, const float *x, int8_t *out, float *scales, float *sums) {
    using B = Bytes<BITS>;
    const int64_t width = padded<B>(weight), group = weight.columns / weight.groups;
    Buffer<int8_t> rounded(width);
    Buffer<float> shared(width / kSharing);
    int64_t g = 0, end = group;  // of the group that `first` is in
    for (int64_t first = 0; first < weight.columns; first += kSharing) {
        const int64_t stop = first + kSharing < weight.columns ? first + kSharing : weight.columns;
        int32_t sum;
        const float scale = round_block(x + first, stop - first, rounded.data + first, &sum);
        shared[first / kSharing] = scale;
        if (stop <= end) {
            sums[g] += scale * float(sum);
        } else {  // more than one group's
            for (int64_t k = first; k < stop; k++) {
                if (k == end) g++, end += group;
                sums[g] += scale * float(rounded[k]);
            }
        }
        if (stop == end) g++, end += group;
    }
    for (int64_t begin = 0; begin < width; begin += B::kBlock) {
        deal<int8_t, B::kSteps>(rounded.data + begin, out + begin);
        for (int lane = 0; lane < 16; lane++)
            scales[begin / B::kBlock * 16 + lane] = shared[(begin + B::first(lane)) / kSharing];
    }
}

// --------------------------------------------------------------------------------------------------------------- products

// R neighbouring outputs and M rows of activations.
template <int BITS>
struct Tile {
    Bytes<BITS> bytes;
    Scaling scaling;
    const uint8_t *rows;  // [R, row_bytes]
    int64_t row_bytes;
    const int8_t *x;  // [M, x_stride]
    int64_t x_stride;
    const float *x_scales;  // [M, x_scale_stride]
    int64_t x_scale_stride;
    const float *scales, *shifts;  // [R, scale_stride]: of each group, and what its sum is multiplied by
    int64_t scale_stride;
    const float *sums;  // [M, groups]
    int64_t groups;
    float *y;  // [M, y_stride]
    int64_t y_stride;
};

template <int BITS, int M, int R, Spread SPREAD>
QL_INLINE void add_block(const Tile<BITS> &tile, int64_t block, int64_t bytes, __m512 (&total)[R][M]) {
    using B = Bytes<BITS>;
    __m512i loaded[R];
    __m512 scale[R];
    unrolled<R>([&](auto r) QL_INLINED {
        loaded[r] = tile.bytes.load(tile.rows + r * tile.row_bytes + block * B::kBytes, bytes);
        scale[r] = scale_of<SPREAD>(tile.scaling, tile.scales + r * tile.scale_stride, block);
    });
    __m512i sum[R][M];
    unrolled<B::kSteps>([&](auto step) QL_INLINED {
        __m512i codes[R];
        unrolled<R>([&](auto r) QL_INLINED { codes[r] = B::codes(loaded[r], step); });
        unrolled<M>([&](auto m) QL_INLINED {
            const __m512i x = _mm512_loadu_si512(tile.x + m * tile.x_stride + block * B::kBlock + 64 * step);
            unrolled<R>([&](auto r) QL_INLINED {
                sum[r][m] = _mm512_dpbusd_epi32(step ? sum[r][m] : _mm512_setzero_si512(), codes[r], x);
            });
        });
    });
    unrolled<M>([&](auto m) QL_INLINED {
        const __m512 x_scale = _mm512_loadu_ps(tile.x_scales + m * tile.x_scale_stride + 16 * block);
        unrolled<R>([&](auto r) QL_INLINED {
            const __m512 by = _mm512_mul_ps(scale[r], x_scale);
            total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][m]), by, total[r][m]);
        });
    });
}

template <int BITS, int M, int R, Spread SPREAD>
void multiply_tile(const Tile<BITS> &given) {
    using B = Bytes<BITS>;
    const Tile<BITS> tile = given;
    const int64_t whole = tile.row_bytes / B::kBytes, rest = tile.row_bytes % B::kBytes;
    __m512 total[R][M];
    unrolled<R * M>([&](auto i) QL_INLINED { total[i / M][i % M] = zero(); });
    for (int64_t block = 0; block < whole; block++) {
        unrolled<R>([&](auto r) QL_INLINED {
            const char *codes = reinterpret_cast<const char *>(tile.rows);
            _mm_prefetch(codes + kAhead + (block * R + r) * B::kBytes, _MM_HINT_T1);
        });
        add_block<BITS, M, R, SPREAD>(tile, block, B::kBytes, total);
    }
    if (rest) add_block<BITS, M, R, SPREAD>(tile, whole, rest, total);
    for (int64_t g = 0; g < tile.groups; g += 16) {
        const __mmask16 some = first_lanes(tile.groups - g);
        unrolled<R * M>([&](auto i) QL_INLINED {
            const int r = i / M, m = i % M;
            const __m512 sums = _mm512_maskz_loadu_ps(some, tile.sums + m * tile.groups + g);
            total[r][m] = _mm512_fnmadd_ps(_mm512_loadu_ps(tile.shifts + r * tile.scale_stride + g), sums, total[r][m]);
        });
    }
    unrolled<R * M>([&](auto i) QL_INLINED {
        tile.y[i % M * tile.y_stride + i / M] = _mm512_reduce_add_ps(total[i / M][i % M]);
    });
}

template <int BITS, int M, int R>
void multiply_tile(const Tile<BITS> &tile) {
    switch (tile.scaling.spread) {
        case Spread::kBlock: return multiply_tile<BITS, M, R, Spread::kBlock>(tile);
        case Spread::kRepeated: return multiply_tile<BITS, M, R, Spread::kRepeated>(tile);
        default: return multiply_tile<BITS, M, 1, Spread::kAnywhere>(tile);  // rare: an output at a time
    }
}

// A group's sum of activations counts (zero - first of the table) * scale times.
QL_INLINE void load_shifts(const ql_weight &weight, int64_t output, const float *scales, float *out) {
    const __m512 start = _mm512_set1_ps(weight.table[0]);
    for (int64_t g = 0; g < weight.groups; g += 16) {
        const __m512 zeros = weight.zeros ? load_floats(weight.zeros, weight.zero_type, scale_row(weight, output) + g,
                                                        first_lanes(weight.groups - g))
                                          : zero();
        _mm512_storeu_ps(out + g, _mm512_mul_ps(_mm512_sub_ps(zeros, start), _mm512_loadu_ps(scales + g)));
    }
}

template <int BITS, int M, int R>
void multiply_rows(const Job &job, int64_t done, int64_t begin, int64_t end) {
    const ql_weight &weight = *job.weight;
    const Bytes<BITS> bytes;
    const ScalingOf<Bytes<BITS>> scaling(weight);
    const int64_t stride = weight.groups + 32;
    Buffer<float> scales(R * stride), shifts(R * stride);
    for (int64_t output = begin; output < end;) {
        const int outputs = end - output >= R && scaling.spread != Spread::kAnywhere ? R : 1;
        for (int r = 0; r < outputs; r++) {
            float *of = scales.data + r * stride;
            load_row(weight.scales, weight.scale_type, scale_row(weight, output + r), weight.groups, of);
            load_shifts(weight, output + r, of, shifts.data + r * stride);
        }
        const Tile<BITS> tile = {bytes,
                                 scaling,
                                 weight.codes + output * job.row_bytes,
                                 job.row_bytes,
                                 static_cast<const int8_t *>(job.x) + done * job.x_stride,
                                 job.x_stride,
                                 job.x_scales + done * job.x_scale_stride,
                                 job.x_scale_stride,
                                 scales.data,
                                 shifts.data,
                                 stride,
                                 job.sums + done * weight.groups,
                                 weight.groups,
                                 job.y + done * weight.outputs + output,
                                 weight.outputs};
        if (outputs == R) multiply_tile<BITS, M, R>(tile);
        else multiply_tile<BITS, M, 1>(tile);
        output += outputs;
    }
}

template <int BITS>
void multiply(const Job &job, int64_t begin, int64_t end) {
    for (int64_t done = 0; done < job.rows;) {
        const int64_t left = job.rows - done;
        if (left >= 8) multiply_rows<BITS, 8, 2>(job, done, begin, end), done += 8;
        else if (left >= 4) multiply_rows<BITS, 4, 2>(job, done, begin, end), done += 4;
        else if (left >= 2) multiply_rows<BITS, 2, 4>(job, done, begin, end), done += 2;
        else multiply_rows<BITS, 1, 4>(job, done, begin, end), done += 1;
    }
}

bool consecutive_integers(const ql_weight &weight) {
    const float first = weight.table[0];
    if (!(first >= -256 && first <= 256) || first != float(int(first))) return false;
    for (int i = 1; i < weight.table_size; i++)
        if (weight.table[i] != first + float(i)) return false;
    return true;
}

}  // namespace

const Kernel *avx512_int8_kernel() {
    static const Kernel kernel = {
        /* input */ Input::kBytes,
        /* supports */
        [](const ql_weight &weight) {
            bool fits = false;
            with_bits(weight.bits, [&](auto bits) { fits = groups_fit<Bytes<decltype(bits)::value>>(weight); });
            return fits && consecutive_integers(weight);
        },
        /* padded */
        [](const ql_weight &weight) {
            int64_t width = 0;
            with_bits(weight.bits, [&](auto bits) { width = padded<Bytes<decltype(bits)::value>>(weight); });
            return width;
        },
        /* permute */ nullptr,
        /* quantize */
        [](const ql_weight &weight, const float *x, int8_t *out, float *scales, float *sums) {
            with_bits(weight.bits, [&](auto bits) { quantize<decltype(bits)::value>(weight, x, out, scales, sums); });
        },
        /* multiply */
        [](const Job &job, int64_t begin, int64_t end) {
            with_bits(job.weight->bits, [&](auto bits) { multiply<decltype(bits)::value>(job, begin, end); });
        },
        /* decode */ nullptr,
        /* dot */ avx512_kernel()->dot,
    };
    return &kernel;
}

}  // namespace quantlab

QL_TARGET_END

#else

namespace quantlab {
const Kernel *avx512_int8_kernel() { return nullptr; }
}  // namespace quantlab

#endif
