"""Checkpoints that are whole or absent, and that any topology can read.

`RUN/checkpoints/step_00000010/` holds one safetensors file per rank with the flat fp32 pieces of weights, EMA and
optimizer moments that ZeRO keeps on it, `state.json` and a manifest of sizes and checksums. A piece says where in
its tensor it belongs, so any number of processes, `ep_size` and ZeRO stage reads just the ranges it needs:
resuming elsewhere converts nothing. Working bf16 weights are not stored; they are the rounded master weights.

DeepSpeed's own format is not used: it loads on the topology that wrote it only, or through a second full copy on
disk that differs between ZeRO stages and loses optimizer hyper-parameters on the way.
"""
