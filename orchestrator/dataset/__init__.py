"""Token shards: their format, packing, the order of samples, and the reader."""
