"""The Kubernetes API, as much of it as Headway asks for. Its exceptions end here.

Imports ``kubernetes`` when it is made, not before: the command line starts without it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import yaml

from orchestrator.errors import EnvironmentUnusable, TargetError
from orchestrator.targets.kubernetes.forward import PodStream

Object = dict[str, Any]
_RAY: dict[str, Any] = {"group": "ray.io", "version": "v1"}
_KUEUE_GROUP, _KUEUE_VERSIONS = "kueue.x-k8s.io", ("v1beta2", "v1beta1")
_TIMEOUT_S = (5, 30)
"""To connect, and to answer."""
RAY_JOBS, RAY_SERVICES = "rayjobs", "rayservices"


class KubernetesClient:
    """One namespace of one cluster.

    Args:
        context: of the kubeconfig; None is its current one, or the pod's own account inside a cluster.
        api: a ``kubernetes.client.ApiClient`` that is set up already; None makes one from the kubeconfig.

    Raises:
        EnvironmentUnusable: the ``kubernetes`` package or a kubeconfig is missing.
    """

    def __init__(self, namespace: str, *, context: str | None = None, api: Any = None) -> None:
        try:
            import kubernetes
            import urllib3
        except ModuleNotFoundError as e:
            raise EnvironmentUnusable(
                "--target kubernetes needs the kubernetes package.",
                next_step="Install it: pip install 'headway[kubernetes]'",
            ) from e
        self.namespace = namespace
        self._failures = (
            kubernetes.client.exceptions.ApiException,
            kubernetes.config.config_exception.ConfigException,
            urllib3.exceptions.HTTPError,
            OSError,
        )
        api = api if api is not None else _load(kubernetes, context)
        self.host = str(api.configuration.host)
        self._core = kubernetes.client.CoreV1Api(api)
        self._custom = kubernetes.client.CustomObjectsApi(api)
        self._to_plain = api.sanitize_for_serialization

    # -- Ray's resources

    def create(self, plural: str, manifest: Object) -> bool:
        """Create an object. False where one of this name exists."""
        created = self._call(
            f"create {manifest['kind']} {manifest['metadata']['name']}",
            self._custom.create_namespaced_custom_object,
            none_at=409,
            **_RAY,
            namespace=self.namespace,
            plural=plural,
            body=manifest,
        )
        return created is not None

    def get(self, plural: str, name: str) -> Object | None:
        return self._call(
            f"read {plural}/{name}",
            self._custom.get_namespaced_custom_object,
            **_RAY,
            namespace=self.namespace,
            plural=plural,
            name=name,
        )

    def list_all(self, plural: str) -> list[Object] | None:
        """All objects of a kind; None where the cluster does not know the kind."""
        list_objects = self._custom.list_namespaced_custom_object
        found = self._call(f"list {plural}", list_objects, **_RAY, namespace=self.namespace, plural=plural)
        return None if found is None else [dict(each) for each in found["items"]]

    def patch(self, plural: str, name: str, change: Object) -> Object | None:
        """Merge ``change`` into an object; None where there is none."""
        return self._call(
            f"change {plural}/{name}",
            self._custom.patch_namespaced_custom_object,
            **_RAY,
            namespace=self.namespace,
            plural=plural,
            name=name,
            body=change,
        )

    def delete(self, plural: str, name: str) -> bool:
        """Delete an object and, behind it, all that belongs to it. False where there was none."""
        gone = self._call(
            f"delete {plural}/{name}",
            self._custom.delete_namespaced_custom_object,
            **_RAY,
            namespace=self.namespace,
            plural=plural,
            name=name,
            propagation_policy="Background",
        )
        return gone is not None

    # -- what belongs to them

    def pods(self, selector: str) -> list[Object]:
        """Pods by a label selector, in the API's own JSON."""
        found = self._call(
            "list pods", self._core.list_namespaced_pod, namespace=self.namespace, label_selector=selector
        )
        return list((found or {}).get("items", []))

    def events(self, name: str) -> list[Object]:
        """Events about the object of this name, oldest first."""
        found = self._call(
            "list events",
            self._core.list_namespaced_event,
            namespace=self.namespace,
            field_selector=f"involvedObject.name={name}",
        )
        events = list((found or {}).get("items", []))
        return sorted(events, key=lambda each: str(each.get("lastTimestamp") or each.get("eventTime") or ""))

    def workloads(self) -> list[Object]:
        """Kueue's workloads of the namespace; empty where the cluster has no Kueue."""
        for version in _KUEUE_VERSIONS:
            found = self._call(
                "list workloads",
                self._custom.list_namespaced_custom_object,
                group=_KUEUE_GROUP,
                version=version,
                namespace=self.namespace,
                plural="workloads",
            )
            if found is not None:
                return list(found["items"])
        return []

    def secret(self, name: str) -> dict[str, str] | None:
        """A Secret's values, or None where there is none."""
        found = self._call(
            f"read secret {name}", self._core.read_namespaced_secret, namespace=self.namespace, name=name
        )
        if found is None:
            return None
        return {key: base64.b64decode(value).decode() for key, value in (found.get("data") or {}).items()}

    def forward(self, pod: str, port: int) -> PodStream:
        """A connection to a pod's port. What the pod's node could not do, the stream tells.

        Raises:
            TargetError: the API cannot be reached or refuses.
        """
        from kubernetes.stream.ws_client import create_websocket, get_websocket_url
        from websocket import WebSocketException

        # Not kubernetes.stream.portforward, which swaps a method of the shared client while it connects, so that
        # threads break each other, and which closes both ways where one ends.
        api = self._core.api_client
        try:
            _, url, headers, *_ = api.param_serialize(
                "GET",
                f"/api/v1/namespaces/{self.namespace}/pods/{pod}/portforward",
                query_params=[("ports", str(port))],
                auth_settings=["BearerToken"],
            )
            socket: Any = create_websocket(api.configuration, get_websocket_url(url), headers)  # type: ignore[no-untyped-call]
            return PodStream(socket)
        except (*self._failures, WebSocketException) as e:
            raise TargetError(f"Port {port} of pod {pod} cannot be reached: {_words(e)}.") from e

    def _call(self, what: str, call: Callable[..., Any], *, none_at: int = 404, **arguments: Any) -> Object | None:
        """One request. None where the API answers with the status ``none_at``.

        Raises:
            TargetError: anything else that went wrong.
        """
        try:
            found = self._to_plain(call(**arguments, _request_timeout=_TIMEOUT_S))
        except self._failures as e:
            status = getattr(e, "status", None)
            if status == none_at:
                return None
            raise _refused(what, self.host, self.namespace, e, status) from e
        return dict(found)


