"""Drafters: whatever can propose tokens. Each owns its state, keyed by sequence."""
