"""nginx as the app and as one proxy hop: a worker each, no logs, endless keep-alive."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bench.apps import SMALL_BODY
from bench.processes import Child, Run, accepts, free_port

HEAD = """daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;{user}
events {{ worker_connections 4096; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 1000000000; keepalive_time 24h;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
"""
APP = """  server {{
    listen 127.0.0.1:{port} backlog=1024; default_type application/json;
    location / {{ return 200 '{body}'; }}
  }}
}}
"""
HOP = """  upstream {name} {{ server 127.0.0.1:{target}; keepalive 128; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024; client_max_body_size 0;
    location / {{
      proxy_pass http://{name}; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
      proxy_request_buffering off; proxy_max_temp_file_size 0;
    }}
  }}
"""


def program() -> str | None:
    """The path of nginx, which Debian keeps where users' PATH may not look."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def version() -> str:
    done = subprocess.run([str(program()), "-v"], capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition("/")[2]


def start_app(run: Run) -> tuple[int, Child]:
    """An app that answers everything with the small body; its port."""
    port = free_port()
    return port, _start(run, "nginx-app", APP.format(port=port, body=SMALL_BODY.decode()), [port])


def start_hop(run: Run, targets: dict[str, int]) -> tuple[dict[str, int], Child]:
    """A proxy in front of every target, by name; its ports."""
    ports = {name: free_port() for name in targets}
    parts = [HOP.format(name=name, port=ports[name], target=target) for name, target in targets.items()]
    return ports, _start(run, "nginx-hop", "".join(parts) + "}\n", list(ports.values()))


def _start(run: Run, name: str, servers: str, ports: list[int]) -> Child:
    folder = run.home(name)
    user = " user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(HEAD.format(folder=folder, user=user) + servers)
    argv: list[str | Path] = [str(program()), "-p", folder, "-c", config, "-e", folder / "error.log"]
    child = run.start(name, argv)
    child.wait_for(lambda: all(accepts(port) for port in ports), 10, "its ports")
    return child
