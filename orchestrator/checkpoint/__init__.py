"""Checkpoints of a ZeRO engine: saved behind training, committed by a manifest, resumed at any scale."""
