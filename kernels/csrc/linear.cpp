// The C interface: what is the same for all instruction sets. Activations are prepared once, outputs are divided among
// threads, and each output is summed by one of them in a fixed order, so that results do not depend on their number.
#include <optional>

#include "activations.h"
#include "job.h"
#include "threads.h"

using namespace quantlab;

namespace {

// Rows that are multiplied by one decoded panel: what is in memory for them has a bound.
constexpr int64_t kRowsTogether = 256;
constexpr int64_t kMostRows = 32;  // of a kernel that has no panels

const Kernel *kernel_of(int isa) {
    switch (isa) {
        case QL_AVX512_INT8: return avx512_int8_kernel();
        case QL_AVX512: return avx512_kernel();
        case QL_AVX2: return avx2_kernel();
        default: return scalar_kernel();
    }
}

bool exact_in_bfloat16(const ql_weight &weight) {
    for (int i = 0; i < weight.table_size; i++)
        if (float_to_bits(weight.table[i]) & 0xffff) return false;
    return true;
}

// A weight whose table can be read up to the highest code.
struct Padded : ql_weight {
    explicit Padded(const ql_weight &weight) : ql_weight(weight) {
        for (int i = 0; i < 1 << bits; i++) values[i] = i < table_size ? weight.table[i] : 0.0f;
        table = values;
    }
    Padded(const Padded &) = delete;
    float values[256];
};

// x right^T, float32 [rows, rank].
void project(const Kernel &kernel, const ql_weight &weight, const void *x, int64_t rows, int type, int threads,
             float *out) {
    Buffer<float> floats(rows * weight.columns);
    load_floats(x, type, 0, rows * weight.columns, floats.data);
    divide(weight.rank, threads, rows * weight.rank * weight.columns, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            for (int64_t m = 0; m < rows; m++)
                out[m * weight.rank + r] = kernel.dot(weight.right, weight.right_type, r * weight.columns,
                                                      floats.data + m * weight.columns, weight.columns);
    });
}

// Where a product goes: columns from `first` on of [rows, width].
struct Output {
    void *y;
    int type;
    int64_t first, width;
};

// One weight of a call.
struct Product {
    Product(const ql_weight &of, int64_t rows, int64_t pieces)
        : weight(of), sums(rows * pieces * of.outputs, false), projected(rows * of.rank, false) {}

    // The outputs begin..end of all rows: what was summed, with all that is added to it. A row's first piece becomes the whole.
    void store(const Kernel &kernel, int64_t rows, int64_t pieces, const Output &to, int64_t begin, int64_t end) {
        for (int64_t m = 0; m < rows; m++) {
            float *whole = sums.data + m * pieces * weight.outputs;
            for (int64_t n = begin; n < end && (weight.bias || weight.rank || pieces > 1); n++) {
                float value = weight.bias ? load_as_float(weight.bias, weight.bias_type, n) : 0.0f;
                for (int64_t p = pieces - 1; p >= 0; p--) value += whole[p * weight.outputs + n];
                if (weight.rank)
                    value += kernel.dot(weight.left, weight.left_type, n * weight.rank,
                                        projected.data + m * weight.rank, weight.rank);
                whole[n] = value;
            }
            store_floats(to.y, to.type, m * to.width + to.first + begin, whole + begin, end - begin);
        }
    }

    Padded weight;
    Buffer<float> sums, projected;
};

constexpr int kTogether = 8;  // weights

// Whether activations are prepared for one weight as for the other.
bool alike(const ql_weight &one, const ql_weight &other) {
    return one.bits == other.bits && one.columns == other.columns && one.groups == other.groups &&
           !one.zeros == !other.zeros;
}

