"""The models that are tried: one of each family, with random weights, and inputs for it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mtprune import recalibrate_bn
from tests import families
from tests.encoders import randomize
from tests.families import (
    EXPERTS,
    FAMILIES,
    GPT,
    IDS,
    IMAGE,
    PAIR,
    SHARED,
    SIZED,
    T5,
    TEXT,
    Family,
)

TRANSFORMERS, TIMM, VISION, SEGMENTATION = (
    "transformers",
    "timm",
    "torchvision",
    "segmentation-models-pytorch",
)
LIBRARIES = (TRANSFORMERS, TIMM, VISION, SEGMENTATION)


@dataclass(frozen=True)
class Entry:
    """One model of the matrix.

    Attributes:
        name: Its name in the table.
        library: Where it comes from.
        make: Builds it.
        inputs: What it is called with, for a seed and a number of rows.
        auto: The class of transformers that loads it; empty if there is none.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int, int], Any]
    auto: str = ""

    def build(self) -> nn.Module:
        """The model: the same one each time, with weights and biases that matter.

        Positions that follow from their number stay: transformers does not store them. Batch norms
        know their inputs, or a deep network would be numbers of ten digits, and rounding of them.
        """
        torch.manual_seed(0)
        model = self.make()
        fixed = [
            (p, p.detach().clone())
            for module in model.modules()
            if "Sinusoidal" in type(module).__name__
            for p in module.parameters()
        ]
        randomize(model)
        for parameter, value in fixed:
            parameter.data.copy_(value)
        with suppress(ValueError):  # there are none, or they are frozen
            recalibrate_bn(model, [self.inputs(model, 2, 8)])
        return model.eval()


# Of transformers: those that have a test of their own, and further ones.

CONVOLVED = {"depths": [1, 1], "hidden_sizes": [16, 32], "image_size": 32}
STAGED = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "image_size": 64}
SOUND = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0,
    "pad_token_id": 0,
}


def _decoder(config: str, settings: dict[str, Any], model: str = "ForCausalLM") -> Family:
    return Family(config, model, "CausalLM", settings)


def _text(config: str, settings: dict[str, Any] = TEXT) -> Family:
    name = "SequenceClassification"
    return Family(config, f"For{name}", name, settings)


def _pair(config: str, settings: dict[str, Any] = PAIR) -> Family:
    return Family(config, "ForConditionalGeneration", "Seq2SeqLM", settings)


def _image(config: str, settings: dict[str, Any]) -> Family:
    return Family(config, "ForImageClassification", "ImageClassification", settings)


def _sound(config: str, settings: dict[str, Any] = SOUND) -> Family:
    return Family(config, "ForCTC", "CTC", settings)


