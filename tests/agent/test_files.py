"""file:///dir: what is served, how, and everything that must not be."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from portico.agent.files import FileServer
from portico.agent.stats import Stats
from portico.agent.target import parse_target
from portico.settings import AgentSettings
from portico.wire import frames as f
from tests.agent.harness import RelayConnection, Visit, serving

SECRET = "the secret"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with files, beside a secret that must stay outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (tmp_path / "rooted").mkdir()
    (tmp_path / "rooted" / "secret.txt").write_text(SECRET)  # shares the root's name as a prefix
    root = tmp_path / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("hello")
    (root / "data.bin").write_bytes(bytes(range(256)) * 4)
    (root / "sub" / "index.html").write_text("<h1>index</h1>")
    (root / 'x<b>&".txt').write_text("odd")
    (root / "päth ü.txt").write_text("utf-8")
    (root / ".env").write_text(SECRET)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text(SECRET)
    (root / "inside").symlink_to(root / "a.txt")
    (root / "escape").symlink_to(outside / "secret.txt")
    (root / "escape-dir").symlink_to(outside)
    (root / "hidden-link").symlink_to(root / ".env")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


@pytest.fixture
async def site(root: Path) -> AsyncIterator[RelayConnection]:
    server = FileServer(parse_target(f"file://{root}"), AgentSettings(), Stats())
    async with serving(server, AgentSettings()) as (relay, _, _):
        yield relay
    assert server.stats.open == 0
    await server.abort()


async def get(site: RelayConnection, path: bytes, *fields: bytes, method: bytes = b"GET") -> Visit:
    return await site.get(path, *fields, method=method).over()


class TestFiles:
    async def test_whole(self, site: RelayConnection) -> None:
        visit = await get(site, b"/a.txt?x=/../y")
        assert (visit.status, bytes(visit.body)) == (200, b"hello")
        assert visit.field(b"content-type") == [b"text/plain; charset=utf-8"]
        assert visit.field(b"content-length") == [b"5"]
        assert visit.field(b"x-content-type-options") == [b"nosniff"]

    async def test_head(self, site: RelayConnection) -> None:
        visit = await get(site, b"/a.txt", method=b"HEAD")
        assert (visit.status, visit.ended, bytes(visit.body)) == (200, True, b"")
        assert visit.field(b"content-length") == [b"5"]

    @pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PROPFIND"])
    async def test_other_methods(self, site: RelayConnection, method: bytes) -> None:
        visit = await get(site, b"/a.txt", method=method)
        assert visit.status == 405 and visit.field(b"allow") == [b"GET, HEAD"]

    async def test_a_body_that_nobody_asked_for(self, site: RelayConnection) -> None:
        visit = site.request([b"POST", b"/a.txt"], end=False)
        await visit.until(lambda: visit.reset)
        assert visit.status == 405 and visit.reset is not None and visit.reset[0] == f.NO_ERROR

    async def test_encoded_names(self, site: RelayConnection) -> None:
        assert bytes((await get(site, b"/p%C3%A4th%20%C3%BC.txt")).body) == b"utf-8"

    async def test_a_link_inside(self, site: RelayConnection) -> None:
        assert bytes((await get(site, b"/inside")).body) == b"hello"

    async def test_large_with_a_slow_reader(self, site: RelayConnection, root: Path) -> None:
        (root / "big").write_bytes(os.urandom(3_000_000))
        visit = site.get(b"/big", hold=True)
        await visit.until(lambda: len(visit.body) == f.STREAM_WINDOW)
        visit.release()
        await visit.over()
        assert bytes(visit.body) == (root / "big").read_bytes()

    async def test_a_visitor_who_leaves(self, site: RelayConnection, root: Path) -> None:
        (root / "big").write_bytes(bytes(3_000_000))
        visit = site.get(b"/big", hold=True)
        await visit.until(lambda: visit.status)
        visit.stream.reset(f.CANCELLED)
        assert (await get(site, b"/a.txt")).status == 200

    async def test_a_file_that_shrinks(self, site: RelayConnection, root: Path) -> None:
        (root / "big").write_bytes(bytes(3_000_000))
        visit = site.get(b"/big", hold=True)
        await visit.until(lambda: len(visit.body) == f.STREAM_WINDOW)
        os.truncate(root / "big", 100_000)
        visit.release()
        await visit.over()
        assert visit.reset is not None and visit.reset[0] == f.TARGET_RESET


class TestRefused:
    @pytest.mark.parametrize(
        "path",
        [
            b"/../outside/secret.txt", b"/%2e%2e/outside/secret.txt", b"/sub/../../outside/secret.txt",
            b"/sub/%2e%2e%2f%2e%2e/outside/secret.txt", b"/..%2foutside%2fsecret.txt", b"/....//outside/secret.txt",
            b"/..\\outside\\secret.txt", b"/%5c..%5coutside", b"/../rooted/secret.txt", b"/escape", b"/escape-dir/secret.txt",
            b"/escape-dir/", b"/.env", b"/%2eenv", b"/.git/config", b"/.git/", b"/hidden-link", b"/loop", b"/pipe",
            b"/a.txt%00.png", b"/a.txt/", b"/a.txt/b", b"/none", b"/%ff%fe", b"/" + b"a" * 5000, b"//etc/passwd/../../..", b"*",
            b"http://other/a.txt", b"/sub/..", b"/.",
        ],
    )  # fmt: skip
    async def test_is_not_found(self, site: RelayConnection, path: bytes) -> None:
        visit = await get(site, path)
        assert visit.status == 404, bytes(visit.body)
        assert SECRET.encode() not in visit.body

    async def test_absolute_names_stay_below_the_root(self, site: RelayConnection, root: Path) -> None:
        for path in (f"/{root.parent}/outside/secret.txt", "//etc/hostname", "///etc/passwd"):
            assert (await get(site, path.encode())).status == 404

    async def test_a_link_that_is_changed_meanwhile(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between the check of the resolved path and the open, a name becomes a link to the outside."""
        from portico.agent.files import Folder

        folder = Folder(str(root), 10)
        walk = folder._walk

        def swapped(parts: list[str]) -> int:
            (root / "a.txt").unlink()
            (root / "a.txt").symlink_to(root.parent / "outside" / "secret.txt")
            return walk(parts)

        monkeypatch.setattr(folder, "_walk", swapped)
        assert folder.open(["a.txt"]) is None


