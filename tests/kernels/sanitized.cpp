// Products of all kinds in buffers that end where their data ends: the sanitizers watch.
#include <cstdio>
#include <initializer_list>
#include <memory>

#include "quantlab_cpu.h"

namespace {

// Exactly as large as asked for, so that one byte too far is seen.
template <typename T>
std::unique_ptr<T[]> filled(int64_t count, T (*value)(int64_t)) {
    std::unique_ptr<T[]> data(new T[size_t(count)]);
    for (int64_t i = 0; i < count; i++) data[size_t(i)] = value(i);
    return data;
}

uint16_t small_bfloat16(int64_t i) { return uint16_t(0x3f00 + i * 37 % 64 + (i % 3 == 0) * 0x8000); }
uint8_t any_byte(int64_t i) { return uint8_t(i * 2654435761u >> 13); }
int8_t any_zero(int64_t i) { return int8_t(i % 9 - 4); }
float any_value(int64_t i) { return float(i % 17) - 8.0f; }
float integer(int64_t i) { return float(i) - 3.0f; }
float between(int64_t i) { return float(i) - 2.5f; }
float positive(int64_t i) { return float(i % 7) + 0.25f; }

// Quantizes a weight of every type to every kind of grid; whether all went well.
bool quantize(int64_t rows, int64_t groups, int64_t size) {
    const int64_t columns = groups * size;
    auto halves = filled<uint16_t>(rows * columns, small_bfloat16);
    auto floats = filled<float>(rows * columns, any_value);
    auto zeros = filled<float>(rows * groups, any_value);
    auto importance = filled<float>(columns, positive);
    auto peaks = filled<float>(rows * groups, positive), scales = filled<float>(rows * groups, positive);
    auto errors = filled<float>(rows, positive), energies = filled<float>(rows, positive);
    std::unique_ptr<uint8_t[]> codes(new uint8_t[size_t(rows * columns)]);
    for (int type = QL_FLOAT32; type <= QL_BFLOAT16; type++)
        for (int count : {2, 4, 15, 16, 31, 64, 65, 253, 256}) {
            auto values = filled<float>(count, integer), borders = filled<float>(count - 1, between);
            for (const float *table : {static_cast<const float *>(borders.get()), static_cast<const float *>(nullptr)})
                for (const float *counts : {static_cast<const float *>(importance.get()), static_cast<const float *>(nullptr)}) {
                    const float factors[] = {1.0f, 0.9f, -1.0f, 1.1f, 0.8f};
                    const ql_grid grid = {values.get(), table, count};
                    const ql_search_steps steps = {counts, factors, 5, 2};
                    ql_groups weight = {};
                    weight.values = type == QL_FLOAT32 ? static_cast<const void *>(floats.get()) : halves.get();
                    weight.rows = weight.scale_rows = rows;
                    weight.groups = groups;
                    weight.size = size;
                    weight.type = type;
                    if (ql_peaks(&weight, peaks.get(), 2)) return false;
                    weight.scales = peaks.get();
                    if (ql_search(&weight, &grid, &steps, scales.get(), 2)) return false;
                    weight.scales = scales.get();
                    weight.zeros = counts ? zeros.get() : nullptr;
                    if (ql_nearest(&weight, &grid, codes.get(), 2)) return false;
                    if (ql_errors(&weight, &grid, counts, codes.get(), errors.get(), energies.get(), 2)) return false;
                }
        }
    for (int bits = 1; bits <= 8; bits++) {
        std::unique_ptr<uint8_t[]> packed(new uint8_t[size_t(rows * ((columns * bits + 7) / 8))]);
        if (ql_pack(codes.get(), rows, columns, bits, packed.get(), 2)) return false;
    }
    return true;
}

}  // namespace

int main() {
    if (ql_best_isa() >= QL_AVX512)
        for (int64_t rows : {1, 18})
            for (int64_t groups : {1, 3})
                for (int64_t size : {1, 7, 16, 33, 64})
                    if (!quantize(rows, groups, size)) return 1;
    long products = 0;
    const int64_t shapes[][2] = {{64, 1},  {128, 2}, {256, 4}, {576, 9}, {96, 1}, {96, 4}, {520, 65}, {72, 9},
                                 {33, 1},  {39, 3},  {1, 1},   {1024, 2}, {192, 2}, {640, 5}, {1000, 1}, {2112, 33}};
    for (int bits = 1; bits <= 8; bits++)
        for (const auto &shape : shapes)
            for (int64_t outputs : {1, 5, 18})
                for (int64_t rows : {1, 2, 3, 4, 7, 8, 13, 41})
                    for (int kind = 0; kind < 4; kind++) {
                        const int64_t columns = shape[0], groups = shape[1], rank = kind == 3 ? 3 : 0;
                        const int64_t bytes = (columns * bits + 7) / 8, scale_rows = kind == 2 ? 1 : outputs;
                        const int sizes[] = {4, 2, 2};
                        const int type = kind % 3;
                        auto codes = filled<uint8_t>(outputs * bytes, any_byte);
                        auto scales = filled<uint16_t>(scale_rows * groups, small_bfloat16);
                        auto zeros = filled<int8_t>(scale_rows * groups, any_zero);
                        auto table = filled<float>(1 << bits, kind == 1 ? any_value : integer);
                        auto bias = filled<float>(outputs, any_value);
                        auto left = filled<uint16_t>(outputs * rank + 1, small_bfloat16);
                        auto right = filled<uint16_t>(rank * columns + 1, small_bfloat16);
                        auto x16 = filled<uint16_t>(rows * columns, small_bfloat16);
                        auto x32 = filled<float>(rows * columns, any_value);
                        std::unique_ptr<char[]> y(new char[size_t(rows * outputs * sizes[type])]);
                        ql_weight weight = {};
                        weight.codes = codes.get();
                        weight.scales = scales.get();
                        weight.zeros = kind == 1 || kind == 2 ? zeros.get() : nullptr;
                        weight.table = table.get();
                        weight.bias = kind == 3 ? bias.get() : nullptr;
                        weight.left = rank ? left.get() : nullptr;
                        weight.right = rank ? right.get() : nullptr;
                        weight.outputs = outputs;
                        weight.columns = columns;
                        weight.groups = groups;
                        weight.scale_rows = scale_rows;
                        weight.rank = rank;
                        weight.bits = bits;
                        weight.table_size = 1 << bits;
                        weight.scale_type = weight.left_type = weight.right_type = QL_BFLOAT16;
                        weight.zero_type = QL_INT8;
                        weight.bias_type = QL_FLOAT32;
                        const void *x = type == QL_FLOAT32 ? static_cast<const void *>(x32.get()) : x16.get();
                        auto rounded = std::unique_ptr<int8_t[]>(new int8_t[size_t(rows * columns)]);
                        auto steps = std::unique_ptr<float[]>(new float[size_t(rows)]);
                        ql_round_rows(x, type, rows, columns, rounded.get(), steps.get(), 2);
                        for (int at_most = QL_SCALAR; at_most <= QL_AVX512_INT8; at_most++) {
                            const int isa = ql_choose(&weight, type, rows, at_most);
                            if (isa != at_most) continue;
                            if (ql_linear(&weight, 1, x, y.get(), rows, type, isa, 2)) return 1;
                            products++;
                            if (isa >= QL_AVX512) continue;
                            std::unique_ptr<char[]> out(new char[size_t(outputs * columns * sizes[type])]);
                            if (ql_decode(&weight, out.get(), 0, outputs, type, isa, 1)) return 1;
                        }
                    }
    printf("%ld products\n", products);
    return products ? 0 : 1;
}
