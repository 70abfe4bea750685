"""What the worker imports: ``python -m bridge.worker -A make_celery``."""

from flask_shop import create_app

flask_app = create_app()
celery_app = flask_app.extensions["celery"]
