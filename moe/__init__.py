"""Mixture of experts, by default with expert choice: routers, dispatch, expert-parallel exchange and expert MLPs."""

from moe.lean_import import install

install()
