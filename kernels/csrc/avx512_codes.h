// How packed codes of each width become vectors of bfloat16, for AVX-512.
#pragma once

#include "target.h"

#include "job.h"

#if QL_X86
#include <immintrin.h>

QL_AVX512_BEGIN

namespace quantlab {
namespace {

// Calls function(0) to function(N - 1), each with a constant: arrays that nothing else is an index of stay in registers, which a
// loop would not promise. It is a loop where nothing is optimized: compiling would take minutes.
template <int N, int I = 0, typename Function>
QL_INLINE void unrolled(const Function &function) {
#ifdef __OPTIMIZE__
    if constexpr (I < N) {
        function(std::integral_constant<int, I>());
        unrolled<N, I + 1>(function);
    }
#else
    for (int i = 0; i < N; i++) function(i);
#endif
}

// COUNT registers of elements of one or two bytes, dealt to as many: element i goes to register i % COUNT.
template <typename T, int COUNT>
QL_INLINE void deal(const T *from, T *to) {
    constexpr int kLanes = 64 / sizeof(T);
    if constexpr (COUNT == 1) {
        _mm512_storeu_si512(to, _mm512_loadu_si512(from));
    } else {
        T even[kLanes], odd[kLanes];
        for (int i = 0; i < kLanes; i++) even[i] = T(2 * i), odd[i] = T(2 * i + 1);
        const __m512i evens = _mm512_loadu_si512(even), odds = _mm512_loadu_si512(odd);
        const auto select = [](__m512i low, __m512i which, __m512i high) QL_INLINED {
            if constexpr (sizeof(T) == 1) return _mm512_permutex2var_epi8(low, which, high);
            else return _mm512_permutex2var_epi16(low, which, high);
        };
        alignas(64) T first[kLanes * COUNT / 2], second[kLanes * COUNT / 2], dealt[kLanes * COUNT / 2];
        for (int i = 0; i < COUNT / 2; i++) {
            const __m512i low = _mm512_loadu_si512(from + 2 * i * kLanes);
            const __m512i high = _mm512_loadu_si512(from + (2 * i + 1) * kLanes);
            _mm512_storeu_si512(first + i * kLanes, select(low, evens, high));
            _mm512_storeu_si512(second + i * kLanes, select(low, odds, high));
        }
        for (int half = 0; half < 2; half++) {
            deal<T, COUNT / 2>(half ? second : first, dealt);
            for (int i = 0; i < COUNT / 2; i++)
                _mm512_storeu_si512(to + (2 * i + half) * kLanes, _mm512_loadu_si512(dealt + i * kLanes));
        }
    }
}

// How codes of BITS are taken apart: kBlock codes a load, in kSteps vectors of 32 weights. A 16-bit lane holds kSteps
// neighbouring codes of the block, one for each step, and `permute` brings a block of activations into the same order; so
// float32 lane m of a product belongs to the kGrain codes from `first(m)` on.
//
// An index may lie anywhere in the bits that a look-up reads: the table is repeated for what is below and above it, a
// register for each place, which saves a shift.
//
// A weight is what one look-up finds, or the sum of what kTerms of them find.
template <int BITS, int STEPS, int TERMS = 1>
struct Order {
    static constexpr int kBits = BITS, kTerms = TERMS;
    static constexpr int kSteps = STEPS, kBlock = 32 * kSteps, kGrain = 2 * kSteps, kBytes = kBlock * BITS / 8;
    static int first(int lane) { return lane * kGrain; }
    static void permute(const uint16_t *x, uint16_t *out) { deal<uint16_t, kSteps>(x, out); }
    static __m512i load(const uint8_t *codes) {
        if constexpr (kBytes == 64) return _mm512_loadu_si512(codes);
        return _mm512_maskz_loadu_epi8(~0ull >> (64 - kBytes), codes);
    }
    static __m512i load(const uint8_t *codes, int64_t bytes) {
        return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, unsigned(bytes)), codes);
    }
};

// The values of codes that lie `at` bits up in an index of as many bits as `size` entries need.
template <int BITS>
QL_INLINE void repeat(const uint16_t *values, int at, int size, __m512i *table) {
    uint16_t repeated[256];
    for (int i = 0; i < size; i++) repeated[i] = values[i >> at & ((1 << BITS) - 1)];
    for (int i = 0; i < size / 32; i++) table[i] = _mm512_loadu_si512(repeated + 32 * i);
}

// One of 128 or of 256 values, by the lowest 7 or 8 bits.
QL_INLINE __m512i look_up_128(const __m512i *table, __m512i index) {
    const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    return _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(table[0], index, table[1]),
                                   _mm512_permutex2var_epi16(table[2], index, table[3]));
}

QL_INLINE __m512i look_up_256(const __m512i *table, __m512i index) {
    const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    return _mm512_mask_blend_epi16(upper, look_up_128(table, index), look_up_128(table + 4, index));
}

// Codes that fill 16 bits: a load is a block as it is.
template <int BITS, bool FILLS = (BITS == 1 || BITS == 2 || BITS == 4 || BITS == 8)>
struct Codes : Order<BITS, 16 / BITS> {
    static constexpr int kPlaces = BITS == 8 ? 1 : 5 / BITS;  // of a code in the five bits that vpermw reads
    __m512i table[BITS == 8 ? 8 : kPlaces];

