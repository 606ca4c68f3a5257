import json
import re

import pytest

from orchestrator.errors import SpecError
from orchestrator.render.ray_service import application_name, ray_service, serve_application, service_name
from orchestrator.target_settings import TargetSettings

SETTINGS = {
    "apiVersion": "headway/v1",
    "kind": "kubernetes",
    "image": "registry.example.com/headway:0.1.0",
    "s3": {"endpoint_url": "http://s3.example.com", "region": "us-east-1"},
    "server": {"cpu": "2500m", "memory": "8Gi"},
    "serve_pool": "l4",
    "env": {"TRAINING": "1"},
    "secrets": ["hub"],
    "pools": {
        "l4": {
            "gpus_per_pod": 1,
            "max_pods": 3,
            "node_selector": {"kind": "l4"},
            "env": {"NCCL_SOCKET_IFNAME": "eth0"},
        }
    },
}


def rendered(*, settings=None, **change):
    request = {
        "model": "code-lm",
        "channel": "production",
        "store_uri": "s3://bucket/main",
        "replicas": 2,
        "version": "0.1.0",
        "route_prefix": "/code",
    }
    return ray_service(
        **{**request, **change}, settings=TargetSettings.model_validate({**SETTINGS, **(settings or {})})
    )


def cluster(request):
    return request.manifest["spec"]["rayClusterConfig"]


def worker_spec(request):
    return cluster(request)["workerGroupSpecs"][0]["template"]["spec"]


def environment(container):
    return {each["name"]: each.get("value") for each in container["env"]}


def test_serve_is_told_the_application_of_headway_serve_and_to_listen_on_every_pod():
    request = rendered()
    assert json.loads(request.manifest["spec"]["serveConfigV2"]) == {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "headway-code-lm",
                "route_prefix": "/code",
                "import_path": "workloads.serve.app:build",
                "args": {
                    "model": "code-lm",
                    "channel": "production",
                    "store": "s3://bucket/main",
                    "num_replicas": 2,
                    "headway": "0.1.0",
                    "num_cpus": 1,
                    "num_gpus": 1,
                    "num_threads": 2,
                },
            }
        ],
    }
    assert (request.name, request.application, request.replicas) == ("code-lm-production", "headway-code-lm", 2)


