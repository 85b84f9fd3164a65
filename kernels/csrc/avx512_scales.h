// How the float32 lanes of a product get their scales and zeros, for AVX-512.
#pragma once

#include "target.h"

#include "avx512_codes.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

QL_INLINE __m512 zero() { return _mm512_setzero_ps(); }

// The lanes of four sums, added up.
QL_INLINE __m128 add_lanes(const __m512 (&sums)[4]) {
    const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
    const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
    const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// The first `count` of 16 lanes, all of them from 16 on.
QL_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : __mmask16(_bzhi_u32(0xffff, unsigned(count)));
}

// 16 numbers of `type` from `first` on as float32; those outside of the mask are 0 and not read.
QL_INLINE __m512 load_floats(const void *data, int type, int64_t first, __mmask16 mask) {
    switch (type) {
        case QL_FLOAT32: return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(data) + first);
        case QL_FLOAT16:
            return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(data) + first));
        case QL_BFLOAT16:
            return _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(data) + first)), 16));
        case QL_INT8:
            return _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, static_cast<const int8_t *>(data) + first)));
        default: {
            float values[16] = {};
            for (int i = 0; i < 16; i++)
                if (mask >> i & 1) values[i] = load_as_float(data, type, first + i);
            return _mm512_loadu_ps(values);
        }
    }
}

// The bits of the largest magnitude of `count` numbers from `first` on; of NaN where there is one.
QL_INLINE uint32_t largest_magnitude(const void *data, int type, int64_t first, int64_t count) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();  // as integers magnitudes have the same order, and NaN is above all others
    for (int64_t k = 0; k < count; k += 16) {
        const __m512i bits = _mm512_castps_si512(load_floats(data, type, first + k, first_lanes(count - k)));
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
    }
    return _mm512_reduce_max_epu32(most);
}

template <int TYPE>
__attribute__((noinline)) void load_row(const void *data, int type, int64_t first, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += 16)
        _mm512_storeu_ps(out + i, load_floats(data, TYPE < 0 ? type : TYPE, first + i, first_lanes(count - i)));
}

inline void load_row(const void *data, int type, int64_t first, int64_t count, float *out) {
    switch (type) {  // once a row, not for every 16
        case QL_FLOAT16: return load_row<QL_FLOAT16>(data, type, first, count, out);
        case QL_BFLOAT16: return load_row<QL_BFLOAT16>(data, type, first, count, out);
        default: return load_row<-1>(data, type, first, count, out);
    }
}

// Scales, or zeros, as float32: of several outputs at a time, for those of one can be few.
class ScaleRows {
  public:
    // `together` outputs are asked for at once.
    ScaleRows(const ql_weight &weight, const void *data, int type, int64_t together)
        : weight(weight),
          data(data),
          type(type),
          stride(weight.scale_rows == 1 ? 0 : weight.groups),
          most(together * weight.groups > kAtOnce ? together : kAtOnce / weight.groups / together * together),
          floats(data ? most * weight.groups + 32 : 0) {}

    // [count, stride], readable for a vector more.
    const float *of(int64_t output, int64_t count) {
        if (data && (output < first || output + count > end)) load(output);
        return floats.data + (output - first) * stride;
    }

    const ql_weight &weight;
    const void *const data;
    const int type;
    const int64_t stride;

  private:
    static constexpr int64_t kAtOnce = 1024;

    __attribute__((noinline)) void load(int64_t output) {
        first = output;
        end = stride == 0 ? INT64_MAX : output + most < weight.outputs ? output + most : weight.outputs;
        load_row(data, type, output * stride, stride ? (end - output) * stride : weight.groups, floats.data);
    }

    const int64_t most;
    Buffer<float> floats;
    int64_t first = 0, end = 0;
};

// How the float32 lanes of a block get their scales.
enum class Spread {
    kBlock,     // one scale a block, or one for several blocks
    kRepeated,  // several a block, in the same places of each
    kAnywhere   // groups that begin inside of blocks
};

struct Scaling {
    Spread spread;
    int64_t per_block;        // kRepeated: scales of a block
    __m512i lanes;            // kRepeated: of which of them a lane is
    const int32_t *group_of;  // kBlock: [blocks], kAnywhere: [16 * blocks]
};

template <Spread SPREAD>
QL_INLINE __m512 scale_of(const Scaling &scaling, const float *scales, int64_t block) {
    if constexpr (SPREAD == Spread::kBlock) return _mm512_set1_ps(scales[scaling.group_of[block]]);
    if constexpr (SPREAD == Spread::kRepeated)
        return _mm512_permutexvar_ps(scaling.lanes, _mm512_loadu_ps(scales + block * scaling.per_block));
    return _mm512_i32gather_ps(_mm512_loadu_si512(scaling.group_of + 16 * block), scales, 4);
}

// Finds the scales of a block's lanes: once a product, for all outputs.
template <typename C>
struct ScalingOf : Scaling {
    explicit ScalingOf(const ql_weight &weight) : Scaling{}, map(16 * padded<C>(weight) / C::kBlock) {
        const int64_t group = weight.columns / weight.groups, blocks = padded<C>(weight) / C::kBlock;
        group_of = map.data;
        spread = weight.groups == 1 || group % C::kBlock == 0 ? Spread::kBlock
                 : C::kBlock % group == 0                     ? Spread::kRepeated
                                                              : Spread::kAnywhere;
        per_block = spread == Spread::kRepeated ? C::kBlock / group : 0;
        int32_t first[16];
        for (int lane = 0; lane < 16; lane++) first[lane] = int32_t(C::first(lane) / group);
        lanes = _mm512_loadu_si512(first);
        if (spread == Spread::kRepeated) return;
        const int step = spread == Spread::kBlock ? 1 : 16;
        for (int64_t i = 0; i < blocks * step; i++) {
            const int64_t code = i / step * C::kBlock + (step == 1 ? 0 : C::first(int(i % 16)));
            map[i] = int32_t(code / group < weight.groups ? code / group : weight.groups - 1);
        }
    }
    Buffer<int32_t> map;
};

QL_INLINE __m512 lane_scales(const Scaling &scaling, const float *scales, int64_t block) {
    switch (scaling.spread) {
        case Spread::kBlock: return scale_of<Spread::kBlock>(scaling, scales, block);
        case Spread::kRepeated: return scale_of<Spread::kRepeated>(scaling, scales, block);
        default: return scale_of<Spread::kAnywhere>(scaling, scales, block);
    }
}

// What the zeros of one output take away: the sum of scale * zero * the activations' sum over groups.
QL_INLINE float zero_shift(const float *scales, const float *zeros, const float *sums, int64_t groups) {
    __m512 shift = zero();
    for (int64_t g = 0; g < groups; g += 16) {
        __m512 products = _mm512_mul_ps(_mm512_loadu_ps(scales + g), _mm512_loadu_ps(zeros + g));
        shift = _mm512_fmadd_ps(products, _mm512_maskz_loadu_ps(first_lanes(groups - g), sums + g), shift);
    }
    return _mm512_reduce_add_ps(shift);
}

}  // namespace
}  // namespace quantlab

QL_TARGET_END
#endif
