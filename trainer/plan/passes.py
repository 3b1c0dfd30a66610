"""Bytes that a block's kernels move, forward and backward, other than products and attention; those of the ends.

Per image token and unit of width, in bf16. m is the MLP ratio, r key/value heads per head (below 1: grouped), l text
tokens per image token, f the capacity factor, E experts, D width.

| kernels                         | eager                         | compiled                     |
|---------------------------------|-------------------------------|------------------------------|
| norms, modulation, gates        | 220 + 62 r                    | 98 + 26 r                    |
| keys and values of the text     | 22 l r                        | 14 l r                       |
| dense MLP: GELU, biases         | 12 m                          | 10 m                         |
| MoE instead: router, rows, GELU | 14 + f (22 + 12 m) + 48 E / D | 8 + f (12 + 10 m) + 27 E / D |

Counted by `python -m benchmarks.count_kernels` (eager: operators that are dispatched; compiled: what
torch.compile plans for an H100), which prints its own numbers beside these; the tests hold them together. Other routers
move more.
"""

from trainer.plan.job import Job


def bytes_per_token_and_width(job: Job, *, moe: bool, compiled: bool) -> float:
    """Of one block, forward and backward; see the module docstring."""
    model, settings = job.config.model, job.config.moe
    m, r, text = model.mlp_ratio, model.num_kv_heads / model.num_heads, job.text_tokens / job.num_tokens
    f, experts = settings.capacity_factor, settings.num_experts / model.dim
    if compiled:
        attention = 98 + 26 * r + text * 14 * r
        return attention + (8 + f * (12 + 10 * m) + 27 * experts if moe else 10 * m)
    attention = 220 + 62 * r + text * 22 * r
    return attention + (14 + f * (22 + 12 * m) + 48 * experts if moe else 12 * m)


def pass_bytes(job: Job, images: int) -> float:
    """Of all blocks and of the ends, forward and backward, of so many images."""
    model, num_moe = job.config.model, job.counts.num_moe
    each = [bytes_per_token_and_width(job, moe=moe, compiled=job.compiled) for moe in (False, True)]
    blocks = (model.num_layers - num_moe) * each[0] + num_moe * (each[1] if num_moe else 0.0)
    tokens, text = images * job.num_tokens, images * job.text_tokens
    # The ends, by hand: patches, positions, last layer; the text's norm in fp32; its gradient summed over the blocks.
    ends = 60 * tokens * model.dim + text * (20 * job.shape.text_dim + 6 * model.num_layers * model.dim)
    return (blocks * tokens * model.dim + ends) * job.num_bytes / 2
