"""The routers by the name that `moe.router` gives: one line each.

A name stands for the path of a class, imported when a configuration asks for it: looking at the names needs no torch.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.config import MoeConfig
    from moe.routers.base import Router

ROUTERS = {
    "expert_choice": "moe.routers.expert_choice:ExpertChoice",
    "token_choice": "moe.routers.token_choice:TokenChoice",
    "diffmoe": "moe.routers.diffmoe:DiffMoe",
    "expert_race": "moe.routers.expert_race:ExpertRace",
}


def router_class(name: str) -> "type[Router]":
    """The class of a registered router; ValueError naming the setting and what is known."""
    if name not in ROUTERS:
        raise ValueError(f"moe.router is {name}: use one of {', '.join(ROUTERS)}")
    found: type[Router] = resolve_name(ROUTERS[name])
    return found


def build_router(config: "MoeConfig") -> "Router":
    """The configured router; ValueError naming the settings that it does not go with."""
    return router_class(config.router)(config)