def test_a_cluster_of_a_head_that_serves_nothing_and_a_pod_for_each_replica():
    request = rendered()
    assert request.manifest["spec"]["excludeHeadPodFromServeSvc"] is True
    found = cluster(request)
    assert found["authOptions"] == {"mode": "token", "secretName": "headway-ray-token"}
    assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = found["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    assert group["rayStartParams"]["num-cpus"] == "1"


def test_kuberay_finds_the_port_by_which_it_makes_the_service():
    head = cluster(rendered())["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "serve", "containerPort": 8000} in head["ports"]
    assert {"name": "dashboard", "containerPort": 8265} in head["ports"]


def test_a_replicas_pod_has_the_servers_rights_and_nothing_of_training():
    spec = worker_spec(rendered())
    container = spec["containers"][0]
    assert spec["serviceAccountName"] == "headway-server"
    assert spec["automountServiceAccountToken"] is False
    assert spec["priorityClassName"] == "headway-serving"
    assert spec["nodeSelector"] == {"kind": "l4"}
    assert "initContainers" not in spec
    assert container["envFrom"] == [{"secretRef": {"name": "headway-s3-server"}}]
    assert container["resources"]["limits"] == {"cpu": "2500m", "memory": "8Gi", "nvidia.com/gpu": "1"}
    assert environment(container) == {
        "POD_NAME": None,
        "HEADWAY_STORE": "s3://bucket/main",
        "HEADWAY_CACHE": "/tmp/ray/headway",
        "AWS_ENDPOINT_URL": "http://s3.example.com",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NCCL_SOCKET_IFNAME": "eth0",
    }


def test_a_replicas_pod_is_ready_when_its_proxy_answers_and_asks_no_program_of_the_image_for_it():
    probe = worker_spec(rendered())["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/-/healthz", "port": 8000}


def test_pods_say_what_they_belong_to_and_wait_in_no_queue():
    request = rendered()
    for group in (cluster(request)["headGroupSpec"], cluster(request)["workerGroupSpecs"][0]):
        labels = group["template"]["metadata"]["labels"]
        assert labels["headway.dev/component"] == "server"
        assert labels["headway.dev/service"] == "code-lm-production"
    assert "kueue.x-k8s.io/queue-name" not in json.dumps(request.manifest)
    annotations = request.manifest["metadata"]["annotations"]
    assert (annotations["headway.dev/model"], annotations["headway.dev/channel"]) == ("code-lm", "production")


def test_only_the_number_of_pods_differs_between_numbers_of_replicas():
    """Else KubeRay would start a second cluster to change it."""
    one, two = rendered(replicas=1), rendered(replicas=2)
    for request in (one, two):
        group = cluster(request)["workerGroupSpecs"][0]
        for key in ("replicas", "minReplicas", "maxReplicas"):
            del group[key]
    assert cluster(one) == cluster(two)


def test_more_replicas_than_pods_are_refused():
    with pytest.raises(SpecError, match="--replicas 4 needs as many pods of pool l4; its max_pods is 3"):
        rendered(replicas=4)


def test_a_pod_of_less_than_one_cpu_still_has_a_thread():
    (application,) = json.loads(
        rendered(settings={"server": {"cpu": "500m", "memory": "2Gi"}}).manifest["spec"]["serveConfigV2"]
    )["applications"]
    assert application["args"]["num_threads"] == 1


@pytest.mark.parametrize(
    ("model", "channel"),
    [
        ("code-lm", "production"),
        ("7b", "production"),
        ("m7b", "production"),
        ("a", "b-c"),
        ("a-b", "c"),
        ("a", "1"),
        ("m" * 31, "c" * 31),
        ("m" * 31, "c" * 30 + "d"),
        ("m" * 30 + "n", "production"),
        ("a" * 15 + "-" + "b" * 15, "c" * 31),
    ],
)
def test_names_are_what_kuberay_takes(model, channel):
    name = service_name(model, channel)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert len(name) <= 47


def test_no_two_channels_share_a_name():
    pairs = [("a-b", "c"), ("a", "b-c"), ("7b", "x"), ("m7b", "x"), ("m" * 31, "c" * 31), ("m" * 31, "c" * 30 + "d")]
    assert len({service_name(*pair) for pair in pairs}) == len(pairs)
    assert service_name("code-lm", "production") == "code-lm-production"


def test_an_application_has_only_the_arguments_that_are_given():
    found = serve_application(model="m", channel="c", store_uri="s3://b/p", replicas=3, route_prefix="/")
    assert found["args"] == {"model": "m", "channel": "c", "store": "s3://b/p", "num_replicas": 3}


def test_an_application_is_named_by_model_and_channel():
    assert application_name("lm", "production") == "headway-lm"
    assert application_name("lm", "staging") == "headway-lm.staging"
    assert application_name("lm-staging", "production") == "headway-lm-staging"


def test_serving_pods_get_the_secrets_that_are_theirs():
    request = rendered(settings={"serve_secrets": ["api-keys"]})
    for group in (cluster(request)["headGroupSpec"], cluster(request)["workerGroupSpecs"][0]):
        (container,) = group["template"]["spec"]["containers"]
        names = [source["secretRef"]["name"] for source in container["envFrom"]]
        assert "api-keys" in names
        assert "hub" not in names


def test_more_arguments_of_the_application():
    request = rendered(arguments={"max_batch": 8, "num_threads": 2})
    (application,) = json.loads(request.manifest["spec"]["serveConfigV2"])["applications"]
    arguments = application["args"]
    assert (arguments["max_batch"], arguments["num_threads"], arguments["num_cpus"]) == (8, 2, 1)


@pytest.mark.parametrize("name", ["num_cpus", "num_gpus", "min_replicas", "max_replicas"])
def test_what_pods_decide_is_no_argument(name):
    with pytest.raises(SpecError, match=f"--set {name} is not for Kubernetes"):
        rendered(arguments={name: 1})


def test_vllm_is_refused_where_it_has_no_place():
    with pytest.raises(SpecError, match="engine=vllm is not for Kubernetes"):
        rendered(arguments={"engine": "vllm"})
