"""Checkpoints that are whole or absent, and that any topology can read.

`RUN/checkpoints/step_00000010/` holds one safetensors file per rank with the flat fp32 pieces of weights, EMA and
optimizer moments that ZeRO left it, `state.json` and a manifest of sizes and checksums. A piece says where in
its tensor it belongs, so any number of processes, `ep_size` and ZeRO stage reads just the ranges it needs:
resuming elsewhere converts nothing. Working bf16 weights are not stored; they are the rounded master weights.

DeepSpeed's own format is not used: it loads on the topology that wrote it only, or through a second full copy on
disk that differs between ZeRO stages and loses optimizer hyper-parameters on the way.
"""

from trainer.checkpoint.agree import CheckpointError
from trainer.checkpoint.export_reader import is_export, read_export, read_export_config
from trainer.checkpoint.folder import checkpoint_dir, fault, find_checkpoint, list_checkpoints, newest_whole
from trainer.checkpoint.init_from import check_init, check_init_whole, init_notes, load_init
from trainer.checkpoint.load import load_checkpoint
from trainer.checkpoint.reader import CheckpointReader, read_ema, tensor_hashes
from trainer.checkpoint.resume import check_resumable, choose_checkpoint, find_candidate
from trainer.checkpoint.save import save_checkpoint
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state import Topology, TrainState, git_commit, read_state

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Saver",
    "Topology",
    "TrainState",
    "check_init",
    "check_init_whole",
    "check_resumable",
    "checkpoint_dir",
    "choose_checkpoint",
    "fault",
    "find_candidate",
    "find_checkpoint",
    "git_commit",
    "init_notes",
    "is_export",
    "list_checkpoints",
    "load_checkpoint",
    "load_init",
    "newest_whole",
    "read_ema",
    "read_export",
    "read_export_config",
    "read_state",
    "save_checkpoint",
    "tensor_hashes",
]
