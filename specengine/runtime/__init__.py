"""Device state: sequences, KV tensors, batches, the model runner."""
