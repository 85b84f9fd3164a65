// The C interface: what is the same for all instruction sets. Activations are prepared once, outputs are divided among
// threads, and each output is summed by one of them in a fixed order, so that results do not depend on their number.
#include <optional>

#include "job.h"

// The threads are those that torch has: a second team would spin against the first. Where there is no OpenMP in the
// process, one thread does it all.
#if defined(__GNUC__) && !defined(_WIN32)
extern "C" {
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_thread_num(void) __attribute__((weak));
int omp_get_num_threads(void) __attribute__((weak));
}
#define QL_THREADS 1
#else
#define QL_THREADS 0
#endif

using namespace quantlab;

namespace {

constexpr int64_t kUnit = 16;              // outputs; threads then write different cache lines
constexpr int64_t kWorthAThread = 1 << 15;  // products: fewer are done before a thread wakes up

template <typename Function>
struct Division {
    const Function *function;
    int64_t count;

    static void part(void *data) {
        const auto &self = *static_cast<const Division *>(data);
#if QL_THREADS
        const int64_t me = omp_get_thread_num(), of = omp_get_num_threads();
#else
        const int64_t me = 0, of = 1;
#endif
        const int64_t units = (self.count + kUnit - 1) / kUnit;
        const int64_t begin = units * me / of * kUnit, end = units * (me + 1) / of * kUnit;
        if (begin < self.count) (*self.function)(begin, end < self.count ? end : self.count);
    }
};

// Calls function(begin, end) for parts of 0..count, each on a thread.
template <typename Function>
void divide(int64_t count, int threads, int64_t work, const Function &function) {
    const int64_t wanted = work / kWorthAThread + 1;
    if (wanted < threads) threads = int(wanted);
#if QL_THREADS
    if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
        Division<Function> division = {&function, count};
        GOMP_parallel(Division<Function>::part, &division, unsigned(threads), 0);
        return;
    }
#endif
    function(0, count);
}

const Kernel *kernel_of(int isa) {
    switch (isa) {
        case QL_AVX512_INT8: return avx512_int8_kernel();
        case QL_AVX512: return avx512_kernel();
        case QL_AVX2: return avx2_kernel();
        default: return scalar_kernel();
    }
}

// How many bfloat16 numbers add up to one activation.
int pieces_of(int activation_type) {
    return activation_type == QL_BFLOAT16 ? 1 : activation_type == QL_FLOAT16 ? 2 : 3;
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

// Activations as a kernel wants them. With bfloat16 kernels a row becomes as many rows as it takes to hold it.
struct Activations {
    Activations(const Kernel &kernel, const ql_weight &weight, const void *x, int64_t rows, int type)
        : kernel(kernel),
          weight(weight),
          rows(rows),
          stride(kernel.padded(weight)),
          scale_stride(kernel.input == Input::kBytes ? stride / 4 : 0),  // no block is shorter than 64
          pieces(kernel.input == Input::kHalves ? pieces_of(type) : 1),
          bytes(kernel.input == Input::kBytes ? rows * stride : 0),
          scales(rows * scale_stride),
          halves(kernel.input == Input::kHalves ? rows * pieces * stride : 0),
          floats(kernel.input == Input::kFloats ? rows * stride : 0),
          plain(kernel.input == Input::kBytes || pieces > 1 || weight.zeros ? weight.columns : 0),
          sums(kernel.input == Input::kBytes || weight.zeros ? rows * pieces * weight.groups : 0) {
        if (!complete()) return;
        for (int64_t m = 0; m < rows; m++) {
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
            if (weight.zeros) sum_groups(x, type, m, sums.data + m * pieces * weight.groups);
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
                out};
    }

    const Kernel &kernel;
    const ql_weight &weight;
    int64_t rows, stride, scale_stride;
    int pieces;
    Buffer<int8_t> bytes;
    Buffer<float> scales;
    Buffer<uint16_t> halves;
    Buffer<float> floats, plain, sums;
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
bool multiply(const Kernel &kernel, const ql_weight *weights, int count, const void *x, int64_t rows, const Output &output,
              int threads) {
    const Activations activations(kernel, weights[0], x, rows, output.type);
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
            kernel.multiply(activations.job(products[i]->weight, products[i]->sums.data), from, until);
            products[i]->store(kernel, rows, activations.pieces, to, from, until);
        }
    });
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

int ql_choose(const ql_weight *weight, int activation_type, int at_most) {
    static const int best = best_isa();
    for (int isa = at_most < best ? at_most : best; isa > QL_SCALAR; isa--) {
        const Kernel &kernel = *kernel_of(isa);
        if (kernel.supports(*weight) &&
            (kernel.input != Input::kHalves || activation_type == QL_BFLOAT16 || exact_in_bfloat16(*weight)))
            return isa;
    }
    return QL_SCALAR;
}

// AVX2 pads its own copy of activations only.
int64_t ql_padded(const ql_weight *weight, int isa) {
    const Kernel &kernel = *kernel_of(isa);
    return kernel.input == Input::kHalves ? kernel.padded(*weight) : weight->columns;
}

int ql_linear(const ql_weight *weights, int count, const void *x, void *y, int64_t rows, int type, int at_most, int threads) {
    Output output = {y, type, 0, 0};
    for (int i = 0; i < count; i++) output.width += weights[i].outputs;
    for (int begin = 0, end; begin < count; begin = end) {
        const int isa = ql_choose(weights + begin, type, at_most);
        for (end = begin + 1; end < count && end < begin + kTogether; end++)
            if (!alike(weights[begin], weights[end]) || ql_choose(weights + end, type, at_most) != isa) break;
        if (!multiply(*kernel_of(isa), weights + begin, end - begin, x, rows, output, threads)) return 1;
        for (int i = begin; i < end; i++) output.first += weights[i].outputs;
    }
    return 0;
}

int ql_permute(const ql_weight *weight, const void *x, void *out, int64_t rows, int isa, int threads) {
    const Kernel &kernel = *kernel_of(isa);
    const int64_t width = kernel.padded(*weight);
    divide(rows, threads, rows * width, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++)
            kernel.permute(*weight, static_cast<const uint16_t *>(x) + m * weight->columns,
                           static_cast<uint16_t *>(out) + m * width);
    });
    return 0;
}

int ql_decode(const ql_weight *of, void *out, int64_t begin, int64_t end, int type, int isa, int threads) {
    const Kernel &kernel = *kernel_of(isa);
    const Padded weight(*of);
    const int64_t width = ql_padded(of, isa);
    const int64_t size = type == QL_FLOAT32 ? 4 : 2;
    divide(end - begin, threads, (end - begin) * width, [&](int64_t first, int64_t last) {
        kernel.decode(weight, static_cast<char *>(out) + first * width * size, type, begin + first, begin + last);
    });
    return 0;
}

}  // extern "C"
