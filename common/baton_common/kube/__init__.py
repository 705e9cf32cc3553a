"""The Kubernetes API for rooms that speak to it: credentials, a small client, objects as JSON. No service of ours."""
