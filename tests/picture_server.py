"""A web server on this machine with good pictures in many encodings and answers of every bad kind."""

import io
import socket
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

GOOD = ("jpg", "png", "webp", "grey.jpg", "palette.png", "rgba.png", "gif", "bmp", "cmyk.jpg", "rotated.jpg")
BAD = (
    "missing", "gone", "broken", "html", "empty", "cut.jpg", "tiny.png", "long.png", "noai.jpg", "reset", "white16.png",
)  # fmt: skip
SIDE = 48


def picture(seed: int) -> Image.Image:
    """A smooth picture of its own, wider than high; the top is bright and the bottom dark."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 200, (4, 6, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((SIDE * 3 // 2, SIDE), Image.Resampling.BICUBIC)
    ramp = np.linspace(55, -55, SIDE)[:, None, None]
    return Image.fromarray((np.asarray(image) + ramp).clip(0, 255).astype(np.uint8))


def encoded(kind: str, seed: int) -> bytes:
    """The bytes of one picture; kinds are those of GOOD and the pictures among BAD."""
    image, options = picture(seed), {}
    *variant, suffix = kind.split(".")
    match variant:
        case ["grey"]:
            image = image.convert("L")
        case ["palette"]:
            image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        case ["rgba"]:
            image = image.convert("RGBA")
        case ["cmyk"]:
            image = image.convert("CMYK")
        case ["rotated"]:  # stored on its side, as cameras do: upright after a quarter turn clockwise
            image = image.transpose(Image.Transpose.ROTATE_90)
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        case ["tiny"]:
            image = image.resize((6, 6))
        case ["long"]:
            image = image.resize((SIDE * 6, SIDE))
        case ["white16"]:  # img2dataset's re-encoding saturates 16 bits to white
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 100 + 3000)
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "jpeg"}.get(suffix, suffix), **options)
    content = buffer.getvalue()
    return content[: len(content) // 3] if kind == "cut.jpg" else content


def _drip(handler: BaseHTTPRequestHandler, kind: str) -> None:
    """A byte every 0.3 s, for 30 s, of the body or (drip-head) of the headers."""
    if kind != "drip-head":
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.3)
    except OSError:  # it has given up
        return


class PictureServer:
    """Serves /SEED/KIND and counts what was asked for."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address = address
        self.requests: Counter[str] = Counter()
        self.delay = 0.0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests[self.path] += 1
                time.sleep(owner.delay)
                _, seed, kind = self.path.split("/")
                owner.answer(self, int(seed), kind)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((address, 0), Handler)
        self.thread = Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def url(self, seed: int, kind: str) -> str:
        return f"http://{self.address}:{self.server.server_port}/{seed}/{kind}"

    def answer(self, handler: BaseHTTPRequestHandler, seed: int, kind: str) -> None:
        status = {"missing": 404, "gone": 410, "broken": 500}.get(kind, 200)
        if kind == "reset":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        if kind.startswith("drip"):  # never silent for long, never done
            _drip(handler, kind)
            return
        body = {"html": b"<html>no picture here</html>", "empty": b""}.get(kind)
        if body is None:
            body = encoded(kind.replace("noai.", ""), seed) if status == 200 else b"no"
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        if kind == "noai.jpg":
            handler.send_header("X-Robots-Tag", "noai")
        handler.end_headers()
        handler.wfile.write(body)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
