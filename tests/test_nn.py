from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from quantlab.errors import QuantlabError
from quantlab.experts import UnfusedExperts, unfuse_experts
from quantlab.nn import QuantLinear
from quantlab.numerics import LowRank, QTensor, apply_scales, choose_scales, grid
from quantlab.storage import Storage

pytestmark = pytest.mark.usefixtures("reference_kernel")


def qtensor(bits=4, granularity=16, *, symmetric=True, dtype=torch.bfloat16, low_rank=0, out=12, columns=64):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(out, columns, generator=generator)
    table = grid(f"int{bits}")
    stored = str(dtype).removeprefix("torch.")
    scales = choose_scales(weight, table, granularity, symmetric=symmetric, search=False, stored=stored)
    codes = apply_scales(weight, table, scales)
    correction = None
    if low_rank:
        left, right = torch.randn(out, low_rank), torch.randn(low_rank, columns)
        correction = LowRank(left.to(torch.float16), right.to(torch.float16))
    return replace(QTensor.of(codes, scales, table), low_rank=correction)


FORMS = {
    "grouped": {},
    "three bits": {"bits": 3, "columns": 51, "granularity": 17},
    "channel": {"granularity": "channel", "symmetric": False},
    "tensor": {"bits": 8, "granularity": "tensor", "dtype": torch.float32},
    "low rank": {"low_rank": 3, "bits": 2},
}


@pytest.mark.parametrize("form", FORMS)
class TestQuantLinear:
    def test_is_the_linear_layer_of_the_decoded_weight(self, form):
        q, bias = qtensor(**FORMS[form]), torch.randn(12)
        x = torch.randn(2, 3, q.shape[1])
        y = QuantLinear.from_qtensor(q, bias)(x)
        expected = nn.functional.linear(x, q.dequantize(), bias)
        if q.low_rank is None:
            assert torch.equal(y, expected)
        torch.testing.assert_close(y, expected)

    def test_gives_its_qtensor_back(self, form):
        q = qtensor(**FORMS[form])
        back = QuantLinear.from_qtensor(q).to_qtensor()
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.dequantize(), q.dequantize())
        assert (back.zeros is None) == (q.zeros is None)
        assert Storage.of(back) == Storage.of(q)

    def test_an_empty_one_has_the_same_tensors(self, form):
        full = QuantLinear.from_qtensor(qtensor(**FORMS[form]), torch.randn(12))
        with torch.device("meta"):
            empty = QuantLinear(full.storage)
        described = {name: (t.shape, t.dtype) for name, t in full.state_dict().items()}
        assert described == {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()}
        assert all(t.is_meta for t in empty.state_dict().values())

    def test_storage_goes_through_json(self, form):
        storage = Storage.of(qtensor(**FORMS[form]), bias=True)
        assert Storage.from_dict(json.loads(json.dumps(storage.to_dict()))) == storage

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_casting_the_model_leaves_its_numbers(self, form, dtype):
        layer = QuantLinear.from_qtensor(qtensor(**FORMS[form]), torch.randn(12))
        before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
        model = nn.Sequential(layer).to(dtype)
        assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in layer.named_buffers())
        assert layer.bias.dtype == dtype
        assert model(torch.randn(1, layer.in_features, dtype=dtype)).dtype == dtype
        assert layer.weight.dtype == dtype


def test_moves_between_devices():
    layer = QuantLinear.from_qtensor(qtensor(symmetric=False))
    empty = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in empty.state_dict().values())
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled.weight, layer.weight)


def test_weight_cannot_be_assigned():
    layer = QuantLinear.from_qtensor(qtensor())
    with pytest.raises((KeyError, AttributeError)):
        layer.weight = nn.Parameter(torch.zeros(12, 64))


@pytest.mark.parametrize(
    "change", [{"bits": 9}, {"table_size": 17}, {"scale_shape": [5, 4]}, {"scale_shape": [12, 5]}, {"odd": 1}]
)
def test_refuses_descriptions_that_cannot_be(change):
    with pytest.raises(QuantlabError):
        Storage.from_dict({**Storage.of(qtensor()).to_dict(), **change})


def test_refuses_dtypes_that_torch_does_not_have():
    with pytest.raises(QuantlabError, match="float7"):
        Storage.from_dict({**Storage.of(qtensor()).to_dict(), "scale_dtype": "float7"}).specs()


MIXTURES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "Olmoe": {"num_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4},  # biases, transposed weights, gate and up interleaved
    "DeepseekV3": {"n_routed_experts": 4, "moe_intermediate_size": 24},
    "NemotronH": {"n_routed_experts": 4, "moe_intermediate_size": 24, "mlp_hidden_act": "relu2"},  # no gate
}


