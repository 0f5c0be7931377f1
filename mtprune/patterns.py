"""Patterns: where transformers keep their attention heads and feed-forward neurons.

A pattern is data (`Attention`, `FeedForward`): the paths of the weights of one block, seen from the
block. Blocks are told by these paths and by the shapes they lead to, whatever their class is
called. Before units are handed out, some of each group are removed on trial from a copy of the
model, so that a block that only looks like one that is known is refused at once, and by name.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mtprune.model.blocks import Attention, FeedForward, Pattern, match
from mtprune.structure import Group

__all__ = ["PATTERNS", "Attention", "FeedForward", "Pattern", "heads", "neurons"]

_QUERIES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "all_head_size", "inner_dim")
_KEYS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_RATIOS = ("num_key_value_groups",)
_SIZES = "head_dim|attention_head_size|head_size|key_value_proj_dim"
_ALIBI = (
    "the slopes that tell distances to its heads follow from their number, and not from a tensor"
)


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
    _separate("OPT, BART, CLIP, Whisper", "q_proj", "k_proj", "v_proj", "out_proj"),
    _separate("Phi", "q_proj", "k_proj", "v_proj", "dense"),
    _packed(
        "Phi 3",
        "qkv_proj",
        "o_proj",
        why_not="it takes the number of its heads from the configuration, which all layers share",
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
    _separate("MPNet", "q", "k", "v", "o", head_size="attention_head_size"),
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
    _packed("BLOOM", "query_key_value", "dense", only=(("beta", 1.0),), why_not=_ALIBI),
    _packed(
        "Falcon with ALiBi",
        "query_key_value",
        "dense",
        only=(("config.alibi", True),),
        why_not=_ALIBI,
    ),
    _packed("GPT-NeoX, Falcon", "query_key_value", "dense", interleaved=True),
    _packed("MPT", "Wqkv", "out_proj", why_not=_ALIBI),
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
)
"""All patterns known; each is named after models that have it, and fits others that are alike."""


def heads(
    model: nn.Module, patterns: Sequence[Pattern] = PATTERNS, example_inputs: Any = None
) -> list[Group]:
    """The attention heads of a model: one group for each block of attention.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.
        example_inputs: What the model is called with when heads are removed on trial: a tensor, a
            tuple of arguments, a dict of keyword arguments. Models of transformers are tried
            without, as long as they are not large.

    Raises:
        ValueError: If no block of the model fits a pattern, or no block can lose heads.

    Warns:
        UserWarning: Of blocks that fit a pattern and cannot lose heads; they are left out.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), 2)
        >>> [(group.name, group.size) for group in heads(encoder)]
        [('layers.0.self_attn.heads', 4), ('layers.1.self_attn.heads', 4)]
    """
    attentions = [p for p in patterns if isinstance(p, Attention)]
    return _groups(model, attentions, "attention heads", example_inputs)


def neurons(
    model: nn.Module, patterns: Sequence[Pattern] = PATTERNS, example_inputs: Any = None
) -> list[Group]:
    """The neurons between the two layers of feed-forward blocks: one group for each block.

    The experts of a block are one group: a neuron is the same one in each of them.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.
        example_inputs: What the model is called with when neurons are removed on trial: as for
            `heads`.

    Raises:
        ValueError: If no block of the model fits a pattern, or no block can lose neurons.

    Warns:
        UserWarning: Of blocks that fit a pattern and cannot lose neurons; they are left out.

    Example:
        >>> group, = neurons(nn.TransformerEncoderLayer(16, 4, 32))
        >>> group.size, [(member.tensor, member.role) for member in group.members]
        (32, [('linear1.weight', 'out'), ('linear1.bias', 'out'), ('linear2.weight', 'in')])
    """
    feed_forwards = [p for p in patterns if isinstance(p, FeedForward)]
    return _groups(model, feed_forwards, "feed-forward neurons", example_inputs)


def _groups(
    model: nn.Module, patterns: Sequence[Pattern], units: str, example_inputs: Any
) -> list[Group]:
    """The group of every block, by the first pattern that fits it.

    Args:
        model: The model.
        patterns: The patterns.
        units: The name of the units in errors.
        example_inputs: What the model is called with, or None.
    """
    from mtprune.compression.probe import refused  # it needs more than most runs do

    found, refusals = candidates(model, patterns)
    if not found:
        tried = ", ".join(f"'{name}'" for name in dict.fromkeys(p.name for p in patterns)) or "none"
        raise ValueError(
            f"{type(model).__name__} has no {units} where the patterns look. Tried: {tried}. The "
            f"model has {_contents(model)}. Say where they are with a pattern of your own: see "
            "mtprune.patterns."
        )
    hopeful = [group for group in found if group.name not in refusals]
    refusals |= refused(model, hopeful, example_inputs)
    groups = [group for group in hopeful if group.name not in refusals]
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has {units} that cannot be removed: {_listed(refusals)}. "
            "Prune its weights one by one, or in blocks."
        )
    if refusals:
        warnings.warn(f"Left out: {_listed(refusals)}.", stacklevel=3)
    return groups


def candidates(
    model: nn.Module, patterns: Sequence[Pattern] = PATTERNS
) -> tuple[list[Group], dict[str, str]]:
    """The group of every block that a pattern fits, tried or not.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.

    Returns:
        The groups, and why some of them cannot lose units by their patterns, by the group's name.

    Example:
        >>> groups, refusals = candidates(nn.TransformerEncoderLayer(16, 4, 32))
        >>> [group.name for group in groups], refusals
        (['neurons', 'self_attn.heads'], {})
    """
    stacks: dict[str, list[Group]] = {}
    refusals: dict[str, str] = {}
    taken: set[str] = set()
    for name, module in model.named_modules():
        for pattern in patterns:
            group = match(name, module, pattern)
            if group is None or any(member.tensor in taken for member in group.members):
                continue
            taken.update(member.tensor for member in group.members)
            stack = _stack(group.name, pattern)
            stacks.setdefault(stack, []).append(group)
            if pattern.why_not:
                refusals[stack] = pattern.why_not
    return [_together(name, groups) for name, groups in stacks.items()], refusals


def _stack(name: str, pattern: Pattern) -> str:
    """The name of a group, without the number of its block if all of a stack lose the same."""
    if isinstance(pattern, FeedForward) or not pattern.stack:
        return name
    return re.sub(rf"(^|\.){pattern.stack}\.\d+\.", rf"\1{pattern.stack}.*.", name)


def _together(name: str, groups: Sequence[Group]) -> Group:
    """One group of the units that several lose together."""
    if len(groups) == 1 and groups[0].name == name:
        return groups[0]
    members = tuple(member for group in groups for member in group.members)
    counts = tuple(path for group in groups for path in group.counts)
    return Group(name, groups[0].size, members, counts=counts)


def _listed(refusals: Mapping[str, str]) -> str:
    """Groups by the reason why they are refused, a few names of each."""
    alike: dict[str, list[str]] = {}
    for name, why in refusals.items():
        alike.setdefault(why, []).append(f"'{name}'")
    return "; ".join(
        ", ".join(names[:2])
        + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        + f": {why}"
        for why, names in alike.items()
    )


def _contents(model: nn.Module) -> str:
    """Some weights of a model, for an error."""
    names = [f"'{name}' {tuple(p.shape)}" for name, p in model.named_parameters() if p.dim() == 2]
    if not names:
        return "no weight with two dimensions"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
