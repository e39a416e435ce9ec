"""Quantised checkpoints: what their config says, how their files hold a weight, and reading it from them."""
