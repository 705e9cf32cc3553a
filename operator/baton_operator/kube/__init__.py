"""The Kubernetes API as this operator uses it: credentials, a small client, kinds, quantities. Knows no service."""
