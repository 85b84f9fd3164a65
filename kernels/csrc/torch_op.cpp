// `quantlab::linear` and `quantlab::linears` for CPU tensors, registered with torch through its stable ABI: no Python between one layer of a compiled
// model and the next. Built at first use against the headers that torch brings; see quantlab_kernels/native.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <exception>
#include <optional>
#include <vector>

#include "quantlab_cpu.h"

using torch::stable::Tensor;

namespace {

// What the kernels' own library offers, and how Python configured it.
struct Kernels {
    decltype(&ql_most_rows) most_rows;
    decltype(&ql_linear) linear;
    int at_most;
    int allowed;
} kernels;

// What torch's C interface says of a tensor.
template <typename T, typename Function>
T ask(Function function, AtenTensorHandle tensor) {
    T value;
    STABLE_TORCH_ERROR_CODE_CHECK(function(tensor, &value));
    return value;
}

int64_t size_of(AtenTensorHandle tensor, int64_t dimension) {
    int64_t size;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(tensor, dimension, &size));
    return size;
}

const void *data_of(AtenTensorHandle tensor) { return tensor ? ask<void *>(aoti_torch_get_data_ptr, tensor) : nullptr; }

// Asked of torch as a number: its stable interface does not know all types by name. What is not there is of any type.
int type_of(AtenTensorHandle tensor) {
    using torch::headeronly::ScalarType;
    if (!tensor) return QL_FLOAT32;
    switch (static_cast<ScalarType>(ask<int32_t>(aoti_torch_get_dtype, tensor))) {
        case ScalarType::Float: return QL_FLOAT32;
        case ScalarType::Half: return QL_FLOAT16;
        case ScalarType::BFloat16: return QL_BFLOAT16;
        case ScalarType::Char: return QL_INT8;
        case ScalarType::Float8_e8m0fnu: return QL_E8M0;
        default: return -1;
    }
}

bool contiguous(AtenTensorHandle tensor) { return !tensor || ask<bool>(aoti_torch_is_contiguous, tensor); }

// The tensors of one weight, null where there is none.
struct Operands {
    AtenTensorHandle codes, scales, zeros, table, bias, left, right;

    // Whether the kernels can read all of them.
    bool plain() const {
        for (AtenTensorHandle tensor : {scales, zeros, bias, left, right})
            if (!contiguous(tensor) || type_of(tensor) < 0) return false;
        return contiguous(codes) && contiguous(table) && type_of(table) == QL_FLOAT32;
    }

    ql_weight weight(int64_t columns, int64_t bits) const {
        ql_weight weight = {};
        weight.codes = static_cast<const uint8_t *>(data_of(codes));
        weight.scales = data_of(scales);
        weight.zeros = data_of(zeros);
        weight.table = static_cast<const float *>(data_of(table));
        weight.bias = data_of(bias);
        weight.left = data_of(left);
        weight.right = data_of(right);
        weight.outputs = size_of(codes, 0);
        weight.columns = columns;
        weight.groups = size_of(scales, 1);
        weight.scale_rows = size_of(scales, 0);
        weight.rank = left ? size_of(left, 1) : 0;
        weight.bits = int32_t(bits);
        weight.table_size = int32_t(size_of(table, 0));
        weight.scale_type = type_of(scales);
        weight.zero_type = type_of(zeros);
        weight.bias_type = type_of(bias);
        weight.left_type = type_of(left);
        weight.right_type = type_of(right);
        return weight;
    }
};

// The product of x with all weights, side by side; null where it has too many rows, or something is out of the ordinary.
AtenTensorHandle product(AtenTensorHandle x, const Operands *operands, size_t count, int64_t bits) {
    const int type = type_of(x);
    const int64_t dimensions = ask<int64_t>(aoti_torch_get_dim, x), columns = size_of(x, dimensions - 1);
    const int64_t rows = columns ? ask<int64_t>(aoti_torch_get_numel, x) / columns : 0;
    if (!kernels.allowed || rows == 0 || !contiguous(x) || type < 0 || type > QL_BFLOAT16) return nullptr;
    std::vector<ql_weight> weights;
    int64_t outputs = 0;
    for (size_t i = 0; i < count; i++) {
        if (!operands[i].plain()) return nullptr;
        weights.push_back(operands[i].weight(columns, bits));
        if (rows > kernels.most_rows(&weights[i], type, kernels.at_most)) return nullptr;
        outputs += weights[i].outputs;
    }
    std::vector<int64_t> sizes, strides(size_t(dimensions), 1);
    for (int64_t i = 0; i < dimensions; i++) sizes.push_back(i + 1 < dimensions ? size_of(x, i) : outputs);
    for (int64_t i = dimensions - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
    AtenTensorHandle y;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes.data(), strides.data(),
                                                           ask<int32_t>(aoti_torch_get_dtype, x),
                                                           aoti_torch_device_type_cpu(), 0, &y));
    const Tensor owned(y);
    const int threads = int(torch::stable::get_num_threads());
    STD_TORCH_CHECK(kernels.linear(weights.data(), int(count), data_of(x), owned.data_ptr(), rows, type, kernels.at_most,
                                   threads) == 0,
                    "quantlab: no memory for a product of ", rows, " rows");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(y, &y));
    return y;
}

