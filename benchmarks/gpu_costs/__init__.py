"""What a kernel should cost on a GPU, computed from what the compiler made of it: a model, never a measurement."""