class TestFolders:
    async def test_listing_is_escaped_and_hides(self, site: RelayConnection) -> None:
        visit = await get(site, b"/")
        page = visit.body.decode()
        assert visit.status == 200 and visit.field(b"content-type") == [b"text/html; charset=utf-8"]
        assert "x&lt;b&gt;&amp;&quot;.txt" in page and "x<b>" not in page
        assert 'href="./x%3Cb%3E%26%22.txt"' in page and 'href="./sub/"' in page
        for hidden in (".env", ".git", "escape", "hidden-link", "loop", "secret"):
            assert hidden not in page
        assert "inside" in page and "p%C3%A4th%20%C3%BC.txt" in page

    async def test_index_html_comes_first(self, site: RelayConnection) -> None:
        assert bytes((await get(site, b"/sub/")).body) == b"<h1>index</h1>"

    async def test_an_index_that_leads_outside_is_none(self, site: RelayConnection, root: Path) -> None:
        (root / "sub" / "deep" / "index.html").symlink_to(root.parent / "outside" / "secret.txt")
        visit = await get(site, b"/sub/deep/")
        assert visit.status == 200 and SECRET.encode() not in visit.body

    async def test_a_slash_is_added(self, site: RelayConnection) -> None:
        visit = await get(site, b"/sub?a=b")
        assert (visit.status, visit.field(b"location")) == (301, [b"/sub/?a=b"])
        assert (await get(site, b"//sub")).field(b"location") == [b"/sub/"]  # never //host

    async def test_a_long_listing_is_cut(self, root: Path) -> None:
        settings = AgentSettings(listing_max_entries=2)
        server = FileServer(parse_target(f"file://{root}"), settings, Stats())
        async with serving(server, settings) as (relay, _, _):
            page = (await get(relay, b"/")).body.decode()
        assert page.count("<tr>") == 2 and "More entries" in page


class TestConditions:
    async def test_unchanged(self, site: RelayConnection) -> None:
        first = await get(site, b"/a.txt")
        (etag,), (when,) = first.field(b"etag"), first.field(b"last-modified")
        for fields in (
            (b"If-None-Match", etag),
            (b"If-None-Match", b'"x", W/' + etag),
            (b"If-None-Match", b"*"),
            (b"If-Modified-Since", when),
        ):
            visit = await get(site, b"/a.txt", *fields)
            assert (visit.status, visit.ended, bytes(visit.body), visit.field(b"etag")) == (304, True, b"", [etag])

    async def test_changed(self, site: RelayConnection) -> None:
        for fields in (
            (b"If-None-Match", b'"other"'),
            (b"If-Modified-Since", b"Thu, 01 Jan 1970 00:00:00 GMT"),
            (b"If-Modified-Since", b"nonsense"),
        ):
            assert (await get(site, b"/a.txt", *fields)).status == 200

    @pytest.mark.parametrize(
        ("value", "span"),
        [(b"0-0", (0, 1)), (b"5-9", (5, 10)), (b"1000-", (1000, 1024)), (b"-4", (1020, 1024)), (b"9-99999", (9, 1024)),
         (b"-99999", (0, 1024))],
    )  # fmt: skip
    async def test_range(self, site: RelayConnection, root: Path, value: bytes, span: tuple[int, int]) -> None:
        data = (root / "data.bin").read_bytes()
        visit = await get(site, b"/data.bin", b"Range", b"bytes=" + value)
        assert visit.status == 206 and bytes(visit.body) == data[span[0] : span[1]]
        assert visit.field(b"content-range") == [b"bytes %d-%d/1024" % (span[0], span[1] - 1)]

    @pytest.mark.parametrize("value", [b"bytes=1024-", b"bytes=-0", b"bytes=5000-6000"])
    async def test_range_outside(self, site: RelayConnection, value: bytes) -> None:
        visit = await get(site, b"/data.bin", b"Range", value)
        assert (visit.status, visit.field(b"content-range")) == (416, [b"bytes */1024"])

    @pytest.mark.parametrize(
        "value", [b"bytes=0-1,4-5", b"items=0-1", b"bytes=5-1", b"bytes=a-b", b"bytes=-", b"bytes=1"]
    )
    async def test_range_that_is_passed_over(self, site: RelayConnection, value: bytes) -> None:
        assert (await get(site, b"/data.bin", b"Range", value)).status == 200

    async def test_if_range(self, site: RelayConnection) -> None:
        first = await get(site, b"/data.bin")
        (etag,), (when,) = first.field(b"etag"), first.field(b"last-modified")
        for condition, status in ((etag, 206), (when, 206), (b'"old"', 200)):
            visit = await get(site, b"/data.bin", b"Range", b"bytes=0-1", b"If-Range", condition)
            assert visit.status == status


async def test_a_folder_has_no_tcp(site: RelayConnection) -> None:
    visit = await site.open_tcp().over()
    assert visit.reset is not None and visit.reset[0] == f.TARGET_REFUSED
