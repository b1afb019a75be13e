"""KubeRay and Kueue templates, the code that renders them, and the Grafana dashboard."""
