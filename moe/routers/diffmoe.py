"""DiffMoE (arXiv 2503.14487, section 3): expert choice among many pictures, a learned predictor when sampling.

Shapes: B pools, S tokens of a pool, D width, E experts.
"""

from torch import Tensor, nn
from torch.nn import functional

from moe.routers.base import Choice, Router, RouterInput, RouterTraits
from moe.routers.expert_choice import choose_tokens
from moe.routers.modules import Threshold, threshold_loss
from moe.routing import chosen_mask


class DiffMoe(Router):
    """Expert choice in training; when sampling, token s goes to expert e if its prediction is above e's threshold.

    So a picture's output does not depend on its batch mates. In the authors' code it does (`sampling_choice: gate`):
    predictions only say how many tokens of the pool an expert takes, and affinities which.
    Sampling has no equal splits: every expert gets as many rows as the fullest one of its group.
    """

    traits = RouterTraits(
        has_equal_splits=True, has_tie_break=False, initial_std={"threshold.value": 0.0},
        example={"pool": "batch"}, waits_when_sampling=True, has_sampling_choice=True,
    )  # fmt: skip

    def check(self) -> None:
        """Pictures have to compete."""
        if self.config.pool == "image":
            raise ValueError(
                "moe.router=diffmoe learns how much compute a picture deserves among others, but moe.pool=image gives "
                "each the same: use moe.pool=batch or group(n)"
            )

    def learned_modules(self, dim: int) -> dict[str, nn.Module]:
        """The capacity predictor, and a threshold for each expert."""
        num_experts = self.config.num_experts
        return {"predictor": CapacityPredictor(dim, num_experts), "threshold": Threshold(num_experts)}

    def choose(self, seen: RouterInput) -> Choice:
        """The loss: the predictor's cross entropy against what the experts took, and the thresholds' distance."""
        predicted_BSE, threshold_E = seen.learned["predictor"](seen.x_BSD), seen.learned["threshold"]()
        if not seen.training:
            mask_BSE = predicted_BSE > threshold_E
            if self.config.sampling_choice == "gate":
                order_BSE = seen.affinity_BSE.argsort(dim=1, descending=True, stable=True)
                mask_BSE = order_BSE.argsort(dim=1) < mask_BSE.sum(1, keepdim=True)
            index_BEC, valid_BEC = seen.packed(mask_BSE)
            return Choice(index_BEC=index_BEC, valid_BEC=valid_BEC, affinity_BSE=seen.affinity_BSE)
        num_tokens, best_BEC = seen.x_BSD.shape[1], seen.memory.index_BEC
        if best_BEC is None:
            best_BEC = choose_tokens(seen.affinity_BSE, seen.capacity)
        taken_BSE = chosen_mask(best_BEC, None, num_tokens).to(predicted_BSE.dtype)
        last_BE = predicted_BSE.detach().transpose(1, 2).topk(best_BEC.shape[-1], dim=-1).values[..., -1]
        loss = functional.binary_cross_entropy_with_logits(predicted_BSE, taken_BSE)
        loss = loss + threshold_loss(threshold_E, last_BE)
        return Choice(index_BEC=best_BEC, affinity_BSE=seen.affinity_BSE, loss=loss)

    def multiply_adds(self, num_tokens: int, dim: int) -> int:
        """S D (D + E) of the predictor. Training counts three times that, though its input has no gradient."""
        return num_tokens * dim * (dim + self.config.num_experts)

    def activation_bytes(self, num_tokens: int, dim: int, value_bytes: int) -> float:
        """The predictor's hidden layer around SiLU and its input, and fp32 predictions, mask and cross entropy."""
        return value_bytes * num_tokens * dim * 3 + 12 * num_tokens * self.config.num_experts


class CapacityPredictor(nn.Module):
    """Two-layer SiLU MLP: logit of each expert taking a token (section 3.3)."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, num_experts)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Tokens [B, S, D], through which no gradient flows back -> logits [B, S, E] fp32."""
        out: Tensor = self.down(functional.silu(self.up(x_BSD.detach())))
        return out.float()
