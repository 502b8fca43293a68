"""Exact rewrites of trained networks for inference, and what is made with them."""
