"""Numbers in few bits: codecs, bit packing, byte accounting and kernels that compute on the packed form."""
