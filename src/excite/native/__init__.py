"""Passes over channels-last maps that PyTorch has no operator for, in C: compiled where they are first used."""
