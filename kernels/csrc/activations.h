// Activations as each instruction set wants them, prepared once a product.
#pragma once

#include "job.h"
#include "threads.h"

namespace quantlab {
namespace {

// Rows of bfloat16 for which codes are read as they are; with more, panels of the weight are decoded and multiplied.
constexpr int64_t kFewRows = 7;

// How many bfloat16 numbers add up to one activation.
int pieces_of(int activation_type) {
    return activation_type == QL_BFLOAT16 ? 1 : activation_type == QL_FLOAT16 ? 2 : 3;
}

// Whether a kernel takes many rows: it rounds weights to bfloat16 for them, which is no less than what activations are.
bool has_panels(const Kernel &kernel, int activation_type) {
    return kernel.input == Input::kHalves && activation_type == QL_BFLOAT16;
}

// Activations as a kernel wants them. With bfloat16 kernels a row becomes as many rows as it takes to hold it.
struct Activations {
    Activations(const Kernel &kernel, const ql_weight &weight, const void *x, int64_t rows, int type, int threads)
        : kernel(kernel),
          weight(weight),
          rows(rows),
          panels(has_panels(kernel, type) && rows > kFewRows),
          stride(kernel.padded(weight) + (panels ? 32 : 0)),  // rows a power of two apart fall onto each other in the cache
          scale_stride(kernel.input == Input::kBytes ? stride / 4 : 0),  // no block is shorter than 64
          pieces(kernel.input == Input::kHalves ? pieces_of(type) : 1),
          bytes(kernel.input == Input::kBytes ? rows * stride : 0),
          scales(rows * scale_stride),
          halves(kernel.input == Input::kHalves ? rows * pieces * stride : 0, false),
          floats(kernel.input == Input::kFloats ? rows * stride : 0),
          summed(weight.zeros && !panels),  // where weights are decoded, their zeros are taken off there
          plain(kernel.input == Input::kBytes || pieces > 1 || summed ? weight.columns : 0),
          sums(kernel.input == Input::kBytes || summed ? rows * pieces * weight.groups : 0) {
        if (!complete()) return;
        // One thread where rows share what is written in between.
        divide(rows, panels ? threads : 1, rows * weight.columns,
               [&](int64_t begin, int64_t end) { prepare(x, type, begin, end); });
    }

    void prepare(const void *x, int type, int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) {
            switch (kernel.input) {
                case Input::kFloats:
                    load_floats(x, type, m * weight.columns, weight.columns, floats.data + m * stride);
                    break;
                case Input::kHalves: split(x, type, m); break;
                case Input::kBytes:
                    load_floats(x, type, m * weight.columns, weight.columns, plain.data);
                    kernel.quantize(weight, plain.data, bytes.data + m * stride, scales.data + m * scale_stride,
                                    sums.data + m * weight.groups);
                    continue;
            }
            // The sums are whole in a row's first piece; those of the others stay 0.
            if (summed) sum_groups(x, type, m, sums.data + m * pieces * weight.groups);
        }
    }

    // One row as bfloat16 numbers that add up to it.
    void split(const void *x, int type, int64_t row) {
        if (type == QL_BFLOAT16) {
            kernel.permute(weight, static_cast<const uint16_t *>(x) + row * weight.columns, halves.data + row * stride);
            return;
        }
        Buffer<uint16_t> piece(weight.columns);
        load_floats(x, type, row * weight.columns, weight.columns, plain.data);
        for (int p = 0; p < pieces; p++) {
            for (int64_t k = 0; k < weight.columns; k++) {
                piece[k] = to_bfloat16(plain[k]);
                plain[k] -= from_bfloat16(piece[k]);
            }
            kernel.permute(weight, piece.data, halves.data + (row * pieces + p) * stride);
        }
    }

    void sum_groups(const void *x, int type, int64_t row, float *out) {
        const int64_t group = weight.columns / weight.groups;
        load_floats(x, type, row * weight.columns, weight.columns, plain.data);
        for (int64_t g = 0; g < weight.groups; g++)
            for (int64_t i = 0; i < group; i++) out[g] += plain[g * group + i];
    }

    bool complete() const {
        return bytes.block && scales.block && halves.block && floats.block && plain.block && sums.block;
    }
    const void *data() const {
        switch (kernel.input) {
            case Input::kFloats: return floats.data;
            case Input::kHalves: return halves.data;
            default: return bytes.data;
        }
    }

    // These activations times a weight that is like the one they were prepared for.
    Job job(const ql_weight &with, float *out) const {
        return {&with,
                rows * pieces,
                with.columns / with.groups,
                (with.columns * with.bits + 7) / 8,
                data(),
                stride,
                scales.data,
                scale_stride,
                sums.data,
                out,
                panels};
    }

    const Kernel &kernel;
    const ql_weight &weight;
    int64_t rows;
    bool panels;
    int64_t stride, scale_stride;
    int pieces;
    Buffer<int8_t> bytes;
    Buffer<float> scales;
    Buffer<uint16_t> halves;
    Buffer<float> floats;
    bool summed;
    Buffer<float> plain, sums;
};

}  // namespace
}  // namespace quantlab
