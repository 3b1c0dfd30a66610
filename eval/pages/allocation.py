"""How the text moves the compute: importance of each word, and captioned against empty text.

Importance of a word: how far experts per patch move when the word is taken out of the caption, on the same noised
picture; the sum over patches of |with - without| as a share of all, mean over MoE layers and times. The difference of
captioned and empty text is measured alike, on the way of sampling.

Shapes: N pictures, T times, L MoE layers, S patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routing import Routed
from trainer.data.latents.samples import pad_text
from trainer.diffusion.flow import interpolate
from trainer.diffusion.solver import initial_noise
from trainer.formats.page import escape
from trainer.formats.progress_bar import ProgressBar
from trainer.pipeline import Pipeline

TIMES = (0.3, 0.6, 0.9)


@dataclass(frozen=True, kw_only=True)
class WordShares:
    """The words of a caption and the share of the compute that each moves."""

    words: tuple[str, ...]
    shares: tuple[float, ...]


def moved_share(one_NLS: Tensor, other_NLS: Tensor) -> Tensor:
    """Share of the experts per patch that differ between two allocations, mean over pictures, [L]."""
    moved_NL = (one_NLS - other_NLS).abs().sum(-1)
    return (moved_NL / one_NLS.sum(-1).clamp_min(1)).mean(0)


def _allocation(pipeline: Pipeline, x_CHW: Tensor, time: float, caption: str) -> Tensor:
    """Experts per patch of one picture at one time, [1, L, S]; alone in its batch, whatever the routing pool."""
    device = pipeline.device
    text, mask = pad_text(pipeline.text_encoder.encode([caption]), pipeline.info.max_tokens)
    t_B = torch.full((1,), time, device=device)
    routed: list[Routed]
    _, routed = pipeline.model(x_CHW.unsqueeze(0).to(device), t_B, text.to(device), mask.to(device))
    return torch.stack([layer.statistics().experts_per_token_BS.float() for layer in routed], 1).cpu()


@torch.inference_mode()
def word_shares(
    pipeline: Pipeline, captions: Sequence[str], pictures_NHWC: Tensor, seeds: Sequence[int]
) -> tuple[WordShares, ...]:
    """Importance of each word of each caption for the picture that was drawn from it."""
    rgb = pictures_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, std = (value.view(1, -1, 1, 1) for value in (pipeline.info.mean_C, pipeline.info.std_C))
    latent_NCHW = (pipeline.codec.encode(rgb) - mean) / std
    noise_NCHW = initial_noise(list(seeds), tuple(latent_NCHW.shape[1:]))  # type: ignore[arg-type]
    found = []
    for n, caption in enumerate(ProgressBar(captions, "words", unit="caption")):
        words = caption.split()
        totals = [0.0] * len(words)
        for time in TIMES:
            x_CHW = interpolate(latent_NCHW[n : n + 1], noise_NCHW[n : n + 1], torch.tensor([time]))[0]
            whole = _allocation(pipeline, x_CHW, time, caption)
            for i in range(len(words)):
                without = _allocation(pipeline, x_CHW, time, " ".join(words[:i] + words[i + 1 :]))
                totals[i] += float(moved_share(whole, without).mean()) / len(TIMES)
        found.append(WordShares(words=tuple(words), shares=tuple(totals)))
    return tuple(found)


def word_lines(found: Sequence[WordShares]) -> list[str]:
    """HTML: each caption with its words shaded by importance, the largest of all the darkest."""
    if not found:
        return []
    top = max((share for item in found for share in item.shares), default=0.0)
    lines = []
    for item in found:
        spans = [
            f'<span style="background: rgba(47, 95, 208, {0.55 * share / max(top, 1e-9):.2f}); padding: 1px 4px" '
            f'title="{share:.1%}">{escape(word)}</span>'
            for word, share in zip(item.words, item.shares, strict=True)
        ]
        lines.append(f"<p>{' '.join(spans)}</p>")
    return [
        "<h3>Which words move the compute</h3>",
        f'<p class="muted">Share of the experts per patch that changes when the word is left out, over all blocks and '
        f"times {', '.join(map(str, TIMES))}; the darkest word moves {top:.1%}.</p>",
        *lines,
    ]
