"""Names of an mmdet Mask2Former-Swin checkpoint (2.x and 3.x) turned into those of transformers.

The two libraries build the same network. Swin's query, key and value are one matrix in mmdet; its patch merging uses
`nn.Unfold`'s channel order (channel by channel, four neighbours each), transformers concatenates the neighbours
(top left, bottom left, top right, bottom right). In 2.x the decoder's `attentions.0` is cross-attention and
`attentions.1` self-attention.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_ENCODER = "model.pixel_level_module.encoder."
_SWIN = _ENCODER + "swin."
_PIXELS = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_NEIGHBOURS = [0, 2, 1, 3]  # unfold's row-major neighbours in transformers' order
_OLD_NAMES = (
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"ffns\.0\.", "ffn."),
)
_BLOCK, _NEW_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.", _SWIN + r"encoder.layers.\1.blocks.\2."
_PIXEL_LAYER, _NEW_PIXEL_LAYER = r"pixel_decoder\.encoder\.layers\.(\d+)\.", _PIXELS + r"encoder.layers.\1."
_QUERY_LAYER, _NEW_QUERY_LAYER = r"transformer_decoder\.layers\.(\d+)\.", _QUERIES + r"decoder.layers.\1."
_BIAS_TABLE = "relative_position_bias_table"
# Beginnings of names, the first that fits is replaced; {c} stands for q, k and v, which are one matrix in mmdet.
_NAMES = (
    (r"backbone\.patch_embed\.projection\.", _SWIN + "embeddings.patch_embeddings.projection."),
    (r"backbone\.patch_embed\.norm\.", _SWIN + "embeddings.norm."),
    *((rf"backbone\.norm{i}\.", f"{_ENCODER}hidden_states_norms.stage{i + 1}.") for i in range(4)),
    (r"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)\.", _SWIN + r"encoder.layers.\1.downsample.\2."),
    (_BLOCK + r"norm1\.", _NEW_BLOCK + "layernorm_before."),
    (_BLOCK + r"norm2\.", _NEW_BLOCK + "layernorm_after."),
    (_BLOCK + r"ffn\.layers\.0\.0\.", _NEW_BLOCK + "mlp.fc1."),
    (_BLOCK + r"ffn\.layers\.1\.", _NEW_BLOCK + "mlp.fc2."),
    (_BLOCK + r"attn\.w_msa\.qkv\.", _NEW_BLOCK + "attention.{c}_proj."),
    (_BLOCK + r"attn\.w_msa\.proj\.", _NEW_BLOCK + "attention.o_proj."),
    (_BLOCK + rf"attn\.w_msa\.{_BIAS_TABLE}", f"{_NEW_BLOCK}attention.relative_position_bias.{_BIAS_TABLE}"),
    (_PIXEL_LAYER + r"ffn\.layers\.0\.0\.", _NEW_PIXEL_LAYER + "fc1."),
    (_PIXEL_LAYER + r"ffn\.layers\.1\.", _NEW_PIXEL_LAYER + "fc2."),
    (_PIXEL_LAYER + r"norms\.0\.", _NEW_PIXEL_LAYER + "self_attn_layer_norm."),
    (_PIXEL_LAYER + r"norms\.1\.", _NEW_PIXEL_LAYER + "final_layer_norm."),
    (_PIXEL_LAYER, _NEW_PIXEL_LAYER),
    (r"pixel_decoder\.input_convs\.(\d)\.conv\.", _PIXELS + r"input_projections.\1.0."),
    (r"pixel_decoder\.input_convs\.(\d)\.gn\.", _PIXELS + r"input_projections.\1.1."),
    (r"pixel_decoder\.lateral_convs\.0\.conv\.", _PIXELS + "adapter_1.0."),
    (r"pixel_decoder\.lateral_convs\.0\.gn\.", _PIXELS + "adapter_1.1."),
    (r"pixel_decoder\.output_convs\.0\.conv\.", _PIXELS + "layer_1.0."),
    (r"pixel_decoder\.output_convs\.0\.gn\.", _PIXELS + "layer_1.1."),
    (r"pixel_decoder\.level_encoding\.weight", _PIXELS + "level_embed"),
    (r"pixel_decoder\.mask_feature\.", _PIXELS + "mask_projection."),
    (_QUERY_LAYER + r"ffn\.layers\.0\.0\.", _NEW_QUERY_LAYER + "fc1."),
    (_QUERY_LAYER + r"ffn\.layers\.1\.", _NEW_QUERY_LAYER + "fc2."),
    (_QUERY_LAYER + r"norms\.0\.", _NEW_QUERY_LAYER + "cross_attn_layer_norm."),
    (_QUERY_LAYER + r"norms\.1\.", _NEW_QUERY_LAYER + "self_attn_layer_norm."),
    (_QUERY_LAYER + r"norms\.2\.", _NEW_QUERY_LAYER + "final_layer_norm."),
    (_QUERY_LAYER + r"cross_attn\.attn\.", _NEW_QUERY_LAYER + "cross_attn."),
    (_QUERY_LAYER + r"self_attn\.attn\.in_proj_", _NEW_QUERY_LAYER + "self_attn.{c}_proj."),
    (_QUERY_LAYER + r"self_attn\.attn\.out_proj\.", _NEW_QUERY_LAYER + "self_attn.out_proj."),
    (_QUERY_LAYER, _NEW_QUERY_LAYER),
    (r"transformer_decoder\.post_norm\.", _QUERIES + "decoder.layernorm."),
    (r"query_embed\.", _QUERIES + "queries_embedder."),
    (r"query_feat\.", _QUERIES + "queries_features."),
    (r"level_embed\.", _QUERIES + "level_embed."),
    (r"cls_embed\.", "class_predictor."),
    *((rf"mask_embed\.{2 * i}\.", f"{_QUERIES}decoder.mask_predictor.mask_embedder.{i}.0.") for i in range(3)),
)


def reorder_merging(value: Tensor) -> Tensor:
    """Patch merging's projection [out, 4 C] or norm [4 C] from unfold's channel order to transformers'."""
    channels = value.shape[-1] // 4
    parts = value.unflatten(-1, (channels, 4)).transpose(-1, -2)[..., _NEIGHBOURS, :]
    merged: Tensor = parts.flatten(-2).contiguous()
    return merged


def convert_key(name: str, value: Tensor) -> dict[str, Tensor]:
    """One weight of mmdet under its name or names in transformers; empty for what the network computes itself.

    Raises KeyError for a name that a Mask2Former-Swin does not have.
    """
    if name.endswith("relative_position_index") or "loss_" in name:
        return {}
    for pattern, new in _OLD_NAMES:
        name = re.sub(pattern, new, name)
    name = name.removeprefix("panoptic_head.")
    for pattern, new in _NAMES:
        if match := re.match(pattern, name):
            renamed = match.expand(new) + name[match.end() :]
            if "{c}" in renamed:
                return {renamed.replace("{c}", c): part for c, part in zip("qkv", value.chunk(3), strict=True)}
            return {renamed: reorder_merging(value) if ".downsample." in renamed else value}
    raise KeyError(name)


def convert_mask2former(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's `state_dict` of mmdet as one of transformers; KeyError for a name that neither has."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        found |= convert_key(name, value)
    return found
