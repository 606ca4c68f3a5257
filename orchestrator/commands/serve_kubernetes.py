"""``headway serve MODEL --target kubernetes``: a model's channel as a RayService.

Promoting and rolling back append to the channel and touch nothing here: replicas follow it by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator import __version__
from orchestrator.errors import UsageError
from orchestrator.release import channels
from orchestrator.render.ray_service import SERVE_PORT, ray_service, service_name
from orchestrator.reporter import Reporter, Result
from orchestrator.store import Store
from orchestrator.target_settings import TargetSettings
from orchestrator.targets.kubernetes.services import Client, apply_service, delete_service, wait_until_answering


def serve_kubernetes(
    client: Client,
    settings: TargetSettings,
    store: Store,
    *,
    model: str,
    channel: str,
    replicas: int,
    route_prefix: str,
    arguments: Mapping[str, Any],
    timeout_s: float,
    reporter: Reporter,
) -> Result:
    """Create the service or change it in place, and wait until it answers.

    Raises:
        UsageError: nothing was released to the channel. SpecError: the target has too few pods for the replicas.
        TargetError, TimedOut: it does not come up.
    """
    entry = channels.newest(store, model, channel)
    if entry is None:
        raise UsageError(
            f"Nothing was released to {model}'s channel {channel} yet.",
            next_step="See what there is: headway list models",
        )
    request = ray_service(
        model=model,
        channel=channel,
        store_uri=store.uri,
        replicas=replicas,
        version=__version__,
        settings=settings,
        route_prefix=route_prefix,
        arguments=arguments,
    )
    changed = apply_service(client, request)
    reporter.say(f"RayService {request.name} {'is on its way' if changed else 'is there already'} …")
    prefix = route_prefix.rstrip("/")
    wait_until_answering(client, request, path=f"{prefix}/readyz/{model}", timeout_s=timeout_s, say=reporter.say)
    service = f"{request.name}-serve-svc"
    endpoint = f"http://{service}.{settings.namespace}.svc:{SERVE_PORT}{prefix}"
    reach = f"kubectl -n {settings.namespace} port-forward service/{service} {SERVE_PORT}"
    facts = {
        "model": model,
        "channel": channel,
        "endpoint": endpoint,
        "rayservice": request.name,
        "replicas": replicas,
        "port_forward": reach,
    }
    text = f"{model} answers at {endpoint}/v1 in the cluster.\nFrom here: {reach}, then http://127.0.0.1:{SERVE_PORT}{prefix}/v1"
    return facts, text


def stop_serving(client: Client, *, model: str, channel: str) -> Result:
    """Take the channel's service away; its versions and entries stay in the store."""
    name = service_name(model, channel)
    deleted = delete_service(client, name)
    text = f"RayService {name} is being deleted." if deleted else f"There is no RayService {name}."
    return {"model": model, "channel": channel, "rayservice": name, "deleted": deleted}, text
