"""Ray Serve's Celery task consumer: Celery's threads pool inside a Serve replica, where the body runs too.

`python -m benchmarks.apps.serve_consumer` deploys it and waits. It needs the packages of `ray[serve-async-inference]`.
Concurrency is Serve's default; no HTTP proxy is started, since nobody calls over HTTP.
"""

import os
import signal

import ray
from ray import serve
from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig
from ray.serve.task_consumer import task_consumer, task_handler

CONFIG = TaskProcessorConfig(
    queue_name=os.environ.get("BENCH_QUEUE", "serve"),
    adapter_config=CeleryAdapterConfig(
        broker_url=os.environ.get("CELERY_BROKER_URL", ""), backend_url=os.environ.get("CELERY_RESULT_BACKEND", "")
    ),
)


@serve.deployment(ray_actor_options={"num_cpus": 0})
@task_consumer(task_processor_config=CONFIG)
class Consumer:
    """One replica, which reserves nothing."""

    @task_handler(name="noop")
    def noop(self) -> None:
        """Do nothing."""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ray.init(address=os.environ["BENCH_RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray has replaced it
    serve.start(proxy_location="Disabled")
    serve.run(Consumer.bind(), route_prefix=None)
    signal.pause()
