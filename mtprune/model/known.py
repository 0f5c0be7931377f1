"""Known blocks: where the models people bring keep their heads, neurons and experts."""

from typing import Any

from mtprune.model.blocks import Attention, Experts, FeedForward, Pattern

__all__ = ["PATTERNS"]

_QUERIES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "all_head_size", "inner_dim")
_KEYS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_RATIOS = ("num_key_value_groups",)
_SIZES = "head_dim|attention_head_size|head_size|key_value_proj_dim"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _separate(name: str, query: str, key: str, value: str, out: str, **others: Any) -> Attention:
    """Attention whose queries, keys and values are layers of their own."""
    query, key, value, out = (f"{path}.weight" for path in (query, key, value, out))
    usual = {"head_size": _SIZES, "counts": _QUERIES, "key_counts": _KEYS, "ratios": _RATIOS}
    return Attention(name, query, key, value, out, **{**usual, **others})


def _packed(name: str, inner: str, out: str, **others: Any) -> Attention:
    """Attention whose queries, keys and values are one layer."""
    return _separate(name, inner, inner, inner, out, **others)


def _plain(name: str, up: str, down: str, **others: Any) -> FeedForward:
    """A feed-forward block of two layers."""
    return FeedForward(name, (f"{up}.weight",), f"{down}.weight", **others)


def _gated(name: str, gate: str, up: str, down: str) -> FeedForward:
    """A feed-forward block with gates."""
    counts = ("intermediate_size",)
    return FeedForward(name, (f"{gate}.weight", f"{up}.weight"), f"{down}.weight", counts=counts)


def _experts(gate: str, up: str = "gate_up_proj", **others: Any) -> Experts:
    """A router, and a matrix for each expert in stacks."""
    return Experts(
        f"experts with a {gate}",
        f"{gate}.weight",
        (f"experts.{up}",),
        "experts.down_proj",
        f"{gate}.top_k|gate.top_k|top_k",
        along=(
            "experts.gate_up_proj_bias",
            "experts.down_proj_bias",
            "e_score_correction_bias",  # MiniMax M2
            f"{gate}.bias",
            f"{gate}.e_score_correction_bias",
        ),
        counts=tuple(
            f"{owner}{name}" for owner in ("experts.", f"{gate}.", "") for name in _EXPERTS
        ),
        **others,
    )


