"""The MoE layer and its routers as plain loops: what the tests compare with."""
