"""Small models of transformers with random weights, one of each family, and inputs for them."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.encoders import randomize

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    **IDS,
}
SHARED = {**TEXT, "num_key_value_heads": 2}
"""Two heads of queries share keys and values."""
SIZED = {**SHARED, "head_dim": 8}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 24, **IDS}
FALCON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 24,
    "alibi": False,
    **IDS,
}
PAIR = {
    "vocab_size": 64,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    **IDS,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    **IDS,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
DISENTANGLED = {
    **TEXT,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "max_relative_positions": 16,
}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
MIXED = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [1, 1],
    "decoder_hidden_size": 16,
    "image_size": 32,
}
LATENT = {
    **TEXT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """How a family is built, and what can be removed from it.

    Attributes:
        config: The class of its configuration, without ``Config``.
        model: The class of the model, as what follows the name of its family.
        auto: The class that loads it.
        settings: What the configuration is given.
        heads: How many heads each block has; empty if none can be removed.
        neurons: How many units of neurons each block has.
    """

    config: str
    model: str
    auto: str
    settings: dict[str, Any] = field(repr=False)
    heads: tuple[int, ...] = (2, 2)
    neurons: tuple[int, ...] = (24, 24)


def _decoder(config: str, settings: dict[str, Any], **units: Any) -> Family:
    return Family(config, "ForCausalLM", "CausalLM", settings, **units)


def _image(config: str, settings: dict[str, Any], **units: Any) -> Family:
    return Family(
        config,
        "ForImageClassification",
        "ImageClassification",
        settings,
        **{"heads": (4, 4), **units},
    )


def _text(config: str, settings: dict[str, Any], **units: Any) -> Family:
    name = "SequenceClassification"
    return Family(config, f"For{name}", name, settings, **{"heads": (4, 4), **units})


FAMILIES = {
    "llama": _decoder("Llama", {**SIZED, "tie_word_embeddings": True}),
    "mistral": _decoder("Mistral", SIZED),
    "qwen2": _decoder("Qwen2", SHARED),
    "qwen3": _decoder("Qwen3", SIZED),
    "gemma2": _decoder("Gemma2", SIZED),
    "gemma, one key": _decoder("Gemma", {**SIZED, "num_key_value_heads": 1}, heads=(4, 4)),
    "phi": _decoder("Phi", SHARED),
    "phi3": _decoder("Phi3", SHARED),
    "phi3, a size for heads": _decoder("Phi3", SIZED),
    "stablelm": _decoder("StableLm", SHARED),
    "starcoder2": _decoder("Starcoder2", SHARED),
    "olmo2": _decoder("Olmo2", SHARED, heads=()),
    "opt": _decoder("OPT", {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 32}, heads=(4, 4)),
    "gpt2": Family("GPT2", "LMHeadModel", "CausalLM", GPT, heads=(4, 4)),
    "gptj": _decoder("GPTJ", {**GPT, "rotary_dim": 4}, heads=(4, 4)),
    "gpt neox": _decoder("GPTNeoX", {**TEXT, "rotary_pct": 0.5}, heads=(4, 4)),
    "bigcode": _decoder("GPTBigCode", {**GPT, "multi_query": False}, heads=(4, 4)),
    "bigcode, one key": _decoder("GPTBigCode", GPT, heads=(4, 4)),
    "bloom": _decoder(
        "Bloom",
        {"vocab_size": 64, "hidden_size": 48, "n_layer": 2, "n_head": 6, **IDS},
        heads=(6, 6),
        neurons=(192, 192),
    ),
    "mpt": _decoder(
        "Mpt",
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 1},
        heads=(4, 4),
        neurons=(128, 128),
    ),
    "falcon": _decoder("Falcon", {**FALCON, "multi_query": False}, heads=(4, 4)),
    "falcon, one key": _decoder("Falcon", FALCON, heads=(4, 4)),
    "falcon, slopes": _decoder("Falcon", {**FALCON, "alibi": True}, heads=(4, 4)),
    "falcon, shared keys": _decoder(
        "Falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}
    ),
    "mixtral": _decoder("Mixtral", {**SIZED, **EXPERTS}, neurons=(3, 3)),
    "qwen3 moe": _decoder(
        "Qwen3Moe",
        {**SIZED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        neurons=(3, 3),
    ),
    "gpt oss": _decoder("GptOss", {**SIZED, **EXPERTS}, neurons=(3, 3)),
    "deepseek": _decoder("DeepseekV3", LATENT, heads=(4, 4), neurons=(24, 2, 16)),
    "bart": Family("Bart", "ForConditionalGeneration", "Seq2SeqLM", PAIR, (4,) * 6, (24,) * 4),
    "t5": Family("T5", "ForConditionalGeneration", "Seq2SeqLM", T5, (4,) * 3, (24,) * 4),
    "t5, gated": Family(
        "T5",
        "ForConditionalGeneration",
        "Seq2SeqLM",
        {**T5, "feed_forward_proj": "gated-gelu"},
        (4,) * 3,
        (24,) * 4,
    ),
    "whisper": Family(
        "Whisper",
        "ForConditionalGeneration",
        "SpeechSeq2Seq",
        {
            **PAIR,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        (4,) * 6,
        (24,) * 4,
    ),
    "bert": _text("Bert", TEXT),
    "albert": _text("Albert", {**TEXT, "embedding_size": 16}, heads=(4,), neurons=(24,)),
    "deberta": _text("Deberta", DISENTANGLED),
    "deberta 2": _text("DebertaV2", {**DISENTANGLED, "position_buckets": 8, "share_att_key": True}),
    "funnel": _text(
        "Funnel",
        {
            "vocab_size": 64,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 24,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
    ),
    "mpnet": _text("MPNet", TEXT),
    "vit": _image("ViT", IMAGE),
    "deit": _image("DeiT", IMAGE),
    "dinov2": _image("Dinov2", {**IMAGE, "mlp_ratio": 1}, neurons=(32, 32)),
    "beit": _image("Beit", {**IMAGE, "use_relative_position_bias": True}),
    "swin": _image("Swin", WINDOWS, heads=(2, 2, 4, 4), neurons=(64, 64, 128, 128)),
    "swin 2": _image("Swinv2", WINDOWS, heads=(2, 2, 4, 4), neurons=(64, 64, 128, 128)),
    "segformer": Family(
        "Segformer", "ForSemanticSegmentation", "SemanticSegmentation", MIXED, (2, 4), (16, 32)
    ),
    "clip": Family(
        "CLIP",
        "Model",
        "",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
        (4,) * 4,
        (24,) * 4,
    ),
    "yolos": Family("Yolos", "Model", "", {**IMAGE, "image_size": [16, 16]}, (4, 4)),
    "siglip": Family(
        "Siglip",
        "Model",
        "",
        {"text_config": {**TEXT, "projection_size": 32}, "vision_config": IMAGE},
        (4,) * 5,
        (24,) * 4 + (24,),
    ),
}


def build(name: str) -> Any:
    """The model of a family, with weights and biases that matter."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.config}Config")(**family.settings)
    return randomize(getattr(transformers, family.config + family.model)(config)).eval()


def loader(name: str) -> Any:
    """The class of transformers that loads the models of a family."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    auto = FAMILIES[name].auto
    return getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel")


def inputs(model: Any, seed: int = 0, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """What a model is called with."""
    random = torch.Generator().manual_seed(seed)
    ids = {"input_ids": torch.randint(3, 64, (rows, length), generator=random)}
    ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    size = getattr(model.config, "image_size", 16)
    high, wide = size if isinstance(size, list) else (size, size)
    pixels = {"pixel_values": torch.randn(rows, 3, high, wide, generator=random)}
    further = {"decoder_input_ids": torch.randint(3, 64, (rows, length - 2), generator=random)}
    main = model.main_input_name
    if main == "pixel_values":
        return pixels
    if main == "input_features":
        return {"input_features": torch.randn(rows, 8, 32, generator=random), **further}
    if hasattr(model.config, "vision_config"):
        return {**ids, **pixels}
    return {**ids, **further} if model.config.is_encoder_decoder else ids
