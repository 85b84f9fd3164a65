// What the kernels of all instruction sets share: a prepared product, and the plain C++ that they have in common.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#include "quantlab_cpu.h"

namespace quantlab {

// One product, ready for a range of outputs: activations are permuted, split and summed.
struct Job {
    const ql_weight *weight;
    int64_t rows;           // of `x`: a row of activations, or a piece of one
    int64_t group;          // inputs that share a scale
    int64_t row_bytes;      // of packed codes
    const void *x;          // [rows, x_stride], in the order and type of the instruction set
    int64_t x_stride;
    const float *x_scales;  // [rows, x_scale_stride], of activations that are bytes: 16 for each block
    int64_t x_scale_stride;
    const float *sums;      // [rows, groups]: of each group's activations; null without zeros, unless they are bytes
    float *y;               // [rows, outputs]
    bool panels;            // many rows: weights may be rounded to what activations are, and decoded once for all of them
};

// Outputs that are decoded together, the most of a job with panels; with their columns, 256 KB in the second-level cache.
constexpr int64_t kPanelOutputs = 64;

// What activations are when they are multiplied: float32 as they stand, or, in an order of the kernel's own, bfloat16 (the
// table is, too) or integers of 8 bits with scales. All are padded to `padded` columns.
enum class Input { kFloats, kHalves, kBytes };

// One instruction set.
struct Kernel {
    Input input;
    bool (*supports)(const ql_weight &weight);
    int64_t (*padded)(const ql_weight &weight);
    void (*permute)(const ql_weight &weight, const uint16_t *x, uint16_t *out);
    // A row as bytes, 16 scales a block, and each group's sum of what the bytes stand for.
    void (*quantize)(const ql_weight &weight, const float *x, int8_t *out, float *scales, float *sums);
    void (*multiply)(const Job &job, int64_t begin, int64_t end);
    void (*decode)(const ql_weight &weight, void *out, int type, int64_t begin, int64_t end);  // null if it has panels
    float (*dot)(const void *row, int type, int64_t first, const float *x, int64_t count);
};

// Null where they were compiled for another processor.
const Kernel *scalar_kernel();
const Kernel *avx2_kernel();
const Kernel *avx512_kernel();
const Kernel *avx512_int8_kernel();

namespace {

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bfloat16(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = float_to_bits(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

inline float from_float16(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // The bits as they stand, with float32's bias: subnormals come out right.
    float value = bits_to_float(magnitude << 13) * bits_to_float(uint32_t(127 + 112) << 23);
    return bits_to_float(sign | float_to_bits(value));
}

inline uint16_t to_float16(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to more than the largest
    if (magnitude < 0x38800000) {                                 // subnormal: let the addition round
        float shifted = bits_to_float(magnitude) + 0.5f;
        return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}

inline float from_e8m0(uint8_t exponent) {
    if (exponent == 0) return bits_to_float(0x00400000);
    if (exponent == 255) return bits_to_float(0x7fc00000);
    return bits_to_float(uint32_t(exponent) << 23);
}

// Element i of an array of `type`, as float32.
inline float load_as_float(const void *data, int type, int64_t i) {
    switch (type) {
        case QL_FLOAT32: return static_cast<const float *>(data)[i];
        case QL_FLOAT16: return from_float16(static_cast<const uint16_t *>(data)[i]);
        case QL_BFLOAT16: return from_bfloat16(static_cast<const uint16_t *>(data)[i]);
        case QL_INT8: return static_cast<const int8_t *>(data)[i];
        default: return from_e8m0(static_cast<const uint8_t *>(data)[i]);
    }
}

inline void store_float(void *data, int type, int64_t i, float value) {
    switch (type) {
        case QL_FLOAT32: static_cast<float *>(data)[i] = value; break;
        case QL_FLOAT16: static_cast<uint16_t *>(data)[i] = to_float16(value); break;
        default: static_cast<uint16_t *>(data)[i] = to_bfloat16(value);
    }
}

// `count` numbers, rounded to elements of `type` from `first` on.
inline void store_floats(void *data, int type, int64_t first, const float *values, int64_t count) {
    if (type == QL_BFLOAT16)  // by far the most, and a loop without a branch
        for (int64_t i = 0; i < count; i++) static_cast<uint16_t *>(data)[first + i] = to_bfloat16(values[i]);
    else
        for (int64_t i = 0; i < count; i++) store_float(data, type, first + i, values[i]);
}

// `count` elements from `first` on, as float32.
inline void load_floats(const void *data, int type, int64_t first, int64_t count, float *out) {
    switch (type) {
        case QL_FLOAT32: memcpy(out, static_cast<const float *>(data) + first, size_t(count) * sizeof(float)); break;
        case QL_BFLOAT16:
            for (int64_t i = 0; i < count; i++) out[i] = from_bfloat16(static_cast<const uint16_t *>(data)[first + i]);
            break;
        case QL_INT8:
            for (int64_t i = 0; i < count; i++) out[i] = static_cast<const int8_t *>(data)[first + i];
            break;
        default:
            for (int64_t i = 0; i < count; i++) out[i] = load_as_float(data, type, first + i);
    }
}

// Memory of one call, on cache lines: zeroed, so that what lies behind the end of a row may be read, unless all that is read
// was written before. A little of it is in the object: small products are many, and take no longer than an allocation or two.
template <typename T>
struct Buffer {
    explicit Buffer(int64_t count, bool zeroed = true) : count(count) {
        const size_t bytes = (size_t(count) * sizeof(T) / 64 + 1) * 64;
        block = bytes <= sizeof inside ? inside : malloc(bytes + 63);
        data = reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(block) + 63) / 64 * 64);
        if (block && zeroed) memset(data, 0, bytes);
    }
    ~Buffer() {
        if (block != inside) free(block);
    }
    Buffer(const Buffer &) = delete;
    T &operator[](int64_t i) { return data[i]; }

    int64_t count;
    T *data;
    void *block;  // null where there was no memory
    alignas(64) char inside[2048];
};

// Calls `function` with the width as a constant.
template <typename Function>
void with_bits(int bits, Function function) {
    switch (bits) {
        case 1: return function(std::integral_constant<int, 1>());
        case 2: return function(std::integral_constant<int, 2>());
        case 3: return function(std::integral_constant<int, 3>());
        case 4: return function(std::integral_constant<int, 4>());
        case 5: return function(std::integral_constant<int, 5>());
        case 6: return function(std::integral_constant<int, 6>());
        case 7: return function(std::integral_constant<int, 7>());
        default: return function(std::integral_constant<int, 8>());
    }
}

inline int64_t scale_row(const ql_weight &weight, int64_t output) {
    return weight.scale_rows == 1 ? 0 : output * weight.groups;
}

}  // namespace
}  // namespace quantlab
