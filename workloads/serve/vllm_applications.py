"""Ray Serve's applications, as far as an application for each version needs them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets.serve_api import gist

RUNNING, DELETING, DEPLOY_FAILED = "RUNNING", "DELETING", "DEPLOY_FAILED"
Complete = Callable[[dict[str, Any]], Any]
"""One completion, by its arguments: something to be iterated over with ``async for``, and to be cancelled."""
_NOT_ITS_FAULT = re.compile(r"\borchestrator\.errors\.(EnvironmentUnusable|StoreError): ")


@dataclass(frozen=True, kw_only=True)
class Application:
    state: str
    """Serve's word: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY (it ran before), DELETING."""
    message: str = ""
    """What Serve says of it and of its deployments, tracebacks included."""

    @property
    def said(self) -> str:
        words = gist(self.message)
        return f"Serve says {self.state}: {words}" if words else f"Serve says {self.state}."

    @property
    def lacks_something(self) -> bool:
        """Whether it failed for what a replica of it raised about the store or the machine."""
        return _NOT_ITS_FAULT.search(self.message) is not None


class Applications(Protocol):
    """All of these raise EnvironmentUnusable where Ray Serve does not do it."""

    def found(self) -> Mapping[str, Application]:
        """Those that Serve has now, by name."""
        ...

    def deploy(self, name: str, arguments: dict[str, Any], version: dict[str, Any]) -> None:
        """Ask for it, without waiting for anything."""
        ...

    def delete(self, name: str) -> None:
        """Ask that it ends. For a while Serve may still say of it what it said before."""
        ...

    def complete(self, name: str) -> Complete:
        """How to have this application complete. Waits for Serve's controller; what it gives does not."""
        ...


class ServeApplications:
    """The cluster that this process is part of."""

    def found(self) -> Mapping[str, Application]:
        from ray import serve

        with _ours("tell its applications"):
            return {
                name: Application(
                    state=str(each.status.value),
                    message=_lines([each.message, *(part.message for part in each.deployments.values())]),
                )
                for name, each in serve.status().applications.items()
            }

    def deploy(self, name: str, arguments: dict[str, Any], version: dict[str, Any]) -> None:
        from ray import serve

        try:
            from workloads.serve import vllm_server
        except ImportError as e:
            raise EnvironmentUnusable(f"vLLM cannot be imported: {e}.", next_step="Install ray[llm].") from e
        target = serve.RunTarget(target=vllm_server.build(arguments, version), name=name, route_prefix=None)
        with _ours(f"deploy {name}"):
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def delete(self, name: str) -> None:
        from ray import serve

        with _ours(f"delete {name}"):
            serve.delete(name, _blocking=False)

    def complete(self, name: str) -> Complete:
        from ray import serve
        from ray.serve.llm.openai_api_models import CompletionRequest

        with _ours(f"give a handle of {name}"):
            handle = serve.get_app_handle(name).options(stream=True)
        return lambda arguments: handle.completions.remote(CompletionRequest(**arguments))


def _lines(messages: Iterable[str]) -> str:
    return "\n".join(message for message in messages if message)


@contextmanager
def _ours(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # Ray has no base for what its controller's absence raises
        raise EnvironmentUnusable(f"Ray Serve could not {what}: {type(e).__name__}: {e}") from e
