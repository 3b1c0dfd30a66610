"""Bounds the time of one download and of one tar. Runs in img2dataset's own interpreter and imports nothing of ours.

Its timeout is one of each read: a host that sends a byte every few seconds would keep a tar open for ever.
"""

import socket
import threading
import time
from typing import Any

from img2dataset import downloader

_current = threading.local()  # until when the download of this thread may read
_readinto = socket.SocketIO.readinto  # plain and encrypted connections, headers and bodies are all read by it
_download = downloader.download_image


def _bounded_readinto(stream: socket.SocketIO, buffer: Any) -> Any:
    if time.monotonic() > getattr(_current, "end", float("inf")):
        raise TimeoutError("took longer than --download-seconds or --tar-seconds")
    return _readinto(stream, buffer)


class BoundedDownloader(downloader.Downloader):  # type: ignore[misc]
    """Ends each try after some seconds, and those that are left when its tar has taken too long."""

    def __init__(self, *arguments: Any, download_seconds: int, tar_seconds: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.download_seconds, self.tar_seconds = download_seconds, tar_seconds

    def download_shard(self, row: Any) -> None:
        """One tar, by the threads of this process."""
        tar_end = time.monotonic() + self.tar_seconds

        def download(key_and_url: Any, *options: Any) -> Any:
            now = time.monotonic()
            if now > tar_end:
                return key_and_url[0], None, "not begun within --tar-seconds"
            _current.end = min(now + self.download_seconds, tar_end)
            return _download(key_and_url, *options)

        socket.SocketIO.readinto = _bounded_readinto  # type: ignore[assignment, method-assign]
        downloader.download_image = download
        super().download_shard(row)