PATTERNS: tuple[Pattern, ...] = (
    _separate(
        "BERT",
        "self.query",
        "self.key",
        "self.value",
        "output.dense",
        head_size="self.attention_head_size",
        counts=("self.num_attention_heads", "self.all_head_size"),
        tables=(
            ("self.logit_scale", 0),  # Swin 2
            ("self.continuous_position_bias_mlp.2.weight", 0),
            ("self.conv.weight", 0),  # Nystromformer
        ),
    ),
    _separate(
        "YOLOS",
        "attention.query",
        "attention.key",
        "attention.value",
        "output.dense",
        head_size="attention.attention_head_size",
        counts=("attention.num_attention_heads", "attention.all_head_size"),
    ),
    _separate(
        "DeBERTa",
        "self.query_proj",
        "self.key_proj",
        "self.value_proj",
        "output.dense",
        head_size="self.attention_head_size",
        counts=("self.num_attention_heads", "self.all_head_size"),
    ),
    _packed(
        "DeBERTa",
        "self.in_proj",
        "output.dense",
        head_size="self.attention_head_size",
        counts=("self.num_attention_heads", "self.all_head_size"),
        tables=(
            ("self.q_bias", 0),
            ("self.v_bias", 0),
            ("self.pos_proj.weight", 0),
            ("self.pos_q_proj.weight", 0),
            ("self.pos_q_proj.bias", 0),
        ),
        interleaved=True,
    ),
    _separate("ALBERT", "query", "key", "value", "dense"),
    _separate("DistilBERT", "q_lin", "k_lin", "v_lin", "out_lin", counts=("n_heads", "dim")),
    _separate(
        "Funnel",
        "q_head",
        "k_head",
        "v_head",
        "post_proj",
        head_size="config.d_head",
        counts=("config.n_head",),
        tables=(
            ("r_w_bias", 0),
            ("r_r_bias", 0),
            ("r_s_bias", 0),
            ("r_kernel", 1),
            ("seg_embed", 1),
        ),
    ),
    _packed("ModernBERT", "Wqkv", "Wo"),
    Attention(
        "torch.nn.MultiheadAttention",
        query="in_proj_weight",
        key="in_proj_weight",
        value="in_proj_weight",
        out="out_proj.weight",
        head_size="head_dim",
        counts=("num_heads",),
        # An added key takes part in every head, so that outputs are no averages of the values.
        only=(("bias_k", None), ("add_zero_attn", False)),
    ),
    _separate(
        "BEiT",
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        head_size="attention.head_dim",
        counts=("attention.num_attention_heads",),
        tables=(("relative_position_bias.relative_position_bias_table", 1),),
        needs=("relative_position_bias.relative_position_bias_table",),
    ),
    _separate(
        "Llama, ViT",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        tables=(
            ("relative_position_bias.relative_position_bias_table", 1),  # Swin
            ("sinks", 0),  # GPT-OSS
        ),
    ),
    _separate(
        "XGLM",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        counts=(*_QUERIES, "embed_dim"),  # it puts the heads together to this width
        only=(("is_decoder", True), ("config", None)),
    ),
    _separate("OPT, BART, CLIP, Whisper", "q_proj", "k_proj", "v_proj", "out_proj"),
    _separate("Phi", "q_proj", "k_proj", "v_proj", "dense"),
    _packed(
        "Phi 3",
        "qkv_proj",
        "o_proj",
        counts=("config.num_attention_heads",),
    ),
    _separate(
        "T5",
        "q",
        "k",
        "v",
        "o",
        head_size="key_value_proj_dim",
        tables=(("relative_attention_bias.weight", 1),),
        stack="block",
    ),
    _separate(
        "MPNet",
        "q",
        "k",
        "v",
        "o",
        head_size="attention_head_size",
        arguments=(("position_bias", 1),),
    ),
    _packed(
        "GPT-BigCode",
        "c_attn",
        "c_proj",
        only=(("multi_query", False),),
        counts=("num_heads", "split_size", "embed_dim"),
        key_counts=("kv_heads", "kv_dim"),
        interleaved=True,
    ),
    _packed(
        "GPT-BigCode",
        "c_attn",
        "c_proj",
        only=(("multi_query", True),),
        counts=("num_heads", "split_size", "embed_dim"),
    ),
    _packed("GPT-2", "c_attn", "c_proj", counts=("num_heads", "split_size")),
    _separate(
        "GPT-2, cross attention",
        "q_attn",
        "c_attn",
        "c_attn",
        "c_proj",
        counts=("num_heads", "split_size"),
    ),
    _packed(
        "BLOOM",
        "query_key_value",
        "dense",
        only=(("beta", 1.0),),
        interleaved=True,
        arguments=(("alibi", 0),),
        least=1,  # it reshapes to as many dimensions as are left
    ),
    _packed(
        "Falcon with ALiBi",
        "query_key_value",
        "dense",
        only=(("config.alibi", True),),
        interleaved=True,
        arguments=(("alibi", 1), ("attention_mask", 1)),
    ),
    _packed("GPT-NeoX, Falcon", "query_key_value", "dense", interleaved=True),
    _packed("MPT", "Wqkv", "out_proj", arguments=(("position_bias", 0),)),
    _separate(
        "DeepSeek",
        "q_b_proj",
        "kv_b_proj",
        "kv_b_proj",
        "o_proj",
        head_size="v_head_dim",
        interleaved=True,
    ),
    _separate(
        "DeepSeek",
        "q_proj",
        "kv_b_proj",
        "kv_b_proj",
        "o_proj",
        head_size="v_head_dim",
        interleaved=True,
    ),
    _packed(
        "timm",
        "qkv",
        "proj",
        counts=("num_heads", "attn_dim"),
        number="num_heads",
        tables=(
            ("relative_position_bias_table", 1),
            ("q_bias", 0),
            ("k_bias", 0),
            ("v_bias", 0),
            ("logit_scale", 0),
            ("cpb_mlp.2.weight", 0),
        ),
    ),
    _separate("EVA", "q_proj", "k_proj", "v_proj", "proj"),
    FeedForward(
        "BERT",
        up=("intermediate.dense.weight",),
        down="output.dense.weight",
        activation="intermediate.intermediate_act_fn",
    ),
    _plain("DistilBERT", "lin1", "lin2", activation="activation"),
    FeedForward("ModernBERT", up=("Wi.weight", "Wi.weight"), down="Wo.weight"),
    _plain("torch.nn.TransformerEncoderLayer", "linear1", "linear2", activation="activation"),
    _gated("Llama", "gate_proj", "up_proj", "down_proj"),
    FeedForward("Phi 3", ("gate_up_proj.weight", "gate_up_proj.weight"), "down_proj.weight"),
    _plain("MPT", "up_proj", "down_proj"),
    _gated("SwiGLU of timm", "fc1_g", "fc1_x", "fc2"),
    _plain(
        "OPT, BART, ViT, Whisper",
        "fc1",
        "fc2",
        along=("dwconv.dwconv.weight", "dwconv.dwconv.bias"),  # SegFormer
    ),
    FeedForward("GLU of timm", ("fc1.weight", "fc1.weight"), "fc2.weight"),
    _plain(
        "PVT, GLPN",
        "dense1",
        "dense2",
        along=("dwconv.dwconv.weight", "dwconv.dwconv.bias"),
    ),
    _plain("XLM", "lin1", "lin2"),
    _plain("Wav2Vec 2", "intermediate_dense", "output_dense"),
    _plain("ALBERT", "ffn", "ffn_output"),
    _plain("T5", "wi", "wo"),
    _gated("T5, gated", "wi_0", "wi_1", "wo"),
    _plain("GPT-2", "c_fc", "c_proj"),
    _plain("GPT-J", "fc_in", "fc_out"),
    _plain("BLOOM, Falcon, GPT-NeoX", "dense_h_to_4h", "dense_4h_to_h"),
    _plain("XLNet", "layer_1", "layer_2"),
    _plain("Funnel", "linear_1", "linear_2", activation="activation_function"),
    FeedForward(
        "experts, interleaved",
        ("gate_up_proj", "gate_up_proj"),
        "down_proj",
        only=(("is_concatenated", False),),
        counts=("intermediate_dim", "intermediate_size"),
        interleaved=True,
        unit=8,
    ),
    FeedForward(
        "experts",
        ("gate_up_proj", "gate_up_proj"),
        "down_proj",
        counts=("intermediate_dim", "intermediate_size"),
        unit=8,  # grouped products want rows of so many numbers, or of a multiple
    ),
    *(
        _experts("gate", up, only=(("gate.num_group", groups),))
        for up in ("gate_up_proj", "up_proj")
        for groups in (1, None)  # DeepSeek has one, and others none
    ),
    _experts(
        "gate",
        why_not="its router chooses among groups of experts, which are to be equally large",
    ),
    _experts("router"),
    _experts("gate.wg"),  # HunYuan
)
"""All patterns known; each is named after models that have it, and fits others that are alike."""
