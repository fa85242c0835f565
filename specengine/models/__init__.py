"""Architectures as data: one decoder, one file an architecture that maps a checkpoint onto it."""
