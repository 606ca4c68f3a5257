"""A real Kubernetes of two nodes on one Linux machine, without Docker, and the tests that run on it."""
