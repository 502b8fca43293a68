"""Recipes, and ``fit``, which trains one network by one."""