// An operator on what its arguments are to torch: products with many rows, and everything out of the ordinary, in Python.
template <typename... Arguments>
AtenTensorHandle other(const char *name, const Arguments &...arguments) {
    StableIValue stack[] = {torch::stable::detail::from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<AtenTensorHandle>(stack[0]);
}

AtenTensorHandle handle(const std::optional<Tensor> &tensor) { return tensor ? tensor->get() : nullptr; }

Tensor linear(Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> zeros, Tensor table, int64_t bits,
              int64_t offset, std::optional<Tensor> bias, std::optional<Tensor> left, std::optional<Tensor> right) {
    const Operands operands = {codes.get(), scales.get(), handle(zeros), table.get(), handle(bias), handle(left), handle(right)};
    AtenTensorHandle y = product(x.get(), &operands, 1, bits);
    return Tensor(y ? y : other("quantlab::linear_any", x, codes, scales, zeros, table, bits, offset, bias, left, right));
}

// Borrowed tensors, as a compiled graph has them.
struct List {
    const AtenTensorHandle *tensors;
    int64_t count;

    AtenTensorHandle at(int64_t i) const { return count ? tensors[i] : nullptr; }
    std::vector<Tensor> owned() const {
        std::vector<Tensor> found;
        for (int64_t i = 0; i < count; i++) found.emplace_back(ask<AtenTensorHandle>(aoti_torch_new_tensor_handle, tensors[i]));
        return found;
    }
};

AtenTensorHandle linears(AtenTensorHandle x, List codes, List scales, List zeros, List tables, int64_t bits, List biases) {
    std::vector<Operands> operands;
    for (int64_t i = 0; i < codes.count; i++)
        operands.push_back({codes.at(i), scales.at(i), zeros.at(i), tables.at(i), biases.at(i), nullptr, nullptr});
    if (AtenTensorHandle y = product(x, operands.data(), operands.size(), bits)) return y;
    const Tensor owned(ask<AtenTensorHandle>(aoti_torch_new_tensor_handle, x));
    return other("quantlab::linears_any", owned, codes.owned(), scales.owned(), zeros.owned(), tables.owned(), bits,
                 biases.owned());
}

Tensor boxed_linears(Tensor x, std::vector<Tensor> codes, std::vector<Tensor> scales, std::vector<Tensor> zeros,
                     std::vector<Tensor> tables, int64_t bits, std::vector<Tensor> biases) {
    std::vector<AtenTensorHandle> handles[5];
    const std::vector<Tensor> *given[] = {&codes, &scales, &zeros, &tables, &biases};
    List lists[5];
    for (int i = 0; i < 5; i++) {
        for (const Tensor &tensor : *given[i]) handles[i].push_back(tensor.get());
        lists[i] = {handles[i].data(), int64_t(handles[i].size())};
    }
    return Tensor(linears(x.get(), lists[0], lists[1], lists[2], lists[3], bits, lists[4]));
}

}  // namespace

extern "C" void ql_configure(void *most_rows, void *linear_function, int at_most, int allowed) {
    kernels = {reinterpret_cast<decltype(&ql_most_rows)>(most_rows), reinterpret_cast<decltype(&ql_linear)>(linear_function),
               at_most, allowed};
}

// What torch's compiler calls for `quantlab::linears` without its dispatcher: the name is its own rule for C functions of
// operators, and the arguments are what native.LINEARS_IN_C declares.
extern "C" AOTITorchError aoti_torch_cpu_linears(AtenTensorHandle x, const AtenTensorHandle *codes, int64_t codes_count,
                                                 const AtenTensorHandle *scales, int64_t scales_count,
                                                 const AtenTensorHandle *zeros, int64_t zeros_count,
                                                 const AtenTensorHandle *tables, int64_t tables_count, int64_t bits,
                                                 const AtenTensorHandle *biases, int64_t biases_count,
                                                 AtenTensorHandle *result) {
    try {
        *result = linears(x, {codes, codes_count}, {scales, scales_count}, {zeros, zeros_count}, {tables, tables_count}, bits,
                          {biases, biases_count});
        return AOTI_TORCH_SUCCESS;
    } catch (const std::exception &error) {
        fprintf(stderr, "quantlab::linears: %s\n", error.what());
        return AOTI_TORCH_FAILURE;
    }
}

STABLE_TORCH_LIBRARY_IMPL(quantlab, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("linears", TORCH_BOX(&boxed_linears));
}
