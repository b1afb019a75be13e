"""What is deployed beside a run: KubeRay and Kueue templates, what fills them, the Grafana dashboard."""
