"""Where models come from: what a checkpoint's files say, read with suspicion."""
