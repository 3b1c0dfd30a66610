"""Expert-choice mixture-of-experts: routing, dispatch, expert-parallel exchange and expert MLPs."""
