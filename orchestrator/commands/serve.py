"""``headway serve``: a model's channel on Ray Serve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml

from orchestrator.commands.context import find_kubernetes, find_ray, find_store, is_kubernetes, require_stack
from orchestrator.commands.serve_kubernetes import serve_kubernetes, stop_serving
from orchestrator.errors import TargetError, UsageError
from orchestrator.release import channels
from orchestrator.render import serve_application
from orchestrator.render.ray_service import application_name
from orchestrator.reporter import Reporter, Result
from orchestrator.store import Store
from orchestrator.targets.serve_api import ABSENT, ServeApi

_SERVE_PORT = 8000  # Ray Serve's own default, on clusters that are not ours
_OWN_OPTIONS = {
    "model": "the model's name",
    "channel": "--channel",
    "store": "--store",
    "store_uri": "--store",
    "replicas": "--replicas",
    "route_prefix": "--route-prefix",
    "num_replicas": "--replicas",
    "headway": "Headway itself",
}


def serve(
    model: str,
    *,
    channel: str,
    target: str,
    store_uri: str | None,
    replicas: int,
    route_prefix: str,
    settings: Sequence[str],
    timeout_s: float,
    down: bool,
    reporter: Reporter,
) -> Result:
    """Serve a channel, or take its application away. ``settings`` are NAME=VALUE of more of its arguments."""
    arguments = parse_settings(settings)
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
            arguments=arguments,
            timeout_s=timeout_s,
            reporter=reporter,
        )
    cluster = find_ray(target)
    if down:
        return _take_away(ServeApi(cluster.url), model, channel)
    store = find_store(store_uri)
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
        arguments=arguments,
    )
    return {"model": model, "channel": channel, "endpoint": endpoint}, f"{model} answers at {endpoint}/v1"


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` with YAML's values, as the application's arguments.

    Raises:
        UsageError: not of this form, or one that has an option of its own.
    """
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--set {text!r} is not NAME=VALUE.", next_step="Such as: --set max_batch=16")
        if name in _OWN_OPTIONS:
            raise UsageError(f"--set {name} is not taken: {_OWN_OPTIONS[name]} says it.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise UsageError(f"--set {name}: {value!r} is not a value that YAML can read.") from e
        try:
            json.dumps(found[name], allow_nan=False)
        except (TypeError, ValueError) as e:
            raise UsageError(
                f"--set {name}: {value!r} is read as {found[name]!r}, which no argument can be.",
                next_step="Give a finite number, true, false, null, a text in quotes, a list or a mapping.",
            ) from e
    return found


def _take_away(api: ServeApi, model: str, channel: str) -> Result:
    """Remove the channel's application; its versions and entries stay in the store."""
    name = application_name(model, channel)
    there = api.status(name).state != ABSENT
    api.remove(name)
    text = f"{model} is no longer served." if there else f"There is no application {name}."
    return {"model": model, "channel": channel, "application": name, "deleted": there}, text


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
    arguments: Mapping[str, Any] | None = None,
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
        model=model,
        channel=channel,
        store_uri=store.uri,
        replicas=replicas,
        route_prefix=route_prefix,
        arguments=arguments or {},
    )
    endpoint = f"http://{host}:{port}{route_prefix.rstrip('/')}"
    reporter.say(f"Serving {model}@{entry.version} at {endpoint} …")
    try:
        api.deploy(application, host=bind, port=port)
    except TargetError as e:
        raise TargetError(
            e.message, next_step=f"Is the route {route_prefix} taken? Choose one with --route-prefix."
        ) from e
    api.wait_until_answering(application["name"], f"{endpoint}/readyz/{model}", timeout_s=timeout_s)
    return endpoint
