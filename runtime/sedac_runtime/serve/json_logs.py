"""Logs of the server: one JSON object a line, on stderr."""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime

# of the request that is being answered
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
# where it is traced
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object. Extra fields are its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            line["request_id"] = current
        if (trace := trace_id.get()) is not None:
            line["trace_id"] = trace
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json() -> None:
    """Log what the server and its libraries say as JSON. A log that cannot be written is lost;
    nothing else is."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name in ("sedac_runtime", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
