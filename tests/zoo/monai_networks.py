"""Every network of monai.networks.nets: listed, or left out with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anybatch.registry import METHODS
from zoo.listing import Call, Listed, image, images

VERSION = "1.6"  # of MONAI, when the list was complete

BATCH = ("batch", {})
FEW = ("bn", "mabn", "gn")
WIDTHS = {"channels": (4, 8), "strides": (2, 2)}
SE = {"layers": (1, 1, 1, 1), "spatial_dims": 2, "in_channels": 1, "num_classes": 2}
EFFICIENT = {"spatial_dims": 2, "in_channels": 1, "num_classes": 2}


def monai(
    name: str, inputs: Callable[[int], Any], settings: dict[str, Any] | None = None, **other: Any
) -> Listed:
    """A network by the name of its class."""
    return Listed(Call("monai.networks.nets", name, (), settings or {}), inputs, **other)


DENSE = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_features": 4}
DENSE |= {"growth_rate": 2, "block_config": (1, 2, 1)}
RESNET = {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2}
UP = {"in_channels": 1, "out_channels": 2}
BLOCKS = {"init_filters": 4, "norm": BATCH, "blocks_down": (1, 1), "blocks_up": (1,)}
UNITS = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)}
CODER = {"spatial_dims": 2, "out_channels": 1, "channels": (4, 8), "strides": (2, 2)}
DISCRIMINATOR = {"spatial_dims": 2, "channels": 4, "in_channels": 1, "kernel_size": 4}
DINTS = Call(
    "monai.networks.nets", "TopologySearch", (),
    {"channel_mul": 0.2, "num_blocks": 2, "num_depths": 2, "spatial_dims": 2,
     "norm_name": ("BATCH", {"affine": True})},
)  # fmt: skip
HEAD = {"model_name": "resnet10", "pretrained": False, "spatial_dims": 2, "in_channels": 1}

NETWORKS: dict[str, Listed] = {
    "AHNet": monai(
        "AHNet", image(1, 64, 64),
        {"layers": (1, 1, 1, 1), "spatial_dims": 2, "psp_block_num": 2},
    ),
    "AttentionUnet": monai("AttentionUnet", image(1, 16, 16), {"spatial_dims": 2, **UP, **WIDTHS}),
    "AutoEncoder": monai(
        "AutoEncoder", image(1, 16, 16),
        {**CODER, "in_channels": 1, "norm": BATCH, "num_res_units": 1, "inter_channels": [8]},
    ),
    "BasicUNet": monai(
        "BasicUNet", image(1, 16, 16),
        {"spatial_dims": 2, **UP, "features": (4, 4, 8, 8, 8, 4), "norm": BATCH},
    ),
    "BasicUNetPlusPlus": monai(
        "BasicUNetPlusPlus", image(1, 16, 16),
        {"spatial_dims": 2, **UP, "features": (4, 4, 8, 8, 8, 4), "norm": BATCH},
    ),
    "Classifier": monai(
        "Classifier", image(1, 16, 16),
        {"in_shape": (1, 16, 16), "classes": 3, **WIDTHS, "norm": "batch"},
    ),
    "Critic": monai(
        "Critic", image(1, 16, 16), {"in_shape": (1, 16, 16), **WIDTHS, "norm": "batch"}
    ),
    "DenseNet": monai("DenseNet", image(1, 16, 16), DENSE),
    "DenseNet121": monai("DenseNet121", image(1, 16, 16), DENSE),
    "DiNTS": monai(
        "DiNTS", image(1, 16, 16),
        {"dints_space": DINTS, "in_channels": 1, "num_classes": 2, "spatial_dims": 2,
         "norm_name": ("BATCH", {"affine": True}), "use_downsample": True},
    ),
    "Discriminator": monai(
        "Discriminator", image(1, 16, 16), {"in_shape": (1, 16, 16), **WIDTHS, "norm": "batch"}
    ),
    "DynUNet": monai(
        "DynUNet", image(1, 16, 16),
        {"spatial_dims": 2, **UP, **UNITS, "filters": (4, 8, 8), "norm_name": "batch",
         "res_block": True, "deep_supervision": True},
    ),
    "EfficientNet": monai(
        "EfficientNet", image(1, 32, 32),
        {"blocks_args_str": ["r1_k3_s11_e1_i32_o16_se0.25", "r2_k3_s22_e6_i16_o24_se0.25"],
         **EFFICIENT, "width_coefficient": 0.25, "drop_connect_rate": 0.0},
    ),
    "EfficientNetBN": monai(
        "EfficientNetBN", image(1, 32, 32),
        {"model_name": "efficientnet-b0", "pretrained": False, **EFFICIENT},
    ),
    "EfficientNetBNFeatures": monai(
        "EfficientNetBNFeatures", image(1, 32, 32),
        {"model_name": "efficientnet-b0", "pretrained": False, **EFFICIENT},
    ),
    "FlexibleUNet": monai(
        "FlexibleUNet", image(1, 32, 32),
        {**UP, "backbone": "resnet10", "decoder_channels": (16, 8, 8, 4, 4), "spatial_dims": 2},
    ),
    "FlexibleUNet of EfficientNet": monai(
        "FlexibleUNet", image(1, 32, 32),
        {**UP, "backbone": "efficientnet-b0", "decoder_channels": (16, 8, 8, 4, 4)},
    ),
    "Generator": monai(
        "Generator", image(5),
        {"latent_shape": (5,), "start_shape": (4, 4, 4), **WIDTHS, "norm": "batch"},
    ),
    "GlobalNet": monai(
        "GlobalNet", image(2, 16, 16),
        {"image_size": [16, 16], "spatial_dims": 2, "in_channels": 2, "num_channel_initial": 4,
         "depth": 2},
    ),
    "HighResBlock": monai(
        "HighResBlock", image(4, 8, 8), {"spatial_dims": 2, "in_channels": 4, "out_channels": 8}
    ),
    "HighResNet": monai(
        "HighResNet", image(1, 8, 8),
        {"spatial_dims": 2, **UP, "layer_params": (
            {"name": "conv_0", "n_features": 4, "kernel_size": 3},
            {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 2},
            {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
            {"name": "conv_1", "n_features": 8, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1})},
    ),
    "HoVerNet": monai(
        "HoVerNet", image(3, 256, 256), {"mode": "fast", "out_classes": 2}, batch=1,
        skipped={name: "a step takes half a minute" for name in METHODS if name not in FEW},
    ),
    "LocalNet": monai(
        "LocalNet", image(2, 16, 16),
        {"spatial_dims": 2, "in_channels": 2, "num_channel_initial": 4, "extract_levels": (0, 1),
         "out_channels": 2},
    ),
    "MILModel": monai(
        "MILModel", image(2, 1, 16, 16),
        {"num_classes": 2, "mil_mode": "att", "pretrained": False, "backbone_num_features": 16,
         "backbone": Call(
             "monai.networks.nets", "ResNet", ("basic", [1, 1, 1, 1], [8, 8, 16, 16]),
             {"spatial_dims": 2, "n_input_channels": 1, "feed_forward": False})},
    ),
    "MultiScalePatchDiscriminator": monai(
        "MultiScalePatchDiscriminator", image(1, 64, 64),
        {**DISCRIMINATOR, "num_d": 2, "num_layers_d": 2, "minimum_size_im": 64},
    ),
    "PatchDiscriminator": monai(
        "PatchDiscriminator", image(1, 32, 32), {**DISCRIMINATOR, "num_layers_d": 2}
    ),
    "RegUNet": monai(
        "RegUNet", image(2, 16, 16),
        {"spatial_dims": 2, "in_channels": 2, "num_channel_initial": 4, "depth": 2,
         "out_channels": 2},
    ),
    "Regressor": monai(
        "Regressor", image(1, 16, 16),
        {"in_shape": (1, 16, 16), "out_shape": (2,), **WIDTHS, "norm": "batch"},
    ),
    "ResNet": monai(
        "ResNet", image(1, 16, 16, 16),
        {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 8, 16, 16], **RESNET},
    ),
    "ResNet of bottlenecks": monai(
        "ResNet", image(1, 16, 16, 16),
        {"block": "bottleneck", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8], **RESNET},
    ),
    "ResNetBlock": monai(
        "ResNetBlock", image(4, 6, 6, 6), {"in_planes": 4, "planes": 4, "spatial_dims": 3},
        core=True,
    ),
    "ResNetBottleneck": monai(
        "ResNetBottleneck", image(16, 6, 6), {"in_planes": 16, "planes": 4, "spatial_dims": 2}
    ),
    "ResNetEncoder": monai("ResNetEncoder", image(1, 32, 32), HEAD),
    "ResNetFeatures": monai("ResNetFeatures", image(1, 32, 32), HEAD),
    "SENet": monai(
        "SENet", image(1, 32, 32),
        {**SE, "block": "se_resnet_bottleneck", "groups": 1, "reduction": 4, "inplanes": 8,
         "dropout_prob": None},
    ),
    "SENet154": monai("SENet154", image(1, 32, 32), {**SE, "inplanes": 64}),
    "SEResNet50": monai("SEResNet50", image(1, 32, 32), SE),
    "SEResNext50": monai("SEResNext50", image(1, 32, 32), SE),
    "SPADENet": monai(
        "SPADENet", images((2, 16, 16), (1, 16, 16)),
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "label_nc": 2,
         "input_shape": [16, 16], "channels": [4, 8], "z_dim": 8, "norm": BATCH,
         "spade_intermediate_channels": 4},
    ),
    "SegResNet": monai(
        "SegResNet", image(1, 8, 8, 8), {"spatial_dims": 3, **UP, **BLOCKS}
    ),
    "SegResNetDS": monai(
        "SegResNetDS", image(1, 16, 16),
        {"spatial_dims": 2, **UP, "init_filters": 4, "norm": "batch", "blocks_down": (1, 1),
         "dsdepth": 2},
    ),
    "SegResNetDS2": monai(
        "SegResNetDS2", image(1, 16, 16),
        {"spatial_dims": 2, **UP, "init_filters": 4, "norm": "batch", "blocks_down": (1, 1)},
    ),
    "SegResNetVAE": monai(
        "SegResNetVAE", image(1, 16, 16),
        {"input_image_size": (16, 16), "spatial_dims": 2, **UP, **BLOCKS, "vae_nz": 8},
    ),
    "SwinUNETR": monai(
        "SwinUNETR", image(1, 32, 32),
        {**UP, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "feature_size": 12,
         "norm_name": "batch", "spatial_dims": 2},
        needs=("einops",),
    ),
    "UNETR": monai(
        "UNETR", image(1, 32, 32),
        {**UP, "img_size": (32, 32), "feature_size": 4, "hidden_size": 16, "mlp_dim": 16,
         "num_heads": 2, "norm_name": "batch", "spatial_dims": 2},
        needs=("einops",),
    ),
    "UNet": monai(
        "UNet", image(1, 16, 16),
        {"spatial_dims": 2, **UP, "channels": (8, 16, 16), "strides": (2, 2), "num_res_units": 1,
         "norm": "batch"},
    ),
    "VNet": monai("VNet", image(1, 32, 32), {"spatial_dims": 2}),
    "VarAutoEncoder": monai(
        "VarAutoEncoder", image(1, 16, 16),
        {**CODER, "in_shape": (1, 16, 16), "latent_size": 4, "norm": BATCH},
    ),
    "VoxelMorphUNet": monai(
        "VoxelMorphUNet", image(2, 16, 16),
        {"spatial_dims": 2, "in_channels": 2, "unet_out_channels": 4, "channels": (4, 4, 4, 4),
         "final_conv_channels": (4,), "norm": "batch"},
    ),
}  # fmt: skip

DEEPER = "the same network with more blocks"
PART = "a part of a network"
NO_NORM = "it has no norm, and none can be chosen"
GROUPS = "it has group norm, and no batch norm can be chosen"
LAYERS = "it has layer norm, and no batch norm can be chosen"
INSTANCES = "it has instance norm, and no batch norm can be chosen"

LEFT_OUT: dict[str, str] = {
    "AutoencoderKL": GROUPS,
    "BertAttention": PART,
    "BertMixedLayer": PART,
    "BertOutput": PART,
    "BertPreTrainedModel": PART,
    "ControlNet": GROUPS,
    "DAF3D": GROUPS,
    "DecoderOnlyTransformer": LAYERS,
    "DenseNet169": DEEPER,
    "DenseNet201": DEEPER,
    "DenseNet264": DEEPER,
    "DiffusionModelUNet": GROUPS,
    "EfficientNetEncoder": "it is EfficientNetBNFeatures",
    "FullyConnectedNet": NO_NORM,
    "HyenaNDUNETR": "it needs nvsubquadratic; its norms are those of SwinUNETR",
    "MaskedAutoEncoderViT": LAYERS,
    "MedNeXt": "it has group or layer norm, and no batch norm can be chosen",
    "MultiModal": LAYERS,
    "NaViT": LAYERS,
    "NetAdapter": "it changes the head of a network that it is given",
    "PatchMerging": PART,
    "PatchMergingV2": PART,
    "Pooler": PART,
    "Quicknat": INSTANCES,
    "SEResNet101": DEEPER,
    "SEResNet152": DEEPER,
    "SEResNext101": DEEPER,
    "SPADEAutoencoderKL": GROUPS,
    "SPADEDiffusionModelUNet": GROUPS,
    "TopologyConstruction": PART,
    "TopologyInstance": "DiNTS after its search: the same layers",
    "TopologySearch": "tested in DiNTS",
    "TorchVisionFCModel": "it builds a network of torchvision",
    "Transchex": LAYERS,
    "VISTA3D": INSTANCES,
    "VQVAE": NO_NORM,
    "VarFullyConnectedNet": NO_NORM,
    "ViT": LAYERS,
    "ViTAutoEnc": LAYERS,
    "VoxelMorph": "VoxelMorphUNet and a warp without norms",
}
