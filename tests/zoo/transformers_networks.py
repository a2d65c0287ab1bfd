"""Every architecture of transformers that builds batch norms: listed, or left out with the reason.

One model of each, drawn at random from a small configuration. The name is the folder in
transformers.models, with a few words where there are several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.listing import Call, Listed, named, pixels

VERSION = "5.23"  # of transformers, when the list was complete


def config(name: str, **settings: Any) -> Call:
    """A configuration by the name of its class."""
    return Call("transformers", name, (), settings)


def hf(
    name: str,
    inputs: Callable[[int], Any],
    settings: Call,
    *,
    module: str = "transformers",
    more: dict[str, Any] | None = None,
    **other: Any,
) -> Listed:
    """A model by the name of its class, with its configuration."""
    return Listed(Call(module, name, (settings,), more or {}), inputs, **other)


def words(length: int, vocabulary: int = 30) -> Callable[[int], Tensor]:
    """Batches of token numbers; none of them is a special one."""
    return lambda n: torch.randint(5, vocabulary, (n, length))


def with_words(
    length: int, vocabulary: int = 30, **shapes: tuple[int, ...]
) -> Callable[[int], dict[str, Tensor]]:
    """Numbers by name and token numbers."""
    return lambda n: {**named(**shapes)(n), "input_ids": words(length, vocabulary)(n)}


def _fused_sounds(n: int) -> dict[str, Tensor]:
    """A long clip of sound, of which CLAP sees parts, too."""
    return {
        "input_features": torch.randn(n, 4, 64, 16),
        "is_longer": torch.ones(n, 1, dtype=torch.bool),
    }


def _speech(n: int) -> dict[str, Tensor]:
    """Text and the spectrogram so far, for SpeechT5."""
    return {
        "input_ids": words(6)(n),
        "decoder_input_values": torch.randn(n, 6, 8),
        "speaker_embeddings": torch.randn(n, 8),
    }


def _spoken(n: int) -> dict[str, Tensor]:
    """Text with durations, pitches and energies, for FastSpeech 2."""
    return {
        "input_ids": words(6)(n),
        "spectrogram_labels": torch.randn(n, 12, 8),
        "duration_labels": torch.full((n, 7), 2)[:, :6].contiguous(),
        "pitch_labels": torch.randn(n, 6, 1),
        "energy_labels": torch.randn(n, 6, 1),
    }


def _classes(n: int) -> dict[str, Tensor]:
    """Pictures, two classes to find in each, and a task."""
    return {
        "pixel_values": torch.randn(n, 3, 64, 64),
        "classes_input_ids": words(4)(2 * n),
        "classes_attention_mask": torch.ones(2 * n, 4, dtype=torch.long),
        "tasks_input_ids": words(4)(n),
        "tasks_attention_mask": torch.ones(n, 4, dtype=torch.long),
        "classes_structure": torch.full((n,), 2),
    }


def _series(n: int) -> dict[str, Tensor]:
    """Time series for the Informer: past, future, their times and what was observed."""
    return {
        "past_values": torch.randn(n, 24),
        "past_time_features": torch.randn(n, 24, 1),
        "past_observed_mask": torch.ones(n, 24),
        "future_values": torch.randn(n, 8),
        "future_time_features": torch.randn(n, 8, 1),
    }


# Parts of configurations

CLASSES = {"num_labels": 3}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {**TINY, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
TEXT = {**TINY, "vocab_size": 40, "intermediate_size": 16, "max_position_embeddings": 16}
TEXT |= {"eos_token_id": 39, "bos_token_id": 1, "pad_token_id": 0}
RESNET_SIZES = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
RESNET = config(
    "ResNetConfig", **RESNET_SIZES, layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)  # fmt: skip
PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8}
PYRAMID |= {"num_attention_heads": [1, 1, 2, 2], "sr_ratios": [8, 4, 2, 1]}
RT_RESNET = config(
    "RTDetrResNetConfig", **RESNET_SIZES, layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)  # fmt: skip
HGNET_SIZES = {
    "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 16],
    "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 16, 16, 16],
    "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 3, 3],
    "embedding_size": 8, "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1],
}  # fmt: skip
HGNET = config("HGNetV2Config", **HGNET_SIZES, out_features=["stage2", "stage3", "stage4"])
DETECTOR = {
    "freeze_backbone_batch_norms": False, "encoder_hidden_dim": 16, "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "d_model": 16, "num_queries": 6,
    "decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16, "decoder_attention_heads": 2,
    "decoder_layers": 2, "decoder_n_points": 2, "num_denoising": 0,
}  # fmt: skip
FROZEN_DETECTOR = {**DETECTOR, "freeze_backbone_batch_norms": True}  # their default
OF_RESNET = {"backbone_config": RT_RESNET, "encoder_in_channels": [16, 16, 24]}
OF_HGNET = {"backbone_config": HGNET, "encoder_in_channels": [16, 16, 16]}
LCNET_BLOCKS = [
    [[3, 8, 8, 1, False]],
    [[3, 8, 16, 2, False], [3, 16, 16, 1, False]],
    [[3, 16, 16, 2, False]],
    [[3, 16, 24, 2, False], [5, 24, 24, 1, False]],
    [[5, 24, 24, 2, True]],
]
LCNET = {"block_configs": LCNET_BLOCKS, "stem_channels": 8, "class_expand": 16}
STAGES = ["stage2", "stage3", "stage4", "stage5"]
LCNET4 = {
    "block_configs": [[[3, 8, 8, 1, True]], [[3, 8, 8, 2, False]], [[3, 8, 16, 2, False]],
                      [[3, 16, 16, 2, True]]],
    "stem_channels": [3, 8, 8],
}  # fmt: skip
INTRACLASS = {
    "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0],
    **{f"{name}_{ratio}ratio": [[k if high else 1, k if wide else 1], [1, 1],
                                [k // 2 if high else 0, k // 2 if wide else 0]]
       for name, high, wide in (("vertical_long_to_small_conv", True, False),
                                ("horizontal_small_to_long_conv", False, True),
                                ("symmetric_conv_long", True, True))
       for ratio, k in (("long", 7), ("mid", 5), ("short", 3))},
}  # fmt: skip
LINES4 = config(
    "PPLCNetV4Config", stem_channels=[3, 8, 8], out_features=["stage4"], block_configs=[
        [[3, 8, 8, 1, True]], [[3, 8, 8, 1, False]], [[3, 8, 16, [2, 1], False]],
        [[3, 16, 16, [2, 1], True]]],
)  # fmt: skip
STAGES4 = ["stage1", "stage2", "stage3", "stage4"]
LINE = {"hidden_size": 16, "depth": 1, "head_out_channels": 20, "num_attention_heads": 2}
CONFORMER = {
    **TINY, "intermediate_size": 16, "num_mel_bins": 16, "subsampling_conv_channels": 4,
    "conv_kernel_size": 3, "dropout": 0.0, "layerdrop": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}  # fmt: skip
GRANITE = {"input_dim": 16, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "dim_head": 8}
GRANITE |= {"output_dim": 8, "context_size": 8, "max_pos_emb": 8, "conv_kernel_size": 3}
WAVE = {**TINY, "intermediate_size": 16, "conv_dim": [8, 8], "conv_stride": [5, 2]}
WAVE |= {"conv_kernel": [10, 3], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
WAVE |= {"num_feat_extract_layers": 2, "mask_time_prob": 0.0, "layerdrop": 0.0}
SERIES = {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "d_model": 16}
IDS = "it takes numbers of tokens only: there is no dataset's mean to draw virtual examples by"
VIRTUAL = ("vdn", "fs+vdn", "bs+vdn")

NETWORKS: dict[str, Listed] = {
    "align": hf(
        "AlignVisionModel", pixels(3, 32, 32),
        config("AlignVisionConfig", image_size=32, width_coefficient=0.2, depth_coefficient=0.2,
               hidden_dim=256, drop_connect_rate=0.0),
    ),
    "beit": hf(
        "BeitForSemanticSegmentation", pixels(3, 32, 32),
        config("BeitConfig", **{**VIT, "num_hidden_layers": 4}, out_indices=[1, 2, 3, 4],
               vocab_size=30, auxiliary_channels=8, **CLASSES),
    ),
    "clap": hf(
        "ClapAudioModel", _fused_sounds,
        config("ClapAudioConfig", num_mel_bins=16, spec_size=64, window_size=4, depths=[1, 1],
               num_attention_heads=[2, 2], hidden_size=16, patch_embeds_hidden_size=8,
               enable_fusion=True, fusion_type="aff_2d", projection_dim=8),
    ),
    "cvt": hf(
        "CvtModel", pixels(3, 64, 64),
        config("CvtConfig", embed_dim=[8, 12, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    ),
    "d_fine": hf(
        "DFineModel", pixels(3, 64, 64), config("DFineConfig", **DETECTOR, **OF_HGNET)
    ),
    "d_fine with frozen norms": hf(
        "DFineModel", pixels(3, 64, 64), config("DFineConfig", **FROZEN_DETECTOR, **OF_HGNET)
    ),
    "data2vec": hf(
        "Data2VecVisionForSemanticSegmentation", pixels(3, 32, 32),
        config("Data2VecVisionConfig", **{**VIT, "num_hidden_layers": 4},
               out_indices=[0, 1, 2, 3], auxiliary_channels=8, **CLASSES),
    ),
    "deimv2": hf(
        "Deimv2Model", pixels(3, 64, 64), config("Deimv2Config", **DETECTOR, **OF_HGNET)
    ),
    "depth_pro": hf(
        "DepthProForDepthEstimation", pixels(3, 64, 64),
        config(
            "DepthProConfig", use_batch_norm_in_fusion_residual=True, fusion_hidden_size=8,
            patch_size=16, intermediate_hook_ids=[1, 0], intermediate_feature_dims=[8, 8],
            scaled_images_ratios=[0.5, 1.0], scaled_images_overlap_ratios=[0.0, 0.2],
            scaled_images_feature_dims=[8, 8],
            **{part: config("Dinov2Config", **{**VIT, "image_size": 16, "patch_size": 4})
               for part in ("image_model_config", "patch_model_config", "fov_model_config")}),
    ),
    "detr with frozen norms": hf(
        "DetrModel", pixels(3, 64, 64),
        config("DetrConfig", d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
               decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
               num_queries=4, dropout=0.0,
               backbone_config=config("ResNetConfig", **RESNET_SIZES, out_features=["stage4"])),
    ),
    "dpt": hf(
        "DPTForSemanticSegmentation", pixels(3, 32, 32),
        config("DPTConfig", **{**VIT, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3],
               neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
               use_batch_norm_in_fusion_residual=True, **CLASSES),
    ),
    "efficientloftr": hf(
        "EfficientLoFTRModel", pixels(2, 1, 64, 64),
        config("EfficientLoFTRConfig", stage_num_blocks=[1, 1, 1], out_features=[8, 8, 16],
               stage_stride=[2, 1, 2], hidden_size=16, num_attention_layers=1,
               q_aggregation_kernel_size=1, kv_aggregation_kernel_size=1,
               q_aggregation_stride=1, kv_aggregation_stride=1, num_attention_heads=8),
    ),
    "efficientnet": hf(
        "EfficientNetModel", pixels(3, 32, 32),
        config("EfficientNetConfig", width_coefficient=0.2, depth_coefficient=0.2,
               hidden_dim=256),
    ),
    "emu3": hf(
        "Emu3VQVAEEncoder", named(pixel_values=(2, 3, 16, 16)),
        config("Emu3VQVAEConfig", codebook_size=16, base_channels=32, channel_multiplier=[1, 1],
               num_res_blocks=1, attn_resolutions=[], hidden_size=32, num_attention_heads=1,
               temporal_downsample_factor=2),
        module="transformers.models.emu3.modeling_emu3",
    ),
    "fastspeech2_conformer": hf(
        "FastSpeech2ConformerModel", _spoken,
        config("FastSpeech2ConformerConfig", hidden_size=16, vocab_size=40, num_mel_bins=8,
               encoder_layers=1, decoder_layers=1, encoder_linear_units=16,
               decoder_linear_units=16, speech_decoder_postnet_layers=2,
               speech_decoder_postnet_units=8, duration_predictor_channels=8,
               energy_predictor_channels=8, pitch_predictor_channels=8, decoder_kernel_size=3,
               encoder_kernel_size=3),
    ),
    "glpn": hf("GLPNForDepthEstimation", pixels(3, 64, 64), config("GLPNConfig", **PYRAMID)),
    "granite_speech": hf(
        "GraniteSpeechCTCEncoder", named(hidden_states=(16, 16)),
        Call("transformers.models.granite_speech.configuration_granite_speech",
             "GraniteSpeechEncoderConfig", (), GRANITE),
        module="transformers.models.granite_speech.modeling_granite_speech",
    ),
    "granite_speech5": hf(
        "GraniteSpeech5Encoder", named(input_features=(32, 64)),
        Call("transformers.models.granite_speech5.configuration_granite_speech5",
             "GraniteSpeech5EncoderConfig", (),
             {**TINY, "vocab_size": 16, "intermediate_size": 16, "num_mel_bins": 16,
              "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8,
              "context_size": 8, "conv_kernel_size": 3, "subsample_layers": [0]}),
        module="transformers.models.granite_speech5.modeling_granite_speech5",
    ),
    "granite_speech_plus": hf(
        "GraniteSpeechPlusCTCEncoder", named(hidden_states=(16, 16)),
        Call("transformers.models.granite_speech_plus.configuration_granite_speech_plus",
             "GraniteSpeechPlusEncoderConfig", (), GRANITE),
        module="transformers.models.granite_speech_plus.modeling_granite_speech_plus",
    ),
    "groupvit": hf(
        "GroupViTModel", with_words(6, pixel_values=(3, 32, 32)),
        config("GroupViTConfig", projection_dim=8, projection_intermediate_dim=16,
               text_config={**TEXT},
               vision_config={**VIT, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0],
                              "num_output_groups": [8, 4, 4]}),
    ),
    "hgnet_v2": hf(
        "HGNetV2ForImageClassification", pixels(3, 32, 32), config("HGNetV2Config", **HGNET_SIZES)
    ),
    "hubert": hf(
        "HubertModel", named(input_values=(400,)),
        config("HubertConfig", **WAVE, conv_pos_batch_norm=True),
    ),
    "informer": hf(
        "InformerModel", _series,
        config("InformerConfig", prediction_length=8, context_length=20, lags_sequence=[1, 2, 4],
               num_time_features=1, d_model=16, encoder_layers=2, decoder_layers=1,
               encoder_layerdrop=0.0, decoder_layerdrop=0.0, attention_type="full"),
    ),
    "lasr": hf(
        "LasrEncoder", named(input_features=(64, 16)),
        config("LasrEncoderConfig", **CONFORMER),
    ),
    "levit": hf(
        "LevitForImageClassification", pixels(3, 64, 64),
        config("LevitConfig", image_size=64, hidden_sizes=[16, 24, 32],
               num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4],
               attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2],
               down_ops=[["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 6, 4, 2, 2]]),
    ),
    "lw_detr": hf(
        "LwDetrModel", pixels(3, 64, 64),
        config("LwDetrConfig", projector_scale_factors=[1.0], d_model=16, decoder_ffn_dim=16,
               decoder_layers=1, decoder_self_attention_heads=2, decoder_cross_attention_heads=2,
               num_queries=6, group_detr=2, c2f_num_blocks=1, decoder_n_points=2,
               backbone_config=config(
                   "LwDetrViTConfig", **TINY, image_size=64, pretrain_image_size=64,
                   patch_size=16, mlp_ratio=2, window_block_indices=[1], num_windows=4,
                   out_indices=[1, 2])),
    ),
    "maskformer of resnet": hf(
        "MaskFormerModel", pixels(3, 64, 64),
        config("MaskFormerConfig", fpn_feature_size=32, mask_feature_size=32,
               backbone_config=config("ResNetConfig", **RESNET_SIZES, layer_type="basic",
                                      out_features=STAGES4),
               decoder_config=config("DetrConfig", d_model=16, decoder_layers=1,
                                     decoder_ffn_dim=16, decoder_attention_heads=2,
                                     num_queries=6)),
    ),
    "mobilenet_v1": hf(
        "MobileNetV1Model", pixels(3, 32, 32), config("MobileNetV1Config", depth_multiplier=0.125)
    ),
    "mobilenet_v2": hf(
        "MobileNetV2ForImageClassification", pixels(3, 32, 32),
        config("MobileNetV2Config", depth_multiplier=0.25),
    ),
    "mobilenet_v2 for segmentation": hf(
        "MobileNetV2ForSemanticSegmentation", pixels(3, 32, 32),
        config("MobileNetV2Config", depth_multiplier=0.25, output_stride=8),
    ),
    "mobilevit": hf(
        "MobileViTForSemanticSegmentation", pixels(3, 64, 64),
        config("MobileViTConfig", image_size=64, hidden_sizes=[16, 16, 16],
               neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2,
               aspp_out_channels=8, **CLASSES),
    ),
    "mobilevitv2": hf(
        "MobileViTV2ForSemanticSegmentation", pixels(3, 64, 64),
        config("MobileViTV2Config", image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1],
               base_attn_unit_dims=[16, 16, 16], aspp_out_channels=8, **CLASSES),
    ),
    "omdet_turbo": hf(
        "OmDetTurboForObjectDetection", _classes,
        config("OmDetTurboConfig", backbone_config=RESNET, use_timm_backbone=False,
               text_config=config("CLIPTextConfig", **{**TEXT, "hidden_size": 24},
                                  projection_dim=24),
               apply_layernorm_after_vision_backbone=False, image_size=64,
               text_projection_in_dim=24, text_projection_out_dim=24, task_encoder_hidden_dim=16,
               class_embed_dim=24, num_queries=6, d_model=16, encoder_hidden_dim=16,
               vision_features_channels=[16, 16, 16], encoder_in_channels=[16, 16, 24],
               encoder_attention_heads=2, encoder_dim_feedforward=16, decoder_hidden_dim=16,
               decoder_num_heads=2, decoder_num_layers=1, decoder_dim_feedforward=16,
               decoder_num_points=2, disable_custom_kernels=True),
        skipped=dict.fromkeys(VIRTUAL, "its classes are not one row an example"),
    ),
    "parakeet": hf(
        "ParakeetEncoder", named(input_features=(64, 16)),
        config("ParakeetEncoderConfig", **CONFORMER, subsampling_factor=4),
    ),
    "patchtsmixer": hf(
        "PatchTSMixerModel", named(past_values=(16, 2)),
        config("PatchTSMixerConfig", **SERIES, patch_stride=4, num_layers=2,
               norm_mlp="BatchNorm"),
    ),
    "patchtst": hf(
        "PatchTSTModel", named(past_values=(16, 2)),
        config("PatchTSTConfig", **SERIES, num_hidden_layers=1, ffn_dim=16,
               num_attention_heads=2),
    ),
    "perceiver": hf(
        "PerceiverForImageClassificationConvProcessing", named(pixel_values=(3, 224, 224)),
        config("PerceiverConfig", num_latents=4, d_latents=16, num_self_attends_per_block=1,
               num_self_attention_heads=2, num_cross_attention_heads=2, **CLASSES),
    ),
    "pp_doclayout_v2": hf(
        "PPDocLayoutV2Model", pixels(3, 64, 64),
        config("PPDocLayoutV2Config", **DETECTOR, **OF_HGNET,
               anchor_image_size=None),
    ),
    "pp_doclayout_v3": hf(
        "PPDocLayoutV3Model", pixels(3, 64, 64),
        config("PPDocLayoutV3Config", **DETECTOR, encoder_in_channels=[16, 16, 16],
               mask_feature_channels=[8, 8], x4_feat_dim=16, num_prototypes=4,
               backbone_config=config("HGNetV2Config", **HGNET_SIZES, out_features=STAGES4)),
    ),
    "pp_doclayout_v4": hf(
        "PPDocLayoutV4Model", pixels(3, 64, 64),
        config("PPDocLayoutV4Config", **DETECTOR, **OF_HGNET, hidden_size=16),
    ),
    "pp_lcnet": hf(
        "PPLCNetForImageClassification", pixels(3, 32, 32), config("PPLCNetConfig", **LCNET)
    ),
    "pp_lcnet_v3": hf(
        "PPLCNetV3Backbone", pixels(3, 32, 32),
        config("PPLCNetV3Config", block_configs=LCNET_BLOCKS, stem_channels=8,
               conv_symmetric_num=2, out_features=STAGES),
    ),
    "pp_lcnet_v4": hf(
        "PPLCNetV4Backbone", pixels(3, 32, 32),
        config("PPLCNetV4Config", **LCNET4, out_features=STAGES4),
    ),
    "pp_ocrv5_mobile_det": hf(
        "PPOCRV5MobileDetForObjectDetection", pixels(3, 64, 64),
        config("PPOCRV5MobileDetConfig", neck_out_channels=16,
               layer_list_out_channels=[4, 4, 8, 8],
               backbone_config=config("PPLCNetV3Config", block_configs=LCNET_BLOCKS,
                                      stem_channels=8, out_features=STAGES)),
    ),
    "pp_ocrv5_mobile_rec": hf(
        "PPOCRV5MobileRecForTextRecognition", pixels(3, 24, 64),
        config("PPOCRV5MobileRecConfig", **LINE,
               backbone_config=config(
                   "PPLCNetV3Config", stem_channels=8, out_features=["stage5"], block_configs=[
                       [[3, 8, 8, 1, False]], [[3, 8, 8, 1, False]], [[3, 8, 8, [2, 1], False]],
                       [[3, 8, 16, [1, 2], False]], [[5, 16, 16, [2, 1], True]]])),
    ),
    "pp_ocrv5_server_det": hf(
        "PPOCRV5ServerDetForObjectDetection", pixels(3, 64, 64),
        config("PPOCRV5ServerDetConfig", neck_out_channels=16, intraclass_block_number=4,
               intraclass_block_config=INTRACLASS, scale_factor_list=[1, 2, 4, 8],
               kernel_list=[3, 2, 2],
               backbone_config=config("HGNetV2Config", **HGNET_SIZES, out_features=STAGES4)),
    ),
    "pp_ocrv5_server_rec": hf(
        "PPOCRV5ServerRecForTextRecognition", pixels(3, 12, 64),
        config("PPOCRV5ServerRecConfig", **LINE,
               backbone_config=config(
                   "HGNetV2Config", **{**HGNET_SIZES, "stage_downsample": [False] * 4},
                   out_features=["stage4"])),
    ),
    "pp_ocrv6_medium_det": hf(
        "PPOCRV6MediumDetForObjectDetection", pixels(3, 64, 64),
        config("PPOCRV6MediumDetConfig", neck_out_channels=16, intraclass_block_number=4,
               intraclass_block_config=INTRACLASS, scale_factor_list=[1, 2, 4, 8],
               kernel_list=[3, 2, 2],
               backbone_config=config("PPLCNetV4Config", **LCNET4, out_features=STAGES4)),
    ),
    "pp_ocrv6_small_det": hf(
        "PPOCRV6SmallDetForObjectDetection", pixels(3, 64, 64),
        config("PPOCRV6SmallDetConfig", neck_out_channels=16,
               layer_list_out_channels=[8, 8, 16, 16],
               backbone_config=config("PPLCNetV4Config", **LCNET4, out_features=STAGES4)),
    ),
    "pp_ocrv6_small_rec": hf(
        "PPOCRV6SmallRecForTextRecognition", pixels(3, 48, 64),
        config("PPOCRV6SmallRecConfig", **LINE,
               backbone_config=LINES4),
    ),
    "pp_ocrv6_tiny_rec": hf(
        "PPOCRV6TinyRecForTextRecognition", pixels(3, 48, 64),
        config("PPOCRV6TinyRecConfig", hidden_size=16, head_out_channels=20,
               backbone_config=LINES4),
    ),
    "regnet": hf(
        "RegNetModel", pixels(3, 32, 32),
        config("RegNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
               groups_width=4),
    ),
    "resnet": hf(
        "ResNetForImageClassification", pixels(3, 32, 32),
        config("ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]), core=True,
    ),
    "rt_detr": hf(
        "RTDetrModel", pixels(3, 64, 64), config("RTDetrConfig", **DETECTOR, **OF_RESNET)
    ),
    "rt_detr with frozen norms": hf(
        "RTDetrModel", pixels(3, 64, 64), config("RTDetrConfig", **FROZEN_DETECTOR, **OF_RESNET)
    ),
    "rt_detr_v2": hf(
        "RTDetrV2Model", pixels(3, 64, 64), config("RTDetrV2Config", **DETECTOR, **OF_RESNET)
    ),
    "sam3_lite_text": hf(
        "Sam3LiteTextTextModel", lambda n: {"input_ids": words(8)(n)},
        config("Sam3LiteTextTextConfig", **TEXT, projection_dim=8, repmixer_kernel_size=3),
        skipped=dict.fromkeys(VIRTUAL, IDS),
    ),
    "seamless_m4t": hf(
        "SeamlessM4TSpeechEncoder", named(input_features=(16, 16)),
        config("SeamlessM4TConfig", hidden_size=16, speech_encoder_layers=2,
               speech_encoder_attention_heads=2, speech_encoder_intermediate_size=16,
               feature_projection_input_dim=16, conv_depthwise_kernel_size=3,
               speech_encoder_layerdrop=0.0, max_source_positions=32, adaptor_kernel_size=4,
               adaptor_stride=4),
        module="transformers.models.seamless_m4t.modeling_seamless_m4t",
    ),
    "segformer": hf(
        "SegformerForSemanticSegmentation", pixels(3, 64, 64),
        config("SegformerConfig", **PYRAMID, **CLASSES),
    ),
    "slanet": hf(
        "SLANetForTableRecognition", pixels(3, 64, 64),
        config("SLANetConfig", post_conv_out_channels=16, out_channels=8, hidden_size=16,
               max_text_length=3,
               backbone_config=config("PPLCNetConfig", **LCNET, out_features=STAGES)),
    ),
    "speecht5": hf(
        "SpeechT5ForTextToSpeech", _speech,
        config("SpeechT5Config", vocab_size=40, hidden_size=16, encoder_layers=1,
               encoder_attention_heads=2, encoder_ffn_dim=16, decoder_layers=1,
               decoder_ffn_dim=16, decoder_attention_heads=2, conv_dim=[8], conv_stride=[2],
               conv_kernel=[3], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
               num_mel_bins=8, speech_decoder_prenet_units=8, speaker_embedding_dim=8,
               speech_decoder_postnet_layers=2, speech_decoder_postnet_units=8,
               encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    ),
    "superglue": hf(
        "SuperGlueForKeypointMatching", pixels(2, 3, 64, 64),
        config("SuperGlueConfig", hidden_size=16, keypoint_encoder_sizes=[8, 16],
               gnn_layers_types=["self", "cross"], num_attention_heads=2,
               sinkhorn_iterations=3,
               keypoint_detector_config=config(
                   "SuperPointConfig", encoder_hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8,
                   keypoint_decoder_dim=65, descriptor_decoder_dim=16, max_keypoints=12,
                   keypoint_threshold=0.0)),
    ),
    "swiftformer": hf(
        "SwiftFormerForImageClassification", pixels(3, 64, 64),
        config("SwiftFormerConfig", image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16],
               mlp_ratio=2),
    ),
    "textnet": hf(
        "TextNetForImageClassification", pixels(3, 64, 64),
        config("TextNetConfig", stem_out_channels=8, image_size=[64, 64],
               hidden_sizes=[8, 8, 16, 16, 24], depths=[2, 1, 1, 1],
               conv_layer_kernel_sizes=[[[3, 3], [3, 3]], [[1, 3]], [[3, 1]], [[3, 3]]],
               conv_layer_strides=[[1, 2], [2], [2], [2]]),
    ),
    "tvp": hf(
        "TvpModel", with_words(6, pixel_values=(2, 3, 64, 64)),
        config("TvpConfig", **TEXT, max_img_size=64, num_frames=2, visual_prompt_size=8,
               backbone_config=config("ResNetConfig", **RESNET_SIZES, layer_type="basic",
                                      out_features=["stage4"])),
        batch=1, skipped=dict.fromkeys(VIRTUAL, "it takes one example at a time"),
    ),
    "upernet": hf(
        "UperNetForSemanticSegmentation", pixels(3, 64, 64),
        config("UperNetConfig", hidden_size=8, auxiliary_channels=8, auxiliary_in_channels=16,
               pool_scales=[1, 2], **CLASSES,
               backbone_config=config("ResNetConfig", **RESNET_SIZES, layer_type="basic",
                                      out_features=STAGES4)),
    ),
    "uvdoc": hf(
        "UVDocModel", pixels(3, 64, 64),
        config("UVDocConfig", bridge_connector=[16, 8], out_point_positions2D=[[8, 4], [4, 2]],
               backbone_config=config(
                   "UVDocBackboneConfig", resnet_head=[[3, 4], [4, 4]], kernel_size=5,
                   resnet_configs=[[[4, 4, 1, False]], [[4, 8, 1, True]], [[8, 16, 1, True]]],
                   stage_configs=[[[16, 1]], [[16, 2]], [[16, 3], [16, 2]]],
                   out_features=["stage1", "stage2", "stage3"])),
    ),
    "vitmatte": hf(
        "VitMatteForImageMatting", pixels(4, 64, 64),
        config("VitMatteConfig", hidden_size=16, convstream_hidden_sizes=[4, 8, 8],
               fusion_hidden_sizes=[8, 8, 8, 4],
               backbone_config=config("VitDetConfig", **TINY, image_size=64, patch_size=16,
                                      num_channels=4, mlp_ratio=2, out_features=["stage2"])),
    ),
    "vitpose": hf(
        "VitPoseForPoseEstimation", pixels(3, 64, 48),
        config("VitPoseConfig", use_simple_decoder=False, num_labels=4,
               backbone_config=config("VitPoseBackboneConfig", **TINY, image_size=[64, 48],
                                      patch_size=[16, 16], mlp_ratio=2, num_experts=1,
                                      part_features=0, out_indices=[2])),
    ),
    "wav2vec2_conformer": hf(
        "Wav2Vec2ConformerModel", named(input_values=(400,)),
        config("Wav2Vec2ConformerConfig", **WAVE, conv_depthwise_kernel_size=3,
               max_source_positions=64),
    ),
    "zoedepth": hf(
        "ZoeDepthForDepthEstimation", pixels(3, 32, 32),
        config("ZoeDepthConfig", neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
               bottleneck_features=8, num_attractors=[4, 2, 2, 1], bin_embedding_dim=8,
               use_batch_norm_in_fusion_residual=True, use_bias_in_fusion_residual=False,
               backbone_config=config("BeitConfig", **{**VIT, "num_hidden_layers": 4},
                                      vocab_size=30, out_indices=[1, 2, 3, 4],
                                      reshape_hidden_states=False)),
    ),
}  # fmt: skip

# Listed though they build no batch norm of their own: it is in the backbone.
BACKBONES = {"maskformer", "tvp"}

LEFT_OUT: dict[str, str] = {
    "conditional_detr": "its backbone's batch norms are frozen, or it needs timm",
    "dab_detr": "its backbone's batch norms are frozen, or it needs timm",
    "deformable_detr": "its backbone's batch norms are frozen, or it needs timm",
    "grounding_dino": "its backbone's batch norms are frozen, or it has none",
    "layoutlmv2": "it needs detectron2",
    "mask2former": "its backbone as in maskformer",
    "mm_grounding_dino": "its backbone's batch norms are frozen, or it has none",
    "oneformer": "its backbone as in maskformer",
    "table_transformer": "its backbone's batch norms are frozen, or it needs timm",
    "timm_backbone": "it builds a network of timm",
    "timm_wrapper": "it builds a network of timm",
}
