"""What the console answers with by itself: `/` says what this is; styles and scripts."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from portico import kit
from portico.control.console import account, confirm, device, frame, invitation, links, register, security, sign_in
from portico.settings import ApiSettings

router = APIRouter(include_in_schema=False)
for part in (sign_in, register, links, invitation, confirm, security, account, device):
    router.include_router(part.router)

# The agent's local page shares what is in kit.
_FOLDERS = (Path(kit.__file__).parent / "static", Path(__file__).parent / "static")
_FILES = {path.name: path.read_bytes() for folder in _FOLDERS for path in sorted(folder.iterdir())}
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def _serve(name: str) -> None:
    async def static() -> Response:
        headers = {"Cache-Control": "public, max-age=300"}
        return Response(_FILES[name], media_type=_TYPES[Path(name).suffix], headers=headers)

    router.add_api_route(f"/static/{name}", static, methods=["GET"])


for _name in _FILES:
    _serve(_name)


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """What a person finds who opens the address of the API; nothing here needs or starts a session."""
    settings: ApiSettings = request.app.state.settings
    public = urlsplit(settings.public_url)
    port = f":{public.port}" if public.port is not None else ""
    html = frame.templates.get_template("index.html").render(
        person=None,
        path="/",
        api_url=settings.api_url.rstrip("/"),
        pattern=f"{public.scheme}://NAME.{settings.base_domain}{port}",
    )
    return HTMLResponse(html, headers=frame.HEADERS)
