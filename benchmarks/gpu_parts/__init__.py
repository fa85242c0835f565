"""What `gpu.py` is made of: the parts, how they are run apart from each other, and the page."""
