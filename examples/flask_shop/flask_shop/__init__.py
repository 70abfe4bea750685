"""The application factory, and the Celery app it makes: Flask's documented pattern. Nothing here is about GPUs."""

from celery import Celery, Task
from flask import Flask

from flask_shop import views


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.from_mapping(
        UNITS="mm",
        CELERY={"broker_url": "redis://localhost:6379/0", "result_backend": "redis://localhost:6379/0"},
    )
    app.config.from_prefixed_env()
    celery_init_app(app)
    app.register_blueprint(views.blueprint)
    return app


def celery_init_app(app: Flask) -> Celery:
    class FlaskTask(Task):
        """Runs the body in an application context, in whichever process the body runs."""

        def __call__(self, *args: object, **kwargs: object) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app
