"""What goes wrong with a request, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from tersor.experts.server.jobs import Failure


class ApiError(Exception):
    """A request that is answered with an error object.

    Args:
        failure: What the client is told.
        headers: Further headers of the answer.
    """

    def __init__(self, failure: Failure, headers: dict[str, str] | None = None) -> None:
        super().__init__(failure.message)
        self.failure, self.headers = failure, headers or {}


def refuse(message: str, param: str | None = None, *, status: int = 400, code: str = "invalid_value") -> ApiError:
    """An error that the client can mend."""
    return ApiError(Failure(status, code, message, param))


def error_object(failure: Failure) -> dict[str, Any]:
    """The body of an error, in an answer or in a stream."""
    kinds = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}
    kind = kinds.get(failure.status, "server_error" if failure.status >= 500 else "invalid_request_error")
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}


def error_answer(error: ApiError) -> JSONResponse:
    """The answer to a request that failed before anything was sent."""
    retry = {"Retry-After": "1"} if error.failure.status in (429, 503) else {}
    return JSONResponse(error_object(error.failure), error.failure.status, headers={**retry, **error.headers})