    explicit Codes(const uint16_t *values) {
        for (int place = 0; place < kPlaces; place++) repeat<BITS>(values, place * BITS, BITS == 8 ? 256 : 32, table + place);
    }

    static __m512i prepare(__m512i block) { return block; }

    QL_INLINE __m512i weights(__m512i block, int step, int) const {
        const int shift = step / kPlaces * kPlaces * BITS;
        const __m512i index = shift ? _mm512_srli_epi16(block, unsigned(shift)) : block;
        if constexpr (BITS == 8) return look_up_256(table, index);
        return _mm512_permutexvar_epi16(index, table[step % kPlaces]);
    }
};

// Others are spread first: a byte gets one code, or two of three bits, with whatever follows them above.
template <int BITS>
struct Codes<BITS, false> : Order<BITS, BITS == 3 ? 4 : 2> {
    static constexpr int kPlaces = BITS == 3 ? 2 : 1;
    static constexpr int kTable = BITS == 7 ? 4 : BITS == 5 ? 1 : 2;
    __m512i gather, shifts;
    __m512i table[kPlaces * kTable];

    explicit Codes(const uint16_t *values) {
        constexpr int kByte = BITS * kPlaces;
        uint8_t from[64], by[64];
        for (int i = 0; i < 64; i++) {
            from[i] = uint8_t(i / 8 * kByte + i % 8);  // what goes to eight bytes is that many bytes long
            by[i] = uint8_t(i % 8 * kByte);
        }
        gather = _mm512_loadu_si512(from);
        shifts = _mm512_loadu_si512(by);
        for (int place = 0; place < kPlaces; place++)
            repeat<BITS>(values, place * BITS, 32 * kTable, table + place * kTable);
    }

    __m512i prepare(__m512i block) const {
        return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(gather, block));
    }

    QL_INLINE __m512i weights(__m512i block, int step, int) const {
        const __m512i index = step / kPlaces ? _mm512_srli_epi16(block, 8) : block;
        const __m512i *values = table + step % kPlaces * kTable;
        if constexpr (BITS == 5) return _mm512_permutexvar_epi16(index, values[0]);
        if constexpr (BITS == 7) return look_up_128(values, index);
        return _mm512_permutex2var_epi16(values[0], index, values[1]);
    }
};

// The table in bfloat16, as long as codes can ask for.
struct Values {
    explicit Values(const ql_weight &weight) {
        for (int i = 0; i < weight.table_size; i++) data[i] = to_bfloat16(weight.table[i]);
    }
    uint16_t data[256] = {};
};

// Codes of 8 bits whose values are a sum: one number by the upper four bits and one by the lower, both exact in bfloat16. All
// consecutive integers are. Two tables of 16 are searched faster than one of 256.
struct Nibbles : Order<8, 2, 2> {
    __m512i table[2];

    static bool hold(const ql_weight &weight) {
        const Parts parts(weight);
        for (int i = 0; i < weight.table_size; i++)
            if (from_bfloat16(parts.upper[i >> 4]) + from_bfloat16(parts.lower[i & 15]) != weight.table[i]) return false;
        return true;
    }

    explicit Nibbles(const ql_weight &weight) {
        const Parts parts(weight);
        repeat<4>(parts.lower, 0, 32, table);
        repeat<4>(parts.upper, 0, 32, table + 1);
    }

    static __m512i prepare(__m512i block) { return block; }

    QL_INLINE __m512i weights(__m512i block, int step, int term) const {
        const int shift = 8 * step + 4 * term;
        return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi16(block, unsigned(shift)) : block, table[term]);
    }

  private:
    // The value nearest to zero is the sum of nothing and itself, so that it takes nothing of the others' precision with it.
    struct Parts {
        explicit Parts(const ql_weight &weight) {
            int least = 0;
            const auto magnitude = [&](int i) { return weight.table[i] < 0 ? -weight.table[i] : weight.table[i]; };
            for (int i = 1; i < weight.table_size; i++)
                if (magnitude(i) < magnitude(least)) least = i;
            for (int i = 0; i < 16; i++) {
                upper[i] = to_bfloat16(weight.table[i * 16 + least % 16] - weight.table[least]);
                lower[i] = to_bfloat16(weight.table[least / 16 * 16 + i]);
            }
        }
        uint16_t upper[16], lower[16];
    };
};

// How far ahead codes are fetched, in bytes: into the second-level cache, where there is room for them.
constexpr int64_t kAhead = 16 << 10;

// Whether no float32 lane of C's products belongs to two groups.
template <typename C>
bool groups_fit(const ql_weight &weight) {
    return weight.groups == 1 || weight.columns / weight.groups % C::kGrain == 0;
}

// Columns, in whole blocks of C.
template <typename C>
int64_t padded(const ql_weight &weight) {
    return (weight.columns + C::kBlock - 1) / C::kBlock * C::kBlock;
}

// Activations in the order of the codes.
template <int BITS>
void permute(const ql_weight &weight, const uint16_t *x, uint16_t *out) {
    using C = Codes<BITS>;
    int64_t first = 0;
    for (; first + C::kBlock <= weight.columns; first += C::kBlock) C::permute(x + first, out + first);
    if (first == weight.columns) return;
    uint16_t last[C::kBlock] = {};
    memcpy(last, x + first, size_t(weight.columns - first) * sizeof *x);
    C::permute(last, out + first);
}

}  // namespace
}  // namespace quantlab

QL_TARGET_END
#endif
