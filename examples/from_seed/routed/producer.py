"""The seed's producer: plain Celery. It needs no GPU, no Ray and no change."""

from tasks import app, gpu_intensive_task

data = [1.0, 2.0, 3.0]

if __name__ == "__main__":
    result = gpu_intensive_task.delay(data)
    print(f"sent {result.id}")
    if app.conf.result_backend:  # the seed's app names none; CELERY_RESULT_BACKEND does
        print(f"result {result.get(timeout=60)}")
