"""What is released, to where, and whether it may be: versions, channels, the gate."""
