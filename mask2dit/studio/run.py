"""Serves the studio's page."""

import atexit
import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from mask2dit.optional import import_optional
from mask2dit.studio.config import StudioConfig

logger = logging.getLogger(__name__)

USER = "studio"
# Nothing is fetched from other servers, whatever the page holds.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; object-src 'none'; base-uri 'self'"
)


def studio(config: StudioConfig) -> None:
    """Serves the page until the process is stopped.

    Raises:
        ValueError: if Gradio, an optional extra, is not installed.
        OSError: if the port is taken or the folder of projects cannot be written in.
    """
    page, url = launch(config)
    logger.info("The studio is at %s; its projects are in %s", url, Path(config.projects).resolve())
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close()


def launch(config: StudioConfig):
    """Starts the server in threads of its own. Returns the page and its address."""
    # Read when Gradio is imported: no telemetry, and uploads in a folder that only this user can read.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if "GRADIO_TEMP_DIR" not in os.environ:
        uploads = tempfile.mkdtemp(prefix="mask2dit-studio-")
        atexit.register(shutil.rmtree, uploads, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = uploads
    _check_port(config)
    import_optional("gradio", "studio")
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from mask2dit.studio.actions import Studio
    from mask2dit.studio.page import build_page, theme
    from mask2dit.studio.views import CSS

    actions = Studio(config)
    page = build_page(actions)
    password = os.environ[config.password_env] if config.password_env else None
    middleware = [Middleware(_Headers)]
    if config.is_local:  # a page of another name that resolves to this address is refused
        middleware.append(
            Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "::1", "[::1]", config.host])
        )
    _, url, _ = page.queue(default_concurrency_limit=4, max_size=200).launch(
        server_name=config.host,
        server_port=config.port or None,
        auth=(USER, password) if password else None,
        allowed_paths=[str(actions.projects.folder)],
        max_file_size=f"{config.max_upload_mb}mb",
        app_kwargs={"middleware": middleware},
        theme=theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return page, url


def _check_port(config: StudioConfig) -> None:
    """Raises `OSError` if the address cannot be listened at."""
    try:
        family = socket.getaddrinfo(config.host, config.port)[0][0]
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        raise OSError(
            error.errno, f"cannot listen at {config.host}, port {config.port} ({error.strerror}): choose another port"
        ) from error


class _Headers:
    """ASGI middleware that adds headers for the browser's protection to every answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
