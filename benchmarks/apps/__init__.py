"""The Celery apps that benchmarks run workers of. Broker and backend come from the environment."""
