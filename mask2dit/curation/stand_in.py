"""A loopback server that replaces a captioning endpoint, for `caption.backend=stand_in` and for tests.

Its captions are in the right format but ignore the pictures. They exercise the rest of the pipeline.
"""

import json
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

APPEARANCE = "a round grey robot on one wheel, wearing a red scarf"
DOES = ("rolls in from the left", "looks around", "waves at the camera", "turns around once")


class StandIn(BaseHTTPRequestHandler):
    """Answers a request for chat completions. `answer` takes the request's JSON and returns a status and a text."""

    answer: Callable[[dict], tuple[int, str]]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, text = self.answer(request)
        body = completion(request, text) if status == 200 else {"error": {"message": text}}
        content = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            return  # the client has disconnected

    def log_message(self, *arguments) -> None:
        pass


def good_answer(request: dict) -> tuple[int, str]:
    """Captions in the right format, one per scene of the request."""
    labels = [part["text"] for part in request["messages"][0]["content"] if part["type"] == "text"]
    scenes = sum(bool(re.fullmatch(r"Scene \d+:", label)) for label in labels)
    captions = [
        f"Actor1 ({APPEARANCE}) is on a wide plain under a clear sky. Actor1 {DOES[i % len(DOES)]}."
        for i in range(scenes)
    ]
    return 200, json.dumps(
        {
            "actors": [{"name": "Actor1", "appearance": APPEARANCE}],
            "scenes": [{"caption": caption} for caption in captions],
        }
    )


def completion(request: dict, text: str) -> dict:
    """A chat completion in the API's format."""
    words = sum(len(part.get("text", "").split()) for message in request["messages"] for part in message["content"])
    return {
        "id": "stand-in",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {
            "prompt_tokens": words,
            "completion_tokens": len(text.split()),
            "total_tokens": words + len(text.split()),
        },
    }


@contextmanager
def stand_in(answer: Callable[[dict], tuple[int, str]] = good_answer) -> Generator[str]:
    """Runs the server and yields its base URL."""
    handler = type("Handler", (StandIn,), {"answer": staticmethod(answer)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds to notice a shutdown
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
