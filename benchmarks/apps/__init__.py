"""The Celery apps that `benchmarks.noop` runs workers of. Broker and backend come from the environment."""
