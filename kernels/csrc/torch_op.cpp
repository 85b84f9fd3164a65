// `quantlab::linear` for CPU tensors, registered with torch through its stable ABI: no Python between one layer of a compiled
// model and the next. Built at first use against the headers that torch brings; see quantlab_kernels/native.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "quantlab_cpu.h"

using torch::stable::Tensor;

namespace {

// What the kernels' own library offers, and how Python configured it.
struct Kernels {
    decltype(&ql_choose) choose;
    decltype(&ql_linear) linear;
    int at_most;
    int64_t most_rows;
} kernels;

// Asked of torch as a number: its stable interface does not know all types by name.
int type_of(const Tensor &tensor) {
    using torch::headeronly::ScalarType;
    int32_t type = -1;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
    switch (static_cast<ScalarType>(type)) {
        case ScalarType::Float: return QL_FLOAT32;
        case ScalarType::Half: return QL_FLOAT16;
        case ScalarType::BFloat16: return QL_BFLOAT16;
        case ScalarType::Char: return QL_INT8;
        case ScalarType::Float8_e8m0fnu: return QL_E8M0;
        default: return -1;
    }
}

const void *data_of(const std::optional<Tensor> &tensor) { return tensor ? tensor->data_ptr() : nullptr; }
int type_of(const std::optional<Tensor> &tensor) { return tensor ? type_of(*tensor) : QL_FLOAT32; }
bool plain(const std::optional<Tensor> &tensor) { return !tensor || (tensor->is_contiguous() && type_of(*tensor) >= 0); }

// Products with many rows, and everything out of the ordinary: in Python.
Tensor other(const Tensor &x, const Tensor &codes, const Tensor &scales, const std::optional<Tensor> &zeros,
             const Tensor &table, int64_t bits, int64_t offset, const std::optional<Tensor> &bias,
             const std::optional<Tensor> &left, const std::optional<Tensor> &right) {
    StableIValue stack[] = {torch::stable::detail::from(x),     torch::stable::detail::from(codes),
                            torch::stable::detail::from(scales), torch::stable::detail::from(zeros),
                            torch::stable::detail::from(table),  torch::stable::detail::from(bits),
                            torch::stable::detail::from(offset), torch::stable::detail::from(bias),
                            torch::stable::detail::from(left),   torch::stable::detail::from(right)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("quantlab::linear_any", "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> zeros, Tensor table, int64_t bits,
              int64_t offset, std::optional<Tensor> bias, std::optional<Tensor> left, std::optional<Tensor> right) {
    const int type = type_of(x);
    const int64_t columns = x.size(x.dim() - 1), rows = columns ? x.numel() / columns : 0;
    const bool few = rows > 0 && rows <= kernels.most_rows && x.is_contiguous() && codes.is_contiguous() &&
                     scales.is_contiguous() && plain(zeros) && plain(bias) && plain(left) && plain(right) &&
                     type_of(scales) >= 0 && type >= 0 && type <= QL_BFLOAT16 && type_of(table) == QL_FLOAT32;
    if (!few) return other(x, codes, scales, zeros, table, bits, offset, bias, left, right);
    ql_weight weight = {};
    weight.codes = static_cast<const uint8_t *>(codes.data_ptr());
    weight.scales = scales.data_ptr();
    weight.zeros = data_of(zeros);
    weight.table = static_cast<const float *>(table.data_ptr());
    weight.bias = data_of(bias);
    weight.left = data_of(left);
    weight.right = data_of(right);
    weight.outputs = codes.size(0);
    weight.columns = columns;
    weight.groups = scales.size(1);
    weight.scale_rows = scales.size(0);
    weight.rank = left ? left->size(1) : 0;
    weight.bits = int32_t(bits);
    weight.table_size = int32_t(table.size(0));
    weight.scale_type = type_of(scales);
    weight.zero_type = type_of(zeros);
    weight.bias_type = type_of(bias);
    weight.left_type = type_of(left);
    weight.right_type = type_of(right);
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i + 1 < x.dim(); i++) sizes.push_back(x.size(i));
    sizes.push_back(weight.outputs);
    Tensor y = torch::stable::new_empty(x, sizes);
    const int isa = kernels.choose(&weight, type, kernels.at_most);
    const int threads = int(torch::stable::get_num_threads());
    STD_TORCH_CHECK(kernels.linear(&weight, x.data_ptr(), y.data_ptr(), rows, type, isa, threads) == 0,
                    "quantlab: no memory for a product of ", rows, " rows");
    return y;
}

}  // namespace

extern "C" void ql_configure(void *choose, void *linear_function, int at_most, int64_t most_rows) {
    kernels = {reinterpret_cast<decltype(&ql_choose)>(choose), reinterpret_cast<decltype(&ql_linear)>(linear_function),
               at_most, most_rows};
}

STABLE_TORCH_LIBRARY_IMPL(quantlab, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
