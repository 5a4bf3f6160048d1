"""Settings of the studio. Imports nothing heavy, so that mistakes are reported at once."""

import ipaddress
import os
from dataclasses import dataclass

from mask2dit.config import check_at_least


@dataclass(kw_only=True)
class StudioConfig:
    """The page on which stories are written, generated and mended scene by scene."""

    projects: str = "projects"
    """Folder of the projects. The page can read and write no other files."""
    model: str = "models/storyworld"
    """Model of new projects: a folder in diffusers' layout, or a name on the Hugging Face Hub. The small world's model runs
    on a CPU."""
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""

    # Access
    host: str = "127.0.0.1"
    """Address to listen at. Any other than this computer's own needs a password."""
    port: int = 7860
    """Port to listen at; 0: any free one."""
    password_env: str = ""
    """Environment variable that holds the password of the page, whose user is "studio"; empty: no password."""

    # Uploads
    max_upload_mb: int = 200
    """Largest video that can be uploaded, in megabytes."""
    max_upload_seconds: float = 120.0
    """Longest video that can be uploaded, in seconds."""

    # The writer
    writer_base_url: str = ""
    """Address of an OpenAI-compatible endpoint that writes stories, such as http://localhost:8000/v1; empty: no writer."""
    writer_model: str = ""
    """Name of the model at the endpoint."""
    writer_api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; a local server needs none."""
    writer_timeout: float = 120.0
    """Seconds to wait for an answer of the endpoint."""

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} has to lie between 0 and 65535")
        for name in ("max_upload_mb", "max_upload_seconds", "writer_timeout"):
            check_at_least(name, getattr(self, name), 1)
        if self.password_env and not os.environ.get(self.password_env):
            raise ValueError(f"password_env={self.password_env} names an environment variable that is not set")
        if not self.is_local and not self.password_env:
            raise ValueError(
                f"host={self.host} can be reached from other computers: set a password in an environment variable and name "
                "it, as in password_env=STUDIO_PASSWORD"
            )
        if self.writer_base_url and not self.writer_model:
            raise ValueError("writer_base_url needs writer_model, the name of the model at the endpoint")

    @property
    def is_local(self) -> bool:
        """True if only this computer can reach the page."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
