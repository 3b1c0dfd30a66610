"""Names of an mmdet Mask2Former-Swin checkpoint (2.x and 3.x) turned into those of transformers.

The two libraries build the same network. Swin's query, key and value are one matrix in mmdet; its patch merging uses
`nn.Unfold`'s channel order (channel by channel, four neighbours each), transformers concatenates the neighbours
(top left, bottom left, top right, bottom right). In 2.x the decoder's `attentions.0` is cross-attention and
`attentions.1` self-attention.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_SWIN = "model.pixel_level_module.encoder.swin."
_PIXELS = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_NEIGHBOURS = [0, 2, 1, 3]  # unfold's row-major neighbours in transformers' order
_OLD_NAMES = (
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"ffns\.0\.", "ffn."),
)
_BLOCK_NAMES = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "ffn.layers.0.0.": "mlp.fc1.",
    "ffn.layers.1.": "mlp.fc2.",
    "attn.w_msa.proj.": "attention.o_proj.",
    "attn.w_msa.relative_position_bias_table": "attention.relative_position_bias.relative_position_bias_table",
}
_PIXEL_LAYER_NAMES = {
    "ffn.layers.0.0.": "fc1.",
    "ffn.layers.1.": "fc2.",
    "norms.0.": "self_attn_layer_norm.",
    "norms.1.": "final_layer_norm.",
}
_QUERY_LAYER_NAMES = {
    "ffn.layers.0.0.": "fc1.",
    "ffn.layers.1.": "fc2.",
    "norms.0.": "cross_attn_layer_norm.",
    "norms.1.": "self_attn_layer_norm.",
    "norms.2.": "final_layer_norm.",
    "cross_attn.attn.": "cross_attn.",
    "self_attn.attn.out_proj.": "self_attn.out_proj.",
}
_SINGLE_NAMES = {
    "pixel_decoder.level_encoding.weight": _PIXELS + "level_embed",
    "pixel_decoder.mask_feature.weight": _PIXELS + "mask_projection.weight",
    "pixel_decoder.mask_feature.bias": _PIXELS + "mask_projection.bias",
    "transformer_decoder.post_norm.weight": _QUERIES + "decoder.layernorm.weight",
    "transformer_decoder.post_norm.bias": _QUERIES + "decoder.layernorm.bias",
    "query_embed.weight": _QUERIES + "queries_embedder.weight",
    "query_feat.weight": _QUERIES + "queries_features.weight",
    "level_embed.weight": _QUERIES + "level_embed.weight",
    "cls_embed.weight": "class_predictor.weight",
    "cls_embed.bias": "class_predictor.bias",
}


def reorder_merging(value: Tensor) -> Tensor:
    """Patch merging's projection [out, 4 C] or norm [4 C] from unfold's channel order to transformers'."""
    channels = value.shape[-1] // 4
    parts = value.unflatten(-1, (channels, 4)).transpose(-1, -2)[..., _NEIGHBOURS, :]
    merged: Tensor = parts.flatten(-2).contiguous()
    return merged


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def _backbone(name: str, value: Tensor) -> dict[str, Tensor]:
    if match := re.fullmatch(r"patch_embed\.(projection|norm)\.(\w+)", name):
        place = "embeddings.patch_embeddings.projection" if match[1] == "projection" else "embeddings.norm"
        return {f"{_SWIN}{place}.{match[2]}": value}
    if match := re.fullmatch(r"norm(\d)\.(\w+)", name):
        stage = f"model.pixel_level_module.encoder.hidden_states_norms.stage{int(match[1]) + 1}"
        return {f"{stage}.{match[2]}": value}
    if match := re.fullmatch(r"stages\.(\d+)\.downsample\.(norm|reduction)\.(\w+)", name):
        return {f"{_SWIN}encoder.layers.{match[1]}.downsample.{match[2]}.{match[3]}": reorder_merging(value)}
    if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
        block = f"{_SWIN}encoder.layers.{match[1]}.blocks.{match[2]}."
        if qkv := re.fullmatch(r"attn\.w_msa\.qkv\.(\w+)", match[3]):
            return {f"{block}attention.{c}_proj.{qkv[1]}": v for c, v in zip("qkv", value.chunk(3), strict=True)}
        if renamed := _renamed(match[3], _BLOCK_NAMES):
            return {block + renamed: value}
    raise KeyError(f"backbone.{name}")


def _pixel_decoder(name: str, value: Tensor) -> dict[str, Tensor]:
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
        renamed = _renamed(match[2], _PIXEL_LAYER_NAMES) or match[2]
        return {f"{_PIXELS}encoder.layers.{match[1]}.{renamed}": value}
    if match := re.fullmatch(r"input_convs\.(\d)\.(conv|gn)\.(\w+)", name):
        return {f"{_PIXELS}input_projections.{match[1]}.{int(match[2] == 'gn')}.{match[3]}": value}
    if match := re.fullmatch(r"(lateral|output)_convs\.0\.(conv|gn)\.(\w+)", name):
        place = "adapter_1" if match[1] == "lateral" else "layer_1"
        return {f"{_PIXELS}{place}.{int(match[2] == 'gn')}.{match[3]}": value}
    raise KeyError(f"pixel_decoder.{name}")


def _query_decoder(name: str, value: Tensor) -> dict[str, Tensor]:
    match = re.fullmatch(r"(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(f"transformer_decoder.layers.{name}")
    layer, rest = f"{_QUERIES}decoder.layers.{match[1]}.", match[2]
    if joined := re.fullmatch(r"self_attn\.attn\.in_proj_(weight|bias)", rest):
        return {f"{layer}self_attn.{c}_proj.{joined[1]}": v for c, v in zip("qkv", value.chunk(3), strict=True)}
    return {layer + (_renamed(rest, _QUERY_LAYER_NAMES) or rest): value}


def convert_key(name: str, value: Tensor) -> dict[str, Tensor]:
    """One weight of mmdet under its name or names in transformers; empty for what the network computes itself.

    Raises KeyError for a name that a Mask2Former-Swin does not have.
    """
    if name.endswith("relative_position_index") or "loss_" in name:
        return {}
    for pattern, new in _OLD_NAMES:
        name = re.sub(pattern, new, name)
    name = name.removeprefix("panoptic_head.")
    if name in _SINGLE_NAMES:
        return {_SINGLE_NAMES[name]: value}
    if name.startswith("backbone."):
        return _backbone(name.removeprefix("backbone."), value)
    if name.startswith("pixel_decoder."):
        return _pixel_decoder(name.removeprefix("pixel_decoder."), value)
    if name.startswith("transformer_decoder.layers."):
        return _query_decoder(name.removeprefix("transformer_decoder.layers."), value)
    if match := re.fullmatch(r"mask_embed\.(\d)\.(\w+)", name):
        return {f"{_QUERIES}decoder.mask_predictor.mask_embedder.{int(match[1]) // 2}.0.{match[2]}": value}
    raise KeyError(name)


def convert_mask2former(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's `state_dict` of mmdet as one of transformers; KeyError for a name that neither has."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        found |= convert_key(name, value)
    return found
