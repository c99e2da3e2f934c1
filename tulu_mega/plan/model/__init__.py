"""Arithmetic of runs: what a step costs."""
