"""Send a task, read its result."""

from celery.result import AsyncResult
from flask import Blueprint, request

from flask_shop.tasks import count, norm

blueprint = Blueprint("tasks", __name__)


@blueprint.post("/norm")
def send_norm():
    return {"id": norm.delay(request.get_json()).id}, 202


@blueprint.post("/count")
def send_count():
    return {"id": count.delay(request.get_json()).id}, 202


@blueprint.get("/results/<task_id>")
def result(task_id):
    found = AsyncResult(task_id)
    state = found.state  # asked once: a moment later it may be another
    if state == "FAILURE":
        return {"state": state, "error": str(found.result)}
    return {"state": state, "value": found.result if state == "SUCCESS" else None}
