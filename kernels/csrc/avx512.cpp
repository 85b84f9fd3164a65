// AVX-512 with VBMI and BF16: codes become bfloat16 by register tables, products are vdpbf16ps with float32 sums.
//
// A block of codes is one load. Its 16-bit lanes hold codes that are neighbours in memory, so a shift brings a lane's next
// code to the place where vpermw looks for its index, and the activations are permuted once to match, instead of the
// weights each time. Widths that do not divide 16 are spread to bytes first (vpermb, vpmultishiftqb). The bits above an
// index are whatever they are: the table is repeated, so that they do not matter.
#include "target.h"

#include "avx512_panels.h"
#include "avx512_scales.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

// One block of codes of R outputs times M rows of activations.
template <typename C, int M, int R>
QL_INLINE void add_steps(const C &codes, const __m512i (&block)[R], const uint16_t *x, int64_t stride,
                         __m512 (&part)[R][M]) {
    unrolled<C::kSteps * C::kTerms>([&](auto i) QL_INLINED {
        const int step = i / C::kTerms, term = i % C::kTerms;
        __m512bh weights[R];
        unrolled<R>([&](auto r) QL_INLINED { weights[r] = (__m512bh)codes.weights(block[r], step, term); });
        unrolled<M>([&](auto m) QL_INLINED {
            const __m512bh activations = (__m512bh)_mm512_loadu_si512(x + m * stride + 32 * step);
            unrolled<R>([&](auto r) QL_INLINED {
                part[r][m] = _mm512_dpbf16_ps(i ? part[r][m] : zero(), activations, weights[r]);
            });
        });
    });
}

// R neighbouring outputs, and all that their product needs, by value: what is known to be the function's own stays in
// registers.
template <typename C>
struct Tile {
    C codes;
    Scaling scaling;
    const uint8_t *rows;  // [R, row_bytes]
    int64_t row_bytes;
    const uint16_t *x;  // [M, x_stride]
    int64_t x_stride;
    const float *scales;  // [R, scale_stride]
    int64_t scale_stride;
    float *y;  // [M, y_stride]
    int64_t y_stride;
};

// Adds a block of the tile's codes, of which `bytes` are there, or all where WHOLE.
template <typename C, int M, int R, Spread SPREAD, bool WHOLE>
QL_INLINE void add_block(const Tile<C> &tile, int64_t block, int64_t bytes, __m512 (&total)[R][M]) {
    __m512i loaded[R];
    __m512 part[R][M];
    unrolled<R>([&](auto r) QL_INLINED {
        const uint8_t *at = tile.rows + r * tile.row_bytes + block * C::kBytes;
        loaded[r] = tile.codes.prepare(WHOLE ? C::load(at) : C::load(at, bytes));
    });
    add_steps<C, M, R>(tile.codes, loaded, tile.x + block * C::kBlock, tile.x_stride, part);
    unrolled<R>([&](auto r) QL_INLINED {
        const __m512 scale = scale_of<SPREAD>(tile.scaling, tile.scales + r * tile.scale_stride, block);
        unrolled<M>([&](auto m) QL_INLINED { total[r][m] = _mm512_fmadd_ps(part[r][m], scale, total[r][m]); });
    });
}

// Several outputs at a time, so that activations are read less often, and sums do not wait for each other. An output by itself
// has several blocks under way, with sums of their own. A function of its own: what surrounds it would take registers from it.
template <typename C, int M, int R, Spread SPREAD>
__attribute__((noinline)) void multiply_tile(const Tile<C> &given) {
    constexpr int kUnroll = R * M >= 4 ? 1 : 4 / (R * M);
    const Tile<C> tile = given;
    const int64_t whole = tile.row_bytes / C::kBytes, rest = tile.row_bytes % C::kBytes;
    __m512 total[kUnroll][R][M];
    unrolled<kUnroll * R * M>([&](auto i) QL_INLINED { total[i / (R * M)][i / M % R][i % M] = zero(); });
    int64_t block = 0;
    for (; block + kUnroll <= whole; block += kUnroll) {
        // Further tiles, in the order in which they lie in memory: rows of a tile are too short for the processor to follow.
        if constexpr (R > 1)
            unrolled<R * kUnroll>([&](auto i) QL_INLINED {
                const char *codes = reinterpret_cast<const char *>(tile.rows);
                _mm_prefetch(codes + kAhead + (block * R + i) * C::kBytes, _MM_HINT_T1);
            });
        unrolled<kUnroll>([&](auto u) QL_INLINED {
            add_block<C, M, R, SPREAD, true>(tile, block + u, 0, total[u]);
        });
    }
    for (; block < whole; block++) add_block<C, M, R, SPREAD, true>(tile, block, 0, total[0]);
    if (rest) add_block<C, M, R, SPREAD, false>(tile, whole, rest, total[0]);
    if constexpr (R == 4 && M == 1) {
        _mm_storeu_ps(tile.y, add_lanes({total[0][0][0], total[0][1][0], total[0][2][0], total[0][3][0]}));
        return;
    }
    unrolled<R * M>([&](auto i) QL_INLINED {
        const int r = i / M, m = i % M;
        unrolled<kUnroll - 1>([&](auto u) QL_INLINED { total[0][r][m] = _mm512_add_ps(total[0][r][m], total[u + 1][r][m]); });
        tile.y[m * tile.y_stride + r] = _mm512_reduce_add_ps(total[0][r][m]);
    });
}

