"""Optimiser constructors and hooks."""
