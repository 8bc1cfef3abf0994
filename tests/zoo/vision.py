"""Images, video and sound, from configurations of transformers with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.zoo.architecture import Architecture, Field, image, integers, normal, of_batch
from tests.zoo.text import of

PATCHES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}

CLASS_TOKEN_DB = 10.0
"""Of what is read off a class token alone: as it begins, it is a tenth of the patches beside it, whose scale it shares
where sums are integers."""


def seen(
    name: str, model: str, config: str, settings: Mapping[str, Any], family: str = "image", **more: Any
) -> Architecture:
    """An image in; a model of transformers."""
    inputs: Mapping[str, Field] = more.pop("inputs", None) or {
        "pixel_values": image(batch="batch" if "sizes" in more else 2)
    }
    return Architecture(name=name, family=family, build=of(model, config, **settings), inputs=inputs, **more)


VISION = (
    seen("vit", "ViTForImageClassification", "ViTConfig", PATCHES, inductor=True,
         floor_db=CLASS_TOKEN_DB),
    seen("deit", "DeiTModel", "DeiTConfig", PATCHES, floor_db=CLASS_TOKEN_DB),
    seen("beit", "BeitModel", "BeitConfig", {**PATCHES, "use_relative_position_bias": True}),
    seen("dinov2", "Dinov2Model", "Dinov2Config", PATCHES),
    seen("swin", "SwinForImageClassification", "SwinConfig",
         {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}),
    seen("convnext", "ConvNextForImageClassification", "ConvNextConfig",
         {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 0.5},
         sizes=of_batch()),
    seen("resnet", "ResNetForImageClassification", "ResNetConfig",
         {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}, sizes=of_batch(),
         inductor=True),
    seen("regnet", "RegNetForImageClassification", "RegNetConfig",
         {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8}),
    seen("mobilenet-v2", "MobileNetV2ForImageClassification", "MobileNetV2Config",
         {"depth_multiplier": 0.25, "image_size": 32, "min_depth": 8, "depth_divisible_by": 8}, inductor=True,
         sizes=of_batch()),
    seen("efficientnet", "EfficientNetForImageClassification", "EfficientNetConfig",
         {"image_size": 32, "width_coefficient": 0.5, "depth_coefficient": 0.3, "in_channels": [32, 16],
          "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
          "expand_ratios": [1, 4], "depthwise_padding": [], "hidden_dim": 640}),
    seen("mobilevit", "MobileViTForImageClassification", "MobileViTConfig",
         {"image_size": 32, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 32],
          "num_attention_heads": 2, "expand_ratio": 2.0, "initializer_range": 0.15}),
    seen("segformer", "SegformerForSemanticSegmentation", "SegformerConfig",
         {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
          "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
          "decoder_hidden_size": 16}),
    seen("poolformer", "PoolFormerForImageClassification", "PoolFormerConfig",
         {"depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "patch_sizes": [3, 3],
          "strides": [2, 2], "padding": [1, 1], "layer_scale_init_value": 0.5}),
    seen("levit", "LevitForImageClassification", "LevitConfig",
         {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
          "key_dim": [8, 8, 8], "attention_ratio": [1, 1, 1]}, inputs={"pixel_values": image(side=64)}),
    seen("yolos", "YolosForObjectDetection", "YolosConfig",
         {**PATCHES, "image_size": [32, 32], "num_detection_tokens": 4}, family="detection"),
    seen("clip", "CLIPModel", "CLIPConfig",
         {"text_config": {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                          "num_attention_heads": 4, "max_position_embeddings": 16, "eos_token_id": 95,
                          "bos_token_id": 94, "pad_token_id": 0},
          "vision_config": PATCHES, "projection_dim": 16}, family="image and text",
         inputs={"input_ids": integers(96, 2, 8), "pixel_values": image()}),
    seen("videomae", "VideoMAEForVideoClassification", "VideoMAEConfig", {**PATCHES, "num_frames": 4}, family="video",
         inputs={"pixel_values": normal(1, 4, 3, 32, 32)}),
    seen("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config",
         {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
          "intermediate_size": 64, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
          "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
         family="sound", inputs={"input_values": normal(2, 800)}),
    seen("whisper-encoder", "WhisperModel", "WhisperConfig",
         {"vocab_size": 96, "num_mel_bins": 16, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
          "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
          "max_source_positions": 20, "max_target_positions": 16, "use_cache": False, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, family="sound",
         inputs={"input_features": normal(2, 16, 40), "decoder_input_ids": integers(96, 2, 6)}),
    seen("audio-spectrogram-transformer", "ASTForAudioClassification", "ASTConfig",
         {**PATCHES, "num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8}, family="sound",
         inputs={"input_values": normal(2, 32, 16)}),
    seen("patchtst", "PatchTSTForPrediction", "PatchTSTConfig",
         {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 4,
          "d_model": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "dropout": 0.0},
         family="time series", inputs={"past_values": normal("batch", 32, 3)}, sizes=of_batch()),
)  # fmt: skip
"""Models of images, video, sound and series."""
