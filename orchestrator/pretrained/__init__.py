"""Pretrained models: their files copied once into the store, verified, and read by range."""
