"""A file an architecture: what its config means and where its tensors are. None imports another."""
