"""``headway serve``: a model's channel on Ray Serve."""

from __future__ import annotations

from urllib.parse import urlsplit

from orchestrator.commands.context import find_kubernetes, find_ray, find_store, is_kubernetes, require_stack
from orchestrator.commands.serve_kubernetes import serve_kubernetes, stop_serving
from orchestrator.errors import TargetError, UsageError
from orchestrator.release import channels
from orchestrator.render import serve_application
from orchestrator.reporter import Reporter, Result
from orchestrator.store import Store
from orchestrator.targets.serve_api import ServeApi

_SERVE_PORT = 8000  # Ray Serve's own default, on clusters that are not ours


def serve(
    model: str,
    *,
    channel: str,
    target: str,
    store_uri: str | None,
    replicas: int,
    route_prefix: str,
    timeout_s: float,
    down: bool,
    reporter: Reporter,
) -> Result:
    if down and not is_kubernetes(target):
        raise UsageError(
            f"--down takes a service of Kubernetes away; --target is {target}.",
            next_step="On this machine headway down ends everything; elsewhere use Ray's own: serve shutdown",
        )
    if is_kubernetes(target):
        found = find_kubernetes(target, store_uri)
        if down:
            return stop_serving(found.client, model=model, channel=channel)
        return serve_kubernetes(
            found.client,
            found.settings,
            find_store(store_uri),
            model=model,
            channel=channel,
            replicas=replicas,
            route_prefix=route_prefix,
            timeout_s=timeout_s,
            reporter=reporter,
        )
    cluster, store = find_ray(target), find_store(store_uri)
    if target == "local":
        bind, host, port = "127.0.0.1", "127.0.0.1", require_stack().ray_ports.serve
    else:
        bind, host, port = "0.0.0.0", urlsplit(cluster.url).hostname or "", _SERVE_PORT
    endpoint = deploy(
        ServeApi(cluster.url),
        store,
        model=model,
        channel=channel,
        replicas=replicas,
        route_prefix=route_prefix,
        bind=bind,
        host=host,
        port=port,
        timeout_s=timeout_s,
        reporter=reporter,
    )
    return {"model": model, "channel": channel, "endpoint": endpoint}, f"{model} answers at {endpoint}/v1"


def deploy(
    api: ServeApi,
    store: Store,
    *,
    model: str,
    channel: str,
    replicas: int,
    route_prefix: str,
    bind: str,
    host: str,
    port: int,
    timeout_s: float,
    reporter: Reporter,
) -> str:
    """Deploy the application of one model beside what is served already. Returns its endpoint.

    Raises:
        UsageError: nothing was released to the channel. TargetError, TimedOut: it does not come up.
    """
    entry = channels.newest(store, model, channel)
    if entry is None:
        raise UsageError(
            f"Nothing was released to {model}'s channel {channel} yet.",
            next_step="See what there is: headway list models",
        )
    application = serve_application(
        model=model, channel=channel, store_uri=store.uri, replicas=replicas, route_prefix=route_prefix
    )
    endpoint = f"http://{host}:{port}{route_prefix.rstrip('/')}"
    reporter.say(f"Serving {model}@{entry.version} at {endpoint} …")
    try:
        api.deploy(application, host=bind, port=port)
    except TargetError as e:
        raise TargetError(
            e.message, next_step=f"Is the route {route_prefix} taken? Choose one with --route-prefix."
        ) from e
    api.wait_until_answering(application["name"], f"{endpoint}/v1/models/{model}", timeout_s=timeout_s)
    return endpoint
