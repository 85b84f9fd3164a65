// Any processor, any group: what the faster kernels do, a code at a time.
#include "job.h"

namespace quantlab {
namespace {

// Code k of a row.
inline unsigned code_at(const uint8_t *row, int bits, int64_t k) {
    const int64_t bit = k * bits, byte = bit / 8;
    const int shift = int(bit % 8);
    unsigned window = row[byte];
    if (shift + bits > 8) window |= unsigned(row[byte + 1]) << 8;
    return window >> shift & ((1u << bits) - 1);
}

// One output's weights, as float32.
void decode_row(const ql_weight &weight, int64_t output, float *out) {
    const uint8_t *row = weight.codes + output * ((weight.columns * weight.bits + 7) / 8);
    const int64_t group = weight.columns / weight.groups, at = scale_row(weight, output);
    for (int64_t g = 0, k = 0; g < weight.groups; g++) {
        const float scale = load_as_float(weight.scales, weight.scale_type, at + g);
        const float zero = weight.zeros ? load_as_float(weight.zeros, weight.zero_type, at + g) : 0.0f;
        for (const int64_t stop = k + group; k < stop; k++)
            out[k] = (weight.table[code_at(row, weight.bits, k)] - zero) * scale;
    }
}

float dot(const void *row, int type, int64_t first, const float *x, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += load_as_float(row, type, first + i) * x[i];
    return sum;
}

void multiply(const Job &job, int64_t begin, int64_t end) {
    const ql_weight &weight = *job.weight;
    Buffer<float> row(weight.columns);
    for (int64_t output = begin; output < end; output++) {
        decode_row(weight, output, row.data);
        for (int64_t m = 0; m < job.rows; m++)
            job.y[m * weight.outputs + output] =
                dot(row.data, QL_FLOAT32, 0, static_cast<const float *>(job.x) + m * job.x_stride, weight.columns);
    }
}

void decode(const ql_weight &weight, void *out, int type, int64_t begin, int64_t end) {
    Buffer<float> row(weight.columns);
    for (int64_t output = begin; output < end; output++) {
        decode_row(weight, output, row.data);
        for (int64_t k = 0; k < weight.columns; k++)
            store_float(out, type, (output - begin) * weight.columns + k, row[k]);
    }
}

}  // namespace

const Kernel *scalar_kernel() {
    static const Kernel kernel = {
        /* input */ Input::kFloats,
        /* supports */ [](const ql_weight &) { return true; },
        /* padded */ [](const ql_weight &weight) { return weight.columns; },
        /* permute */ nullptr,
        /* quantize */ nullptr,
        multiply,
        decode,
        dot,
    };
    return &kernel;
}

}  // namespace quantlab
