"""Token grids of images and videos: which token may be decoded when, and models that decode them."""
