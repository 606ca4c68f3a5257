"""``headway dashboard RUN``: Ray's dashboard and Jobs API of a run, on this machine.

On Kubernetes a run's Ray asks everyone for its token. The forwarded port asks for it as well, because everyone who
is logged in on this machine can connect to it: a proxy that added the token would let them all in. So programs show
the token themselves (``RAY_AUTH_TOKEN``), and a browser is let in by a link that works once. The link answers with
the cookie that Ray's own dialog would set after someone has pasted the token
(``ray/dashboard/http_server_head.py``, ``/api/authenticate``), but for as long as the browser runs, not 30 days.
Cookies are kept by host and not by port, so that a server on a port of its own can set it. The token itself is never
printed, and stands in no address and no command line.
"""

from __future__ import annotations

import secrets
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from orchestrator.commands.context import find_kubernetes, find_ray, find_store, is_kubernetes
from orchestrator.commands.show import resolve_submitted
from orchestrator.errors import TargetError
from orchestrator.reporter import Reporter
from orchestrator.targets.kubernetes.forward import forwarded

DASHBOARD_PORT = 8265
_COOKIE = "ray-authentication-token"  # ray/_private/authentication/authentication_constants.py
_TOKEN_KEY = "auth_token"  # KubeRay: controllers/ray/utils/constant.go, RAY_AUTH_TOKEN_SECRET_KEY
_POLL_S = 5.0


def dashboard(
    run_id: str, *, target: str, store_uri: str | None, port: int, open_browser: bool, reporter: Reporter
) -> None:
    """Say where a run's dashboard is; on Kubernetes, forward it until Ctrl-C."""
    open_url = webbrowser.open if open_browser else _leave_closed
    if not is_kubernetes(target):
        url = find_ray(target).url
        reporter.result({"url": url}, url)
        open_url(url)
        return
    cluster = find_kubernetes(target, store_uri)
    run_id = resolve_submitted(find_store(store_uri), cluster, run_id)
    secret, namespace = cluster.settings.token_secret, cluster.settings.namespace
    token = _token(cluster.client.secret, secret, reporter)

    def head() -> str | None:
        pod = cluster.head_pod(run_id)
        return None if pod is None else str(pod["metadata"]["name"])

    def head_name() -> str:
        return _named(head(), run_id, cluster.flag)

    head_name()
    with forwarded(cluster.client, head_name, DASHBOARD_PORT, local_port=port) as local_port:
        url = f"http://127.0.0.1:{local_port}"
        with login_link(token, url) as link:
            reporter.result({"run_id": run_id, "url": url, "login_url": link}, _text(run_id, url, link))
            reporter.say(
                "For Ray's own tools, in another terminal:\n"
                f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(kubectl -n {namespace} get secret {secret} "
                f"-o jsonpath='{{.data.{_TOKEN_KEY}}}' | base64 -d)\n"
                f"  ray job list --address {url}\n"
                "Ctrl-C ends this."
            )
            open_url(link or url)
            with suppress(KeyboardInterrupt):  # the way this command ends, so no failure
                watch(head, reporter.say)


def watch(
    head: Callable[[], str | None], say: Callable[[str], None], *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Say, without end, when the head pod is replaced or gone. New connections find the new one by themselves."""
    told = head()
    while True:
        sleep(_POLL_S)
        try:
            now = head()
        except TargetError as e:
            say(str(e))
            continue
        if now != told:
            say(
                f"Its head is now {now}; reload the page." if now else "Its head pod is gone; waiting for another one …"
            )
            told = now


@contextmanager
def login_link(token: str | None, url: str) -> Iterator[str | None]:
    """A link that lets one browser into ``url``, once. None where there is no token."""
    if token is None:
        yield None
        return
    server = _LoginServer(token, url)
    thread = threading.Thread(target=server.serve_forever, name="login-link", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{server.path}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _LoginServer(ThreadingHTTPServer):
    """Answers to one secret path, once, with the cookie and the way on."""

    daemon_threads = True

    def __init__(self, token: str, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _LoginHandler)
        self.token, self.url, self.path = token, url, f"/{secrets.token_urlsafe(24)}"
        self._unused = threading.Semaphore(1)

    def take(self, path: str) -> bool:
        """Whether this path lets in. True at most once."""
        return secrets.compare_digest(path.encode(), self.path.encode()) and self._unused.acquire(blocking=False)


class _LoginHandler(BaseHTTPRequestHandler):
    server: _LoginServer

    def do_GET(self) -> None:
        if not self.server.take(self.path):
            self.send_error(404, "Not found, or used already; headway dashboard gives a new link")
            return
        self.send_response(302)
        self.send_header("Location", self.server.url)
        self.send_header("Set-Cookie", f"{_COOKIE}={self.server.token}; Path=/; HttpOnly; SameSite=Strict")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the path is a secret."""


def _token(read: Callable[[str], dict[str, str] | None], secret: str, reporter: Reporter) -> str | None:
    """Ray's token. Whoever may not read it is told, and still gets the port."""
    try:
        token = (read(secret) or {}).get(_TOKEN_KEY, "").strip()
    except TargetError as e:
        reporter.say(f"No link that logs in: {e}")
        return None
    if not token:
        reporter.say(f"No link that logs in: there is no Secret {secret} with an {_TOKEN_KEY}.")
    return token or None


def _named(head: str | None, run_id: str, flag: str) -> str:
    if head is None:
        raise TargetError(
            f"{run_id} has no head pod: it waits, is being restarted, or has ended.",
            next_step=f"See: headway status{flag} {run_id}",
        )
    return head


def _text(run_id: str, url: str, link: str | None) -> str:
    lines = [f"{run_id}: Ray's dashboard and Jobs API are at {url}"]
    if link is not None:
        lines.append(f"To log in, open this link, which works once: {link}")
    return "\n".join(lines)


def _leave_closed(url: str) -> bool:
    return False
