"""What the Triton kernels share: launching, noise, numbers, tiles. Device code only; no op lives here."""