def _load(kubernetes: Any, context: str | None) -> Any:
    """An API client from the kubeconfig, or from the pod that this runs in."""
    missing = kubernetes.config.config_exception.ConfigException
    try:
        return kubernetes.config.new_client_from_config(context=context)
    # Of a file that is no kubeconfig the client says so by whatever it stumbled over.
    except (missing, yaml.YAMLError, OSError, TypeError, ValueError) as e:
        if context is None and isinstance(e, missing):
            try:
                kubernetes.config.load_incluster_config()
                return kubernetes.client.ApiClient()
            except missing:
                pass
        raise EnvironmentUnusable(
            f"There is no usable kubeconfig: {' '.join(str(e).split()).rstrip('.')}.",
            next_step="Set KUBECONFIG, and check it with: kubectl get namespaces",
        ) from e


def _refused(what: str, host: str, namespace: str, error: BaseException, status: int | None) -> TargetError:
    if status == 403:
        return TargetError(
            f"Kubernetes does not let you {what} in namespace {namespace}: {_words(error)}.",
            next_step="Ask for the role headway-submitter there (k8s/base).",
        )
    if status == 404:
        return TargetError(
            f"Kubernetes cannot {what}: {_words(error)}.",
            next_step=f"Does namespace {namespace} exist, and is KubeRay installed? kubectl get crd rayjobs.ray.io",
        )
    if status in (None, 401):
        return TargetError(
            f"Kubernetes at {host} cannot be used ({_words(error)}).",
            next_step="Check the kubeconfig and the network: kubectl get namespaces",
        )
    return TargetError(f"Kubernetes refused to {what}: {_words(error)}.")


def _words(error: BaseException) -> str:
    """What the API said, in one sentence without a full stop."""
    try:
        body = getattr(error, "body", None) or getattr(error, "resp_body", None)  # of HTTP, and of a WebSocket's start
        message = json.loads(body or "{}").get("message")
    except (ValueError, AttributeError):
        message = None
    said = message or getattr(error, "reason", None) or error
    return str(said).strip().rstrip(".")