def fused_experts(kind: str, **changes) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, **MIXTURES[kind], **changes}
    config = getattr(transformers, f"{kind}Config")(**sizes, experts_implementation="eager")
    config._experts_implementation = "eager"
    modeling = __import__(
        getattr(transformers, f"{kind}Config").__module__.replace("configuration_", "modeling_"),
        fromlist=["_"],
    )
    experts = getattr(modeling, f"{kind}Experts")(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.requires_grad_(False)


def routed(experts: int = 4, tokens: int = 20):
    torch.manual_seed(1)
    weights, index = torch.rand(tokens, experts).topk(2)
    return torch.randn(tokens, 32), index, weights


@pytest.mark.parametrize("kind", MIXTURES)
class TestUnfusedExperts:
    def test_has_the_result_of_the_eager_loop(self, kind):
        fused = fused_experts(kind)
        assert UnfusedExperts.is_fused(fused)
        unfused = UnfusedExperts.from_fused(fused)
        assert not UnfusedExperts.is_fused(unfused)
        y, expected = unfused(*routed()), fused(*routed())
        torch.testing.assert_close(y, expected)
        if not fused.has_bias:  # there the loop adds the bias after rounding, a linear layer before
            assert torch.equal(y, expected)

    def test_shares_the_fused_memory(self, kind):
        fused = fused_experts(kind)
        unfused = UnfusedExperts.from_fused(fused)
        assert unfused.get_submodule("2.down_proj").weight.data_ptr() == fused.down_proj[2].data_ptr()

    def test_origin_names_the_fused_parameter(self, kind):
        fused = fused_experts(kind)
        for name, parameter in UnfusedExperts.from_fused(fused).named_parameters():
            origin, expert = UnfusedExperts.origin(name)
            part = fused.get_parameter(origin)[expert]
            assert torch.equal(part.T if fused.is_transposed and part.ndim == 2 else part, parameter)

    def test_works_on_the_meta_device(self, kind):
        with torch.device("meta"):
            fused = fused_experts(kind)
        unfused = UnfusedExperts.from_fused(fused)
        real = UnfusedExperts.from_fused(fused_experts(kind))
        assert {n: p.shape for n, p in unfused.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
        assert all(p.is_meta for p in unfused.parameters())

    def test_can_be_copied_and_pickled(self, kind):
        unfused = UnfusedExperts.from_fused(fused_experts(kind))
        expected = unfused(*routed())
        assert torch.equal(copy.deepcopy(unfused)(*routed()), expected)
        assert torch.equal(pickle.loads(pickle.dumps(unfused))(*routed()), expected)


def test_experts_without_tokens_are_not_called_and_unused_slots_are_skipped():
    unfused = UnfusedExperts.from_fused(fused_experts("Mixtral"))
    called = []
    for e in range(4):
        unfused.get_submodule(f"{e}.down_proj").register_forward_hook(lambda *_, e=e: called.append(e))
    x, index = torch.randn(3, 32), torch.tensor([[1, 4], [1, 4], [3, 4]])
    y = unfused(x, index, torch.tensor([[1.0, 0.0]] * 3))
    assert called == [1, 3]
    assert y.isfinite().all()


def test_experts_can_be_quantized_one_by_one():
    unfused = UnfusedExperts.from_fused(fused_experts("Qwen3Moe"))
    expected = unfused(*routed())
    linear = unfused.get_submodule("1.gate_up_proj")
    table = grid("int8")
    scales = choose_scales(linear.weight, table, 16, search=False)
    q = QTensor.of(apply_scales(linear.weight, table, scales), scales, table)
    unfused.get_submodule("1").gate_up_proj = QuantLinear.from_qtensor(q)
    torch.testing.assert_close(unfused(*routed()), expected, atol=0.2, rtol=0.05)


def test_unfuses_a_whole_model():
    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=50)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    assert unfuse_experts(model) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert unfuse_experts(model) == []
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in model.state_dict()


class OddExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))


def test_refuses_experts_that_it_does_not_understand():
    with pytest.raises(QuantlabError, match=r"0: .*OddExperts"):
        unfuse_experts(nn.Sequential(OddExperts()))
    fused = fused_experts("Mixtral")
    fused.extra_scale = nn.Parameter(torch.ones(4))
    with pytest.raises(QuantlabError, match=r"MixtralExperts.*extra_scale"):
        UnfusedExperts.from_fused(fused)
