"""Weights of a transformers Mask2Former under mmdet's names, written down from mmdet's own module tree."""

import torch
from torch import Tensor

from eval.networks.mask2former_keys import reorder_merging

SWIN, PIXELS = "model.pixel_level_module.encoder.swin.", "model.pixel_level_module.decoder."
QUERIES, HEAD = "model.transformer_module.", "panoptic_head."
Weights = dict[str, Tensor]


def _unfold_order(value: Tensor) -> Tensor:
    """Inverse of `reorder_merging`, found by solving for it."""
    order = reorder_merging(torch.arange(value.shape[-1]).float()[None])[0].long()
    out = torch.empty_like(value)
    out[..., order] = value
    return out


def mmdet_state(state: Weights, depths: tuple[int, ...], old: bool) -> Weights:
    """The whole checkpoint, in the names of mmdet 2.x (`old`) or 3.x."""
    return _backbone(state, depths) | _pixel_decoder(state, old) | _query_decoder(state, old)


def _both(out: Weights, new: str, state: Weights, theirs: str) -> None:
    for part in ("weight", "bias"):
        out[f"{new}.{part}"] = state[f"{theirs}.{part}"]


def _backbone(state: Weights, depths: tuple[int, ...]) -> Weights:
    out: Weights = {}

    def both(new: str, theirs: str) -> None:
        _both(out, new, state, theirs)

    both("backbone.patch_embed.projection", SWIN + "embeddings.patch_embeddings.projection")
    both("backbone.patch_embed.norm", SWIN + "embeddings.norm")
    for stage, depth in enumerate(depths):
        both(f"backbone.norm{stage}", f"model.pixel_level_module.encoder.hidden_states_norms.stage{stage + 1}")
        for block in range(depth):
            mine, theirs = f"backbone.stages.{stage}.blocks.{block}.", f"{SWIN}encoder.layers.{stage}.blocks.{block}."
            both(mine + "norm1", theirs + "layernorm_before")
            both(mine + "norm2", theirs + "layernorm_after")
            both(mine + "ffn.layers.0.0", theirs + "mlp.fc1")
            both(mine + "ffn.layers.1", theirs + "mlp.fc2")
            both(mine + "attn.w_msa.proj", theirs + "attention.o_proj")
            for part in ("weight", "bias"):
                parts = [state[f"{theirs}attention.{c}_proj.{part}"] for c in "qkv"]
                out[f"{mine}attn.w_msa.qkv.{part}"] = torch.cat(parts)
            table = "relative_position_bias_table"
            out[f"{mine}attn.w_msa.{table}"] = state[f"{theirs}attention.relative_position_bias.{table}"]
            out[f"{mine}attn.w_msa.relative_position_index"] = torch.zeros(1)
        if stage < len(depths) - 1:
            theirs = f"{SWIN}encoder.layers.{stage}.downsample."
            mine = f"backbone.stages.{stage}.downsample."
            for name in ("norm.weight", "norm.bias", "reduction.weight"):
                out[mine + name] = _unfold_order(state[theirs + name])
    return out


def _pixel_decoder(state: Weights, old: bool) -> Weights:
    out: Weights = {}
    attention, ffn = ("attentions.0", "ffns.0") if old else ("self_attn", "ffn")

    def both(new: str, theirs: str) -> None:
        _both(out, new, state, theirs)

    for i in range(6):
        mine, theirs = f"{HEAD}pixel_decoder.encoder.layers.{i}.", f"{PIXELS}encoder.layers.{i}."
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            both(f"{mine}{attention}.{name}", f"{theirs}self_attn.{name}")
        for name, other in (("norms.0", "self_attn_layer_norm"), ("norms.1", "final_layer_norm")):
            both(mine + name, theirs + other)
        both(f"{mine}{ffn}.layers.0.0", theirs + "fc1")
        both(f"{mine}{ffn}.layers.1", theirs + "fc2")
    for i in range(3):
        both(f"{HEAD}pixel_decoder.input_convs.{i}.conv", f"{PIXELS}input_projections.{i}.0")
        both(f"{HEAD}pixel_decoder.input_convs.{i}.gn", f"{PIXELS}input_projections.{i}.1")
    for name, other in (("lateral", "adapter_1"), ("output", "layer_1")):
        out[f"{HEAD}pixel_decoder.{name}_convs.0.conv.weight"] = state[f"{PIXELS}{other}.0.weight"]
        both(f"{HEAD}pixel_decoder.{name}_convs.0.gn", f"{PIXELS}{other}.1")
    out[f"{HEAD}pixel_decoder.level_encoding.weight"] = state[PIXELS + "level_embed"]
    both(f"{HEAD}pixel_decoder.mask_feature", PIXELS + "mask_projection")
    return out


def _query_decoder(state: Weights, old: bool) -> Weights:
    out: Weights = {}
    ffn = "ffns.0" if old else "ffn"

    def both(new: str, theirs: str) -> None:
        _both(out, new, state, theirs)

    for i in range(9):
        mine, theirs = f"{HEAD}transformer_decoder.layers.{i}.", f"{QUERIES}decoder.layers.{i}."
        cross, own = ("attentions.0", "attentions.1") if old else ("cross_attn", "self_attn")
        for part in ("weight", "bias"):
            out[f"{mine}{cross}.attn.in_proj_{part}"] = state[f"{theirs}cross_attn.in_proj_{part}"]
            parts = [state[f"{theirs}self_attn.{c}_proj.{part}"] for c in "qkv"]
            out[f"{mine}{own}.attn.in_proj_{part}"] = torch.cat(parts)
        both(f"{mine}{cross}.attn.out_proj", f"{theirs}cross_attn.out_proj")
        both(f"{mine}{own}.attn.out_proj", f"{theirs}self_attn.out_proj")
        both(f"{mine}{ffn}.layers.0.0", theirs + "fc1")
        both(f"{mine}{ffn}.layers.1", theirs + "fc2")
        norms = ("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")
        for number, other in enumerate(norms):
            both(f"{mine}norms.{number}", theirs + other)
    both(f"{HEAD}transformer_decoder.post_norm", QUERIES + "decoder.layernorm")
    for mine, theirs in (("query_embed", "queries_embedder"), ("query_feat", "queries_features"), ("level_embed",) * 2):
        out[f"{HEAD}{mine}.weight"] = state[f"{QUERIES}{theirs}.weight"]
    both(f"{HEAD}cls_embed", "class_predictor")
    for number in range(3):
        both(f"{HEAD}mask_embed.{2 * number}", f"{QUERIES}decoder.mask_predictor.mask_embedder.{number}.0")
    out[f"{HEAD}loss_cls.class_weight"] = torch.zeros(81)
    return out