FURTHER = {
    "cohere": _decoder("Cohere", SIZED),
    "granite": _decoder("Granite", SIZED),
    "glm": _decoder("Glm", SIZED),
    "glm 4": _decoder("Glm4", SIZED),
    "smollm 3": _decoder("SmolLM3", SIZED),
    "olmo": _decoder("Olmo", SHARED),
    "helium": _decoder("Helium", SIZED),
    "nemotron": _decoder("Nemotron", SIZED),
    "persimmon": _decoder("Persimmon", TEXT),
    "gemma 3": _decoder("Gemma3Text", SIZED, "Gemma3ForCausalLM"),
    "arcee": _decoder("Arcee", SIZED),
    "ernie 4.5": _decoder("Ernie4_5", SIZED, "Ernie4_5ForCausalLM"),
    "gpt neo": _decoder(
        "GPTNeo",
        {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "codegen": _decoder("CodeGen", {**GPT, "rotary_dim": 4}),
    "xglm": _decoder(
        "XGLM",
        {
            "vocab_size": 64,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 24,
            **IDS,
        },
    ),
    "biogpt": _decoder("BioGpt", TEXT),
    "mamba": _decoder(
        "Mamba",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **IDS},
    ),
    "qwen2 moe": _decoder(
        "Qwen2Moe",
        {
            **SHARED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "olmoe": _decoder("Olmoe", {**SHARED, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite moe": _decoder("GraniteMoe", {**SHARED, **EXPERTS}),
    "phimoe": _decoder("Phimoe", {**SHARED, **EXPERTS}),
    "roberta": _text("Roberta"),
    "electra": _text("Electra", {**TEXT, "embedding_size": 16}),
    "distilbert": _text(
        "DistilBert",
        {
            "vocab_size": 64,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 24,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
    ),
    "modernbert": _text("ModernBert", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "camembert": _text("Camembert"),
    "xlm roberta": _text("XLMRoberta"),
    "xlm roberta xl": _text("XLMRobertaXL"),
    "ernie": _text("Ernie"),
    "rembert": _text("RemBert", {**TEXT, "input_embedding_size": 16, "output_embedding_size": 16}),
    "megatron bert": _text("MegatronBert"),
    "roformer": _text("RoFormer", {**TEXT, "embedding_size": 32}),
    "convbert": _text("ConvBert", {**TEXT, "embedding_size": 32, "head_ratio": 2}),
    "mobilebert": _text("MobileBert", {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16}),
    "squeezebert": _text("SqueezeBert", {**TEXT, "embedding_size": 32}),
    "longformer": _text("Longformer", {**TEXT, "attention_window": [4, 4]}),
    "big bird": _text("BigBird", {**TEXT, "attention_type": "original_full"}),
    "nystromformer": _text(
        "Nystromformer", {**TEXT, "num_landmarks": 4, "segment_means_seq_len": 8}
    ),
    "xlnet": _text(
        "XLNet", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 24}
    ),
    "layoutlm": _text("LayoutLM"),
    "pegasus": _pair("Pegasus"),
    "mbart": _pair("MBart"),
    "marian": Family("Marian", "MTModel", "Seq2SeqLM", PAIR),
    "m2m 100": _pair("M2M100"),
    "blenderbot": _pair("Blenderbot"),
    "mt5": _pair("MT5", T5),
    "led": _pair(
        "LED",
        {
            **PAIR,
            "attention_window": [4, 4],
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    "vit mae": Family("ViTMAE", "Model", "", IMAGE),
    "vit msn": _image("ViTMSN", IMAGE),
    "data2vec vision": _image("Data2VecVision", IMAGE),
    "convnext": _image("ConvNext", CONVOLVED | {"num_stages": 2, "patch_size": 4}),
    "convnext 2": _image("ConvNextV2", CONVOLVED | {"num_stages": 2, "patch_size": 4}),
    "resnet": _image("ResNet", STAGED | {"embedding_size": 8}),
    "regnet": _image("RegNet", STAGED | {"embedding_size": 8, "groups_width": 4}),
    "mobilenet 1": _image("MobileNetV1", {"depth_multiplier": 0.25, "image_size": 64}),
    "mobilenet 2": _image("MobileNetV2", {"depth_multiplier": 0.25, "image_size": 64}),
    "poolformer": _image(
        "PoolFormer",
        {
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "mlp_ratio": 2.0,
            "image_size": 32,
        },
    ),
    "wav2vec 2": _sound("Wav2Vec2"),
    "hubert": _sound("Hubert"),
    "wavlm": _sound("WavLM"),
    "unispeech": _sound("UniSpeech"),
    "sew": _sound("SEW", {**SOUND, "squeeze_factor": 2}),
    "data2vec audio": _sound("Data2VecAudio", {**SOUND, "num_conv_pos_embeddings": 2}),
    "audio spectrogram": Family(
        "AST",
        "ForAudioClassification",
        "AudioClassification",
        {**IMAGE, "patch_size": 8, "max_length": 32, "num_mel_bins": 16},
    ),
}


def _of_transformers(name: str, family: Family) -> Entry:
    def make() -> nn.Module:
        transformers = import_module("transformers")
        config = getattr(transformers, f"{family.config}Config")(**family.settings)
        cls = getattr(transformers, family.config + family.model, None)
        model: nn.Module = (cls or getattr(transformers, family.model))(config)
        return model

    return Entry(name, TRANSFORMERS, make, _called_with, family.auto)


def _called_with(model: Any, seed: int, rows: int) -> Any:
    main, random = model.main_input_name, torch.Generator().manual_seed(seed)
    if main == "input_values" and hasattr(model.config, "num_mel_bins"):
        bins, length = model.config.num_mel_bins, model.config.max_length
        return {"input_values": torch.randn(rows, length, bins, generator=random)}
    if main == "input_values":
        return {"input_values": torch.randn(rows, 400 + 100 * seed, generator=random)}
    return families.inputs(model, seed, rows, 8)


# Of other libraries: images.

SMALL_TIMM: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "resnet26t": {},
    "seresnext26ts": {},
    "regnetx_002": {},
    "regnety_002": {},
    "densenet121": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "efficientnet_b0": {},
    "mobilenetv2_050": {},
    "mobilenetv3_small_050": {},
    "mnasnet_small": {},
    "lcnet_050": {},
    "tinynet_e": {},
    "ghostnet_050": {},
    "repvgg_a0": {},
    "dla46_c": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "levit_128s": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
}

SMALL_VISION: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenet_v3_small": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_1": {},
    "efficientnet_b0": {},
    "mnasnet0_5": {},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
}

SMALL_SEGMENTATION = ("Unet", "FPN", "DeepLabV3Plus", "Linknet")


def _images(size: int) -> Callable[[nn.Module, int, int], Any]:
    def of(model: nn.Module, seed: int, rows: int) -> Any:
        return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))

    return of


def _of_timm(name: str, options: dict[str, Any]) -> Entry:
    size = options.get("img_size", 64)

    def make() -> nn.Module:
        model: nn.Module = import_module("timm").create_model(name, num_classes=4, **options)
        return model

    return Entry(name, TIMM, make, _images(size))


def _of_vision(name: str, options: dict[str, Any]) -> Entry:
    def make() -> nn.Module:
        make_one = import_module("torchvision.models").get_model
        model: nn.Module = make_one(name, weights=None, num_classes=4, **options)
        return model

    return Entry(name, VISION, make, _images(64))


def _of_segmentation(name: str) -> Entry:
    def make() -> nn.Module:
        cls = getattr(import_module("segmentation_models_pytorch"), name)
        model: nn.Module = cls("mobilenet_v2", encoder_weights=None, classes=4)
        return model

    return Entry(f"{name}, mobilenet_v2", SEGMENTATION, make, _images(64))


ENTRIES: dict[str, Entry] = {
    entry.name if entry.library == TRANSFORMERS else f"{entry.library}: {entry.name}": entry
    for entry in (
        *(_of_transformers(name, family) for name, family in (FAMILIES | FURTHER).items()),
        *(_of_timm(name, options) for name, options in SMALL_TIMM.items()),
        *(_of_vision(name, options) for name, options in SMALL_VISION.items()),
        *(_of_segmentation(name) for name in SMALL_SEGMENTATION),
    )
}
