"""Kubernetes: what a job becomes there, and how a cluster is asked; alerts, dashboards and the image."""
