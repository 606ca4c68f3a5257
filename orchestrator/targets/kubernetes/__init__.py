"""Attempts and services on Kubernetes, through KubeRay. The only caller of the ``kubernetes`` client."""
