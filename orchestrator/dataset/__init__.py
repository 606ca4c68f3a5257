"""Token shards: their format, the order of samples, and the reader."""
