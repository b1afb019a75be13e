"""KubeRay and Kueue templates and what fills them."""