template <typename C, int M, int R>
void multiply_tile(const Tile<C> &tile) {
    switch (tile.scaling.spread) {
        case Spread::kBlock: return multiply_tile<C, M, R, Spread::kBlock>(tile);
        case Spread::kRepeated: return multiply_tile<C, M, R, Spread::kRepeated>(tile);
        default: return multiply_tile<C, M, 1, Spread::kAnywhere>(tile);  // rare: an output at a time
    }
}

// Rare, and a function of its own: the sums of a whole tile would get fewer registers.
template <typename C, int M>
__attribute__((noinline)) void multiply_one(const Tile<C> &tile) {
    multiply_tile<C, M, 1>(tile);
}

// Fetches what a tile's sum leaves out, where rows end inside of a block. A function of its own: it would cost the sum registers.
__attribute__((noinline)) void fetch(const uint8_t *codes, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += 64)
        _mm_prefetch(reinterpret_cast<const char *>(codes) + kAhead + at, _MM_HINT_T1);
}

template <typename C, int M, int R>
void multiply_rows(const Job &job, const C &codes, int64_t begin, int64_t end) {
    const ql_weight &weight = *job.weight;
    const ScalingOf<C> scaling(weight);
    ScaleRows scales(weight, weight.scales, weight.scale_type, R), zeros(weight, weight.zeros, weight.zero_type, R);
    const auto *x = static_cast<const uint16_t *>(job.x);
    Tile<C> tile = {codes,   scaling,       nullptr, job.row_bytes, x, job.x_stride,
                    nullptr, scales.stride, nullptr, weight.outputs};
    for (int64_t output = begin; output < end;) {
        const int outputs = end - output >= R && scaling.spread != Spread::kAnywhere ? R : 1;
        tile.rows = weight.codes + output * job.row_bytes;
        tile.scales = scales.of(output, outputs);
        tile.y = job.y + output;
        if (job.row_bytes % C::kBytes) fetch(tile.rows, job.row_bytes / C::kBytes * C::kBytes * R, job.row_bytes * R);
        if (outputs == R) multiply_tile<C, M, R>(tile);
        else multiply_one<C, M>(tile);
        for (int r = 0; weight.zeros && r < outputs; r++)
            for (int64_t m = 0; m < M; m++)
                tile.y[m * weight.outputs + r] -=
                    zero_shift(tile.scales + r * scales.stride, zeros.of(output, outputs) + r * zeros.stride,
                               job.sums + m * weight.groups, weight.groups);
        output += outputs;
    }
}

template <typename C>
void multiply(const Job &job, const C &codes, int64_t begin, int64_t end) {
    Job part = job;
    for (int64_t done = 0; done < job.rows;) {
        const int64_t left = job.rows - done;
        part.x = static_cast<const uint16_t *>(job.x) + done * job.x_stride;
        part.y = job.y + done * job.weight->outputs;
        part.sums = job.sums ? job.sums + done * job.weight->groups : nullptr;
        part.rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        switch (part.rows) {
            case 1: multiply_rows<C, 1, 4>(part, codes, begin, end); break;
            case 2: multiply_rows<C, 2, 2>(part, codes, begin, end); break;
            default: multiply_rows<C, 4, 2>(part, codes, begin, end);
        }
        done += part.rows;
    }
}

// The dot product of `count` numbers of `type` with float32 ones.
float dot(const void *row, int type, int64_t first, const float *x, int64_t count) {
    __m512 sum = zero();
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = first_lanes(count - i);
        sum = _mm512_fmadd_ps(load_floats(row, type, first + i, mask), _mm512_maskz_loadu_ps(mask, x + i), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

}  // namespace

const Kernel *avx512_kernel() {
    static const Kernel kernel = {
        /* input */ Input::kHalves,
        /* supports */
        [](const ql_weight &weight) {
            bool fits = false;
            with_bits(weight.bits, [&](auto bits) { fits = groups_fit<Codes<decltype(bits)::value>>(weight); });
            return fits;
        },
        /* padded */
        [](const ql_weight &weight) {
            int64_t width = 0;
            with_bits(weight.bits, [&](auto bits) { width = padded<Codes<decltype(bits)::value>>(weight); });
            return width;
        },
        /* permute */
        [](const ql_weight &weight, const uint16_t *x, uint16_t *out) {
            with_bits(weight.bits, [&](auto bits) { permute<decltype(bits)::value>(weight, x, out); });
        },
        /* quantize */ nullptr,
        /* multiply */
        [](const Job &job, int64_t begin, int64_t end) {
            const Values values(*job.weight);
            const auto run = [&](const auto &codes) {
                if (job.panels) multiply_panels(job, codes, begin, end);
                else multiply(job, codes, begin, end);
            };
            with_bits(job.weight->bits, [&](auto bits) {
                if (decltype(bits)::value == 8 && Nibbles::hold(*job.weight)) run(Nibbles(*job.weight));
                else run(Codes<decltype(bits)::value>(values.data));
            });
        },
        /* decode */ nullptr,
        /* dot */ dot,
    };
    return &kernel;
}

}  // namespace quantlab

QL_TARGET_END

#else

namespace quantlab {
const Kernel *avx512_kernel() { return nullptr; }
}  // namespace quantlab

#endif
