"""The web's process: uvicorn, which ends open streams at once when it is told to stop."""

import signal
from types import FrameType

import uvicorn

from app import processes
from app.settings import settings
from app.web.main import create_app


class Server(uvicorn.Server):
    """Uvicorn waits for open streams at shutdown; this tells them first."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Set the event that streams wait on, then end as usual."""
        closing = getattr(self.config.app.state, "closing", None)  # type: ignore[union-attr]
        if closing is not None:
            closing.set()
        super().handle_exit(sig, frame)


def main() -> None:
    """Serve until told to stop."""
    processes.die_with_parent(signal.SIGTERM)
    app = create_app()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    Server(config).run()


if __name__ == "__main__":
    main()
