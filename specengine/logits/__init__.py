"""What requests ask to be done to their logits, as the device's tables have it."""
