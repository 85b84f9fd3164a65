"""Tiny models with random weights, one for each architecture that the engine is tried on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Tiny:
    """A model class and the options of its config; `dtype` of its weights."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


MODELS = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "llama-bf16": Tiny("LlamaForCausalLM", "LlamaConfig", _GROUPED, torch.bfloat16),
    "llama-fp16-tied": Tiny(
        "LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}, torch.float16
    ),
    "llama-bias": Tiny("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, torch.bfloat16),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Tiny("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 16}),
    "gemma3": Tiny(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 16, "sliding_window": 16}, torch.bfloat16
    ),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", _GROUPED),
    "phi": Tiny("PhiForCausalLM", "PhiConfig", _GROUPED),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt2-bf16": Tiny("GPT2LMHeadModel", "GPT2Config", _GPT, torch.bfloat16),
    "opt": Tiny("OPTForCausalLM", "OPTConfig", {**_SIZE, "ffn_dim": 96}),
    "opt-projected": Tiny(
        "OPTForCausalLM",
        "OPTConfig",
        {**_SIZE, "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "gpt-neox": Tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZE),
    "gpt-neo": Tiny(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**_SIZE, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "bloom": Tiny(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    ),
    "falcon": Tiny("FalconForCausalLM", "FalconConfig", {**_SIZE, "parallel_attn": True}),
    "falcon-new": Tiny(
        "FalconForCausalLM",
        "FalconConfig",
        {**_SIZE, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "mpt": Tiny(
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "gptj": Tiny("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "codegen": Tiny("CodeGenForCausalLM", "CodeGenConfig", {**_GPT, "rotary_dim": 8}),
    "gpt-bigcode": Tiny("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "stablelm": Tiny("StableLmForCausalLM", "StableLmConfig", _GROUPED),
    "cohere": Tiny("CohereForCausalLM", "CohereConfig", _GROUPED),
    "cohere2": Tiny("Cohere2ForCausalLM", "Cohere2Config", _GROUPED),
    "olmo2": Tiny("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "starcoder2": Tiny("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "granite": Tiny("GraniteForCausalLM", "GraniteConfig", _GROUPED),
    "smollm3": Tiny("SmolLM3ForCausalLM", "SmolLM3Config", _GROUPED),
    "glm4": Tiny("Glm4ForCausalLM", "Glm4Config", {**_GROUPED, "head_dim": 16}),
    "nemotron": Tiny("NemotronForCausalLM", "NemotronConfig", _GROUPED),
    "mixtral": Tiny(
        "MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen2-moe": Tiny(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_GROUPED, **_MOE, "shared_expert_intermediate_size": 32}
    ),
    "qwen3-moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPED, **_MOE, "head_dim": 16}),
    "olmoe": Tiny("OlmoeForCausalLM", "OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": Tiny("PhimoeForCausalLM", "PhimoeConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": Tiny("DeepseekV2ForCausalLM", "DeepseekV2Config", {**_SIZE, **_MLA}),
    "deepseek-v3": Tiny("DeepseekV3ForCausalLM", "DeepseekV3Config", {**_SIZE, **_MLA}),
    "gpt-oss": Tiny(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "mamba": Tiny(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 16},
    ),
    "mamba2": Tiny(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "jamba": Tiny(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 16,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "lfm2": Tiny("Lfm2ForCausalLM", "Lfm2Config", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "recurrent-gemma": Tiny(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {**_GROUPED, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 32},
    ),
    "rwkv": Tiny(
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "attention_hidden_size": 64,
            "intermediate_size": 96,
        },
    ),
    "bert-mlm": Tiny("BertForMaskedLM", "BertConfig", _SIZE),
    "bert": Tiny("BertModel", "BertConfig", _SIZE),
    "roberta": Tiny("RobertaForMaskedLM", "RobertaConfig", _SIZE),
    "distilbert": Tiny(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 64,
            "hidden_dim": 96,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "electra": Tiny("ElectraForMaskedLM", "ElectraConfig", {**_SIZE, "embedding_size": 32}),
    "deberta-v2": Tiny("DebertaV2ForMaskedLM", "DebertaV2Config", _SIZE),
    "modernbert": Tiny(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_SIZE, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 16},
    ),
    "albert": Tiny("AlbertForMaskedLM", "AlbertConfig", {**_SIZE, "embedding_size": 32}),
    "albert-groups": Tiny(
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**_SIZE, "num_hidden_layers": 4, "num_hidden_groups": 2, "embedding_size": 32},
    ),
    "funnel": Tiny(
        "FunnelForMaskedLM",
        "FunnelConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 96, "block_sizes": [1, 1]},
    ),
    "xlm": Tiny(
        "XLMWithLMHeadModel",
        "XLMConfig",
        {
            "vocab_size": VOCABULARY,
            "emb_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "pad_index": 0,
            "eos_index": 1,
            "unk_index": 2,
            "bos_index": 3,
        },
    ),
    "granite-moe": Tiny(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "image_token_index": 95,
            "text_config": {**_GROUPED, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        },
    ),
    "gemma3-vision": Tiny(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_GROUPED, "head_dim": 16, "sliding_window": 16},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 95,
            "boi_token_index": 94,
            "eoi_token_index": 93,
        },
    ),
    "t5": Tiny("T5ForConditionalGeneration", "T5Config", {**_T5, "decoder_start_token_id": 0}),
    "t5-encoder": Tiny("T5EncoderModel", "T5Config", _T5),
    "bart": Tiny(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
    ),
}


def tiny_model(name: str) -> PreTrainedModel:
    """The model with random weights, the same at every call; norms and biases are random too."""
    tiny = MODELS[name]
    config = getattr(transformers, tiny.config)(**tiny.options)
    torch.manual_seed(0)
    model = getattr(transformers, tiny.model)(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.to(tiny.dtype).eval()
