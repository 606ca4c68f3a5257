import httpx
import pytest

from orchestrator.commands.dashboard import login_link, watch
from orchestrator.errors import TargetError

URL = "http://127.0.0.1:8265"


def get(url):
    with httpx.Client(trust_env=False) as http:
        return http.get(url)


def test_the_link_lets_a_browser_in_once_and_never_shows_the_token():
    with login_link("sesame", URL) as link:
        assert "sesame" not in link
        answer = get(link)
        assert (answer.status_code, answer.headers["Location"]) == (302, URL)
        cookie = answer.headers["Set-Cookie"].split("; ")
        assert cookie == ["ray-authentication-token=sesame", "Path=/", "HttpOnly", "SameSite=Strict"]
        again = get(link)
        assert again.status_code == 404
        assert "Set-Cookie" not in again.headers
    with pytest.raises(httpx.ConnectError):
        get(link)


def test_another_path_does_not_use_the_link_up():
    with login_link("sesame", URL) as link:
        wrong = get(link[:-1] + ("A" if link[-1] != "A" else "B"))
        assert wrong.status_code == 404
        assert "Set-Cookie" not in wrong.headers
        assert get(link).status_code == 302


def test_without_a_token_there_is_no_link():
    with login_link(None, URL) as link:
        assert link is None


def test_a_replaced_head_is_told_and_an_unreachable_api_is_survived():
    answers = iter(["head-1", "head-1", None, TargetError("Kubernetes cannot be used."), "head-2"])
    said = []

    def head():
        try:
            found = next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None
        if isinstance(found, TargetError):
            raise found
        return found

    with pytest.raises(KeyboardInterrupt):
        watch(head, said.append, sleep=lambda s: None)
    assert said == [
        "Its head pod is gone; waiting for another one …",
        "Kubernetes cannot be used.",
        "Its head is now head-2; reload the page.",
    ]