// Weights that are alike. Their outputs are one range, in which each begins with a unit of its own.
bool multiply_alike(const Kernel &kernel, const ql_weight *weights, int count, const void *x, int64_t rows,
                    const Output &output, int threads) {
    const Activations activations(kernel, weights[0], x, rows, output.type, threads);
    if (!activations.complete()) return false;
    std::optional<Product> products[kTogether];
    int64_t starts[kTogether], outputs = 0, wide = 0;
    for (int i = 0; i < count; i++) {
        Product &product = products[i].emplace(weights[i], rows, activations.pieces);
        if (!product.sums.block || !product.projected.block) return false;
        if (product.weight.rank) project(kernel, product.weight, x, rows, output.type, threads, product.projected.data);
        starts[i] = wide;
        outputs += weights[i].outputs;
        wide += (weights[i].outputs + kUnit - 1) / kUnit * kUnit;
    }
    divide(wide, threads, rows * outputs * weights[0].columns, [&](int64_t begin, int64_t end) {
        Output to = output;
        for (int i = 0; i < count; to.first += weights[i++].outputs) {
            const int64_t from = begin > starts[i] ? begin - starts[i] : 0;
            const int64_t until = end - starts[i] < weights[i].outputs ? end - starts[i] : weights[i].outputs;
            if (from >= until) continue;
            // A panel's sums are stored while they are in cache.
            const int64_t step = activations.panels ? kPanelOutputs : until - from;
            for (int64_t first = from; first < until; first += step) {
                const int64_t last = until - first < step ? until : first + step;
                kernel.multiply(activations.job(products[i]->weight, products[i]->sums.data), first, last);
                products[i]->store(kernel, rows, activations.pieces, to, first, last);
            }
        }
    });
    return true;
}

// The same for any number of rows.
bool multiply(const Kernel &kernel, const ql_weight *weights, int count, const void *x, int64_t rows, Output output,
              int threads) {
    const int64_t together = has_panels(kernel, output.type) ? kRowsTogether : rows;
    const int64_t size = output.type == QL_FLOAT32 ? 4 : 2;
    for (int64_t row = 0; row < rows; row += together) {
        const int64_t left = rows - row < together ? rows - row : together;
        if (!multiply_alike(kernel, weights, count, x, left, output, threads)) return false;
        x = static_cast<const char *>(x) + left * weights[0].columns * size;
        output.y = static_cast<char *>(output.y) + left * output.width * size;
    }
    return true;
}

int best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bf16"))
        return QL_AVX512_INT8;
    if (avx2) return QL_AVX2;
#endif
    return QL_SCALAR;
}

}  // namespace

extern "C" {

int ql_best_isa(void) {
    const int best = best_isa();
    return best < QL_AVX512 ? best : QL_AVX512;
}

int ql_choose(const ql_weight *weight, int activation_type, int64_t rows, int at_most) {
    static const int best = best_isa();
    for (int isa = at_most < best ? at_most : best; isa > QL_SCALAR; isa--) {
        const Kernel &kernel = *kernel_of(isa);
        if (kernel.supports(*weight) && (kernel.input != Input::kBytes || rows <= kMostRows) &&
            (kernel.input != Input::kHalves || activation_type == QL_BFLOAT16 || exact_in_bfloat16(*weight)))
            return isa;
    }
    return QL_SCALAR;
}

int64_t ql_few_rows(const ql_weight *weight, int activation_type, int at_most) {
    return has_panels(*kernel_of(ql_choose(weight, activation_type, 1, at_most)), activation_type) ? kFewRows : kMostRows;
}

int64_t ql_most_rows(const ql_weight *weight, int activation_type, int at_most) {
    if (weight->rank) return ql_few_rows(weight, activation_type, at_most);
    const Kernel &kernel = *kernel_of(ql_choose(weight, activation_type, kMostRows + 1, at_most));
    return has_panels(kernel, activation_type) ? INT64_MAX : kMostRows;
}

int ql_linear(const ql_weight *weights, int count, const void *x, void *y, int64_t rows, int type, int at_most, int threads) {
    Output output = {y, type, 0, 0};
    for (int i = 0; i < count; i++) output.width += weights[i].outputs;
    for (int begin = 0, end; begin < count; begin = end) {
        const int isa = ql_choose(weights + begin, type, rows, at_most);
        for (end = begin + 1; end < count && end < begin + kTogether; end++)
            if (!alike(weights[begin], weights[end]) || ql_choose(weights + end, type, rows, at_most) != isa) break;
        if (!multiply(*kernel_of(isa), weights + begin, end - begin, x, rows, output, threads)) return 1;
        for (int i = begin; i < end; i++) output.first += weights[i].outputs;
    }
    return 0;
}

int ql_decode(const ql_weight *of, void *out, int64_t begin, int64_t end, int type, int isa, int threads) {
    const Kernel &kernel = *kernel_of(isa);
    const Padded weight(*of);
    const int64_t width = of->columns * (type == QL_FLOAT32 ? 4 : 2);
    divide(end - begin, threads, (end - begin) * of->columns, [&](int64_t first, int64_t last) {
        kernel.decode(weight, static_cast<char *>(out) + first * width, type, begin + first, begin + last);
    });
    return 0;
}

}  // extern "C"
